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

    def vectors(self) -> tuple[list[str], np.ndarray]:
        """Ids in order, and [N, dimensions] float16; only chunks that have one."""
        ...

    def triples(self) -> Iterator[Triple]: ...

    def quarantined(self) -> Mapping[str, str]:
        """Chunks that a model could not extract from, and why."""
        ...

    def extracted(self) -> set[str]:
        """Ids of chunks that a model has extracted from, with or without triples, quarantined ones too."""
        ...

    def keyword(self, query: str, limit: int) -> list[tuple[str, float]]:
        """Chunk ids by the database's own full-text ranking, best first. `query` is words, and "phrases" in
        double quotes; nothing in it is an operator."""
        ...

    def nearest(self, vector: np.ndarray, limit: int) -> list[tuple[str, float]]:
        """Chunk ids by cosine with [dimensions] float32 of length 1, best first: exact."""
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

    def put_triples(self, chunk: str, triples: Sequence[Triple], *, quarantine: str | None = None) -> None:
        """What was extracted of one chunk, replacing what was there for the same origin; the chunk then
        counts as extracted. With `quarantine`, why nothing could be."""
        ...

    def vacuum(self) -> None:
        """Give space back."""
        ...

    def close(self) -> None: ...
