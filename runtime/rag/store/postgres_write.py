"""Writing and deleting documents in the PostgreSQL store, many at a time, inside the caller's transaction."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..types import Chunk
from .base import Record
from .postgres_state import word_text
from .records import asked, document_row, feature_row

if TYPE_CHECKING:
    from .postgres_schema import Connection

_DOCUMENTS = """
    INSERT INTO documents (row, id, path, title, media_type, digest, size, modified_ns, metadata)
    SELECT * FROM unnest(%s::bigint[], %s::text[], %s::text[], %s::text[], %s::text[], %s::text[],
                         %s::bigint[], %s::bigint[], %s::text[])
    ON CONFLICT (id) DO UPDATE SET path = excluded.path, title = excluded.title,
        media_type = excluded.media_type, digest = excluded.digest, size = excluded.size,
        modified_ns = excluded.modified_ns, metadata = excluded.metadata
    RETURNING id, row
"""
_CHUNKS = """
    INSERT INTO chunks (row, id, document, ordinal, title, heading, text, "start", "end", page, tokens,
                        mentions, words)
    SELECT row, id, document, ordinal, title, heading, text, "start", "end", page, tokens, mentions,
           setweight(to_tsvector('words', title_words), 'A')
           || setweight(to_tsvector('words', text_words), 'D')
    FROM unnest(%s::bigint[], %s::text[], %s::bigint[], %s::bigint[], %s::text[], %s::text[], %s::text[],
                %s::bigint[], %s::bigint[], %s::bigint[], %s::bigint[], %s::bigint[], %s::text[], %s::text[])
        AS new (row, id, document, ordinal, title, heading, text, "start", "end", page, tokens, mentions,
                title_words, text_words)
    ON CONFLICT (row) DO UPDATE SET ordinal = excluded.ordinal, title = excluded.title,
        heading = excluded.heading, text = excluded.text, "start" = excluded."start", "end" = excluded."end",
        page = excluded.page, tokens = excluded.tokens, mentions = excluded.mentions, words = excluded.words
"""
_FEATURES = """
    INSERT INTO features
    SELECT * FROM unnest(%s::bigint[], %s::bytea[], %s::bytea[], %s::bytea[], %s::bytea[], %s::bytea[])
"""
_COPY_HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_COPY_END = struct.pack(">h", -1)


def put_records(connection: Connection, records: Sequence[Record]) -> None:
    """Write documents of different ids, each in place of the one of its id.

    A chunk whose id was there before keeps its row, and with it what a model extracted from it: the id says
    that the text is the same.
    """
    if not records:
        return
    free = _free_row(connection, "documents")
    columns = zip(*(document_row(record.document) for record in records), strict=True)
    numbers = list(range(free, free + len(records)))
    found = connection.execute(_DOCUMENTS, [numbers, *map(list, columns)]).fetchall()
    documents: dict[str, int] = dict(found)
    old = {
        id: (row, document)
        for id, row, document in connection.execute(
            "SELECT id, row, document FROM chunks WHERE document = ANY(%s)", (list(documents.values()),)
        ).fetchall()
    }
    free = _free_row(connection, "chunks")
    placed: list[tuple[int, int, Chunk]] = []
    kept: set[int] = set()
    for record in records:
        document = documents[record.document.id]
        for chunk in record.chunks:
            row, owner = old.get(chunk.id, (free, -1))
            if owner == document:
                kept.add(row)
            else:
                row, free = free, free + 1
            placed.append((row, document, chunk))
    gone = [row for row, _ in old.values() if row not in kept]
    connection.execute("DELETE FROM chunks WHERE row = ANY(%s)", (gone,))
    for table in ("features", "vectors") if kept else ():
        connection.execute(f"DELETE FROM {table} WHERE chunk = ANY(%s)".encode(), (list(kept),))
    if placed:
        _put_chunks(connection, placed)


def _free_row(connection: Connection, table: str) -> int:
    """The row behind the last one. Nobody else writes."""
    row = connection.execute(f"SELECT coalesce(max(row), 0) + 1 FROM {table}".encode()).fetchone()
    return row[0] if row is not None else 1


def _put_chunks(connection: Connection, placed: Sequence[tuple[int, int, Chunk]]) -> None:
    rows = [row for row, _, _ in placed]
    fields = [
        (
            chunk.id,
            document,
            chunk.ordinal,
            chunk.title,
            chunk.heading,
            chunk.text,
            chunk.start,
            chunk.end,
            chunk.page,
            chunk.tokens,
            len(chunk.features.mentions),
            word_text(chunk.title),
            word_text(chunk.text),
        )
        for _, document, chunk in placed
    ]
    connection.execute(_CHUNKS, [rows, *map(list, zip(*fields, strict=True))])
    features = [feature_row(chunk.features) for _, _, chunk in placed]
    connection.execute(_FEATURES, [rows, *map(list, zip(*features, strict=True))])
    put_vectors(connection, [(row, chunk.vector) for row, _, chunk in placed if chunk.vector is not None])


def put_vectors(connection: Connection, vectors: Sequence[tuple[int, np.ndarray]]) -> None:
    """Add vectors of chunks that have none, in PostgreSQL's binary form: decimals would take far longer."""
    if not vectors:
        return
    with connection.cursor() as cursor, cursor.copy("COPY vectors FROM STDIN (FORMAT BINARY)") as copy:
        copy.write(_COPY_HEADER)
        for row, vector in vectors:
            data = struct.pack(">HH", len(vector), 0) + vector.astype(">f2").tobytes()
            copy.write(struct.pack(">hiqi", 2, 8, row, len(data)) + data)
        copy.write(_COPY_END)


def delete_documents(connection: Connection, ids: Sequence[str]) -> int:
    """Remove documents and all that came from them; how many there were."""
    known = [asked(id) for id in ids]
    return connection.execute("DELETE FROM documents WHERE id = ANY(%s)", (known,)).rowcount
