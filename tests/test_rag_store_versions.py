"""Versions of the SQLite store: older ones are migrated, newer ones refused."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from pathlib import Path

import pytest
from llmc.ir.errors import InputError
from llmc.runtime.rag.store import Store, open_store, schema

from .rag_records import SETTINGS, check_whole, record, triples_of


def make(path: Path, documents: int = 8) -> Store:
    store = open_store(path, create=True)
    store.set_settings(SETTINGS)
    store.put(record(number) for number in range(documents))
    return store


def _as_version_2(path: Path) -> None:
    """Take a store back to version 2: mentions are JSON, and what was extracted does not say by what."""
    with contextlib.closing(open_store(path)) as store:
        texts = [
            (json.dumps([[*one] for one in chunk.features.mentions]), chunk.id) for chunk in store.chunks()
        ]
    connection = sqlite3.connect(path)
    connection.executescript(
        "CREATE TABLE old AS SELECT chunk, terms, title_counts, text_counts, spans FROM features;"
        "DROP TABLE features;"
        "CREATE TABLE features (chunk INTEGER PRIMARY KEY REFERENCES chunks ON DELETE CASCADE,"
        " terms BLOB NOT NULL, title_counts BLOB NOT NULL, text_counts BLOB NOT NULL, spans BLOB NOT NULL,"
        " mentions TEXT NOT NULL) STRICT;"
        "INSERT INTO features SELECT *, '' FROM old; DROP TABLE old;"
        "CREATE TABLE old AS SELECT DISTINCT chunk, quarantine FROM extracted; DROP TABLE extracted;"
        "CREATE TABLE extracted (chunk INTEGER PRIMARY KEY REFERENCES chunks ON DELETE CASCADE,"
        " quarantine TEXT) STRICT;"
        "INSERT INTO extracted SELECT * FROM old; DROP TABLE old; PRAGMA user_version = 2;"
    )
    connection.executemany(
        "UPDATE features SET mentions = ? WHERE chunk = (SELECT row FROM chunks WHERE id = ?)", texts
    )
    connection.commit()
    connection.close()


def _as_version_1(path: Path) -> None:
    """Take a store back to version 1, in which a chunk's row did not say how many mentions it has."""
    _as_version_2(path)
    connection = sqlite3.connect(path)
    connection.executescript(
        "DROP INDEX chunks_document; ALTER TABLE chunks DROP COLUMN mentions;"
        "CREATE INDEX chunks_document ON chunks (document, ordinal); PRAGMA user_version = 1;"
    )
    connection.close()


def test_an_older_store_is_migrated(tmp_path: Path) -> None:
    path = tmp_path / "a.kb"
    store = make(path)
    expected, counts = list(store.dump()), store.counts()
    store.close()
    _as_version_1(path)
    with pytest.raises(InputError, match=r"of the older store version 1; open it for writing once"):
        open_store(path, read_only=True)
    store = open_store(path)
    assert list(store.dump()) == expected and store.counts() == counts and counts["mentions"] > 0
    store.put([record(50)])
    assert check_whole(store) == 9
    store.close()
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA user_version").fetchone() == (schema.VERSION,)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


def test_mentions_and_extractions_of_version_2_are_migrated(tmp_path: Path) -> None:
    path = tmp_path / "a.kb"
    store = make(path)
    first, second, third = (record(n).chunks[0] for n in (1, 2, 3))
    store.put_triples(first.id, triples_of(first, "file:x"))
    store.put_triples(second.id, [], origin="llm:", quarantine="no JSON")
    store.put_triples(third.id, [], origin="llm:")
    expected = list(store.dump())
    store.close()
    _as_version_2(path)
    store = open_store(path)
    assert list(store.dump()) == expected
    store.put([record(50)])
    store.delete([record(1).document.id])
    assert check_whole(store) == 8 and store.extracted("file:") == set()
    store.close()


def test_a_migration_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.kb"
    make(path).close()
    _as_version_1(path)

    def fail(connection: sqlite3.Connection) -> None:
        connection.execute("DROP TABLE features")
        raise sqlite3.OperationalError("made up")

    monkeypatch.setitem(schema.MIGRATIONS, 1, fail)
    with pytest.raises(InputError, match="made up"):
        open_store(path)
    monkeypatch.undo()
    store = open_store(path)
    assert check_whole(store) == 8
    store.close()


def test_a_newer_store_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.kb"
    make(path).close()
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {schema.VERSION + 1}")
    connection.close()
    before = path.read_bytes()
    expected = rf"store version {schema.VERSION + 1}, this llmc knows versions up to {schema.VERSION}"
    with pytest.raises(InputError, match=expected):
        open_store(path, create=True)
    assert path.read_bytes() == before


def test_a_store_migrated_meanwhile_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "a.kb"
    store = make(path)
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {schema.VERSION + 1}")
    connection.close()
    with pytest.raises(InputError, match="use a newer llmc"):
        store.put([record(20)])
    with pytest.raises(InputError, match="use a newer llmc"):
        store.counts()
    store.close()
