"""Reading one state of the PostgreSQL store: everything inside one REPEATABLE READ transaction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ....ir.errors import InputError
from ..types import Chunk, Document, Triple
from .base import BEGINNING, Columns, Settings
from .common import BATCH, dump_lines
from .keywords import fold, parse_keywords, words_of
from .matrix import query_vector
from .postgres_schema import Place, explained
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

if TYPE_CHECKING:
    from .postgres_schema import Connection

_DOCUMENT = "SELECT id, path, title, media_type, digest, size, modified_ns, metadata FROM documents"
_CHUNK = """
    SELECT c.id, d.id, c.ordinal, c.title, c.heading, c.text, c."start", c."end", c.page, c.tokens,
           f.terms, f.title_counts, f.text_counts, f.spans, f.mentions, halfvec_send(v.vector)
    FROM chunks c JOIN documents d ON d.row = c.document LEFT JOIN features f ON f.chunk = c.row
    LEFT JOIN vectors v ON v.chunk = c.row
"""
_COLUMNS = f"""
    SELECT c.id, d.id, c.ordinal, c.title, left(c.text, {BEGINNING}),
           f.terms, f.title_counts, f.text_counts, f.spans, f.mentions
    FROM chunks c JOIN documents d ON d.row = c.document LEFT JOIN features f ON f.chunk = c.row
    WHERE c.id > %s ORDER BY c.id LIMIT {BATCH}
"""
_VECTOR_BATCH = 4096
_HEADER = 4
"""Bytes before a halfvec's numbers as PostgreSQL sends it: their count, and zero."""
_WEIGHTS = "{0.25, 0.25, 0.25, 1}"
"""Of words in the text (the first) and in the title (the last)."""
MAX_WORD_TEXT = 200_000
"""Characters of a chunk that the full-text index takes: a tsvector is at most 1 MB."""


class PostgresState:
    """One state of a store. Usable until its transaction ends."""

    def __init__(self, connection: Connection, place: Place) -> None:
        self._connection: Connection | None = connection
        self._place = place
        # The first read fixes the state.
        meta = dict(self._rows("SELECT key, value FROM meta"))
        try:
            self._generation = int(meta["generation"])
            self._settings = settings_of(meta["settings"])
            self.identity: str = meta["identity"]
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{place.location}: is damaged: its settings cannot be read") from None

    def end(self) -> None:
        """From now on, reading is an error."""
        self._connection = None

    def _rows(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        if self._connection is None:
            raise ValueError(f"{self._place.location}: read from after `reading()` ended")
        with explained(self._place), self._connection.cursor(binary=True) as cursor:
            return cursor.execute(sql.encode(), values).fetchall()

    @property
    def generation(self) -> int:
        return self._generation

    def settings(self) -> Settings:
        return self._settings

    def counts(self) -> Mapping[str, int]:
        names = ("documents", "chunks", "mentions", "vectors", "triples", "extracted", "quarantined")
        row = self._rows(
            "SELECT (SELECT count(*) FROM documents), (SELECT count(*) FROM chunks),"
            " (SELECT coalesce(sum(mentions), 0)::bigint FROM chunks), (SELECT count(*) FROM vectors),"
            " (SELECT count(*) FROM triples), (SELECT count(DISTINCT chunk) FROM extracted),"
            " (SELECT count(DISTINCT chunk) FROM extracted WHERE quarantine IS NOT NULL)"
        )[0]
        return dict(zip(names, row, strict=True))

    def documents(self, after: str = "", limit: int | None = None) -> Iterator[Document]:
        left = limit
        while left is None or left > 0:
            wanted = BATCH if left is None else min(left, BATCH)
            rows = self._rows(f"{_DOCUMENT} WHERE id > %s ORDER BY id LIMIT {wanted}", (asked(after),))
            yield from map(self._document, rows)
            if len(rows) < wanted:
                return
            after = rows[-1][0]
            left = None if left is None else left - len(rows)

    def document(self, id: str) -> Document | None:
        rows = self._rows(f"{_DOCUMENT} WHERE id = %s", (asked(id),))
        return self._document(rows[0]) if rows else None

    def documents_of_path(self, path: str) -> list[Document]:
        rows = self._rows(f"{_DOCUMENT} WHERE path = %s ORDER BY id", (asked(path),))
        return [self._document(row) for row in rows]

    def _document(self, row: Sequence[Any]) -> Document:
        try:
            return document_of(row)
        except (TypeError, ValueError, RecursionError):
            raise self._damaged(f"document {row[0]!r}") from None

    def _damaged(self, what: str) -> InputError:
        location = self._place.location
        return InputError(f"{location}: is damaged: {what}", remedy="index the documents into a new store")

    def chunks(self, ids: Sequence[str] | None = None, document: str | None = None) -> Iterator[Chunk]:
        last: Any
        if ids is not None:
            for begin in range(0, len(ids), BATCH):
                wanted = [asked(id) for id in ids[begin : begin + BATCH]]
                rows = self._rows(f"{_CHUNK} WHERE c.id = ANY(%s)", (wanted,))
                found = {row[0]: self._chunk(row) for row in rows}
                yield from (found[id] for id in wanted if id in found)
        elif document is not None:
            last = -1
            sql = f"{_CHUNK} WHERE d.id = %s AND c.ordinal > %s ORDER BY c.ordinal LIMIT {BATCH}"
            while rows := self._rows(sql, (asked(document), last)):
                yield from map(self._chunk, rows)
                last = rows[-1][2]
        else:
            last = ""
            while rows := self._rows(f"{_CHUNK} WHERE c.id > %s ORDER BY c.id LIMIT {BATCH}", (last,)):
                yield from map(self._chunk, rows)
                last = rows[-1][0]

    def _chunk(self, row: tuple[Any, ...]) -> Chunk:
        if not is_whole(row[10:15]):
            raise damaged_features(self._place.location, row[0], row[1])
        vector = None if row[15] is None else np.frombuffer(row[15], ">f2", offset=_HEADER).astype(F16)
        return Chunk(*row[:10], features=features_of_row(row[10:15], row[5]), vector=vector)

    def chunk_ids(self) -> list[str]:
        return [id for (id,) in self._rows("SELECT id FROM chunks ORDER BY id")]

    def columns(self) -> Iterator[Columns]:
        last = ""
        while rows := self._rows(_COLUMNS, (last,)):
            last = rows[-1][0]
            for row in rows:
                if not is_whole(row[5:]):
                    raise damaged_features(self._place.location, row[0], row[1])
            yield Columns(*zip(*rows, strict=True))

    def vectors(self) -> tuple[list[str], np.ndarray]:
        total = self._rows("SELECT count(*) FROM vectors")[0][0]
        matrix = np.empty((total, self._settings.dimensions), np.float16)
        width = _HEADER + matrix.shape[1] * F16.itemsize
        ids: list[str] = []
        sql = (
            "SELECT c.id, halfvec_send(v.vector) FROM vectors v JOIN chunks c ON c.row = v.chunk"
            f" WHERE c.id > %s ORDER BY c.id LIMIT {_VECTOR_BATCH}"
        )
        last = ""
        while rows := self._rows(sql, (last,)):
            wrong = next((id for id, data in rows if len(data) != width), None)
            if wrong is not None:
                raise damaged_vector(self._place.location, wrong)
            part = np.array([np.frombuffer(data, ">f2", offset=_HEADER) for _, data in rows])
            matrix[len(ids) : len(ids) + len(rows)] = part
            ids += [id for id, _ in rows]
            last = ids[-1]
        return ids, matrix

    def triples(self) -> Iterator[Triple]:
        # Those of some chunks at a time, not some triples: a chunk's are few.
        last = ""
        batch = (
            "SELECT row, id FROM chunks WHERE id > %s"
            " AND EXISTS (SELECT * FROM triples t WHERE t.chunk = chunks.row)"
            f" ORDER BY id LIMIT {BATCH}"
        )
        sql = """
            SELECT c.id, t.subject, t.predicate, t.object, t.origin
            FROM triples t JOIN chunks c ON c.row = t.chunk WHERE t.chunk = ANY(%s)
            ORDER BY c.id, t.origin, t.subject, t.predicate, t.object
        """
        while chunks := self._rows(batch, (last,)):
            yield from (Triple(*row) for row in self._rows(sql, ([row for row, _ in chunks],)))
            last = chunks[-1][1]

    def quarantined(self) -> Mapping[str, str]:
        return dict(self._rows(QUARANTINED))

    def extractions(self) -> Iterator[tuple[str, str, str | None]]:
        yield from self._rows(EXTRACTIONS)  # pyright: ignore[reportReturnType]  (id, origin, quarantine)

    def extracted(self, origin: str = "") -> set[str]:
        sql = "SELECT c.id FROM extracted e JOIN chunks c ON c.row = e.chunk WHERE starts_with(e.origin, %s)"
        return {id for (id,) in self._rows(sql, (asked(origin),))}

    def keyword(self, query: str, limit: int) -> list[tuple[str, float]]:
        wanted = parse_keywords(query)
        phrases = [word_text(" ".join(words)) for words in wanted.phrases]
        words = [word_text(word) for word in wanted.words]
        if limit <= 0 or not (phrases or words):
            return []
        both = " && ".join(["phraseto_tsquery('words', %s)"] * len(phrases))
        some = " || ".join(["plainto_tsquery('words', %s)"] * len(words))
        if phrases and words:
            match, values = (
                f"({both}) && (phraseto_tsquery('words', %s) || {some})",
                [*phrases, phrases[0], *words],
            )
        else:
            match, values = both or some, phrases or words
        return self._rows(
            f"SELECT id, ts_rank('{_WEIGHTS}', words, query, 1)::float8 AS score"
            f" FROM chunks, (SELECT {match} AS query) AS wanted"
            f" WHERE words @@ query ORDER BY score DESC, id LIMIT {int(limit)}",
            values,
        )  # pyright: ignore[reportReturnType]  (id, score)

    def nearest(self, vector: np.ndarray, limit: int) -> list[tuple[str, float]]:
        wanted = query_vector(vector, self._settings.dimensions)
        if limit <= 0:
            return []
        # In single precision: of the question nothing is lost, and nothing in the sums.
        text = f"[{','.join(map(repr, wanted.tolist()))}]"
        return self._rows(
            "SELECT c.id, -(v.vector::vector <#> %s::vector) AS score FROM vectors v"
            f" JOIN chunks c ON c.row = v.chunk ORDER BY score DESC, c.id LIMIT {int(limit)}",
            (text,),
        )  # pyright: ignore[reportReturnType]  (id, score)

    def dump(self) -> Iterator[str]:
        return dump_lines(self)


def word_text(text: str) -> str:
    """Words as the full-text index takes them: folded, separated by spaces."""
    return " ".join(words_of(fold(text[:MAX_WORD_TEXT])))[:MAX_WORD_TEXT]
