"""What indexing a folder would take: a sample of its files is indexed for real, and scaled up.

Files of one kind resemble each other more than files of different kinds, so each kind is scaled by its own
bytes. A file of many documents is read to its end, since that is cheap, and only a part of its documents is
split and embedded.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from ...ir.errors import LlmcError
from .folder import File, Listing
from .ingest import Progress, Vectors, Writer, digest_of, passage_text
from .readers import ReadLimits, read_documents
from .store import open_store
from .store.base import Settings, Store
from .types import Text

if TYPE_CHECKING:
    from .extract import ExtractEstimate

_SECONDS = 20.0  # of reading and splitting
_FILES = 400
_LETTERS = 4_000_000
_ROWS_LETTERS = 1_000_000  # of one file of many documents
_EMBEDDED = 192  # chunks
_WARM_UP = 8


@dataclass(frozen=True)
class Estimate:
    """What indexing would give and take. `tokens` are the embedder's; `bytes` the store's on disk. `sampled`
    of `files` files were read for it.
    """

    files: int
    sampled: int
    documents: int
    chunks: int
    tokens: int
    seconds: float
    bytes: int
    model_tokens: int = 0
    """Of a model that finds relations, prompts included; `model_tokens_at_most` if every answer is as long as
    it may be, and `model_seconds` besides `seconds`."""
    model_tokens_at_most: int = 0
    model_seconds: float = 0.0


@dataclass
class _Kind:
    """Files of one kind: those to come, and what those that were read had."""

    waiting: list[File]
    total: int
    seen: int = 0
    files: int = 0
    documents: float = 0.0
    letters: float = 0.0
    chunks: float = 0.0
    tokens: float = 0.0
    reading: float = 0.0

    @property
    def scale(self) -> float:
        """What was seen, times this, is all of it."""
        return self.total / self.seen if self.seen else 0.0

    @property
    def all_documents(self) -> float:
        """Of files that hold one document each, as many as there are files."""
        if self.files and self.documents <= self.files:
            return self.documents / self.files * (self.files + len(self.waiting))
        return self.documents * self.scale

    @property
    def all_chunks(self) -> float:
        """The first of each document, and for the others the bytes tell."""
        return self.all_documents + (self.chunks - self.documents) * self.scale

    @property
    def urgency(self) -> float:
        """Grows with the bytes that are not seen yet, and shrinks with every file read."""
        return (self.total - self.seen) / (1 + self.files)


@dataclass
class _Sample:
    """What the documents that were split cost, besides reading."""

    chunks: int = 0
    writing: float = 0.0
    letters: int = 0
    passages: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])


class _Zeros:
    """Stands for the embedder where only the size of vectors matters."""

    def __init__(self, vectors: Vectors) -> None:
        self._vectors = vectors
        self.dimensions = vectors.dimensions
        self.room = vectors.room

    def embed_passages(self, texts: list[str]) -> np.ndarray:
        return np.zeros((len(texts), self.dimensions), np.float32)

    def count_tokens(self, text: str) -> int:
        return self._vectors.count_tokens(text)


def estimate_listing(
    listing: Listing,
    vectors: Vectors | None,
    chunk_tokens: int,
    limits: ReadLimits,
    progress: Progress | None = None,
    extraction: Callable[[Store], ExtractEstimate] | None = None,
) -> Estimate:
    """Documents, chunks, tokens, seconds and bytes for the files of a folder; with `extraction`, also what a
    model would take that finds relations in all of it.
    """
    kinds = _kinds(listing)
    sample = _Sample()
    with tempfile.TemporaryDirectory(prefix="llmc-estimate-") as folder:
        place = Path(folder) / "sample.kb"
        with contextlib.closing(open_store(str(place), create=True)) as store:
            dimensions = 0 if vectors is None else vectors.dimensions
            store.set_settings(Settings("sample", "sample" if dimensions else "", dimensions, chunk_tokens))
            store.vacuum()
            empty = _size(place)
            zeros = None if vectors is None else _Zeros(vectors)
            writer = Writer(store, zeros, chunk_tokens, limits)
            for done, kind in enumerate(_order(kinds, sample)):
                if progress is not None:
                    progress("reading a sample", min(0.8, 0.8 * done / _FILES))
                _read(kind, kind.waiting.pop(), writer, sample, limits)
            started = time.perf_counter()
            writer.flush()
            sample.writing += time.perf_counter() - started
            _collect(store, sample)
            found = None
            if extraction is not None and sample.chunks:
                if progress is not None:
                    progress("finding relations in a sample", 0.8)
                found = extraction(store)
            store.vacuum()
        size = _size(place) - empty
    if progress is not None:
        progress("embedding a sample", 0.9)
    a_token = _embedding_seconds(vectors, sample)
    chunks = sum(kind.all_chunks for kind in kinds)
    tokens = sum(kind.tokens * kind.scale for kind in kinds)
    share = chunks / max(1, sample.chunks)
    reading = sum(kind.reading * kind.scale for kind in kinds)
    return Estimate(
        files=len(listing.files),
        sampled=sum(kind.files for kind in kinds),
        documents=round(sum(kind.all_documents for kind in kinds)),
        chunks=round(chunks),
        tokens=round(tokens),
        seconds=round(reading + sample.writing * share + a_token * tokens, 1),
        bytes=round(empty + size * share),
        model_tokens=0 if found is None else round((found.prompt_tokens + found.generated_tokens) * share),
        model_tokens_at_most=0 if found is None else round(found.worst_tokens * share),
        model_seconds=0.0 if found is None else round(found.seconds * share, 1),
    )


def _kinds(listing: Listing) -> list[_Kind]:
    by_suffix: dict[str, list[File]] = {}
    for file in listing.files:
        by_suffix.setdefault(PurePosixPath(file.name).suffix.casefold(), []).append(file)
    return [
        # An empty file costs a little too: a byte keeps the sums from dividing by nothing.
        _Kind(sorted(files, key=_lot), sum(max(1, file.size) for file in files))
        for _, files in sorted(by_suffix.items())
    ]


def _lot(file: File) -> bytes:
    """An order that has nothing to do with the files, and is the same each time."""
    return hashlib.blake2b(file.name.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _order(kinds: list[_Kind], sample: _Sample) -> Iterator[_Kind]:
    """Whose next file to read, until enough was."""
    ends = time.perf_counter() + _SECONDS
    count = 0
    while waiting := [kind for kind in kinds if kind.waiting]:
        untouched = [kind for kind in waiting if not kind.files]
        enough = count >= _FILES and sample.letters >= _LETTERS
        if not untouched and (enough or time.perf_counter() > ends):
            return
        count += 1
        yield max(untouched or waiting, key=lambda kind: kind.urgency)


def _read(kind: _Kind, file: File, writer: Writer, sample: _Sample, limits: ReadLimits) -> None:
    kind.files += 1
    kind.seen += max(1, file.size)
    every = max(1, file.size // _ROWS_LETTERS)
    letters = split = chunks = tokens = 0  # of this file's documents: of all, of those that were split
    started = time.perf_counter()
    for text in _documents(file, limits):
        kind.documents += 1
        kind.letters += len(text.text)
        letters += len(text.text)
        if text.id != file.name and every > 1 and _left_out(text, every):
            continue
        paused = time.perf_counter()
        pieces = writer.sample(text, file)
        took = time.perf_counter() - paused
        started += took
        sample.writing += took
        split += len(text.text)
        chunks += len(pieces)
        tokens += sum(pieces)
        sample.letters += len(text.text)
    kind.reading += time.perf_counter() - started
    times = letters / split if split else 1.0
    kind.chunks += chunks * times
    kind.tokens += tokens * times


def _documents(file: File, limits: ReadLimits) -> Iterator[Text]:
    """Those of a file up to what is wrong with it: indexing will report that; it cost its reading."""
    with contextlib.suppress(LlmcError):  # whatever a parser raises has become one
        yield from read_documents(file.path, file.name, limits)


def _left_out(text: Text, every: int) -> bool:
    return int(digest_of(text)[:8], 16) % every != 0


def _collect(store: Store, sample: _Sample) -> None:
    """Ids are hashes: the first chunks in their order are a fair choice."""
    sample.chunks = store.counts()["chunks"]
    for chunk in store.chunks():
        sample.passages.append((passage_text(chunk.title, chunk.heading, chunk.text), chunk.tokens))
        if len(sample.passages) == _EMBEDDED + _WARM_UP:
            return


def _embedding_seconds(vectors: Vectors | None, sample: _Sample) -> float:
    """Of one token."""
    if vectors is None or not sample.passages:
        return 0.0
    warm_up = min(_WARM_UP, len(sample.passages) - 1)
    if warm_up:
        vectors.embed_passages([text for text, _ in sample.passages[:warm_up]])
    timed = sample.passages[warm_up:]
    started = time.perf_counter()
    vectors.embed_passages([text for text, _ in timed])
    return (time.perf_counter() - started) / max(1, sum(tokens for _, tokens in timed))


def _size(place: Path) -> int:
    return sum(file.stat().st_size for file in place.parent.iterdir() if file.is_file())
