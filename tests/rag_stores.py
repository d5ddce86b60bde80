"""Where tests put stores: a fixture for each kind of store, so that one test is run on all of them."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from llmc.runtime.rag.store import Settings, Store, open_store

from . import postgres
from .rag_records import SETTINGS

_numbers = itertools.count()


class Places:
    """Makes up locations of stores that are not there yet, and says how large stores are."""

    def __init__(self, folder: Path, url: str | None) -> None:
        self._folder = folder
        self._url = url

    def new(self) -> str:
        number = next(_numbers)
        return (
            str(self._folder / f"{number}.kb") if self._url is None else f"{self._url}&llmc_store=s{number}"
        )

    def make(self, settings: Settings = SETTINGS) -> Store:
        store = open_store(self.new(), create=True)
        store.set_settings(settings)
        return store

    def size(self, store: Store) -> int:
        if self._url is None:
            return sum(Path(store.location + end).stat().st_size for end in ("", "-wal"))
        import psycopg

        sql = (
            "SELECT sum(pg_total_relation_size(oid)) FROM pg_class"
            " WHERE relkind = 'r' AND relnamespace = %s::regnamespace"
        )
        with psycopg.connect(self._url) as connection:
            row = connection.execute(sql, (store.location.partition("llmc_store=")[2],)).fetchone()
        assert row is not None
        return int(row[0])

    def check(self, store: Store) -> None:
        """The database's own look at whether its file is sound."""
        if self._url is None:
            import sqlite3

            connection = sqlite3.connect(store.location)
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
            # Raises where the full-text index and the text differ.
            connection.execute("INSERT INTO keywords (keywords, rank) VALUES ('integrity-check', 1)")
            connection.close()


@pytest.fixture(scope="session")
def postgres_url() -> Generator[str]:
    pytest.importorskip("psycopg")
    with postgres.server() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgres"])
def places(request: pytest.FixtureRequest, tmp_path: Path) -> Places:
    url = request.getfixturevalue("postgres_url") if request.param == "postgres" else None
    return Places(tmp_path, url)


@pytest.fixture
def both_places(tmp_path: Path, postgres_url: str) -> list[Places]:
    return [Places(tmp_path, None), Places(tmp_path, postgres_url)]


@pytest.fixture
def store(places: Places) -> Iterator[Store]:
    made = places.make()
    yield made
    made.close()
