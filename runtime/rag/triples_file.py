"""Relations from a file, made by whatever made them, put on the chunks that say them.

    {"chunk": "0a1b…"} or {"document": "notes/a.md"} or {"title": "A"}, with "triples": [["A", "wrote", "B"]],
    one object a line; or what OpenIE pipelines such as HippoRAG's write:
    {"docs": [{"title": "A", "passage": "…", "extracted_triples": [["A", "wrote", "B"]]}, …]}

A title that several documents have means the one whose text the triples fit best. Rows that fit no document
are reported.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...ir.errors import InputError
from .features.terms import fold
from .occurrence import Words, count_of
from .types import Chunk, Triple

if TYPE_CHECKING:
    from .store.base import Store, StoreReader

MAX_BYTES = 1 << 30
MAX_LINE = 16 << 20
MAX_LETTERS = 300
MAX_ROW_TRIPLES = 10_000
_CANDIDATES = 50
"""Documents of one title that are looked at."""

_FORM = 'a row is {"document": …, "triples": [["subject", "relation", "object"], …]}'


@dataclass(frozen=True)
class Row:
    """What a file says about one document; empty fields were not given. `where` names the place in it."""

    where: str
    triples: tuple[tuple[str, str, str], ...]
    chunk: str = ""
    document: str = ""
    title: str = ""
    text: str = ""
    skipped: int = 0
    """Triples that were not three texts, or empty."""


@dataclass
class ImportReport:
    """What became of a file. `unmatched` says of each row that fits no document, which and why."""

    rows: int = 0
    chunks: int = 0
    triples: int = 0
    skipped: int = 0
    unmatched: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])


def import_triples(store: Store, path: Path) -> ImportReport:
    """Put a file's triples into a store; those that the file gave before are replaced."""
    report = ImportReport()
    origin = f"file:{path.name}"
    placed: dict[str, dict[tuple[str, str, str], Triple]] = defaultdict(dict)
    with store.writing():  # nothing is deleted between finding a chunk and writing to it
        finder = _Finder(store)
        for row in load_triples(path):
            report.rows += 1
            report.skipped += row.skipped
            chunks, reason = finder.chunks(row)
            if not chunks:
                report.unmatched.append((row.where, reason))
                continue
            for triple in row.triples:
                chunk = _best(triple, chunks)
                placed[chunk].setdefault(triple, Triple(chunk, *triple, origin))
        for chunk in sorted(placed):
            store.put_triples(chunk, list(placed[chunk].values()))
    report.chunks = len(placed)
    report.triples = sum(map(len, placed.values()))
    return report


# Reading ---------------------------------------------------------------------------------------------------


def load_triples(path: Path) -> Iterator[Row]:
    """The rows of a file. Raises InputError, naming file and row, for what is no such file."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise InputError(f"{path} has {size} bytes", remedy=f"split it; at most {MAX_BYTES} are read")
        whole = _whole(path)
        if whole is not None:
            for number, raw in enumerate(whole):
                yield _row(raw, f"docs[{number}]", path)
            return
        with path.open(encoding="utf-8", errors="strict") as lines:
            for number, text in enumerate(iter(lambda: lines.readline(MAX_LINE), ""), 1):
                if text.strip():
                    yield _row(_parsed(text, f"line {number}", path), f"line {number}", path)
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror or error})", remedy="give a file of triples"
        ) from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8", remedy="give it as UTF-8") from None


def _whole(path: Path) -> list[Any] | None:
    """The rows of a file that is one JSON value: an array, or an object with "docs"; None for JSON lines."""
    with path.open("rb") as file:
        head = file.read(1 << 16)
    first_line = head.lstrip().split(b"\n", 1)[0].strip()
    if not first_line and len(head) < 1 << 16:
        return []
    try:
        value = json.loads(first_line)
        if isinstance(value, dict) and "docs" not in value:
            return None
    except (ValueError, RecursionError):
        pass  # the first line is a part of something longer
    value = _parsed(path.read_text("utf-8"), "the file", path)
    rows = value.get("docs") if isinstance(value, dict) else value
    if isinstance(value, dict) and rows is None:
        return [value]
    if not isinstance(rows, list):
        raise InputError(f"{path} holds no rows of triples", remedy=_FORM)
    return list(rows)


def _parsed(text: str, where: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        what = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise InputError(f"{path}, {where}: no JSON ({what})", remedy=_FORM) from None


def _row(raw: Any, where: str, path: Path) -> Row:
    if not isinstance(raw, Mapping):
        raise InputError(f"{path}, {where} is no object", remedy=_FORM)
    triples = raw.get("triples", raw.get("extracted_triples"))
    if not isinstance(triples, list) or len(triples) > MAX_ROW_TRIPLES:
        raise InputError(f"{path}, {where}: triples is no list (of at most {MAX_ROW_TRIPLES})", remedy=_FORM)
    names = {key: _text(raw.get(key)) for key in ("chunk", "document", "title")}
    text = _text(raw.get("text", raw.get("passage")))
    if not any((*names.values(), text)):
        raise InputError(
            f"{path}, {where} names no document", remedy='give "document", "chunk" or "title" with it'
        )
    kept = [triple for one in triples if (triple := _triple(one)) is not None]
    return Row(where, tuple(kept), text=text, skipped=len(triples) - len(kept), **names)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _triple(raw: Any) -> tuple[str, str, str] | None:
    if not isinstance(raw, list) or len(raw) != 3 or not all(isinstance(part, str) for part in raw):
        return None
    subject, predicate, object_ = (" ".join(part.split())[:MAX_LETTERS] for part in raw)
    return (subject, predicate, object_) if subject and predicate and object_ else None


# Finding the chunk -----------------------------------------------------------------------------------------


class _Finder:
    """Finds the chunks that a row is about."""

    def __init__(self, reader: StoreReader) -> None:
        self._reader = reader
        self._titles: dict[str, list[str]] = defaultdict(list)
        self._known: set[str] = set()
        for document in reader.documents():
            self._known.add(document.id)
            if document.title:
                self._titles[_plain(document.title)].append(document.id)

    def chunks(self, row: Row) -> tuple[list[tuple[str, Words]], str]:
        """([(chunk id, its words)], or why there are none)"""
        if row.chunk:
            found = list(self._reader.chunks([row.chunk]))
            return _with_words(found), "no chunk has this id"
        documents = [row.document] if row.document in self._known else []
        if not documents:
            documents = self._titles.get(_plain(row.title or row.document), [])
        if not documents:
            return [], f"no document is {(row.document or row.title or 'of this text')[:80]!r}"
        found = [_with_words(list(self._reader.chunks(document=one))) for one in documents[:_CANDIDATES]]
        return max(found, key=lambda chunks: _fit(row, chunks)), "the document has no text"


def _with_words(chunks: Sequence[Chunk]) -> list[tuple[str, Words]]:
    return [(chunk.id, Words(f"{chunk.title}\n{chunk.heading}\n{chunk.text}")) for chunk in chunks]


def _plain(title: str) -> str:
    return " ".join(fold(title).split())


def _fit(row: Row, chunks: Sequence[tuple[str, Words]]) -> float:
    """How much of a row's names, or of its text, a document holds."""
    names = [row.text] if row.text else [part for triple in row.triples for part in (triple[0], triple[2])]
    if not names or not chunks:
        return -math.inf if not chunks else 0.0
    return math.fsum(max(count_of(name, words) for _, words in chunks) for name in names) / len(names)


def _best(triple: tuple[str, str, str], chunks: Sequence[tuple[str, Words]]) -> str:
    """The chunk that holds most of a triple's subject and object; the first of equals."""
    scores = [count_of(triple[0], words) + count_of(triple[2], words) for _, words in chunks]
    return chunks[scores.index(max(scores))][0]
