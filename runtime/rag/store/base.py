"""What retrieval asks of a place where documents are kept. `sqlite.py` and `postgres.py` are two such."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ..types import Chunk, Document, Triple


@dataclass(frozen=True)
class Record:
    """A document with its chunks, ordinals 0, 1, …: what one write puts."""

    document: Document
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Settings:
    """What a store was made with: whatever changes what is written for the same documents.

    `embedder` is the artifact's name for people, `embedder_hash` tells one from another (empty: no vectors),
    `dimensions` of its vectors. `chunk_tokens` bounds a chunk. `graph` is "fast" or "llm".
    """

    embedder: str = ""
    embedder_hash: str = ""
    dimensions: int = 0
    chunk_tokens: int = 256
    graph: str = "fast"
    features_version: int = 1
    extra: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class Columns:
    """Some chunks, in order of their ids, as what is derived from all of them needs them: lists of [n], the
    features as they are kept (`records.FeatureRow`), of a text its beginning.
    """

    ids: Sequence[str]
    documents: Sequence[str]
    ordinals: Sequence[int]
    titles: Sequence[str]
    beginnings: Sequence[str]
    terms: Sequence[bytes]
    title_counts: Sequence[bytes]
    text_counts: Sequence[bytes]
    spans: Sequence[bytes]
    mentions: Sequence[bytes]


BEGINNING = 400
"""Characters of a text that `Columns` have."""


class StoreReader(Protocol):
    """One consistent state of a store, however much is written meanwhile. Everything comes ordered by id, so
    that two stores with the same documents give the same.
    """

    @property
    def generation(self) -> int:
        """Grows with each write. Not a part of the logical content."""
        ...

    def settings(self) -> Settings: ...

    def counts(self) -> Mapping[str, int]:
        """documents, chunks, mentions, vectors, triples, extracted, quarantined."""
        ...

    def documents(self, after: str = "", limit: int | None = None) -> Iterator[Document]:
        """In order of their ids, those behind `after`."""
        ...

    def document(self, id: str) -> Document | None: ...

    def documents_of_path(self, path: str) -> list[Document]: ...

    def chunks(self, ids: Sequence[str] | None = None, document: str | None = None) -> Iterator[Chunk]:
        """Chunks with features and vectors: these (in the order given, unknown ids left out), those of a
        document in order of their ordinals, or all in order of their ids."""
        ...

    def chunk_ids(self) -> list[str]:
        """Of all chunks, in order."""
        ...

    def columns(self) -> Iterator[Columns]:
        """All chunks, some at a time."""
        ...

    def vectors(self) -> tuple[list[str], np.ndarray]:
        """Ids in order, and [N, dimensions] float16; only chunks that have one."""
        ...

    def triples(self) -> Iterator[Triple]: ...

    def quarantined(self) -> Mapping[str, str]:
        """Chunks that a model could not extract from, and why."""
        ...

    def extractions(self) -> Iterator[tuple[str, str, str | None]]:
        """(chunk, origin, why it is quarantined or None), in order: what said something of a chunk, be it
        that there is nothing."""
        ...

    def extracted(self, origin: str = "") -> set[str]:
        """Ids of the chunks that something was extracted from, with or without triples, quarantined ones too:
        by whatever, or by what begins with `origin` ("llm:", "file:")."""
        ...

    def keyword(self, query: str, limit: int) -> list[tuple[str, float]]:
        """Chunk ids by the database's own full-text ranking, best first. `query` is words, and "phrases" in
        double quotes; nothing in it is an operator."""
        ...

    def nearest(self, vector: np.ndarray, limit: int) -> list[tuple[str, float]]:
        """Chunk ids by cosine with [dimensions] float32 of length 1, best first; all of them are compared."""
        ...

    def dump(self) -> Iterator[str]:
        """The logical content as lines: equal for equal documents, whatever was written and deleted."""
        ...


class Store(StoreReader, Protocol):
    """A store; its reading methods each see the newest state. Safe to use from several threads."""

    @property
    def location(self) -> str:
        """As it was opened: a path or a URL without its password."""
        ...

    @property
    def address(self) -> str:
        """What opens it again in another process, be it with its password: not for people's eyes."""
        ...

    @property
    def cache_folder(self) -> str:
        """Where what is derived from the store (snapshots) may be kept on this machine; may not exist yet,
        or not be writable."""
        ...

    def reading(self) -> AbstractContextManager[StoreReader]:
        """One consistent state for as long as the context is open. Never blocks a writer."""
        ...

    def writing(self) -> AbstractContextManager[None]:
        """The right to write, held over many calls below. A second writer gets InputError that names the
        first (process id) at once. Calls outside of it take the right each for itself."""
        ...

    def put(self, records: Iterable[Record]) -> None:
        """Write documents, each replacing the one of its id, in one transaction: after a crash all of them
        are there, or none. A chunk whose id was there before keeps what a model extracted of it."""
        ...

    def touch(self, documents: Iterable[Document]) -> None:
        """Renew `size` and `modified_ns` of documents whose bytes have not changed. Makes no new generation:
        no search could tell."""
        ...

    def delete(self, ids: Iterable[str]) -> int:
        """Remove documents with all that came from them, in one transaction; returns how many there were."""
        ...

    def set_settings(self, settings: Settings) -> None: ...

    def set_vectors(self, vectors: Mapping[str, np.ndarray]) -> None:
        """Replace vectors of chunks (re-embedding), [dimensions] float16 each, in one transaction."""
        ...

    def drop_vectors(self) -> None: ...

    def put_triples(
        self, chunk: str, triples: Sequence[Triple], *, origin: str = "", quarantine: str | None = None
    ) -> None:
        """What was extracted of one chunk, replacing what was there for the same origin; the chunk then
        counts as extracted by it. `origin` is the triples', and to be said where there are none. With
        `quarantine`, why nothing could be extracted: that stands until the next extraction of the same kind
        (what is before the colon of `origin`)."""
        ...

    def vacuum(self) -> None:
        """Give space back."""
        ...

    def close(self) -> None: ...
