"""Snapshots: what they depend on, where they lie, links between documents."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from llmc.runtime.rag.retrieve import Retriever
from llmc.runtime.rag.snapshot import Snapshot
from llmc.runtime.rag.store import Record, Store

from .rag_searches import SONGS, filled, record, song_store, titles


@pytest.fixture
def songs(tmp_path: Path) -> Store:
    return song_store(tmp_path)


def same_arrays(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and np.array_equal(one[name], other[name]) for name in one
    )


def random_record(rng: random.Random, number: int) -> Record:
    names = [
        "Ed Wood",
        "Tim Burton",
        "Pearl Jam",
        "Seattle",
        "Washington",
        "Johnny Depp",
        "Bela Lugosi",
        "Doctor Strange",
    ]
    title = rng.choice([*names, "", "Ed Wood (film)", "The Pearl Jam"])
    texts = [
        f"{rng.choice(names)} of {rng.choice(names)} came. It met {rng.choice(names)} {rng.randint(1, 9)}."
        for _ in range(rng.randint(1, 3))
    ]
    return record(f"{number:03d}.txt", title, texts)


@pytest.mark.parametrize("seed", range(4))
def test_a_snapshot_depends_on_the_documents_alone(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    store = filled(tmp_path / "history.kb", [])
    live: dict[str, Record] = {}
    for _ in range(40):
        if live and rng.random() < 0.4:
            gone = rng.choice(sorted(live))
            store.delete([gone])
            del live[gone]
        else:
            made = random_record(rng, rng.randint(0, 25))
            store.put([made])
            live[made.document.id] = made
    shuffled = list(live.values())
    rng.shuffle(shuffled)
    fresh = filled(tmp_path / "fresh.kb", shuffled)
    assert same_arrays(Snapshot.of(store).arrays, Snapshot.of(fresh).arrays)


def test_the_file_is_reused_and_older_ones_go(songs: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Snapshot.of(songs)
    files = list(Path(songs.cache_folder).glob("snapshot-*"))
    assert len(files) == 1
    with monkeypatch.context() as patched:
        patched.setattr("llmc.runtime.rag.snapshot.derive", lambda reader: pytest.fail("derived again"))
        again = Snapshot.of(songs)
    assert same_arrays(first.arrays, again.arrays)
    whole = files[0].read_bytes()
    files[0].unlink()  # what is mapped stays as it is
    files[0].write_bytes(whole[:2000])  # cut off: derived again
    assert same_arrays(Snapshot.of(songs).arrays, again.arrays)
    songs.delete(["Boston.txt"])
    assert len(Snapshot.of(songs)) == len(SONGS) - 1
    assert len(list(Path(songs.cache_folder).glob("snapshot-*"))) == 1


def test_a_cache_folder_that_cannot_be_written(songs: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no")

    monkeypatch.setattr("llmc.runtime.rag.snapshot.write_arrays", refuse)
    assert titles(Retriever(songs), "Metallica", mode="keyword", top=1) == ["Metallica"]


def test_links_take_the_longest_name(tmp_path: Path) -> None:
    store = filled(
        tmp_path / "links.kb",
        [
            record("a", "New York", ["A state."]),
            record("b", "New York City", ["A city."]),
            record("c", "Walt", ["Walt lives in New York City."]),
            record("d", "Tom", ["Tom went from New York (state) home, not to a wall."]),
        ],
    )
    snapshot = Snapshot.of(store)
    linked = {
        (snapshot.documents[int(snapshot.document_of[i])], snapshot.documents[int(j)])
        for i, j in zip(*snapshot.links.nonzero(), strict=True)
    }
    assert linked == {("c", "b"), ("d", "a")}


def test_a_title_of_one_word_is_mentioned_without_a_capital(tmp_path: Path) -> None:
    records = [record("a", "Cranberry", ["A fruit."]), record("b", "Hall", ["He grew cranberries in a bog."])]
    snapshot = Snapshot.of(filled(tmp_path / "common.kb", records))
    ((source,), (target,)) = snapshot.links.nonzero()
    assert snapshot.documents[int(snapshot.document_of[source])] == "b"
    assert snapshot.documents[int(target)] == "a" and snapshot.links.data.tolist() == [0.5]


def test_a_name_of_many_documents_links_nothing(tmp_path: Path) -> None:
    records = [record(f"{i}", "Smith", [f"Person {i}."]) for i in range(9)] + [
        record("x", "", ["He met Smith."])
    ]
    assert Snapshot.of(filled(tmp_path / "many.kb", records)).links.nnz == 0
    few = [*records[:4], records[-1]]
    links = Snapshot.of(filled(tmp_path / "few.kb", few)).links
    assert links.nnz == 4 and np.allclose(links.data, 0.5)  # the root of four namesakes


def test_a_people_and_its_place_are_one_entity_and_two_names(tmp_path: Path) -> None:
    language = record("language", "Dutch", ["It is spoken by many."])
    painter = record("painter", "Ada Blom", ["She was a Dutch painter."])
    town = record("town", "Lemmer", ["It lies in the Netherlands."])
    snapshot = Snapshot.of(filled(tmp_path / "p.kb", [language, painter, town]))
    names = list(snapshot.entities)
    assert "netherlands" in names and "dutch" not in names
    chunks = snapshot.chunks_by_entity[names.index("netherlands")].indices
    assert {snapshot.documents[int(snapshot.document_of[one])] for one in chunks} == {
        "language",
        "painter",
        "town",
    }
    place = {snapshot.documents[int(d)]: i for i, d in enumerate(snapshot.document_of)}
    to_language = list(snapshot.documents).index("language")
    assert snapshot.links[place["painter"], to_language] > 0  # called by its name
    assert snapshot.links[place["town"], to_language] == 0  # the place is another name
