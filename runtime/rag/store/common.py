"""What both stores do alike: connections shared by threads, reading the newest state, the logical dump."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Generic, TypeVar

import numpy as np

from ....ir.errors import InputError
from ..types import Chunk, Document, Triple
from .base import Columns, Settings, StoreReader
from .records import feature_row, settings_text, vector_bytes

Connection = TypeVar("Connection")

BATCH = 512
"""Rows that are fetched at a time, so that no cursor stays open between them."""
_IDLE = 8
"""Connections that are kept open for the next one who reads."""

_inherited: list[Any] = []
"""Connections that a forked process got from its parent: the parent's, never to be used nor closed here."""


class Pool(Generic[Connection]):
    """Connections that nobody uses at the moment; one is made where there is none."""

    def __init__(
        self, make: Callable[[], Connection], close: Callable[[Connection], None], location: str
    ) -> None:
        self._make = make
        self._close = close
        self._location = location
        self._idle: list[Connection] = []
        self._guard = threading.Lock()
        self._closed = False
        self._process = os.getpid()

    def take(self) -> Connection:
        """A connection for the caller alone."""
        with self._guard:
            if self._closed:
                raise InputError(f"{self._location}: the store was closed")
            if self._process != os.getpid():
                _inherited.extend(self._idle)
                self._idle, self._process = [], os.getpid()
            if self._idle:
                return self._idle.pop()
        return self._make()

    def give(self, connection: Connection) -> None:
        """Give a connection back that works and holds no transaction."""
        with self._guard:
            if not self._closed and len(self._idle) < _IDLE and self._process == os.getpid():
                self._idle.append(connection)
                return
        self._close(connection)

    def empty(self) -> None:
        """Close those that nobody uses."""
        with self._guard:
            idle, self._idle = self._idle, []
        for connection in idle if self._process == os.getpid() else ():
            self._close(connection)

    def close(self) -> None:
        """Close them all; those in use, when they come back."""
        with self._guard:
            self._closed = True
        self.empty()


class NewestState(ABC):
    """The reading methods of a store, each in a state of its own: the newest when it is called."""

    @abstractmethod
    def reading(self) -> AbstractContextManager[StoreReader]: ...

    @property
    def generation(self) -> int:
        with self.reading() as state:
            return state.generation

    def settings(self) -> Settings:
        with self.reading() as state:
            return state.settings()

    def counts(self) -> Mapping[str, int]:
        with self.reading() as state:
            return state.counts()

    def documents(self, after: str = "", limit: int | None = None) -> Iterator[Document]:
        with self.reading() as state:
            yield from state.documents(after, limit)

    def document(self, id: str) -> Document | None:
        with self.reading() as state:
            return state.document(id)

    def documents_of_path(self, path: str) -> list[Document]:
        with self.reading() as state:
            return state.documents_of_path(path)

    def chunks(self, ids: Sequence[str] | None = None, document: str | None = None) -> Iterator[Chunk]:
        with self.reading() as state:
            yield from state.chunks(ids, document)

    def chunk_ids(self) -> list[str]:
        with self.reading() as state:
            return state.chunk_ids()

    def columns(self) -> Iterator[Columns]:
        with self.reading() as state:
            yield from state.columns()

    def vectors(self) -> tuple[list[str], np.ndarray]:
        with self.reading() as state:
            return state.vectors()

    def triples(self) -> Iterator[Triple]:
        with self.reading() as state:
            yield from state.triples()

    def quarantined(self) -> Mapping[str, str]:
        with self.reading() as state:
            return state.quarantined()

    def extractions(self) -> Iterator[tuple[str, str, str | None]]:
        with self.reading() as state:
            yield from state.extractions()

    def extracted(self, origin: str = "") -> set[str]:
        with self.reading() as state:
            return state.extracted(origin)

    def keyword(self, query: str, limit: int) -> list[tuple[str, float]]:
        with self.reading() as state:
            return state.keyword(query, limit)

    def nearest(self, vector: np.ndarray, limit: int) -> list[tuple[str, float]]:
        with self.reading() as state:
            return state.nearest(vector, limit)

    def dump(self) -> Iterator[str]:
        with self.reading() as state:
            yield from state.dump()


def next_generation(now: int, clock_ns: int) -> int:
    """The generation after `now`. It follows the clock (microseconds), so that what was derived from one
    store is not taken for that of another, which a file of the same name held before.
    """
    return max(now + 1, clock_ns // 1000)


def dump_lines(state: StoreReader) -> Iterator[str]:
    """The logical content, a line of JSON for each thing. Neither when nor in which order it was written, nor
    the sizes and times by which a file is known to be unchanged, nor settings that begin with a point (where
    things lie on this machine); of long arrays the sha256.
    """
    settings = json.loads(settings_text(state.settings()))
    extra = {key: value for key, value in settings["extra"].items() if not key.startswith(".")}
    yield _line("settings", {**settings, "extra": extra})
    for document in state.documents():
        kept = {name: getattr(document, name) for name in ("id", "path", "title", "media_type", "digest")}
        yield _line("document", {**kept, "metadata": dict(document.metadata)})
        for chunk in state.chunks(document=document.id):
            yield _line("chunk", _chunk_fields(chunk))
    for triple in state.triples():
        yield _line("triple", vars(triple))
    for chunk_id, origin, quarantine in state.extractions():
        yield _line("extracted", {"chunk": chunk_id, "origin": origin, "quarantine": quarantine})


def _chunk_fields(chunk: Chunk) -> dict[str, Any]:
    fields = {name: value for name, value in vars(chunk).items() if name not in ("features", "vector")}
    names = ("terms", "title_counts", "text_counts", "spans")
    arrays = feature_row(chunk.features)[:4]
    fields |= {name: _sha256(data) for name, data in zip(names, arrays, strict=True)}
    fields["mentions"] = chunk.features.mentions
    fields["vector"] = None if chunk.vector is None else _sha256(vector_bytes(chunk.vector))
    return fields


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _line(kind: str, fields: Mapping[str, Any]) -> str:
    return json.dumps({"kind": kind, **fields}, ensure_ascii=False, sort_keys=True)
