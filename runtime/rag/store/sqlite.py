"""The store in one SQLite file, with a write-ahead log: readers see the state in which they began."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Generator, Iterable, Mapping, Sequence

import numpy as np

from ....ir.errors import InputError
from ..types import Document, Triple
from .base import Record, Settings, StoreReader
from .common import NewestState, Pool, next_generation
from .connect import Access, connect, explained
from .lock import FileLock, WriteRight
from .matrix import MatrixCache
from .records import (
    asked,
    check_record,
    check_settings,
    check_triples,
    check_vector,
    origins_of,
    settings_of,
    settings_text,
    vector_bytes,
)
from .schema import VERSION, check_file, check_sqlite, check_version, create_tables, migrate
from .sqlite_state import SqliteState
from .sqlite_write import delete_document, put_record


class SqliteStore(NewestState):
    """A store in the file `location`."""

    def __init__(self, location: str, *, create: bool = False, read_only: bool = False) -> None:
        check_sqlite(location)
        self._location = location
        self._path = os.path.realpath(location)
        self._read_only = read_only
        self._closed = False
        if create and not read_only and not os.path.lexists(self._path):
            _create(self._path, location)
        if not os.path.lexists(self._path):
            raise InputError(f"{location}: no such store", remedy="make one with `llmc rag index FOLDER`")
        check_file(self._path, location)
        self._matrix = MatrixCache(self.cache_folder)
        self._stamp: tuple[int, ...] | None = None
        self._readers: Pool[sqlite3.Connection] = Pool(self._reader, sqlite3.Connection.close, location)
        self._writer: sqlite3.Connection | None = None
        self._process = os.getpid()
        lock = FileLock(f"{self._path}-lock", location)
        self._right = WriteRight(f"file:{self._path}", location, lock.take, lock.drop)
        try:
            self._migrate_if_older()
            with self.reading():
                pass
        except BaseException:
            self.close()
            raise

    # Opening ---------------------------------------------------------------------------------------------

    def _migrate_if_older(self) -> None:
        with explained(self._location), contextlib.closing(self._reader()) as connection:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
        check_version(version, self._location)
        if version < VERSION and not self._read_only:
            with self._right.held(long=False), explained(self._location):
                migrate(self._writing_connection())

    def _reader(self) -> sqlite3.Connection:
        """A connection that can read: as usual, or of a file in a folder where nobody can write."""
        access: Access = "read" if self._stamp is None else "immutable"
        with explained(self._location):
            try:
                return connect(self._path, access)
            except sqlite3.OperationalError as error:
                names = ("SQLITE_READONLY_DIRECTORY", "SQLITE_CANTOPEN", "SQLITE_READONLY_CANTINIT")
                if error.sqlite_errorname not in names or os.path.exists(f"{self._path}-wal"):
                    raise
            self._stamp = self._file_stamp()
            return connect(self._path, "immutable")

    def _file_stamp(self) -> tuple[int, ...]:
        found = os.stat(self._path)
        return (found.st_ino, found.st_size, found.st_mtime_ns, int(os.path.exists(f"{self._path}-wal")))

    # Reading ---------------------------------------------------------------------------------------------

    @property
    def location(self) -> str:
        return self._location

    @property
    def address(self) -> str:
        return self._path

    @property
    def cache_folder(self) -> str:
        return f"{self._path}.cache"

    @contextlib.contextmanager
    def reading(self) -> Generator[StoreReader]:
        stamp = self._stamp
        if stamp is not None and stamp != self._file_stamp():
            # Somebody who may write has come: from now on read with SQLite's locks, or of the new file.
            self._readers.empty()
            self._stamp = stamp = None
        connection = self._readers.take()
        stamp = self._stamp
        state: SqliteState | None = None
        try:
            with explained(self._location):
                connection.execute("BEGIN")
            state = SqliteState(connection, self._location, self._matrix)
            yield state
        except InputError:
            self._check_unchanged(stamp)  # what looks like damage may be a writer's work
            raise
        finally:
            if state is not None:
                state.end()
            try:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                self._readers.give(connection)
            except sqlite3.Error:
                connection.close()
        self._check_unchanged(stamp)

    def _check_unchanged(self, stamp: tuple[int, ...] | None) -> None:
        """Raise InputError where a file that is read without locks has changed since."""
        if stamp is not None and stamp != self._file_stamp():
            raise InputError(f"{self._location}: was written to while it was read", remedy="ask again")

    # Writing ---------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def writing(self) -> Generator[None]:
        self._check_writable()
        with self._right.held(long=True):
            yield

    def _check_writable(self) -> None:
        if self._closed:
            raise InputError(f"{self.location}: the store was closed")
        if self._read_only:
            raise InputError(f"{self._location}: was opened for reading only", remedy="open it for writing")

    def _writing_connection(self) -> sqlite3.Connection:
        """The one that writes, whoever has the right; not one that a parent process left."""
        if self._writer is None or self._process != os.getpid():
            self._writer = connect(self._path, "write")
            self._process = os.getpid()
        return self._writer

    @contextlib.contextmanager
    def _transaction(
        self, *, new_generation: bool = True, durable: bool = True
    ) -> Generator[sqlite3.Connection]:
        """One transaction. What changes something makes a new generation, unless no search could tell.

        `durable`: it survives a power failure from the moment that it ends, which costs an fsync; a document
        whose upload was confirmed must. What can be computed again may be lost with the power, though with
        nothing that came before it; a killed process loses nothing either way.
        """
        self._check_writable()
        with self._right.held(long=False), explained(self._location):
            connection = self._writing_connection()
            if connection.in_transaction:
                raise RuntimeError("a write inside of a write of the same store")
            connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            connection.execute("BEGIN IMMEDIATE")
            try:
                before = connection.total_changes
                (version,) = connection.execute("PRAGMA user_version").fetchone()
                check_version(version, self._location)
                yield connection
                if new_generation and connection.total_changes != before:
                    (now,) = connection.execute("SELECT value FROM meta WHERE key = 'generation'").fetchone()
                    new = next_generation(int(now), time.time_ns())
                    connection.execute("UPDATE meta SET value = ? WHERE key = 'generation'", (new,))
                connection.execute("COMMIT")
            except BaseException:
                # SQLite has rolled back by itself where the disk is full.
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    def put(self, records: Iterable[Record]) -> None:
        with self._transaction() as connection:
            settings = _settings_of(connection)
            for record in records:
                check_record(record, settings)
                put_record(connection, record)

    def touch(self, documents: Iterable[Document]) -> None:
        with self._transaction(new_generation=False, durable=False) as connection:
            connection.executemany(
                "UPDATE documents SET size = ?, modified_ns = ? WHERE id = ?",
                ((int(one.size), int(one.modified_ns), asked(one.id)) for one in documents),
            )

    def delete(self, ids: Iterable[str]) -> int:
        with self._transaction() as connection:
            return sum(delete_document(connection, id) for id in ids)

    def set_settings(self, settings: Settings) -> None:
        check_settings(settings)
        with self._transaction() as connection:
            text, old = settings_text(settings), _settings_of(connection)
            (vectors,) = connection.execute("SELECT EXISTS (SELECT * FROM vectors)").fetchone()
            if vectors and settings.dimensions != old.dimensions:
                raise InputError(
                    f"{self._location}: its vectors are of [{old.dimensions}], not [{settings.dimensions}]",
                    remedy="drop the vectors first",
                )
            connection.execute("UPDATE meta SET value = ?1 WHERE key = 'settings' AND value <> ?1", (text,))

    def set_vectors(self, vectors: Mapping[str, np.ndarray]) -> None:
        with self._transaction(durable=False) as connection:
            settings = _settings_of(connection)
            for id, vector in vectors.items():
                check_vector(f"chunk {id}", vector, settings)
            connection.executemany(
                "INSERT INTO vectors SELECT row, ? FROM chunks WHERE id = ?"
                " ON CONFLICT DO UPDATE SET vector = excluded.vector",
                ((vector_bytes(vector), asked(id)) for id, vector in vectors.items()),
            )

    def drop_vectors(self) -> None:
        with self._transaction(durable=False) as connection:
            connection.execute("DELETE FROM vectors")

    def put_triples(
        self, chunk: str, triples: Sequence[Triple], *, origin: str = "", quarantine: str | None = None
    ) -> None:
        check_triples(chunk, triples, origin, quarantine)
        with self._transaction(durable=False) as connection:
            found = connection.execute("SELECT row FROM chunks WHERE id = ?", (asked(chunk),)).fetchone()
            if found is None:
                raise InputError(f"{self._location}: has no chunk {chunk[:80]!r}")
            row: int = found[0]
            origins = origins_of(triples, origin)
            for one in origins:
                connection.execute("DELETE FROM triples WHERE chunk = ? AND origin = ?", (row, one))
            connection.executemany(
                "INSERT OR IGNORE INTO triples VALUES (?, ?, ?, ?, ?)",
                ((row, one.origin, one.subject, one.predicate, one.object) for one in triples),
            )
            connection.executemany(
                "DELETE FROM extracted WHERE chunk = ? AND quarantine IS NOT NULL"
                " AND substr(origin || ':', 1, instr(origin || ':', ':') - 1) = ?",
                ((row, kind) for kind in sorted({one.partition(":")[0] for one in origins})),
            )
            connection.executemany(
                "INSERT OR REPLACE INTO extracted VALUES (?, ?, ?)",
                ((row, one, quarantine) for one in origins),
            )

    def vacuum(self) -> None:
        """Write the file anew without gaps. Readers go on; while one reads an older state, the file cannot
        become smaller, and InputError says so.
        """
        self._check_writable()
        with self._right.held(long=False), explained(self._location):
            connection = self._writing_connection()
            connection.execute("INSERT INTO keywords(keywords) VALUES ('optimize')")
            connection.execute("VACUUM")
            connection.execute("PRAGMA busy_timeout = 5000")
            busy, _, _ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            connection.execute("PRAGMA busy_timeout = 30000")
        if busy:
            raise InputError(
                f"{self._location}: was written anew, but cannot shrink while somebody reads the old state",
                remedy="run it again when they are done",
            )

    def close(self) -> None:
        self._closed = True
        self._readers.close()
        writer, self._writer = self._writer, None
        if writer is not None and self._process == os.getpid():
            writer.close()


def _settings_of(connection: sqlite3.Connection) -> Settings:
    (text,) = connection.execute("SELECT value FROM meta WHERE key = 'settings'").fetchone()
    return settings_of(text)


def _create(path: str, name: str) -> None:
    """Make an empty store, whole from the moment that its name exists; leave one that somebody else made."""
    partial = f"{path}.new-{os.getpid()}-{threading.get_ident()}"
    try:
        with explained(name):
            connection = sqlite3.connect(partial, isolation_level=None)
            with contextlib.closing(connection):
                create_tables(connection)
        try:
            os.link(partial, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            if not os.path.lexists(path):
                os.rename(partial, path)
    except OSError as error:
        raise InputError(f"{name}: cannot be made: {error.strerror}", remedy="check its folder") from None
    finally:
        with contextlib.suppress(OSError):
            os.unlink(partial)
