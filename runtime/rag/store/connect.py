"""Connections to one SQLite file, and what to tell people of SQLite's errors."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Generator
from typing import Literal
from urllib.parse import quote

from ....ir.errors import InputError

_TIMEOUT = 30.0
"""Seconds to wait for what SQLite itself locks, for milliseconds: recovery, closing the last connection."""

_CAUSES = {
    "SQLITE_FULL": ("the disk is full", "make room; nothing of the store is lost"),
    "SQLITE_READONLY": ("may not be written", "check the permissions of the file and its folder"),
    "SQLITE_CANTOPEN": ("cannot be opened", "check the permissions of the file and its folder"),
    "SQLITE_PERM": ("cannot be opened", "check the permissions of the file and its folder"),
    "SQLITE_AUTH": ("cannot be opened", "check the permissions of the file and its folder"),
    "SQLITE_NOTADB": ("is damaged", "index the documents into a new store"),
    "SQLITE_CORRUPT": ("is damaged", "index the documents into a new store"),
    "SQLITE_SCHEMA": ("was changed by another program", "open it again"),
    "SQLITE_BUSY": ("is locked by another program", "end the program that holds it open"),
    "SQLITE_LOCKED": ("is locked by another program", "end the program that holds it open"),
    "SQLITE_IOERR": ("reading or writing it failed", "check the disk; nothing written before is lost"),
    "SQLITE_NOMEM": ("memory ran out", "close other programs"),
    "SQLITE_TOOBIG": ("a document is too large for it", "leave that document out"),
    "SQLITE_CONSTRAINT": ("refused what two documents claim", "give each chunk an id of its own"),
}


@contextlib.contextmanager
def explained(name: str) -> Generator[None]:
    """Turn an error of SQLite into an InputError that names the store, the cause and the way out."""
    try:
        yield
    except sqlite3.Error as error:
        raise explain(error, name) from None


def explain(error: sqlite3.Error, name: str) -> InputError:
    """What to tell people of an error of SQLite."""
    if isinstance(error, sqlite3.ProgrammingError):
        return InputError(f"{name}: the store was closed")
    code: str = getattr(error, "sqlite_errorname", None) or ""
    for prefix, (cause, remedy) in _CAUSES.items():
        if code.startswith(prefix):
            return InputError(f"{name}: {cause} ({error})", remedy=remedy)
    # Missing tables or columns: the file says that it is ours and is not.
    return InputError(f"{name}: is damaged or was changed by another program ({error})", remedy="index again")


def header_of(path: str) -> sqlite3.Connection:
    """A connection that can read the header of a file, and changes nothing of it."""
    connection = sqlite3.connect(_uri(path, "mode=ro&immutable=1"), uri=True, isolation_level=None)
    # Otherwise a file that is shorter than its header says is refused. That is so while a log is copied into
    # it, and for as long as that is kept from ending by a full disk.
    connection.execute("PRAGMA writable_schema = ON")
    return connection


def _uri(path: str, mode: str) -> str:
    return f"file:{quote(os.fsencode(path))}?{mode}"


Access = Literal["read", "write", "immutable"]


class _Connection(sqlite3.Connection):
    """One that is closed where nobody holds it any more: Python warns of others since 3.13, and a store that
    is dropped without `close` leaves its readers.
    """

    def __del__(self) -> None:
        with contextlib.suppress(sqlite3.ProgrammingError):  # it could not be opened
            self.close()


def connect(path: str, access: Access) -> sqlite3.Connection:
    """A connection in which transactions are begun and ended by hand; it has read once.

    `immutable` is for a file in a folder that cannot be written while nobody writes to it: SQLite's shared
    memory cannot be made there.
    """
    mode = "mode=ro&immutable=1" if access == "immutable" else "mode=rw"
    connection = sqlite3.connect(
        _uri(path, mode),
        uri=True,
        timeout=_TIMEOUT,
        isolation_level=None,
        check_same_thread=False,  # the pool hands a connection to one thread at a time
        factory=_Connection,
    )
    try:
        # A store may come from a stranger: its schema runs no functions, and broken pages are noticed. No
        # memory map: it would count the whole file as this process's memory, and a file that another program
        # cuts would end the process.
        connection.executescript(
            "PRAGMA trusted_schema = OFF; PRAGMA cell_size_check = ON; PRAGMA mmap_size = 0;"
            "PRAGMA cache_size = -8192; PRAGMA foreign_keys = ON;"
        )
        if access == "write":
            # Deleted text is overwritten, not only forgotten.
            connection.executescript(
                "PRAGMA journal_mode = WAL; PRAGMA secure_delete = ON;PRAGMA journal_size_limit = 67108864;"
            )
        else:
            connection.execute("PRAGMA query_only = ON")
            connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection
