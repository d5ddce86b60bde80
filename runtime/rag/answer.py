"""Answers from documents, with citations that were checked.

    found = answer(kb, llm, "Who wrote the manual?")
    found.text        "Ada Lovelace wrote it [1]."
    found.citations   number 1: the passage, and the characters of its document that say so
    found.found       False where the documents do not hold the answer; the text then says that
    found.supported   whether every statement has a source, and the passages hold what the question names

The model sees the passages as quoted data (`prompts.py`, `neutral.py`) and may say that they do not hold the
answer; what it cites is looked up (`citations.py`). With `iterative` it first asks for what it misses: each
further question is searched too, and the passages are joined.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from ...ir.errors import InputError
from .citations import Checked, Citation, check, words
from .neutral import neutralise
from .prompts import NOT_THERE, RULES, make_prompt
from .types import Passage

if TYPE_CHECKING:
    from ..llm import LLM

__all__ = ["Answer", "AnswerEvent", "Citation", "Said", "Searched", "Step", "answer", "stream_answer"]

NOT_FOUND = "The documents do not hold the answer."
MAX_QUESTION = 100_000
MAX_STEPS = 8
MAX_TOP = 100

_REFUSAL = re.compile(
    r"\b(?:not (?:in|found in|mentioned|provided|stated|specified|given|contained|available|present)\b"
    r"|(?:do|does|did) not (?:\w+ ){0,3}"
    r"(?:contain|hold|provide|mention|specify|state|include|give|say|have|answer)\b"
    r"|no (?:\w+ ){0,2}(?:information|mention|answer|document)\b"
    r"|(?:can ?not|can't|unable to) (?:be )?(?:answer|determine|find|say|tell)|\bunknown\b)",
    re.IGNORECASE,
)
_REFUSAL_LETTERS = 200
"""A longer text that says that something is missing says something else too."""

_PLAIN = f"{RULES} {NOT_THERE}"
_CITING = f"{RULES} Write behind each statement the number of its document, as in [1]. {NOT_THERE}"
_CITES = 1.2e9
"""Parameters of a model that is asked to cite. A smaller one loses the answer over writing numbers: sources
of what it says are looked up only.
"""
_ASK, _ASK_SHORT = "Answer in one or two sentences.", "Answer with a few words only."


class Searching(Protocol):
    """What is needed of `KnowledgeBase`."""

    def search(
        self, question: str, *, top: int = 5, mode: str = "auto", per_document: int = 1
    ) -> list[Passage]: ...


@dataclass(frozen=True)
class Step:
    """A question that was searched, and the chunks that were new in what it found."""

    question: str
    chunks: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """An answer; `passages` are what the model saw, and citation n is of the n-th of them.

    `removed` are the model's citations that were invented or wrong, each with the reason.
    """

    text: str
    citations: tuple[Citation, ...] = ()
    passages: tuple[Passage, ...] = ()
    found: bool = True
    supported: bool = False
    steps: tuple[Step, ...] = ()
    removed: tuple[str, ...] = ()
    prompt_tokens: int = 0
    generated_tokens: int = 0
    finish_reason: str | None = None


@dataclass(frozen=True)
class Searched:
    """A search is done; `passages` are all that there are so far, best first."""

    question: str
    passages: tuple[Passage, ...]


@dataclass(frozen=True)
class Said:
    """A piece of the model's text as it comes: not checked yet, the `Answer` at the end is."""

    text: str


AnswerEvent = Searched | Said | Answer


@dataclass
class Counts:
    """Tokens and steps so far."""

    prompt: int = 0
    generated: int = 0
    steps: list[Step] = field(default_factory=list[Step])


def answer(kb: Searching, llm: LLM, question: str, **options: Any) -> Answer:
    """Answer a question from documents; `options` are those of `stream_answer`."""
    found: Answer | None = None
    for event in stream_answer(kb, llm, question, **options):
        found = event if isinstance(event, Answer) else found
    assert found is not None, "the last event is the answer"
    return found


def stream_answer(
    kb: Searching,
    llm: LLM,
    question: str,
    *,
    top: int = 5,
    mode: str = "auto",
    per_document: int = 1,
    iterative: bool = False,
    max_steps: int = 3,
    short: bool = False,
    max_tokens: int = 256,
    context: int = 4096,
    passages: Sequence[Passage] | None = None,
) -> Generator[AnswerEvent, None, None]:
    """What happens on the way to an answer; the `Answer` comes last. Closing the iterator stops the model.

    Args:
        kb: where to search.
        llm: a loaded generative artifact.
        question: never cut; too long a one is refused.
        top: passages to read.
        mode: see `KnowledgeBase.search`; "global" answers from summaries of communities, and so does "auto" a
            question about the whole.
        per_document: passages of one document at most.
        iterative: let the model ask up to `max_steps` further questions first.
        short: a few words instead of sentences, as benchmarks want them.
        max_tokens: of the answer.
        context: tokens of prompt and answer together, within the model's own context.
        passages: read these; nothing is searched.

    Raises InputError for an unusable question or option, before anything is searched.
    """
    question = checked_question(question)
    room = _checked_room(llm, top, max_steps, max_tokens, context)
    counts = Counts()
    if passages is None and _is_global(kb, question, mode):
        from .global_answer import stream_global

        return stream_global(kb, llm, question, max_tokens=max_tokens, room=room)
    return _events(
        kb,
        llm,
        question,
        counts,
        given=passages,
        search={"top": top, "mode": mode, "per_document": per_document},
        steps=max_steps if iterative and passages is None else 0,
        short=short,
        max_tokens=max_tokens,
        room=room,
    )


def _is_global(kb: Searching, question: str, mode: str) -> bool:
    if mode == "global":
        return True
    from .communities import is_about_the_whole

    return mode == "auto" and is_about_the_whole(question)


def checked_question(question: str) -> str:
    """The question without spaces around it. Raises InputError for none, or one that is no question."""
    question = question.strip()
    if not question:
        raise InputError("the question is empty", remedy="ask something")
    if len(question) > MAX_QUESTION:
        raise InputError(
            f"the question has {len(question)} characters", remedy=f"ask in at most {MAX_QUESTION}"
        )
    return question


def _checked_room(llm: LLM, top: int, max_steps: int, max_tokens: int, context: int) -> int:
    """Tokens that a prompt may have."""
    for name, value, most in (("top", top, MAX_TOP), ("max_steps", max_steps, MAX_STEPS)):
        if not 1 <= value <= most:
            raise InputError(f"{name} is {value}", remedy=f"allowed: 1 to {most}")
    if max_tokens < 1:
        raise InputError(f"max_tokens is {max_tokens}", remedy="allowed: a whole number from 1")
    whole = min(context, llm.context_length)
    if max_tokens >= whole:
        raise InputError(
            f"an answer of {max_tokens} tokens leaves no room for documents in a context of {whole}",
            remedy="lower max_tokens, or raise the context",
        )
    return whole - max_tokens


def _events(
    kb: Searching,
    llm: LLM,
    question: str,
    counts: Counts,
    *,
    given: Sequence[Passage] | None,
    search: dict[str, Any],
    steps: int,
    short: bool,
    max_tokens: int,
    room: int,
) -> Generator[AnswerEvent, None, None]:
    passages = list(given) if given is not None else kb.search(question, **search)
    counts.steps.append(Step(question, tuple(p.chunk for p in passages)))
    yield Searched(question, tuple(passages))
    for _ in range(steps):
        further = _further_question(llm, question, passages, counts, room)
        if further is None:
            break
        known = {p.chunk for p in passages}
        fresh = [p for p in kb.search(further, **search) if p.chunk not in known]
        counts.steps.append(Step(further, tuple(p.chunk for p in fresh)))
        passages = _joined(passages, fresh, most=2 * search["top"])
        yield Searched(further, tuple(passages))
        if not fresh:
            break
    evidence = evidence_of(question, passages)
    if evidence.is_none or not passages:
        yield not_found(passages, counts.prompt, counts.generated, tuple(counts.steps))
        return
    asked = neutralise(question, llm.tokenizer)
    task = f"Question: {asked}\n{_ASK_SHORT if short else _ASK}"
    if evidence.is_weak:
        task = f"{task} {NOT_THERE}"
    prompt = make_prompt(llm, passages, task, room=room, rules=_rules(llm, short))
    counts.prompt += len(prompt.ids)
    text, reason = "", None
    with closing(llm.stream(prompt.ids, sampling(llm, max_tokens))) as stream:
        for output in stream:
            text += output.text
            counts.generated = counts.generated + len(output.token_ids)
            reason = output.finish_reason or reason
            if output.text:
                yield Said(output.text)
    made = finished(text, prompt.passages, question, counts, reason)
    yield replace(made, supported=made.supported and not evidence.is_weak)


def _rules(llm: LLM, short: bool) -> str:
    size = _parameters(llm)
    return _PLAIN if short or (size is not None and size < _CITES) else _CITING


def _parameters(llm: LLM) -> float | None:
    """About how many a model has, by its weights' size; None where its artifact does not say."""
    manifest = llm.artifact.manifest if llm.artifact is not None else {}
    stored = manifest.get("quantization")
    if not isinstance(stored, Mapping):
        return None
    size, bits = stored.get("weight_bytes"), stored.get("bits_per_weight")
    return 8 * size / bits if isinstance(size, int) and isinstance(bits, int | float) and bits > 0 else None


def sampling(llm: LLM, max_tokens: int, **options: Any) -> Any:
    """Greedy: the same documents and question give the same answer."""
    return llm.sampling(temperature=0.0, max_tokens=max_tokens, **options)


def finished(
    text: str, passages: tuple[Passage, ...], question: str, counts: Counts, reason: str | None
) -> Answer:
    """The answer that a model's text comes to."""
    steps = tuple(counts.steps)
    if is_refusal(text):
        return not_found(passages, counts.prompt, counts.generated, steps, reason)
    checked: Checked = check(harmless(text), passages, question)
    return Answer(
        checked.text,
        checked.citations,
        passages,
        True,
        0 < checked.claims == checked.supported,
        steps,
        checked.removed,
        counts.prompt,
        counts.generated,
        reason,
    )


def not_found(
    passages: Sequence[Passage],
    prompt_tokens: int,
    generated_tokens: int,
    steps: tuple[Step, ...],
    reason: str | None = None,
) -> Answer:
    """The answer where there is none."""
    return Answer(
        NOT_FOUND,
        passages=tuple(passages),
        found=False,
        steps=steps,
        prompt_tokens=prompt_tokens,
        generated_tokens=generated_tokens,
        finish_reason=reason,
    )


def is_refusal(text: str) -> bool:
    """Whether a model's text says that the documents do not hold the answer, or says nothing."""
    text = text.strip()
    return not text or (len(text) <= _REFUSAL_LETTERS and _REFUSAL.search(text) is not None)


def harmless(text: str) -> str:
    """A model's text without pictures that a reader's program would load from an address."""
    return re.sub(r"!(?=\[)", "! ", text).strip()


# Evidence --------------------------------------------------------------------------------------------------

_NONE, _WEAK_NAMES, _WEAK_WORDS = 0.25, 0.8, 0.6
_PAIRED = 10


@dataclass(frozen=True)
class Evidence:
    """How much of a question stands in passages: the share of its words in all of them (`everywhere`; names
    and numbers weigh double) and in the two that hold most (`words`), and of its names and numbers alone
    (`names_everywhere`, `names`; None for a question that has none).
    """

    everywhere: float
    words: float
    names_everywhere: float | None
    names: float | None

    @property
    def is_none(self) -> bool:
        """The passages are about something else: no name of the question stands in them, and hardly a word.
        Of a question without names words say too little, for an answer may choose others.
        """
        return self.names_everywhere == 0 and self.everywhere < _NONE

    @property
    def is_weak(self) -> bool:
        """The passages may well lack the answer: the model is told once more, behind the question, that it
        may say so. A small model that is always told so there says nearly always that it is not there.
        """
        return self.words < _WEAK_WORDS or (self.names is not None and self.names < _WEAK_NAMES)


def evidence_of(question: str, passages: Sequence[Passage]) -> Evidence:
    """Whether passages can hold an answer, by rules. A question without words of its own counts as held."""
    asked = words(question)
    weights = {word.term: word.weight for word in asked}
    names = {word.term: 1.0 for word in asked if word.weight > 1}
    held = [{word.term for word in words(f"{p.title}\n{p.heading}\n{p.text}")} for p in passages]
    pairs = [one | other for place, one in enumerate(held[:_PAIRED]) for other in held[place:_PAIRED]]
    together = set[int]().union(*held)
    return Evidence(
        _cover(weights, together),
        max((_cover(weights, pair) for pair in pairs), default=0.0),
        _cover(names, together) if names else None,
        max((_cover(names, pair) for pair in pairs), default=0.0) if names else None,
    )


def _cover(weights: Mapping[int, float], held: set[int]) -> float:
    whole = sum(weights.values())
    return sum(weight for term, weight in weights.items() if term in held) / whole if whole else 1.0


# Further questions -----------------------------------------------------------------------------------------

_MAX_ASKED = 200
_NEXT_SCHEMA = {
    "type": "object",
    "properties": {
        "missing": {"type": "boolean"},
        "search": {"type": "string", "maxLength": _MAX_ASKED},
    },
    "required": ["missing", "search"],
    "additionalProperties": False,
}
_NEXT = (
    "To answer it, something else may have to be looked up first. Write JSON: in missing whether a fact is "
    "not in the documents, in search a short question about a name in them that would find it. Not again: "
)
_NEXT_TOKENS = 96


def _further_question(
    llm: LLM, question: str, passages: Sequence[Passage], counts: Counts, room: int
) -> str | None:
    """What the model wants to look up; None where it misses nothing, or asks what was asked already."""
    asked = "; ".join(f'"{neutralise(step.question, llm.tokenizer)[:_MAX_ASKED]}"' for step in counts.steps)
    task = f"Question: {neutralise(question, llm.tokenizer)}\n{_NEXT}{asked}."
    prompt = make_prompt(llm, passages, task, room=room)
    grammar = llm.grammars.json_schema(_NEXT_SCHEMA)
    done = llm.generate(prompt.ids, sampling(llm, _NEXT_TOKENS, grammar=grammar))
    counts.prompt += len(prompt.ids)
    counts.generated += done.generated_tokens
    try:
        said = json.loads(done.text)
        wanted = " ".join(str(said["search"]).split())
    except (ValueError, KeyError, TypeError):
        return None  # cut off by the limit of tokens
    earlier = {_plain(step.question) for step in counts.steps}
    if not said["missing"] or not words(wanted) or _plain(wanted) in earlier:
        return None
    return wanted


def _plain(text: str) -> tuple[int, ...]:
    return tuple(sorted({word.term for word in words(text)}))


def _joined(first: Sequence[Passage], second: Sequence[Passage], *, most: int) -> list[Passage]:
    """The passages of two searches: the best of the new ones stand behind the best of the old ones, so that a
    prompt that is cut loses the least of each.
    """
    joined: list[Passage] = []
    for place in range(max(len(first), len(second))):
        joined += [part[place] for part in (first, second) if place < len(part)]
    return joined[:most]
