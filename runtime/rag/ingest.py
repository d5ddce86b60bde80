"""Writing documents into a store: only what has changed, a batch at a time.

A batch is read, split, embedded together and committed in one transaction, so that a process killed at any
moment loses one batch, and the next run goes on where this one ended.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from ...ir.errors import LlmcError
from .chunk import Piece, chunk_text
from .features import features_of
from .folder import UNSURE, File, Listing, shown_name
from .readers import ReadLimits, read_documents
from .readers.titles import title_from_name
from .store.base import Record, Store
from .types import Chunk, Document, Text

ADDED = "llmc.added"
"""Metadata of a document that was handed over by hand, which a sync of the folder leaves alone."""

Progress = Callable[[str, float], None]
"""(what is being done, share of all that is done)."""

_BATCH_CHUNKS = 256
_BATCH_LETTERS = 4_000_000
T = TypeVar("T")

_HEADING_TOKENS = 16  # that the headings above a chunk may take
_AT_ONCE = 500  # documents that one transaction deletes or touches
_SMALL = 1 << 18
_REASON = 300  # characters of why a document failed


class Vectors(Protocol):
    """What writing asks of an embedder."""

    @property
    def dimensions(self) -> int: ...

    @property
    def room(self) -> int:
        """Tokens of which nothing is left out."""
        ...

    def embed_passages(self, texts: list[str]) -> np.ndarray: ...

    def count_tokens(self, text: str) -> int: ...


@dataclass
class SyncReport:
    """What became of documents. `failed` files (or rows) were left out, and why; a reason for exit code 1."""

    added: int = 0
    updated: int = 0
    deleted: int = 0
    unchanged: int = 0
    chunks: int = 0
    """Written."""
    failed: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    unsupported: list[str] = field(default_factory=list[str])
    """Files of kinds that are not read."""
    empty: list[str] = field(default_factory=list[str])
    """Files without bytes, which are no documents and no failure."""

    def fail(self, name: str, reason: object) -> None:
        text = " ".join(str(reason).split())
        self.failed.append((shown_name(name), text if len(text) <= _REASON else text[:_REASON] + "…"))


def chunk_id(document: str, ordinal: int, title: str, text: str) -> str:
    """32 hex digits, the same for the same content wherever and whenever it is written."""
    content = "\0".join((document, str(ordinal), title, text)).encode()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def passage_text(title: str, heading: str, text: str) -> str:
    """What the embedder reads of a passage."""
    above = " – ".join(part for part in (title, heading if heading != title else "") if part)
    return f"{above}\n{text}" if above else text


_WORD = re.compile(r"\w+|[^\w\s]")
_WORD_LETTERS = 6


def count_words(text: str) -> int:
    """Tokens where no embedder says: words and signs, long words as several."""
    return sum(1 + (len(word) - 1) // _WORD_LETTERS for word in _WORD.findall(text))


def digest_of(text: Text) -> str:
    """sha256 of a document that is a part of a file, by all that it says."""
    sections = [(s.start, s.end, s.heading, s.page, s.unbroken) for s in text.sections]
    content = [text.title, text.text, sections, text.media_type, dict(text.metadata)]
    written = json.dumps(content, ensure_ascii=False, sort_keys=True, default=str)
    return hashlib.sha256(written.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(slots=True)
class Known:
    """What a store has of one path. `whole`: one document, of the path's own name. `added`: by hand."""

    size: int
    modified_ns: int
    count: int
    whole: bool
    digest: str
    added: bool

    def matches(self, file: File, added: bool) -> bool:
        """Whether the file is as it was, as far as its size and time tell."""
        same = (self.size, self.modified_ns, self.added) == (file.size, file.modified_ns, added)
        return same and file.modified_ns != UNSURE


def known_paths(store: Store, paths: Iterable[str] | None = None) -> dict[str, Known]:
    """What the store has, by path: of all paths, or of these."""
    known: dict[str, Known] = {}
    if paths is None:
        documents = store.documents()
    else:
        documents = (one for path in dict.fromkeys(paths) for one in store.documents_of_path(path))
    for document in documents:
        before = known.get(document.path)
        if before is None:
            whole = document.id == document.path
            known[document.path] = Known(
                document.size,
                document.modified_ns,
                1,
                whole,
                document.digest if whole else "",
                ADDED in document.metadata,
            )
            continue
        before.count += 1
        before.whole = False
        if (before.size, before.modified_ns) != (document.size, document.modified_ns):
            before.modified_ns = UNSURE - 1  # not written to its end: matches no file
    return known


class _Reading:
    """Reads one file; what goes wrong in the readers is the file's failure and ends its documents."""

    def __init__(self, file: File, report: SyncReport) -> None:
        self.failed = False
        self._file = file
        self._report = report

    def digest(self) -> str | None:
        """sha256 of the file; None where it cannot be read."""
        try:
            if self._file.size < _SMALL:  # file_digest's own buffer costs more than such a file
                return hashlib.sha256(self._file.path.read_bytes()).hexdigest()
            with self._file.path.open("rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            self._report.fail(self._file.name, (error.strerror or str(error)).lower())
            return None

    def texts(self, limits: ReadLimits) -> Iterator[Text]:
        """The documents up to what is wrong."""
        try:
            yield from read_documents(self._file.path, self._file.name, limits, self._problem)
        except LlmcError as error:  # whatever a parser raises has become one
            self._problem(self._file.name, str(error))

    def _problem(self, name: str, reason: str) -> None:
        self.failed = True
        self._report.fail(name, reason)


@dataclass
class _Waiting:
    document: Document
    pieces: list[Piece]
    new: bool


class Writer:
    """Reads files into a store. Use it inside `store.writing()`, and `flush` at the end."""

    def __init__(self, store: Store, vectors: Vectors | None, chunk_tokens: int, limits: ReadLimits) -> None:
        self.report = SyncReport()
        self._store = store
        self._vectors = vectors
        self._chunk_tokens = chunk_tokens
        self._limits = limits
        self._counter = count_words if vectors is None else vectors.count_tokens
        self._waiting: list[_Waiting] = []
        self._chunks = 0
        self._letters = 0
        self._touched: list[Document] = []
        self._gone: list[str] = []
        self._ended: list[File] = []

    # Files --------------------------------------------------------------------------------------------------

    def file(self, file: File, known: Known | None, *, added: bool = False) -> None:
        """Brings the store up to one file. What is wrong with the file goes into the report."""
        if known is not None and known.matches(file, added):
            self.report.unchanged += known.count
            return
        reading = _Reading(file, self.report)
        digest = reading.digest()
        if digest is None:
            return  # out of reach is not gone: what is known of it stays
        if known is not None and known.whole and (known.digest, known.added) == (digest, added):
            self._touch(Document(file.name, file.name, "", "", digest, file.size, file.modified_ns))
            self.report.unchanged += 1
            return
        # Rows of a file that lay here by hand lose that mark, so all of them are written.
        old = self._store.documents_of_path(file.name) if known is not None else []
        before = {} if known is None else {d.id: "" if known.added != added else d.digest for d in old}
        seen: set[str] = set()
        for text in reading.texts(self._limits):
            if text.id in seen:
                self.report.fail(text.id, "a second document of this name in the same file")
                continue
            seen.add(text.id)
            own = digest if text.id == file.name else digest_of(text)
            if before.get(text.id) == own:
                self.report.unchanged += 1
            else:
                self._document(text, file, own, new=text.id not in before, added=added)
        self._gone += sorted(before.keys() - seen)
        if not reading.failed and seen != {file.name}:
            self._ended.append(file)

    def texts(self, name: str, texts: Iterable[Text], digest: str, size: int) -> list[str]:
        """Documents that lie in no file, under a name; returns their ids."""
        before = {d.id for d in self._store.documents_of_path(name)}
        ids: list[str] = []
        file = File(name, Path(name), size, UNSURE)
        for text in texts:
            own = digest if text.id == name else digest_of(text)
            self._document(text, file, own, new=text.id not in before, added=True)
            ids.append(text.id)
        self._gone += sorted(before.difference(ids))
        return ids

    def _document(self, text: Text, file: File, digest: str, *, new: bool, added: bool) -> None:
        """Splits a document and puts it into the batch."""
        whole = text.id == file.name
        metadata = {key: value for key, value in text.metadata.items() if key != ADDED}
        if added:
            metadata[ADDED] = True
        title = text.title or (title_from_name(file.name) if whole else "")
        # A file of many documents is marked as read when the last of them is in.
        modified_ns = file.modified_ns if whole else UNSURE
        document = Document(
            text.id, file.name, title, text.media_type, digest, file.size, modified_ns, metadata
        )
        other = self._store.document(document.id) if new else None
        if other is not None and other.path != document.path:
            self.report.fail(document.id, f"a document of {other.path} has this name already")
            return
        self._add(document, replace(text, title=title), new=new)

    def _add(self, document: Document, text: Text, *, new: bool) -> list[Piece]:
        pieces = chunk_text(text, self._counter, self._room(text.title))
        self._waiting.append(_Waiting(document, pieces, new))
        self._chunks += len(pieces)
        self._letters += len(text.text)
        if self._chunks >= _BATCH_CHUNKS or self._letters >= _BATCH_LETTERS:
            self.flush()
        return pieces

    def _room(self, title: str) -> int:
        """Tokens of a chunk, so that the embedder reads all of it under its title."""
        if self._vectors is None:
            return self._chunk_tokens
        above = min(self._counter(title) + _HEADING_TOKENS, self._vectors.room // 2)
        return min(self._chunk_tokens, self._vectors.room - above)

    def sample(self, text: Text, file: File) -> list[int]:
        """Writes a document for an estimate; returns the tokens of its chunks."""
        document = Document(text.id, file.name, text.title, text.media_type, "", file.size, UNSURE)
        return [piece.tokens for piece in self._add(document, text, new=True)]

    # Batches ------------------------------------------------------------------------------------------------

    def _touch(self, document: Document) -> None:
        self._touched.append(document)
        if len(self._touched) >= _AT_ONCE:
            self.flush()

    def flush(self) -> None:
        """Commits what is waiting. Only when its documents are in is a file marked as read to its end."""
        if self._waiting:
            records = self._records()
            self._store.put(records)
            self.report.added += sum(item.new for item in self._waiting)
            self.report.updated += sum(not item.new for item in self._waiting)
            self.report.chunks += sum(len(record.chunks) for record in records)
        self._waiting, self._chunks, self._letters = [], 0, 0
        self.delete(self._gone)
        self._gone = []
        touched, self._touched = self._touched, []
        for part in parts(touched, _AT_ONCE):
            self._store.touch(part)
        ended, self._ended = self._ended, []
        for file in ended:
            rows = self._store.documents_of_path(file.name)
            self._store.touch(replace(d, size=file.size, modified_ns=file.modified_ns) for d in rows)

    def delete(self, ids: Iterable[str]) -> int:
        """Takes documents out; returns how many there were."""
        count = sum(self._store.delete(part) for part in parts(ids, _AT_ONCE))
        self.report.deleted += count
        return count

    def _records(self) -> list[Record]:
        chunks = [self._chunked(item) for item in self._waiting]
        everything = [chunk for of_document in chunks for chunk in of_document]
        vectors = self._embedded(everything) if self._vectors is not None else {}
        return [
            Record(
                item.document,
                tuple(replace(chunk, vector=vectors[chunk.id]) for chunk in own) if vectors else tuple(own),
            )
            for item, own in zip(self._waiting, chunks, strict=True)
        ]

    def _chunked(self, item: _Waiting) -> list[Chunk]:
        document = item.document.id
        return [
            Chunk(
                chunk_id(document, piece.ordinal, piece.title, piece.text),
                document,
                piece.ordinal,
                piece.title,
                piece.heading,
                piece.text,
                piece.start,
                piece.end,
                piece.page,
                piece.tokens,
                features_of(piece.title, piece.text),
            )
            for piece in item.pieces
        ]

    def _embedded(self, chunks: Sequence[Chunk]) -> dict[str, np.ndarray]:
        """Vectors by chunk id: those that the store has, as far as documents change in part only."""
        changed = [item.document.id for item in self._waiting if not item.new]
        have = {
            chunk.id: chunk.vector
            for document in changed
            for chunk in self._store.chunks(document=document)
            if chunk.vector is not None
        }
        missing = [chunk for chunk in chunks if chunk.id not in have]
        if missing and self._vectors is not None:
            texts = [passage_text(chunk.title, chunk.heading, chunk.text) for chunk in missing]
            made = self._vectors.embed_passages(texts).astype(np.float16)
            have.update(zip((chunk.id for chunk in missing), made, strict=True))
        return have


def parts(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """The items in lists of `size`, the last one shorter."""
    waiting = iter(items)
    while part := list(islice(waiting, size)):
        yield part


def sync_listing(writer: Writer, store: Store, listing: Listing, progress: Progress | None) -> SyncReport:
    """Makes the store hold what the folder holds: reads what is new or changed, deletes what is gone."""
    known = known_paths(store)
    for name, reason in listing.failed:
        writer.report.fail(name, reason)
    writer.report.unsupported += listing.unsupported
    writer.report.empty += listing.empty
    there = {file.name for file in listing.files}
    gone = [
        path
        for path, of_path in known.items()
        if not (path in there or of_path.added or listing.may_hold(path))
    ]
    for path in gone:
        writer.delete([document.id for document in store.documents_of_path(path)])
    total = max(1, listing.bytes)
    done = 0
    for file in listing.files:
        if progress is not None:
            progress("reading and embedding", done / total)
        of_path = known.get(file.name)
        writer.file(file, of_path)
        done += file.size
    writer.flush()
    return writer.report
