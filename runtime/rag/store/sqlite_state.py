"""Reading one state of the SQLite store: everything inside one transaction of one connection."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ....ir.errors import InputError
from ..types import Chunk, Document, Triple
from .base import BEGINNING, Columns, Settings
from .common import BATCH, dump_lines
from .connect import explained
from .keywords import parse_keywords
from .matrix import MatrixCache, Vectors, nearest, query_vector
from .records import (
    EXTRACTIONS,
    F16,
    QUARANTINED,
    asked,
    damaged_features,
    damaged_vector,
    document_of,
    features_of_row,
    is_whole,
    settings_of,
)
from .schema import VERSION, check_version

_DOCUMENT = "SELECT id, path, title, media_type, digest, size, modified_ns, metadata FROM documents"
_CHUNK = """
    SELECT c.id, d.id, c.ordinal, c.title, c.heading, c.text, c."start", c."end", c.page, c.tokens,
           f.terms, f.title_counts, f.text_counts, f.spans, f.mentions, v.vector
    FROM chunks c JOIN documents d ON d.row = c.document LEFT JOIN features f ON f.chunk = c.row
    LEFT JOIN vectors v ON v.chunk = c.row
"""
_COLUMNS = f"""
    SELECT c.id, d.id, c.ordinal, c.title, substr(c.text, 1, {BEGINNING}),
           f.terms, f.title_counts, f.text_counts, f.spans, f.mentions
    FROM chunks c JOIN documents d ON d.row = c.document LEFT JOIN features f ON f.chunk = c.row
    WHERE c.id > ? ORDER BY c.id LIMIT {BATCH}
"""
_VECTOR_BATCH = 4096
_TITLE_WEIGHT = 4.0
_TIES = 64
"""Rows behind the last wanted one that are looked at for equal scores."""


class SqliteState:
    """One state of a store. Usable until its transaction ends."""

    def __init__(self, connection: sqlite3.Connection, name: str, cache: MatrixCache) -> None:
        self._connection: sqlite3.Connection | None = connection
        self._name = name
        self._cache = cache
        # The first read fixes the state.
        (version,) = self._rows("PRAGMA user_version")[0]
        check_version(version, name)
        if version < VERSION:
            raise InputError(
                f"{name}: is of the older store version {version}", remedy="open it for writing once"
            )
        meta = dict(self._rows("SELECT key, value FROM meta"))
        try:
            self._generation = int(meta["generation"])
            self._settings = settings_of(meta["settings"])
        except (KeyError, TypeError, ValueError):
            raise InputError(
                f"{name}: is damaged: its settings cannot be read", remedy="index again"
            ) from None

    def end(self) -> None:
        """From now on, reading is an error."""
        self._connection = None

    def _rows(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        if self._connection is None:
            raise ValueError(f"{self._name}: read from after `reading()` ended")
        with explained(self._name):
            return self._connection.execute(sql, values).fetchall()

    def _damaged(self, what: str) -> InputError:
        return InputError(f"{self._name}: is damaged: {what}", remedy="index the documents into a new store")

    @property
    def generation(self) -> int:
        return self._generation

    def settings(self) -> Settings:
        return self._settings

    def counts(self) -> Mapping[str, int]:
        names = ("documents", "chunks", "mentions", "vectors", "triples", "extracted", "quarantined")
        row = self._rows(
            "SELECT (SELECT count(*) FROM documents), (SELECT count(*) FROM chunks),"
            " (SELECT ifnull(sum(mentions), 0) FROM chunks), (SELECT count(*) FROM vectors),"
            " (SELECT count(*) FROM triples), (SELECT count(DISTINCT chunk) FROM extracted),"
            " (SELECT count(DISTINCT chunk) FROM extracted WHERE quarantine IS NOT NULL)"
        )[0]
        return dict(zip(names, row, strict=True))

    def documents(self, after: str = "", limit: int | None = None) -> Iterator[Document]:
        left = limit
        while left is None or left > 0:
            wanted = BATCH if left is None else min(left, BATCH)
            rows = self._rows(f"{_DOCUMENT} WHERE id > ? ORDER BY id LIMIT ?", (asked(after), wanted))
            yield from map(self._document, rows)
            if len(rows) < wanted:
                return
            after = rows[-1][0]
            left = None if left is None else left - len(rows)

    def document(self, id: str) -> Document | None:
        rows = self._rows(f"{_DOCUMENT} WHERE id = ?", (asked(id),))
        return self._document(rows[0]) if rows else None

    def documents_of_path(self, path: str) -> list[Document]:
        return [
            self._document(row)
            for row in self._rows(f"{_DOCUMENT} WHERE path = ? ORDER BY id", (asked(path),))
        ]

    def _document(self, row: Sequence[Any]) -> Document:
        try:
            return document_of(row)
        except (TypeError, ValueError, RecursionError):
            raise self._damaged(f"document {row[0]!r}") from None

    def chunks(self, ids: Sequence[str] | None = None, document: str | None = None) -> Iterator[Chunk]:
        if ids is not None:
            for begin in range(0, len(ids), BATCH):
                wanted = [asked(id) for id in ids[begin : begin + BATCH]]
                sql = f"{_CHUNK} WHERE c.id IN (SELECT value FROM json_each(?))"
                found = {row[0]: self._chunk(row) for row in self._rows(sql, (json.dumps(wanted),))}
                yield from (found[id] for id in wanted if id in found)
        elif document is not None:
            last: Any = -1
            sql = f"{_CHUNK} WHERE d.id = ? AND c.ordinal > ? ORDER BY c.ordinal LIMIT {BATCH}"
            while rows := self._rows(sql, (asked(document), last)):
                yield from map(self._chunk, rows)
                last = rows[-1][2]
        else:
            last = ""
            while rows := self._rows(f"{_CHUNK} WHERE c.id > ? ORDER BY c.id LIMIT {BATCH}", (last,)):
                yield from map(self._chunk, rows)
                last = rows[-1][0]

    def _chunk(self, row: tuple[Any, ...]) -> Chunk:
        if not is_whole(row[10:15]):
            raise damaged_features(self._name, row[0], row[1])
        try:
            vector = None if row[15] is None else np.frombuffer(row[15], F16)
            return Chunk(*row[:10], features=features_of_row(row[10:15], row[5]), vector=vector)
        except (TypeError, ValueError):
            raise self._damaged(f"chunk {row[0]!r}") from None

    def chunk_ids(self) -> list[str]:
        return [id for (id,) in self._rows("SELECT id FROM chunks ORDER BY id")]

    def columns(self) -> Iterator[Columns]:
        last = ""
        while rows := self._rows(_COLUMNS, (last,)):
            last = rows[-1][0]
            for row in rows:
                if not is_whole(row[5:]):
                    raise damaged_features(self._name, row[0], row[1])
            yield Columns(*zip(*rows, strict=True))

    def vectors(self) -> Vectors:
        # Rows lie in the order in which they were written: read in that order, put where the ids belong.
        pairs = self._rows("SELECT id, row FROM chunks ORDER BY id")
        rows = np.array([row for _, row in pairs], np.int64)
        order = np.argsort(rows)
        rows = rows[order]
        matrix = np.empty((len(pairs), self._settings.dimensions), np.float16)
        there = np.zeros(len(pairs), bool)
        width, last = matrix.shape[1] * F16.itemsize, -1
        sql = f"SELECT chunk, vector FROM vectors WHERE chunk > ? ORDER BY chunk LIMIT {_VECTOR_BATCH}"
        while found := self._rows(sql, (last,)):
            numbers, blobs = zip(*found, strict=True)
            if not len(rows):
                raise self._damaged("vectors of no passage")
            places = order[np.minimum(np.searchsorted(rows, numbers), len(rows) - 1)]
            for place, blob in zip(places, blobs, strict=True):
                if not isinstance(blob, bytes) or len(blob) != width:
                    raise damaged_vector(self._name, pairs[int(place)][0])
            matrix[places] = np.frombuffer(b"".join(blobs), F16).reshape(len(blobs), -1)
            there[places] = True
            last = numbers[-1]
        if there.all():
            return [id for id, _ in pairs], matrix
        return [id for (id, _), one in zip(pairs, there.tolist(), strict=True) if one], matrix[there]

    def triples(self) -> Iterator[Triple]:
        # Those of some chunks at a time, not some triples: a chunk's are few.
        last = ""
        batch = (
            "SELECT row, id FROM chunks WHERE id > ? AND EXISTS (SELECT * FROM triples t WHERE t.chunk = row)"
            f" ORDER BY id LIMIT {BATCH}"
        )
        sql = """
            SELECT c.id, t.subject, t.predicate, t.object, t.origin
            FROM triples t JOIN chunks c ON c.row = t.chunk WHERE t.chunk IN (SELECT value FROM json_each(?))
            ORDER BY c.id, t.origin, t.subject, t.predicate, t.object
        """
        while chunks := self._rows(batch, (last,)):
            yield from (Triple(*row) for row in self._rows(sql, (json.dumps([row for row, _ in chunks]),)))
            last = chunks[-1][1]

    def quarantined(self) -> Mapping[str, str]:
        return dict(self._rows(QUARANTINED))

    def extractions(self) -> Iterator[tuple[str, str, str | None]]:
        yield from self._rows(EXTRACTIONS)  # pyright: ignore[reportReturnType]  (id, origin, quarantine)

    def extracted(self, origin: str = "") -> set[str]:
        sql = (
            "SELECT c.id FROM extracted e JOIN chunks c ON c.row = e.chunk"
            " WHERE substr(e.origin, 1, length(?1)) = ?1"
        )
        return {id for (id,) in self._rows(sql, (origin,))}

    def keyword(self, query: str, limit: int) -> list[tuple[str, float]]:
        wanted = _match(query)
        if not wanted or limit <= 0:
            return []
        # Only the best are sorted; equal scores go by id, hence a few more than wanted, or all of them.
        sql = (
            f"SELECT rowid, -bm25(keywords, {_TITLE_WEIGHT}, 1.0) FROM keywords"
            " WHERE keywords MATCH ? ORDER BY 2 DESC"
        )
        rows = self._rows(f"{sql} LIMIT ?", (wanted, limit + _TIES))
        if len(rows) == limit + _TIES and rows[-1][1] == rows[limit - 1][1]:
            rows = self._rows(sql, (wanted,))
        if len(rows) > limit:
            rows = [row for row in rows if row[1] >= rows[limit - 1][1]]
        names = self._rows(
            "SELECT row, id FROM chunks WHERE row IN (SELECT value FROM json_each(?))",
            (json.dumps([row for row, _ in rows]),),
        )
        ids = dict(names)
        found = [(ids[row], score) for row, score in rows if row in ids]
        return sorted(found, key=lambda one: (-one[1], one[0]))[:limit]

    def nearest(self, vector: np.ndarray, limit: int) -> list[tuple[str, float]]:
        wanted = query_vector(vector, self._settings.dimensions)
        return nearest(self._cache.of(self._generation, self.vectors), wanted, limit)

    def dump(self) -> Iterator[str]:
        return dump_lines(self)


def _match(query: str) -> str:
    """FTS5's expression of a query: all phrases, ranked with the words too; without phrases, any word."""
    wanted = parse_keywords(query)
    phrases = [f'"{" ".join(words)}"' for words in wanted.phrases]
    words = [f'"{word}"' for word in wanted.words]
    if phrases and words:
        return f"({' AND '.join(phrases)}) AND ({' OR '.join([phrases[0], *words])})"
    return " AND ".join(phrases) or " OR ".join(words)
