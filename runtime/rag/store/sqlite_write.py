"""Writing and deleting one document in the SQLite store, inside a transaction of the caller's.

The full-text index keeps no text of its own: it must be told what a row said before the row changes.
"""

from __future__ import annotations

import sqlite3

from ..types import Chunk
from .base import Record
from .records import asked, document_row, feature_row, vector_bytes


def put_record(connection: sqlite3.Connection, record: Record) -> None:
    """Write a document, in place of the one of its id.

    A chunk whose id was there before keeps its row, and with it what a model extracted from it: the id says
    that the text is the same.
    """
    document = _put_document(connection, record)
    _forget_keywords(connection, document)
    old: dict[str, int] = dict(
        connection.execute("SELECT id, row FROM chunks WHERE document = ?", (document,)).fetchall()
    )
    kept = {chunk.id: old[chunk.id] for chunk in record.chunks if chunk.id in old}
    gone = [(row,) for id, row in old.items() if id not in kept]
    connection.executemany("DELETE FROM chunks WHERE row = ?", gone)
    connection.executemany("DELETE FROM vectors WHERE chunk = ?", [(row,) for row in kept.values()])
    free: int = connection.execute("SELECT ifnull(max(row), 0) + 1 FROM chunks").fetchone()[0]
    placed: list[tuple[int, Chunk]] = []
    for chunk in record.chunks:
        if chunk.id in kept:
            placed.append((kept[chunk.id], chunk))
        else:
            placed.append((free, chunk))
            free += 1
    _put_chunks(connection, document, placed)


def delete_document(connection: sqlite3.Connection, id: str) -> int:
    """Remove a document and all that came from it; how many there were: 0 or 1."""
    found = connection.execute("SELECT row FROM documents WHERE id = ?", (asked(id),)).fetchone()
    if found is None:
        return 0
    _forget_keywords(connection, found[0])
    connection.execute("DELETE FROM documents WHERE row = ?", found)
    return 1


def _put_document(connection: sqlite3.Connection, record: Record) -> int:
    (row,) = connection.execute(
        "INSERT INTO documents (id, path, title, media_type, digest, size, modified_ns, metadata)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET path = excluded.path,"
        " title = excluded.title, media_type = excluded.media_type, digest = excluded.digest,"
        " size = excluded.size, modified_ns = excluded.modified_ns, metadata = excluded.metadata"
        " RETURNING row",
        document_row(record.document),
    ).fetchone()
    return row


def _forget_keywords(connection: sqlite3.Connection, document: int) -> None:
    connection.execute(
        "INSERT INTO keywords (keywords, rowid, title, text)"
        " SELECT 'delete', row, title, text FROM chunks WHERE document = ?",
        (document,),
    )


def _put_chunks(connection: sqlite3.Connection, document: int, placed: list[tuple[int, Chunk]]) -> None:
    connection.executemany(
        "INSERT INTO chunks (row, id, document, ordinal, title, heading, text,"
        ' "start", "end", page, tokens, mentions) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)'
        " ON CONFLICT (row) DO UPDATE SET ordinal = excluded.ordinal, title = excluded.title,"
        " heading = excluded.heading, text = excluded.text,"
        ' "start" = excluded."start", "end" = excluded."end", page = excluded.page,'
        " tokens = excluded.tokens, mentions = excluded.mentions",
        (
            (
                row,
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
            )
            for row, chunk in placed
        ),
    )
    connection.executemany(
        "INSERT OR REPLACE INTO features VALUES (?, ?, ?, ?, ?, ?)",
        ((row, *feature_row(chunk.features)) for row, chunk in placed),
    )
    connection.executemany(
        "INSERT OR REPLACE INTO vectors VALUES (?, ?)",
        ((row, vector_bytes(chunk.vector)) for row, chunk in placed if chunk.vector is not None),
    )
    connection.executemany(
        "INSERT INTO keywords (rowid, title, text) VALUES (?, ?, ?)",
        ((row, chunk.title, chunk.text) for row, chunk in placed),
    )
