"""Where documents, their chunks and what was worked out of them are kept: one SQLite file, or PostgreSQL."""

from __future__ import annotations

import os

from ....ir.errors import InputError
from .base import Record, Settings, Store, StoreReader
from .lock import BusyError

__all__ = ["BusyError", "Record", "Settings", "Store", "StoreReader", "is_postgres", "open_store"]

_POSTGRES = ("postgresql://", "postgres://")


def is_postgres(location: str) -> bool:
    """Whether a location names a PostgreSQL database and not a file."""
    return location.startswith(_POSTGRES)


def open_store(location: str | os.PathLike[str], *, create: bool = False, read_only: bool = False) -> Store:
    """Open the store at a path or a `postgresql://…` URL.

    Args:
        location: a file, by custom NAME.kb; or a URL as PostgreSQL's own programs take it, to which
            `?llmc_store=NAME` adds the schema that holds the store ("llmc" where it is not said).
        create: make an empty store where there is none. One that is there is opened.
        read_only: every write is an error.

    Raises InputError where there is no store, it is another program's, damaged or of a newer llmc, or cannot
    be reached; nothing is changed then.
    """
    name = os.fspath(location)
    if not name or "\0" in name:
        raise InputError("the store has no name", remedy="name a file, for example notes.kb")
    if is_postgres(name):
        from .postgres import PostgresStore

        return PostgresStore(name, create=create, read_only=read_only)
    from .sqlite import SqliteStore

    return SqliteStore(name, create=create, read_only=read_only)
