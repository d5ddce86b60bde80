"""JSON of documents, passages and the graph, and where the words of a question stand in a text."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from ..rag.features.terms import stem, words_of
from ..rag.types import Chunk, Document, Passage

_RUN = re.compile(r"[^\W_]+(?:['’ʼ][^\W_]+)*")
_MOST_MATCHES = 500
_SHORT = (
    "a", "about", "an", "and", "are", "as", "at", "be", "been", "but", "by", "can", "did", "do", "does",
    "for", "from", "had", "has", "have", "he", "her", "his", "how", "i", "if", "in", "into", "is", "it",
    "its", "of", "on", "or", "she", "so", "than", "that", "the", "their", "them", "then", "there",
    "these", "they", "this", "to", "was", "we", "were", "what", "when", "where", "which", "who", "whom",
    "whose", "why", "will", "with", "would", "you", "your",
)  # fmt: skip
"""Words that stand everywhere: to mark them would only hide the others."""


def document_entry(document: Document) -> dict[str, Any]:
    """A document without its text."""
    return {
        "id": document.id,
        "object": "rag.document",
        "path": document.path,
        "title": document.title,
        "media_type": document.media_type,
        "bytes": document.size,
        "modified": max(0, document.modified_ns) // 10**9 or None,
    }


def chunk_entry(chunk: Chunk) -> dict[str, Any]:
    """A part of a document's text; `span` is in characters (code points) of the whole text."""
    return {
        "id": chunk.id,
        "ordinal": chunk.ordinal,
        "heading": chunk.heading,
        "page": chunk.page,
        "span": [chunk.start, chunk.end],
        "text": chunk.text,
    }


def passage_entry(passage: Passage, question: str, *, explain: bool = False) -> dict[str, Any]:
    """A result of a search. `matches` are spans of `text` in which words of the question stand."""
    entry: dict[str, Any] = {
        "chunk": passage.chunk,
        "document": passage.document,
        "title": passage.title,
        "heading": passage.heading,
        "page": passage.page,
        "span": [passage.start, passage.end],
        "text": passage.text,
        "score": finite(passage.score),
        "matches": matches(question, passage.text),
    }
    if explain:
        entry["scores"] = {name: finite(score) for name, score in passage.scores.items()}
    return entry


def finite(number: Any) -> float | None:
    """JSON has neither infinity nor NaN."""
    return float(number) if math.isfinite(number) else None


def plain(value: Any) -> Any:
    """A value of statistics as JSON: numbers of numpy become Python's, what is not JSON its text."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Mapping):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(one) for one in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, int):
        return value
    return finite(value) if isinstance(value, float) else str(value)


def matches(question: str, text: str) -> list[list[int]]:
    """[start, end] of the words of `text` that are words of the question, apart from their endings.

    For the eye alone: what is found is decided elsewhere.
    """
    wanted = {stem(word) for word in words_of(question)} - {stem(word) for word in _SHORT}
    found: list[list[int]] = []
    if not wanted:
        return found
    for run in _RUN.finditer(text):
        words = words_of(run.group())
        if len(words) == 1 and stem(words[0]) in wanted:
            found.append([run.start(), run.end()])
        elif len(words) == len(run.group()) - 1:  # a script without spaces: its words are pairs of characters
            starts = (run.start() + at for at, word in enumerate(words) if word in wanted)
            for start in starts:
                if found and found[-1][1] > start:
                    found[-1][1] = start + 2
                else:
                    found.append([start, start + 2])
        if len(found) >= _MOST_MATCHES:
            break
    return found
