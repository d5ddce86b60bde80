"""The tables of the SQLite store: their schema, its versions, and whose file a file is.

What is read together lies together: the passages, their features (three times as large) and their vectors
are tables of their own with the same keys, so that reading all vectors touches nothing else. Rows are large
and written in bulk, hence ordinary tables keyed by small integers and not WITHOUT ROWID, which pays below a
twentieth of a page. The full-text index keeps no copy of the text (external content).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sqlite3
import stat
import time
from collections.abc import Callable

from ....ir.errors import InputError
from ..types import Mention
from .base import Settings
from .connect import explain, header_of
from .records import pack_mentions, settings_text

APPLICATION_ID = int.from_bytes(b"LLMC", "big")
VERSION = 3
PAGE_SIZE = 8192
"""A chunk's features take 2–4 KB: pages of 4 KB would leave a third of each empty or need a second one."""
OLDEST_SQLITE = (3, 38, 0)
"""STRICT tables are of 3.37; since 3.38 the functions for JSON are always there."""

SCHEMA = """
CREATE TABLE meta (
    key TEXT PRIMARY KEY,
    value ANY NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE documents (
    row INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    path TEXT NOT NULL,
    title TEXT NOT NULL,
    media_type TEXT NOT NULL,
    digest TEXT NOT NULL,
    size INTEGER NOT NULL,
    modified_ns INTEGER NOT NULL,
    metadata TEXT NOT NULL
) STRICT;
CREATE INDEX documents_path ON documents (path, id);

CREATE TABLE chunks (
    row INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    document INTEGER NOT NULL REFERENCES documents ON DELETE CASCADE,
    ordinal INTEGER NOT NULL,
    title TEXT NOT NULL,
    heading TEXT NOT NULL,
    text TEXT NOT NULL,
    "start" INTEGER NOT NULL,
    "end" INTEGER NOT NULL,
    page INTEGER,
    tokens INTEGER NOT NULL,
    mentions INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX chunks_document ON chunks (document, ordinal, mentions);

CREATE TABLE features (
    chunk INTEGER PRIMARY KEY REFERENCES chunks ON DELETE CASCADE,
    terms BLOB NOT NULL,
    title_counts BLOB NOT NULL,
    text_counts BLOB NOT NULL,
    spans BLOB NOT NULL,
    mentions BLOB NOT NULL
) STRICT;

CREATE TABLE vectors (
    chunk INTEGER PRIMARY KEY REFERENCES chunks ON DELETE CASCADE,
    vector BLOB NOT NULL
) STRICT;

CREATE TABLE triples (
    chunk INTEGER NOT NULL REFERENCES chunks ON DELETE CASCADE,
    origin TEXT NOT NULL,
    subject TEXT NOT NULL,
    predicate TEXT NOT NULL,
    object TEXT NOT NULL,
    PRIMARY KEY (chunk, origin, subject, predicate, object)
) STRICT, WITHOUT ROWID;

CREATE TABLE extracted (
    chunk INTEGER NOT NULL REFERENCES chunks ON DELETE CASCADE,
    origin TEXT NOT NULL,
    quarantine TEXT,
    PRIMARY KEY (chunk, origin)
) STRICT, WITHOUT ROWID;

CREATE VIRTUAL TABLE keywords USING fts5 (
    title, text,
    content = 'chunks', content_rowid = 'row',
    tokenize = 'porter unicode61 remove_diacritics 2'
);
"""


def _count_mentions(connection: sqlite3.Connection) -> None:
    """1 → 2: how many mentions a chunk has stands beside it, so that counting reads no features."""
    connection.execute("ALTER TABLE chunks ADD COLUMN mentions INTEGER NOT NULL DEFAULT 0")
    connection.execute(
        "UPDATE chunks SET mentions ="
        " (SELECT json_array_length(f.mentions) FROM features f WHERE f.chunk = chunks.row)"
    )
    connection.execute("DROP INDEX chunks_document")
    connection.execute("CREATE INDEX chunks_document ON chunks (document, ordinal, mentions)")


def _pack_mentions(connection: sqlite3.Connection) -> None:
    """2 → 3: mentions are arrays, which a hundred thousand passages can be read from without a JSON parser;
    and what was extracted says by what, so that a file's triples do not keep a model from reading a passage.
    """
    connection.create_function("packed", 1, packed, deterministic=True)
    for old, new in (("features", "features_3"), ("extracted", "extracted_3")):
        made = SCHEMA[SCHEMA.index(f"CREATE TABLE {old} (") :]
        connection.execute(made[: made.index(";")].replace(old, new, 1))
    connection.execute(
        "INSERT INTO features_3"
        " SELECT chunk, terms, title_counts, text_counts, spans, packed(mentions) FROM features"
    )
    connection.execute(
        "INSERT INTO extracted_3 SELECT DISTINCT e.chunk, t.origin, NULL"
        " FROM extracted e JOIN triples t ON t.chunk = e.chunk"
    )
    # Only a model leaves a passage without triples.
    connection.execute(
        "INSERT INTO extracted_3 SELECT chunk, 'llm:', quarantine FROM extracted"
        " WHERE quarantine IS NOT NULL OR chunk NOT IN (SELECT chunk FROM triples)"
    )
    for old in ("features", "extracted"):
        connection.execute(f"DROP TABLE {old}")
        connection.execute(f"ALTER TABLE {old}_3 RENAME TO {old}")


def packed(mentions: str) -> bytes:
    """Mentions as older versions kept them, a list in JSON, as they are kept now."""
    return pack_mentions([Mention(*one) for one in json.loads(mentions)])


MIGRATIONS: dict[int, Callable[[sqlite3.Connection], None]] = {1: _count_mentions, 2: _pack_mentions}
"""Version → what makes it the next one, in a transaction of the caller."""


def create_tables(connection: sqlite3.Connection) -> None:
    """Make an empty store in an empty database, all or nothing."""
    connection.execute(f"PRAGMA page_size = {PAGE_SIZE}")
    settings = settings_text(Settings()).replace("'", "''")
    connection.executescript(
        f"BEGIN EXCLUSIVE;{SCHEMA}"
        f"INSERT INTO meta VALUES ('generation', {time.time_ns() // 1000}), ('settings', '{settings}');"
        f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {VERSION}; COMMIT;"
    )
    connection.execute("PRAGMA journal_mode = WAL")


def migrate(connection: sqlite3.Connection) -> None:
    """Bring a store of an older version to this one, in one transaction."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        for older in range(version, VERSION):
            MIGRATIONS[older](connection)
        connection.execute(f"PRAGMA user_version = {VERSION}")
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise


def check_sqlite(name: str) -> None:
    """Raise InputError where Python's SQLite lacks what the tables need."""
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        raise InputError(
            f"{name}: this Python's SQLite is {sqlite3.sqlite_version}, stores need 3.38 or newer",
            remedy="use a newer Python, or a PostgreSQL store",
        )
    if not _has_fts5():
        raise InputError(
            f"{name}: this Python's SQLite was built without full-text search (FTS5)",
            remedy="use another Python, or a PostgreSQL store",
        )


@functools.cache
def _has_fts5() -> bool:
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        found = connection.execute("SELECT EXISTS (SELECT * FROM pragma_module_list WHERE name = 'fts5')")
        return found.fetchone() == (1,)


def check_file(path: str, name: str) -> None:
    """Raise InputError where a file is no store, or one of a newer llmc, before anything could change it.

    An immutable connection takes no locks, recovers nothing and writes nothing. It reads the header alone:
    without its log, the rest of a store that is being written may look damaged. The file is not opened by our
    own hand, because closing it would give up the locks of all other connections of this process (POSIX).
    """
    try:
        found = os.stat(path)
    except OSError as error:
        raise InputError(
            f"{name}: cannot be read: {error.strerror}", remedy="check its permissions"
        ) from None
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{name}: is not a file", remedy="name the store, a file that ends in .kb")
    if not found.st_size:
        raise InputError(f"{name}: is empty, so it is no store", remedy="name another, or remove it first")
    try:
        with contextlib.closing(header_of(path)) as connection:
            (application,) = connection.execute("PRAGMA application_id").fetchone()
            (version,) = connection.execute("PRAGMA user_version").fetchone()
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorname != "SQLITE_NOTADB":
            raise explain(error, name) from None
        raise InputError(
            f"{name}: is no SQLite file, so it is no store", remedy="name another file"
        ) from None
    if application != APPLICATION_ID:
        raise InputError(f"{name}: is an SQLite file of another program", remedy="name another file")
    check_version(version, name)


def check_version(version: int, name: str) -> None:
    """Raise InputError where a store is newer than what this llmc knows."""
    if version > VERSION:
        raise InputError(
            f"{name}: is of store version {version}, this llmc knows versions up to {VERSION}",
            remedy="use a newer llmc, or index the documents into a new store",
        )
    if version < 1:
        raise InputError(f"{name}: is damaged: it says store version {version}", remedy="index again")
