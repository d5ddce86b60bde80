"""`llmc rag query`: passages for a question, and with a model an answer that cites them."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..ir.errors import InputError
from .agent import visible
from .output import emit, json_option, note, notes_from_logging
from .progress import Progress
from .rag_options import MODES, embedder_option, kb_argument, one_line, open_kb, passage_json, place

if TYPE_CHECKING:
    from ..runtime.rag.answer import Answer
    from ..runtime.rag.knowledge import KnowledgeBase
    from ..runtime.rag.types import Passage

_SHOWN = 700  # characters of a passage on the screen
_WORD = re.compile(r"\w{3,}")
_LETTERS = 100_000  # of a question


@dataclass(frozen=True)
class _Asking:
    """How questions are answered."""

    kb: KnowledgeBase
    search: Mapping[str, Any]
    explain: bool
    answer: Callable[[str, Sequence[Passage] | None], Answer] | None
    iterative: bool


@click.command("query", short_help="Search, or answer a question.")
@kb_argument
@click.argument("question", required=False)
@click.option(
    "--questions",
    type=click.Path(path_type=Path),
    metavar="FILE.jsonl",
    help='Many questions: rows {"question": …, "id": …}.',
)
@click.option(
    "--model", type=click.Path(path_type=Path), metavar="ARTIFACT", help="Answers from what is found."
)
@click.option("--retrieve-only", is_flag=True, help="Passages, and no answer.  [default without --model]")
@click.option(
    "--top", type=click.IntRange(1, 1000), default=5, show_default=True, help="Passages a question."
)
@click.option(
    "--mode", type=click.Choice(MODES), default="auto", show_default=True, help="How passages are found."
)
@click.option(
    "--per-document",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Passages of one document among the first.",
)
@click.option("--explain", is_flag=True, help="Show what each score is made of.")
@click.option("--iterative", is_flag=True, help="With --model: it may ask further questions first.")
@click.option(
    "--max-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Of an answer."
)
@click.option("--short", is_flag=True, help="With --model: answers of a few words.")
@embedder_option
@click.option(
    "--reranker", metavar="SPEC", help="A cross-encoder, or a generative artifact, that ranks again."
)
@json_option
def query(
    kb: str,
    question: str | None,
    questions: Path | None,
    model: Path | None,
    retrieve_only: bool,
    top: int,
    mode: str,
    per_document: int,
    explain: bool,
    iterative: bool,
    max_tokens: int,
    short: bool,
    embedder: str,
    reranker: str | None,
    as_json: bool,
) -> None:
    """Find the passages of KB that answer QUESTION (- reads standard input), and with --model the answer.

    Modes: keyword (words alone), dense (vectors alone), hybrid (both), graph (entities, links and two steps
    besides), global (summaries, for questions about the whole), and auto, which is graph unless the question
    is about the whole. The answer cites passages as [n]; each citation was looked up in the text.

    --questions with --json prints {"results": [{"id", "question", "passages": [{"document", "title", "text",
    "score", "span", "page", "chunk"}]}]}.
    """
    notes_from_logging()
    asked = _questions(question, questions)
    if model is None and (iterative or short):
        raise click.UsageError(f"{'--iterative' if iterative else '--short'} needs --model")
    if retrieve_only and iterative:
        raise click.UsageError("--iterative answers, and --retrieve-only does not")
    with contextlib.ExitStack() as stack:
        opened = open_kb(stack, kb, embedder=embedder, reranker=reranker)
        search = {"top": top, "mode": mode, "per_document": per_document}
        answer = None
        if model is not None and not retrieve_only:
            options = {**search, "iterative": iterative, "max_tokens": max_tokens, "short": short}
            answer = _answerer(stack, opened, model, options)
        asking = _Asking(opened, search, explain, answer, iterative)
        if questions is not None:
            results = _many(asking, asked, as_json=as_json)
            if as_json:
                emit({"kb": opened.store.location, "mode": mode, "results": results}, as_json=True, text="")
            return
        result, text = _one(asking, asked[0][1])
        emit({"kb": opened.store.location, "mode": mode, **result}, as_json=as_json, text=text)


def _questions(question: str | None, questions: Path | None) -> list[tuple[Any, str]]:
    """(id, question) of each."""
    if questions is not None:
        if question is not None:
            raise click.UsageError("give QUESTION or --questions, not both")
        return list(_rows(questions))
    text = sys.stdin.read(_LETTERS + 1) if question == "-" else question
    if text is None or not text.strip():
        raise InputError(
            "no question was given", remedy="llmc rag query KB QUESTION, or --questions FILE.jsonl"
        )
    return [(None, _checked(text, "the question"))]


def _rows(path: Path) -> Iterator[tuple[Any, str]]:
    from ..runtime.rag.questions import read_rows

    count = 0
    for number, row in enumerate(read_rows(path), 1):
        where = f"{path}, row {number}"
        text = row.get("question") if isinstance(row, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{where} has no text in 'question'", remedy='a row is {"question": …, "id": …}')
        count = number
        yield row.get("id", row.get("_id", number)), _checked(text, where)
    if not count:
        raise InputError(f"{path} holds no question", remedy='a row is {"question": …, "id": …}')


def _checked(text: str, where: str) -> str:
    if len(text) > _LETTERS:
        raise InputError(f"{where} has more than {_LETTERS:,} characters", remedy="shorten it")
    return text.strip()


def _answerer(
    stack: contextlib.ExitStack, kb: KnowledgeBase, model: Path, options: Mapping[str, Any]
) -> Callable[[str, Sequence[Passage] | None], Answer]:
    from ..runtime.loader import load
    from ..runtime.rag.answer import answer

    llm = stack.enter_context(load(model, max_sequences=1))

    def ask(question: str, passages: Sequence[Passage] | None) -> Answer:
        return answer(kb, llm, question, passages=passages, **options)

    return ask


def _ask(asking: _Asking, question: str) -> tuple[list[Passage], Answer | None]:
    """Searched once where the answer needs no further search."""
    searches = asking.iterative or asking.search["mode"] == "global"
    if asking.answer is not None and searches:
        answer = asking.answer(question, None)
        return list(answer.passages), answer
    passages = asking.kb.search(question, explain=asking.explain, **asking.search)
    return passages, asking.answer(question, passages) if asking.answer is not None else None


def _many(asking: _Asking, asked: Sequence[tuple[Any, str]], *, as_json: bool) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    with Progress() as progress:
        for index, (id, question) in enumerate(asked):
            progress("asking", index / len(asked))
            passages, answer = _ask(asking, question)
            result: dict[str, Any] = {
                "id": id,
                "question": question,
                "passages": [passage_json(one, explain=asking.explain) for one in passages],
            }
            if answer is not None:
                result["answer"] = answer_json(answer)
            if as_json:
                results.append(result)
            else:
                click.echo(_brief(id, question, passages, answer))
    return results


def _brief(id: Any, question: str, passages: Sequence[Passage], answer: Answer | None) -> str:
    lines = [f"{visible(str(id))}  {one_line(question, 200)}"]
    if answer is not None:
        lines.append(f"  → {visible(answer.text)}")
    lines += [
        f"  [{number}] {one_line(passage.title or passage.text, 60)}  {place(passage)}"
        for number, passage in enumerate(passages, 1)
    ]
    return "\n".join(lines)


def _one(asking: _Asking, question: str) -> tuple[dict[str, Any], str]:
    began = time.perf_counter()
    passages, answer = _ask(asking, question)
    seconds = time.perf_counter() - began
    result: dict[str, Any] = {
        "question": question,
        "passages": [passage_json(one, explain=asking.explain) for one in passages],
        "seconds": round(seconds, 4),
    }
    shown = [
        passage_text(number, passage, question, asking.explain) for number, passage in _numbered(passages)
    ]
    if answer is None:
        note(f"[{len(passages)} passages, {seconds:.3f} s]")
        return result, "\n\n".join(shown) or "nothing was found"
    result["answer"] = answer_json(answer)
    for reason in answer.removed:
        note(f"a citation was removed: {visible(reason)}")
    note(
        f"[prompts {answer.prompt_tokens} tokens, answers {answer.generated_tokens} tokens, {seconds:.1f} s]"
    )
    return result, _answer_text(answer, question)


def _numbered(passages: Sequence[Passage]) -> list[tuple[int, Passage]]:
    return list(enumerate(passages, 1))


def answer_json(answer: Answer) -> dict[str, Any]:
    """An answer as values of JSON."""
    return {
        "text": answer.text,
        "found": answer.found,
        "supported": answer.supported,
        "citations": [
            {
                "number": one.number,
                "document": one.passage.document,
                "title": one.passage.title,
                "chunk": one.passage.chunk,
                "page": one.passage.page,
                "span": [one.start, one.end],
                "quote": one.quote,
            }
            for one in answer.citations
        ],
        "removed": list(answer.removed),
        "steps": [{"question": step.question, "chunks": list(step.chunks)} for step in answer.steps],
        "prompt_tokens": answer.prompt_tokens,
        "generated_tokens": answer.generated_tokens,
        "finish_reason": answer.finish_reason,
    }


# For a person ----------------------------------------------------------------------------------------------


def _answer_text(answer: Answer, question: str) -> str:
    parts = [visible(answer.text)]
    cited = sorted({one.number for one in answer.citations})
    if cited:
        lines = ["Sources"]
        for number in cited:
            passage = answer.passages[number - 1]
            lines.append(f"[{number}] {_bold(visible(passage.title or passage.document))}  {place(passage)}")
            quotes = dict.fromkeys(one.quote for one in answer.citations if one.number == number)
            lines += [f"    “{one_line(quote, 300)}”" for quote in quotes]
        parts.append("\n".join(lines))
    elif answer.found:
        parts.append("No source of it was found among the passages: do not rely on it.")
    if len(answer.steps) > 1:
        asked = [f"  {one_line(step.question, 200)}" for step in answer.steps[1:]]
        parts.append("\n".join(["It also asked", *asked]))
    if not cited and answer.passages:
        seen = [
            f"[{number}] {one_line(passage.title or passage.text, 60)}  {place(passage)}"
            for number, passage in _numbered(answer.passages)
        ]
        parts.append("\n".join(["Passages that it read", *seen]))
    return "\n\n".join(parts)


def passage_text(number: int, passage: Passage, question: str, explain: bool) -> str:
    """A passage for a person: title, place, score, and the text with the question's words marked."""
    heading = f" – {visible(passage.heading)}" if passage.heading and passage.heading != passage.title else ""
    title = visible(passage.title or passage.document)
    lines = [f"[{number}] {_bold(title)}{heading}  {place(passage)}  {passage.score:.3f}"]
    if explain:
        parts = sorted(passage.scores.items(), key=lambda item: -abs(item[1]))
        lines.append("    " + "  ".join(f"{name} {score:.3f}" for name, score in parts))
    lines.append(_indented(_marked(visible(passage.text, _SHOWN), question)))
    return "\n".join(lines)


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines() if line.strip())


def _bold(text: str) -> str:
    return click.style(text, bold=True) if sys.stdout.isatty() else text


def _marked(text: str, question: str) -> str:
    """The question's words in colour, where that is seen."""
    words = {word.casefold() for word in _WORD.findall(question[:2000])}
    if not words or not sys.stdout.isatty():
        return text

    def mark(match: re.Match[str]) -> str:
        word = match[0]
        return click.style(word, fg="yellow", bold=True) if word.casefold() in words else word

    return _WORD.sub(mark, text)
