"""Searching while what is derived of a write is not there yet."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from llmc.ir.errors import InputError
from llmc.runtime.rag import communities, derive_child
from llmc.runtime.rag import newest as module
from llmc.runtime.rag.communities import communities_of
from llmc.runtime.rag.knowledge import KnowledgeBase
from llmc.runtime.rag.newest import Newest
from llmc.runtime.rag.retrieve import Retriever
from llmc.runtime.rag.snapshot import Snapshot
from llmc.runtime.rag.store import Store, open_store

from .rag_searches import SONGS, record, song_store, titles
from .test_rag_snapshot import same_arrays

MORE = record("Nirvana.txt", "Nirvana", ["Nirvana is a rock band that was formed in Aberdeen, Washington."])


@pytest.fixture
def songs(tmp_path: Path) -> Iterator[Store]:
    store = song_store(tmp_path)
    yield store
    store.close()


class Gate:
    """Holds deriving back while it is closed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.open.set()
        self.count = 0
        real = Snapshot.of

        def of(store: Store) -> Snapshot:
            self.count += 1
            assert self.open.wait(30)
            return real(store)

        monkeypatch.setattr(Snapshot, "of", of)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate(monkeypatch)
    yield made
    made.open.set()


def until(true: Callable[[], Any]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_search_goes_on_with_the_state_before(songs: Store, gate: Gate) -> None:
    retriever = Retriever(songs, patience=0.0)
    assert "Nirvana" not in titles(retriever, "rock band", top=9)
    assert retriever.newest.facts() == {
        "generation": songs.generation,
        "current": True,
        "behind_seconds": 0.0,
    }
    gate.open.clear()
    songs.put([MORE])
    for _ in range(3):
        assert "Nirvana" not in titles(retriever, "rock band formed in Aberdeen", top=9)
    until(lambda: gate.count > 1)  # a thread has noticed
    assert "Nirvana" not in titles(retriever, "rock band formed in Aberdeen", top=9)
    assert gate.count == 2, "one at a time is derived"
    facts = retriever.newest.facts()
    assert facts is not None and not facts["current"] and facts["behind_seconds"] > 0
    gate.open.set()
    until(lambda: titles(retriever, "rock band formed in Aberdeen", top=1) == ["Nirvana"])
    assert retriever.newest.facts() == {
        "generation": songs.generation,
        "current": True,
        "behind_seconds": 0.0,
    }
    retriever.close()


def test_what_the_first_search_needs_is_prepared_beside_it(songs: Store, gate: Gate) -> None:
    with KnowledgeBase(songs, None) as kb:
        gate.open.clear()
        kb.prepare(wait=False)
        assert kb.stats()["searched"] is None
        gate.open.set()
        until(lambda: kb.stats()["searched"])
        assert kb.stats()["searched"]["current"] and gate.count == 1
        kb.search("rock band", mode="graph")
        kb.prepare()
        kb.prepare(wait=False)
        assert gate.count == 1, "what is there is not derived again"


def test_what_goes_wrong_beside_it_is_told_to_the_first_search(
    songs: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(store: Store) -> Snapshot:
        raise InputError("the disk is full")

    with KnowledgeBase(songs, None) as kb, monkeypatch.context() as patch:
        patch.setattr(Snapshot, "of", fails)
        kb.prepare(wait=False)
        with pytest.raises(InputError, match="disk is full"):
            kb.search("rock band", mode="graph")
        patch.undo()
        assert kb.search("rock band", mode="graph")


def test_who_has_no_patience_to_give_waits(songs: Store, gate: Gate) -> None:
    retriever = Retriever(songs)
    titles(retriever, "rock band")
    songs.put([MORE])
    assert titles(retriever, "rock band formed in Aberdeen", top=1) == ["Nirvana"]
    patient = Retriever(songs, patience=30.0)
    titles(patient, "rock band")
    songs.delete(["Nirvana.txt"])
    assert "Nirvana" not in titles(patient, "rock band formed in Aberdeen", top=9)
    assert len(patient.snapshot()) == len(SONGS)


def test_what_was_deleted_is_not_found_in_the_state_before(songs: Store, gate: Gate) -> None:
    songs.put([MORE])
    retriever = Retriever(songs, patience=0.0)
    first = titles(retriever, "rock band", top=3)
    gate.open.clear()
    gone = [name for name in ("Nirvana", "Pearl Jam", "Metallica") if name in first]
    songs.delete([f"{name}.txt" for name in gone])
    found = titles(retriever, "rock band", top=3)
    assert len(found) == 3 and not set(found) & set(gone)


def test_only_the_first_searches_wait(songs: Store, gate: Gate) -> None:
    newest = Newest(songs)
    before = newest.get()
    gate.open.clear()
    songs.put([MORE])
    waits: list[float | None] = []
    real = newest._changed.wait

    def wait(seconds: float | None = None) -> bool:
        waits.append(seconds)
        return real(seconds)

    newest._changed.wait = wait  # type: ignore[method-assign]
    assert newest.get(0.3) is before
    assert waits and waits[0] == pytest.approx(0.3, abs=0.1)
    waits.clear()
    assert all(newest.get(0.3) is before for _ in range(20))
    assert not waits


def test_a_write_while_it_is_derived_is_derived_next(songs: Store, gate: Gate) -> None:
    newest = Newest(songs)
    newest.get()
    gate.open.clear()
    songs.put([MORE])
    newest.renew()
    until(lambda: gate.count == 2)
    songs.delete(["Boston.txt"])
    threading.Timer(0.05, gate.open.set).start()
    assert len(newest.get()) == len(SONGS)  # one came, one went
    newest.close()


def test_a_failure_is_told_and_tried_again(songs: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = Newest(songs)
    before = newest.get()
    songs.put([MORE])
    with monkeypatch.context() as patched:

        def fail(store: Store) -> Snapshot:
            raise InputError("made up")

        patched.setattr(Snapshot, "of", fail)
        with pytest.raises(InputError, match="made up"):
            newest.get()
        assert newest.get(0.0) is before
        with pytest.raises(InputError, match="made up"):
            newest.get(30.0)
    assert len(newest.get(30.0)) == len(SONGS) + 1


def test_a_large_store_is_derived_by_a_process(songs: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = Newest(songs)
    newest.get()
    songs.put([MORE])
    monkeypatch.setattr(module, "_SMALL", 0)
    with monkeypatch.context() as patched:
        patched.setattr(Snapshot, "of", lambda store: pytest.fail("derived here"))
        found = newest.get(60.0)
    assert len(found) == len(SONGS) + 1
    for file in Path(songs.cache_folder).glob("snapshot-*"):
        file.unlink()
    assert same_arrays(found.arrays, Snapshot.of(songs).arrays)
    newest.close()
    with pytest.raises(InputError, match="was closed"):
        newest.get()


def test_where_no_process_can_be_started_a_thread_derives(
    songs: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = Newest(songs)
    newest.get()
    songs.put([MORE])
    monkeypatch.setattr(module, "_SMALL", 0)
    monkeypatch.setattr(derive_child.sys, "executable", "/nowhere/python")
    assert len(newest.get(60.0)) == len(SONGS) + 1


def test_the_process_imports_nothing_from_the_current_directory(
    songs: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "documents"
    folder.mkdir()
    for name in ("json.py", "tempfile.py", "llmc.py"):
        (folder / name).write_text("raise SystemExit(9)\n")
    newest = Newest(songs)
    newest.get()
    songs.put([MORE])
    monkeypatch.setattr(module, "_SMALL", 0)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(Snapshot, "of", lambda store: pytest.fail("derived here"))
    assert len(newest.get(60.0)) == len(SONGS) + 1
    newest.close()


def test_a_process_that_fails_leaves_the_state_before_to_be_searched(
    songs: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    newest = Newest(songs)
    before = newest.get()
    songs.put([MORE])
    monkeypatch.setattr(module, "_SMALL", 0)
    with monkeypatch.context() as patched:
        patched.setattr(derive_child, "__name__", "llmc.runtime.rag.no_such_module")
        assert newest.get(60.0) is before
    assert "No module named" in caplog.text and "again in 10 s" in caplog.text
    caplog.clear()
    assert newest.get(60.0) is before and not caplog.text, "not at once again"
    monkeypatch.setattr(newest, "_rests_until", 0.0)
    assert len(newest.get(60.0)) == len(SONGS) + 1
    newest.close()


def test_without_a_state_before_a_failed_process_is_told(
    songs: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = Newest(songs)
    monkeypatch.setattr(module, "_SMALL", 0)
    monkeypatch.setattr(derive_child, "__name__", "llmc.runtime.rag.no_such_module")
    with pytest.raises(InputError, match="could not be derived"):
        newest.get(60.0)
    newest.close()


def test_the_process_goes_on_with_communities_that_were_asked_for(
    songs: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = Newest(songs)
    communities_of(songs, newest.get())
    songs.put([MORE])
    monkeypatch.setattr(module, "_SMALL", 0)
    found = newest.get(60.0)
    until(lambda: newest._child is None)  # pyright: ignore[reportPrivateUsage]
    with monkeypatch.context() as patched:
        patched.setattr(communities, "detect", lambda *_: pytest.fail("detected here"))
        assert len(communities_of(songs, found).ids) == len(SONGS) + 1
    newest.close()


def test_a_store_that_became_another_is_seen(songs: Store, tmp_path: Path) -> None:
    """A file of an earlier generation in its place: as after restoring a backup."""
    newest = Newest(songs)
    early = songs.generation
    newest.get()
    songs.put([MORE])
    assert newest.get().generation > early
    copy = open_store(tmp_path / "other.kb", create=True)
    newest._store = copy  # pyright: ignore[reportPrivateUsage]
    assert len(newest.get()) == 0
    copy.close()
