"""Answers about the whole: each of the best communities is read by itself, and what was said is put together.

communities ranked → for each: a note of the model on its passages → an answer from the notes
"""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .answer import (
    Answer,
    AnswerEvent,
    Counts,
    Said,
    Searched,
    Step,
    finished,
    is_refusal,
    not_found,
    sampling,
)
from .citations import check
from .communities import Communities, Summary, communities_of, is_about_the_whole, summarise
from .extract import model_digest
from .neutral import neutralise
from .notes import Notes
from .prompts import make_prompt
from .types import Passage

if TYPE_CHECKING:
    from ..llm import LLM
    from ..sampling_params import SamplingParams
    from .snapshot import Snapshot

COMMUNITIES = 6
SENTENCES = 4
_NOTE_TOKENS = 96
_FOUND = 40
_MAP = "Write in one or two sentences what these documents say that helps to answer the question. Copy names."
_REDUCE = (
    "The documents are notes on parts of a collection. Answer the question from them in a few sentences."
)


def global_summaries(kb: Any, question: str, *, count: int = COMMUNITIES) -> list[Summary]:
    """Extractive summaries of the communities that a question is about, best first; no model is needed."""
    snapshot: Snapshot = kb.retriever.snapshot()
    communities: Communities = communities_of(kb.store, snapshot)
    whole = is_about_the_whole(question)
    found = [] if whole else [p.chunk for p in kb.search(question, top=_FOUND, mode="hybrid", per_document=3)]
    ranked = communities.rank(found, whole)[:count]
    asked = "" if whole else question
    with kb.store.reading() as reader:
        behind = reader.generation != snapshot.generation
        made = [
            summarise(communities, one, reader, count=SENTENCES, question=asked, behind=behind)
            for one in ranked
        ]
    return [summary for summary in made if summary.sentences]


def global_passages(kb: Any, question: str, *, top: int = 5) -> list[Passage]:
    """The sentences of the summaries as passages: the first of each community, then the second, …"""
    summaries = global_summaries(kb, question, count=max(COMMUNITIES, top))
    rows = [summary.sentences for summary in summaries]
    found = [row[place] for place in range(SENTENCES) for row in rows if place < len(row)]
    return found[:top]


def stream_global(
    kb: Any, llm: LLM, question: str, *, max_tokens: int, room: int, count: int = COMMUNITIES
) -> Generator[AnswerEvent, None, None]:
    """See `stream_answer`, mode "global"."""
    summaries = global_summaries(kb, question, count=count)
    passages = tuple(passage for summary in summaries for passage in summary.sentences)
    counts = Counts()
    counts.steps.append(Step(question, tuple(dict.fromkeys(p.chunk for p in passages))))
    yield Searched(question, passages)
    if not passages:
        yield not_found((), 0, 0, tuple(counts.steps))
        return
    asked = neutralise(question, llm.tokenizer)
    kept = Notes(kb.store.cache_folder)
    made = [_note(kb, llm, summary, asked, room, counts, kept) for summary in summaries]
    notes = [note for note in made if note is not None]
    if not notes:
        yield not_found(passages, counts.prompt, counts.generated, tuple(counts.steps))
        return
    prompt = make_prompt(llm, notes, f"Question: {asked}\n{_REDUCE}", room=room)
    counts.prompt += len(prompt.ids)
    text, reason = "", None
    with closing(llm.stream(prompt.ids, sampling(llm, max_tokens))) as stream:
        for output in stream:
            text += output.text
            counts.generated += len(output.token_ids)
            reason = output.finish_reason or reason
            if output.text:
                yield Said(output.text)
    yield _told(text, notes, passages, question, counts, reason)


def _note(
    kb: Any, llm: LLM, summary: Summary, asked: str, room: int, counts: Counts, kept: Notes
) -> Passage | None:
    """What the model says about one community, to be read like a passage; None where it has no source."""
    named = neutralise(", ".join(summary.entities), llm.tokenizer)
    about = f"Subjects: {named}\n" if named else ""
    prompt = make_prompt(llm, summary.sentences, f"{about}Question: {asked}\n{_MAP}", room=room)
    params: SamplingParams = sampling(llm, _NOTE_TOKENS)
    model = _model(llm, params)
    text = kept.get(model, prompt.ids) if model else None
    if text is None:
        done = llm.generate(prompt.ids, params)
        counts.prompt += len(prompt.ids)
        counts.generated += done.generated_tokens
        text = done.text
        if model:
            kept.put(model, prompt.ids, summary.members, text)
            kept.forget(kb.store)  # a member may have gone while the model read
    if is_refusal(text) or not check(text, prompt.passages, asked).supported:
        return None
    first = summary.sentences[0]
    return Passage(
        first.chunk,
        first.document,
        ", ".join(summary.entities[:3]),
        "",
        text,
        0,
        len(text),
        None,
        0.0,
    )


def _model(llm: LLM, params: SamplingParams) -> str:
    """What a model's notes are kept under: the model, its adapter, and how it is decoded (a server's sampler,
    what an artifact prefers). Empty for one that cannot be told from others.
    """
    if llm.artifact is None:
        return ""
    return f"{model_digest(llm, params.adapter)} {replace(params, adapter=None)}"


def _told(
    text: str,
    notes: Sequence[Passage],
    passages: tuple[Passage, ...],
    question: str,
    counts: Counts,
    reason: str | None,
) -> Answer:
    """The answer with citations of passages: numbers that the model gave are of notes, and taken out."""
    bare = re.sub(r" ?(?:\[\d+\])+", "", check(text, notes, question).text)
    return finished(bare, passages, question, counts, reason)
