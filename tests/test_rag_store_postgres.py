"""The PostgreSQL store's own: URLs, passwords, missing pieces, several stores in one database."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llmc.ir.errors import InputError
from llmc.runtime.rag.knowledge import KnowledgeBase
from llmc.runtime.rag.store import is_postgres, open_store
from llmc.runtime.rag.store import postgres_schema as schema

from .rag_records import DIMENSIONS, SETTINGS, check_whole, record, triples_of

pytest_plugins = ("tests.rag_stores",)


@pytest.fixture
def url(postgres_url: str) -> str:
    return postgres_url


def execute(url: str, sql: str) -> list[tuple[Any, ...]]:
    import psycopg

    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(sql.encode())
        return cursor.fetchall() if cursor.description else []


def make(location: str, documents: int = 4) -> None:
    store = open_store(location, create=True)
    store.set_settings(SETTINGS)
    store.put(record(number) for number in range(documents))
    store.close()


@pytest.mark.parametrize(
    ("given", "shown", "name"),
    [
        ("postgresql://u:secret@h:5433/db", "postgresql://u@h:5433/db", "llmc"),
        ("postgres://u:s%40cret@h/db?llmc_store=a_1", "postgres://u@h/db?llmc_store=a_1", "a_1"),
        ("postgresql://h/db?password=secret&sslmode=require", "postgresql://h/db?sslmode=require", "llmc"),
        ("postgresql://u@/db?host=/var/run", "postgresql://u@/db?host=/var/run", "llmc"),
        ("postgresql://", "postgresql:", "llmc"),
    ],
)
def test_a_location_is_shown_without_its_password(given: str, shown: str, name: str) -> None:
    place = schema.place_of(given)
    assert (place.location.rstrip("/"), place.name) == (shown, name)
    assert "secret" not in place.location and "llmc_store" not in place.url and is_postgres(given)


@pytest.mark.parametrize(
    "name", ["", "A", "public", "pg_x", "information_schema", 'a"b', "a b", "1a", "x" * 60]
)
def test_names_that_are_none_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="no name for a store"):
        open_store(f"postgresql://h/db?llmc_store={name}")


def test_a_server_that_is_not_there_is_named_without_the_password(tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    for host in (f"?host={tmp_path}", "?host=127.0.0.1&port=1"):
        with pytest.raises(InputError, match=r"postgresql://u@/db.*check that the server runs") as caught:
            open_store(f"postgresql://u:secret@/db{host}")
        assert "secret" not in str(caught.value)


def test_without_psycopg_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(InputError, match=r"psycopg.*pip install 'llmc\[postgres\]'"):
        open_store("postgresql://h/db")


def test_a_missing_store_is_made_only_when_asked_for(url: str) -> None:
    location = f"{url}&llmc_store=later"
    with pytest.raises(InputError, match="holds no store 'later'"):
        open_store(location)
    with pytest.raises(InputError, match="holds no store 'later'"):
        open_store(location, create=True, read_only=True)
    make(location)
    store = open_store(location, create=True)
    assert check_whole(store) == 4
    store.close()


def test_stores_of_one_database_are_apart(url: str) -> None:
    make(f"{url}&llmc_store=one", 3)
    make(f"{url}&llmc_store=two", 5)
    one, two = open_store(f"{url}&llmc_store=one"), open_store(f"{url}&llmc_store=two")
    with one.writing():
        two.put([record(9)])
    assert (check_whole(one), check_whole(two)) == (3, 6)
    assert one.cache_folder != two.cache_folder
    again = open_store(f"{url}&llmc_store=one")
    assert again.cache_folder == one.cache_folder
    for store in (one, two, again):
        store.close()


def test_a_schema_of_another_program_is_left_alone(url: str) -> None:
    execute(url, "CREATE SCHEMA foreign_one; CREATE TABLE foreign_one.mine (x int)")
    execute(url, "CREATE SCHEMA foreign_two; CREATE TABLE foreign_two.meta (x int)")
    for name in ("foreign_one", "foreign_two"):
        with pytest.raises(InputError, match="of another program"):
            open_store(f"{url}&llmc_store={name}", create=True)
        tables = execute(url, f"SELECT count(*) FROM pg_tables WHERE schemaname = '{name}'")
        assert tables == [(1,)]


def test_mentions_and_extractions_of_version_1_are_migrated(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    location = f"{url}&llmc_store=first"
    make(location)
    store = open_store(location)
    first, second = (record(n).chunks[0] for n in (1, 2))
    store.put_triples(first.id, triples_of(first, "file:x"))
    store.put_triples(second.id, [], origin="llm:", quarantine="no JSON")
    expected = list(store.dump())
    texts = {chunk.id: json.dumps([[*one] for one in chunk.features.mentions]) for chunk in store.chunks()}
    store.close()
    execute(
        url,
        "SET search_path = first; ALTER TABLE features DROP COLUMN mentions; ALTER TABLE features"
        " ADD COLUMN mentions text; ALTER TABLE extracted DROP CONSTRAINT extracted_pkey;"
        " ALTER TABLE extracted DROP COLUMN origin; ALTER TABLE extracted ADD PRIMARY KEY (chunk);"
        " UPDATE meta SET value = '1' WHERE key = 'llmc_store_version'",
    )
    for id, text in texts.items():
        quoted = text.replace("'", "''")
        execute(
            url,
            f"UPDATE first.features SET mentions = '{quoted}'"
            f" WHERE chunk = (SELECT row FROM first.chunks WHERE id = '{id}')",
        )
    row = "FROM first.features ORDER BY chunk LIMIT 1"
    ((before,),) = execute(url, f"SELECT mentions {row}")
    for damaged in ("{", '[["a"]]'):
        one = f"UPDATE first.features SET mentions = '%s' WHERE chunk = (SELECT chunk {row})"
        execute(url, one % damaged)
        with pytest.raises(InputError, match=r"first.*is damaged"):
            open_store(location)
    execute(url, one % before)
    seen: list[int] = []

    def packed(mentions: str) -> bytes:
        patient = f"{url}&options=-c%20lock_timeout%3D5s"
        ((count,),) = execute(patient, "SELECT count(terms) FROM first.features")
        seen.append(count)
        return real(mentions)

    real = schema.packed
    monkeypatch.setattr(schema, "packed", packed)
    store = open_store(location)
    assert seen == [len(texts)] * len(texts), "who reads the old table does not wait"
    assert list(store.dump()) == expected
    made = "SELECT conname FROM pg_constraint WHERE conrelid = '{}.features'::regclass ORDER BY 1"
    make(f"{url}&llmc_store=fresh")
    assert execute(url, made.format("first")) == execute(url, made.format("fresh"))
    store.put([record(9)])
    assert check_whole(store) == 5
    store.close()


def test_a_search_asks_the_database_little(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import psycopg

    asked: list[str] = []
    real = psycopg.Cursor.execute

    def execute(self: Any, query: Any, *values: Any, **options: Any) -> Any:
        asked.append(query.decode() if isinstance(query, bytes) else str(query))
        return real(self, query, *values, **options)

    with KnowledgeBase.open(f"{url}&llmc_store=asked", embedder="none", create=True) as kb:
        kb.add_bytes("a.txt", b"Grey Heron is a boat of Nils Brandt.")
        kb.search("Who has the boat Grey Heron?")
        monkeypatch.setattr(psycopg.Cursor, "execute", execute)
        assert kb.search("Who has the boat Grey Heron?")
    # Three transactions: the settings, the generation, the passages that were found.
    state = ["BEGIN ISOLATION", "SELECT key,"]
    expected = [*state, "ROLLBACK", *state, "ROLLBACK", *state, "SELECT c.id,", "ROLLBACK"]
    assert [" ".join(sql.split()[:2]) for sql in asked] == expected


def test_a_newer_store_is_refused_and_an_older_one_migrated(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    location = f"{url}&llmc_store=versions"
    make(location)
    version = schema.VERSION
    execute(url, f"UPDATE versions.meta SET value = '{version + 1}' WHERE key = 'llmc_store_version'")
    with pytest.raises(InputError, match=rf"version {version + 1}, this llmc knows versions up to {version}"):
        open_store(location)

    def add_note(connection: schema.Connection) -> None:
        connection.execute("CREATE TABLE note (text text)")

    execute(url, f"UPDATE versions.meta SET value = '{version}' WHERE key = 'llmc_store_version'")
    monkeypatch.setattr(schema, "VERSION", version + 1)
    monkeypatch.setattr("llmc.runtime.rag.store.postgres.VERSION", version + 1)
    monkeypatch.setitem(schema.MIGRATIONS, version, add_note)
    with pytest.raises(InputError, match="reading only"):
        open_store(location, read_only=True)
    store = open_store(location)
    assert check_whole(store) == 4
    assert execute(url, "SELECT count(*) FROM versions.note") == [(0,)]
    store.close()
    open_store(location).close()


def test_a_server_without_pgvector_says_how_to_add_it(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    execute(url, "CREATE DATABASE bare")
    execute(url, "CREATE ROLE guest LOGIN; GRANT CREATE ON DATABASE bare TO guest")
    bare = re.sub(r"tester@/postgres", "tester@/bare", url)
    guest = bare.replace("tester@", "guest@")
    execute(url, "REVOKE CREATE ON DATABASE bare FROM guest")
    with pytest.raises(InputError, match=r"may not add pgvector.*CREATE EXTENSION vector"):
        open_store(guest, create=True)
    assert execute(bare, "SELECT count(*) FROM pg_namespace WHERE nspname = 'llmc'") == [(0,)]

    def unknown(connection: schema.Connection, place: schema.Place) -> None:
        real(_Renamed(connection), place)  # type: ignore[arg-type]

    real = schema._add_pgvector
    monkeypatch.setattr(schema, "_add_pgvector", unknown)
    with pytest.raises(InputError, match="the server has no pgvector"):
        open_store(bare, create=True)


class _Renamed:
    """A connection to a server that has no extension of the name."""

    def __init__(self, connection: schema.Connection) -> None:
        self._connection = connection
        self.transaction = connection.transaction

    def execute(self, sql: str) -> Any:
        return self._connection.execute(sql.replace("vector", "no_such_extension").encode())


def test_a_database_in_another_encoding_is_refused(url: str) -> None:
    execute(url, "CREATE DATABASE latin ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
    with pytest.raises(InputError, match="not in UTF-8"):
        open_store(url.replace("/postgres?", "/latin?"), create=True)


def test_a_server_that_ended_connections_is_asked_again(url: str) -> None:
    location = f"{url}&llmc_store=restarted"
    make(location)
    store = open_store(location)
    assert check_whole(store) == 4
    store.put([record(5)])
    end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'llmc %'"
    execute(url, end)
    assert check_whole(store) == 5
    store.put([record(6)])
    with store.writing():
        execute(url, end)
        # The right to write went with the connection: nothing may be written as if it were still held.
        with pytest.raises(InputError, match=r"lost the connection|terminat|closed"):
            store.put([record(7)])
        with pytest.raises(InputError, match="lost the connection"):
            store.put([record(7)])
    store.put([record(8)])
    assert check_whole(store) == 7
    store.close()


def test_a_vacuum_waits_for_readers_and_then_says_why(url: str) -> None:
    location = f"{url}&llmc_store=vacuumed"
    make(location)
    store = open_store(location)
    with store.reading() as state:
        assert check_whole(state) == 4
        with pytest.raises(InputError, match="somebody reads it"):
            store.vacuum()
        assert check_whole(state) == 4
    store.vacuum()
    assert check_whole(store) == 4
    assert len(store.nearest(np.ones(DIMENSIONS, np.float32), 3)) == 3
    store.close()
