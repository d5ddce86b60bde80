"""Rows of a store that another program damaged: the error names the store, the passage and the way out."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from llmc.ir.errors import InputError
from llmc.runtime.rag.features import features_of
from llmc.runtime.rag.knowledge import KnowledgeBase
from llmc.runtime.rag.snapshot import Snapshot
from llmc.runtime.rag.store import Settings, Store
from llmc.runtime.rag.store.records import feature_row, is_whole

from .rag_searches import DIMENSIONS, SONGS, record

if TYPE_CHECKING:
    from .rag_stores import Places

pytest_plugins = ("tests.rag_stores",)

TITLE = "Pearl Jam"
COLUMNS = ("terms", "title_counts", "text_counts", "spans", "mentions")


@pytest.fixture
def songs(places: Places) -> Iterator[Store]:
    made = places.make(Settings(embedder="words", embedder_hash="w", dimensions=DIMENSIONS))
    made.put([record(f"{t}.txt", t, [x]) for t, x in SONGS.items()])
    yield made
    made.close()


def execute(store: Store, sql: str, *values: Any) -> None:
    """What another program does to the one row of `TITLE`."""
    where = "(SELECT row FROM chunks WHERE title = 'Pearl Jam')"
    sql = sql.replace("<HERE>", f"WHERE chunk = {where}")
    if store.location.startswith("postgresql:"):
        import psycopg

        url, _, name = store.address.partition("&llmc_store=")
        with psycopg.connect(url) as connection:
            connection.execute(f"SET search_path = {name}, public".encode())
            connection.execute(sql.encode(), values)
    else:
        connection = sqlite3.connect(store.location)
        with connection:
            connection.execute(sql.replace("%s", "?"), values)
        connection.close()


def cut(data: bytes) -> bytes:
    return data[:-1]


def one_less(data: bytes) -> bytes:
    return data[:-2]


def more_keys(data: bytes) -> bytes:
    return data + b"\0and one more"


def no_text(data: bytes) -> bytes:
    return data[:-1] + b"\xff"


def many(data: bytes) -> bytes:
    return b"\xff\xff\xff\x7f" + data[4:]


DAMAGE: list[tuple[str, Callable[[bytes], bytes]]] = [
    *((column, cut) for column in COLUMNS[:4]),
    ("title_counts", one_less),
    ("text_counts", one_less),
    ("mentions", more_keys),
    ("mentions", no_text),
    ("mentions", many),
    ("mentions", lambda data: data[:3]),
    ("mentions", lambda data: bytes(8)),
]


def row_of(title: str) -> tuple[bytes, ...]:
    return feature_row(features_of(title, SONGS[title]))


@pytest.mark.parametrize(("column", "damage"), DAMAGE)
def test_what_is_no_row_of_features_is_seen(column: str, damage: Callable[[bytes], bytes]) -> None:
    row = list(row_of(TITLE))
    assert is_whole(row) and is_whole(feature_row(features_of("", "")))
    place = COLUMNS.index(column)
    row[place] = damage(row[place])
    assert not is_whole(row)
    row[place] = "text"
    assert not is_whole(row)


@pytest.mark.parametrize("column", ["terms", "mentions", "missing"])
def test_damaged_features_are_named_and_the_way_out_works(songs: Store, column: str) -> None:
    chunk = next(one.id for one in songs.chunks() if one.title == TITLE)
    if column == "missing":
        execute(songs, "DELETE FROM features <HERE>")
    else:
        data = row_of(TITLE)[COLUMNS.index(column)]
        execute(songs, f"UPDATE features SET {column} = %s <HERE>", data[:7])
    for read in (
        lambda: Snapshot.of(songs),
        lambda: list(songs.chunks()),
        lambda: list(songs.chunks([chunk])),
        lambda: list(songs.chunks(document=f"{TITLE}.txt")),
    ):
        with pytest.raises(InputError) as caught:
            read()
        assert songs.location in str(caught.value) and chunk in str(caught.value)
        assert f"'{TITLE}.txt'" in str(caught.value)
        assert "llmc rag delete" in caught.value.remedy
    kb = KnowledgeBase(songs, None)
    assert kb.delete([f"{TITLE}.txt"]) == 1
    songs.put([record(f"{TITLE}.txt", TITLE, [SONGS[TITLE]])])
    assert chunk in list(Snapshot.of(songs).ids)


def test_a_damaged_vector_or_document_is_named(songs: Store) -> None:
    chunk = next(one.id for one in songs.chunks() if one.title == TITLE)
    vector: Any = np.ones(DIMENSIONS - 1, "<f2").tobytes()
    if songs.location.startswith("postgresql:"):
        vector = str([1] * (DIMENSIONS - 1))
    execute(songs, "UPDATE vectors SET vector = %s <HERE>", vector)
    with pytest.raises(InputError, match="is damaged: the vector") as caught:
        songs.vectors()
    assert songs.location in str(caught.value) and chunk in str(caught.value)
    assert "llmc rag embed" in caught.value.remedy
    execute(songs, "UPDATE documents SET metadata = '{' WHERE title = 'Pearl Jam'")
    with pytest.raises(InputError, match=r"is damaged: document 'Pearl Jam\.txt'"):
        songs.document(f"{TITLE}.txt")
