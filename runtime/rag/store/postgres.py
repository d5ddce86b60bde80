"""The store in a PostgreSQL database with pgvector, for more than one machine."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ....ir.errors import InputError
from ...cache_folder import cache_folder
from ..types import Document, Triple
from .base import Record, Settings, StoreReader
from .common import NewestState, Pool, next_generation
from .lock import WriteRight, refusal
from .postgres_schema import TABLES, VERSION, connect, create_tables, explained, migrate, place_of, version_of
from .postgres_state import PostgresState
from .postgres_write import delete_documents, put_records, put_vectors
from .records import (
    asked,
    check_record,
    check_settings,
    check_triples,
    check_vector,
    origins_of,
    settings_of,
    settings_text,
)

if TYPE_CHECKING:
    from .postgres_schema import Connection

_BATCH_CHUNKS = 512
"""Chunks that are sent together."""
_ATTEMPTS = 12
"""More than the connections that are kept: after a restart of the server each of those fails once."""


class PostgresStore(NewestState):
    """A store in a schema of the database at the URL `location`."""

    def __init__(self, location: str, *, create: bool = False, read_only: bool = False) -> None:
        self._place = place_of(location)
        self._address = location
        self._read_only = read_only
        self._closed = False
        self._readers: Pool[Connection] = Pool(self._connect, _close, self._place.location)
        self._writer: Connection | None = None
        self._process = os.getpid()
        key = f"postgres:{self._place.location}:{self._place.name}"
        self._right = WriteRight(key, self._place.location, self._take, self._drop)
        try:
            self._open(create and not read_only)
            with self.reading() as state:
                assert isinstance(state, PostgresState)
                identity = state.identity
        except BaseException:
            self.close()
            raise
        self._digest = hashlib.sha256(identity.encode()).hexdigest()[:32]

    # Opening ---------------------------------------------------------------------------------------------

    def _open(self, create: bool) -> None:
        connection = self._connect()
        with contextlib.closing(connection), explained(self._place):
            version = version_of(connection, self._place)
            if version is None and create:
                create_tables(connection, self._place)
                version = version_of(connection, self._place)
        if version is None:
            raise InputError(
                f"{self._place.location}: holds no store {self._place.name!r}",
                remedy="make one with `llmc rag index FOLDER --store URL`",
            )
        if version < VERSION:
            self._check_writable()
            with self._right.held(long=False), explained(self._place):
                migrate(self._writing_connection(), self._place)

    def _connect(self) -> Connection:
        return connect(self._place, read_only=self._read_only)

    # Reading ---------------------------------------------------------------------------------------------

    @property
    def location(self) -> str:
        return self._place.location

    @property
    def address(self) -> str:
        return self._address

    @property
    def cache_folder(self) -> str:
        return str(cache_folder() / "rag" / self._digest)

    @contextlib.contextmanager
    def reading(self) -> Generator[StoreReader]:
        connection = self._begin()
        state: PostgresState | None = None
        try:
            state = PostgresState(connection, self._place)
            yield state
        finally:
            if state is not None:
                state.end()
            self._end(connection)

    def _begin(self) -> Connection:
        """A connection in a transaction that sees one state. Those that the server has ended are replaced."""
        import psycopg

        for attempt in range(_ATTEMPTS):
            connection = self._readers.take()
            try:
                connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
                return connection
            except psycopg.OperationalError as error:
                _close(connection)
                if attempt == _ATTEMPTS - 1:
                    with explained(self._place):
                        raise error from None
        raise AssertionError("the last attempt returns or raises")

    def _end(self, connection: Connection) -> None:
        import psycopg

        try:
            connection.execute("ROLLBACK")
            self._readers.give(connection)
        except psycopg.Error:
            _close(connection)

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
            raise InputError(f"{self.location}: was opened for reading only", remedy="open it for writing")

    def _take(self) -> None:
        """Take the advisory lock, on the connection that then writes. It ends with the connection."""
        import psycopg

        with explained(self._place):
            try:
                taken = self._try_lock()
            except psycopg.OperationalError:  # the server has ended the connection since the last write
                self._forget_writer()
                taken = self._try_lock()
            if not taken:
                raise refusal(self.location, self._holder())

    def _try_lock(self) -> bool:
        row = (
            self._writing_connection()
            .execute("SELECT pg_try_advisory_lock(%s, %s)", self._place.key)
            .fetchone()
        )
        return row == (True,)

    def _holder(self) -> str:
        row = self._writing_connection().execute(
            "SELECT l.pid, a.application_name FROM pg_locks l LEFT JOIN pg_stat_activity a ON a.pid = l.pid"
            " WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 2"
            " AND l.classid = %s AND l.objid = %s"
            " AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())",
            self._place.key,
        ).fetchone()  # fmt: skip
        if row is None:
            return "another process"
        return f"{row[1] or 'another program'} (PostgreSQL's process {row[0]})"

    def _drop(self) -> None:
        import psycopg

        if self._writer is not None:
            try:
                self._writer.execute("SELECT pg_advisory_unlock(%s, %s)", self._place.key)
            except psycopg.Error:  # the connection is gone, and the lock with it
                self._forget_writer()

    def _writing_connection(self) -> Connection:
        """The one that writes, whoever has the right; not one that a parent process left."""
        if self._process != os.getpid():
            self._writer, self._process = None, os.getpid()
        if self._writer is None:
            self._writer = self._connect()
        return self._writer

    def _forget_writer(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None and self._process == os.getpid():
            _close(writer)

    @contextlib.contextmanager
    def _transaction(self, *, new_generation: bool = True, durable: bool = True) -> Generator[_Change]:
        """One transaction. What changes something makes a new generation, unless no search could tell. One
        that is not `durable` can be computed again, waits for no disk and may be lost when the server fails.
        """
        self._check_writable()
        with self._right.held(long=False), explained(self._place):
            # Not made anew where it broke: the right to write broke with it.
            connection = self._writer
            if connection is None or connection.closed:
                raise InputError(f"{self.location}: lost the connection while it wrote", remedy="try again")
            if connection.info.transaction_status != 0:
                raise RuntimeError("a write inside of a write of the same store")
            with connection.transaction():
                if not durable:
                    connection.execute("SET LOCAL synchronous_commit = off")
                change = _Change(connection, _meta(connection, "settings"))
                yield change
                if new_generation and change.rows:
                    new = next_generation(int(_meta(connection, "generation")), time.time_ns())
                    connection.execute("UPDATE meta SET value = %s WHERE key = 'generation'", (str(new),))

    def put(self, records: Iterable[Record]) -> None:
        with self._transaction() as change:
            batch: dict[str, Record] = {}
            chunks = 0
            for record in records:
                check_record(record, change.settings)
                if record.document.id in batch or chunks >= _BATCH_CHUNKS:
                    put_records(change.connection, list(batch.values()))
                    batch, chunks = {}, 0
                batch[record.document.id] = record
                chunks += 1 + len(record.chunks)
                change.rows += 1
            put_records(change.connection, list(batch.values()))

    def touch(self, documents: Iterable[Document]) -> None:
        with (
            self._transaction(new_generation=False, durable=False) as change,
            change.connection.cursor() as cursor,
        ):
            cursor.executemany(
                "UPDATE documents SET size = %s, modified_ns = %s WHERE id = %s",
                [(int(one.size), int(one.modified_ns), asked(one.id)) for one in documents],
            )

    def delete(self, ids: Iterable[str]) -> int:
        with self._transaction() as change:
            change.rows = delete_documents(change.connection, list(ids))
            return change.rows

    def set_settings(self, settings: Settings) -> None:
        check_settings(settings)
        with self._transaction() as change:
            held = change.execute("SELECT EXISTS (SELECT * FROM vectors)").fetchone()
            if held == (True,) and settings.dimensions != change.settings.dimensions:
                raise InputError(
                    f"{self.location}: its vectors are of [{change.settings.dimensions}],"
                    f" not [{settings.dimensions}]",
                    remedy="drop the vectors first",
                )
            text = settings_text(settings)
            change.write("UPDATE meta SET value = %s WHERE key = 'settings' AND value <> %s", (text, text))

    def set_vectors(self, vectors: Mapping[str, np.ndarray]) -> None:
        with self._transaction(durable=False) as change:
            for id, vector in vectors.items():
                check_vector(f"chunk {id}", vector, change.settings)
            found = change.execute(
                "SELECT row, id FROM chunks WHERE id = ANY(%s)", ([asked(id) for id in vectors],)
            ).fetchall()
            rows = [row for row, _ in found]
            change.write("DELETE FROM vectors WHERE chunk = ANY(%s)", (rows,))
            put_vectors(change.connection, [(row, vectors[id]) for row, id in found])
            change.rows += len(rows)

    def drop_vectors(self) -> None:
        with self._transaction(durable=False) as change:
            change.write("DELETE FROM vectors")

    def put_triples(
        self, chunk: str, triples: Sequence[Triple], *, origin: str = "", quarantine: str | None = None
    ) -> None:
        check_triples(chunk, triples, origin, quarantine)
        with self._transaction(durable=False) as change:
            found = change.execute("SELECT row FROM chunks WHERE id = %s", (asked(chunk),)).fetchone()
            if found is None:
                raise InputError(f"{self.location}: has no chunk {chunk[:80]!r}")
            origins = origins_of(triples, origin)
            change.write("DELETE FROM triples WHERE chunk = %s AND origin = ANY(%s)", (found[0], origins))
            different = {(one.origin, one.subject, one.predicate, one.object) for one in triples}
            with change.connection.cursor() as cursor:
                cursor.executemany(
                    "INSERT INTO triples VALUES (%s, %s, %s, %s, %s)", [(found[0], *one) for one in different]
                )
            change.write(
                "DELETE FROM extracted WHERE chunk = %s AND quarantine IS NOT NULL"
                " AND split_part(origin, ':', 1) = ANY(%s)",
                (found[0], [one.partition(":")[0] for one in origins]),
            )
            change.write(
                "INSERT INTO extracted (chunk, origin, quarantine) SELECT %s, unnest(%s::text[]), %s"
                " ON CONFLICT (chunk, origin) DO UPDATE SET quarantine = excluded.quarantine",
                (found[0], origins, quarantine),
            )

    def vacuum(self) -> None:
        """Write the tables anew without gaps. Who reads meanwhile waits; where somebody reads for longer than
        some seconds, InputError says so.
        """
        self._check_writable()
        with self._right.held(long=False), explained(self._place):
            connection = self._writing_connection()
            connection.execute("SET lock_timeout = '5s'")
            try:
                for table in TABLES:
                    connection.execute(f"VACUUM (FULL, ANALYZE) {table}".encode())
            finally:
                connection.execute("RESET lock_timeout")

    def close(self) -> None:
        self._closed = True
        self._readers.close()
        self._forget_writer()


class _Change:
    """A transaction that writes: its settings, and how many rows it changed so far."""

    def __init__(self, connection: Connection, settings: str) -> None:
        self.connection = connection
        self.settings: Settings = settings_of(settings)
        self.rows = 0

    def execute(self, sql: str, values: Sequence[Any] = ()) -> Any:
        return self.connection.execute(sql.encode(), values)

    def write(self, sql: str, values: Sequence[Any] = ()) -> None:
        self.rows += max(0, self.execute(sql, values).rowcount)


def _meta(connection: Connection, key: str) -> str:
    row = connection.execute("SELECT value FROM meta WHERE key = %s", (key,)).fetchone()
    if row is None:
        raise InputError(f"the store's {key} is gone: it is damaged", remedy="index again")
    return row[0]


def _close(connection: Connection) -> None:
    connection.close()
