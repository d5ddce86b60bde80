"""What every store does, the same for SQLite and PostgreSQL: readers and writers at once, and killed ones."""

from __future__ import annotations

import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pytest
from llmc.ir.errors import InputError
from llmc.runtime.rag.store import Record, Store, open_store
from llmc.runtime.rag.types import Triple

from .conftest import LONG
from .rag_records import DIMENSIONS, change_at_random, check_whole, rebuilt, record

if TYPE_CHECKING:
    from .rag_stores import Places

pytest_plugins = ("tests.rag_stores",)


# Readers and writers ---------------------------------------------------------------------------------------


def test_a_reader_sees_one_state_while_others_write(store: Store) -> None:
    store.put(record(number) for number in range(10))
    with store.reading() as state:
        before = list(state.dump())
        nearest = state.nearest(np.ones(DIMENSIONS, np.float32), 5)
        other = open_store(_opened_as(store))
        other.put(record(number, 1) for number in range(5, 15))
        other.delete([record(1).document.id])
        other.close()
        assert list(state.dump()) == before and state.counts()["documents"] == 10
        assert state.generation < store.generation
        assert state.nearest(np.ones(DIMENSIONS, np.float32), 5) == nearest
        assert state.keyword("version1", 5) == [] and len(store.keyword("version1", 5)) == 5
    assert store.counts()["documents"] == 14
    with pytest.raises(ValueError, match="after"):
        state.counts()


def _opened_as(store: Store) -> str:
    return store.location  # no password in these


def test_a_read_completes_while_a_write_is_open(store: Store) -> None:
    store.put(record(number) for number in range(5))
    inside, finish = threading.Event(), threading.Event()

    def records() -> Iterator[Record]:
        yield record(7)
        yield from (record(number, 1) for number in range(5))
        inside.set()
        assert finish.wait(60)

    writer = threading.Thread(target=lambda: store.put(records()))
    writer.start()
    try:
        assert inside.wait(60)
        assert store.document(record(7).document.id) is None and check_whole(store) == 5
        assert len(store.keyword("river", 50)) > 0
    finally:
        finish.set()
        writer.join()
    assert check_whole(store) == 6 and store.document(record(7).document.id) is not None


WRITER = """
import sys, time
from llmc.runtime.rag.store import open_store
with open_store(sys.argv[1]).writing():
    print("writing", flush=True)
    time.sleep(600)
"""


def test_the_second_writer_learns_who_is_the_first(store: Store) -> None:
    command = [sys.executable, "-c", WRITER, store.location]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        try:
            assert first.stdout.readline() == "writing\n"
            for attempt in (lambda: store.writing().__enter__(), lambda: store.put([record(1)])):
                with pytest.raises(InputError, match=rf"is being written by .*process {first.pid}\b"):
                    attempt()
            assert store.counts()["documents"] == 0, "reading goes on"
        finally:
            first.kill()
        first.wait()
    # The killed one's right is gone with it; a server needs a moment to notice.
    for _ in range(100):
        try:
            store.put([record(1)])
            break
        except InputError:
            time.sleep(0.05)
    assert check_whole(store) == 1


def test_the_right_to_write_is_one_thread_s(store: Store) -> None:
    other = open_store(store.location)
    refused: list[str] = []

    def attempt(one: Store) -> None:
        try:
            one.put([record(2)])
        except InputError as error:
            refused.append(str(error))

    with store.writing():
        with store.writing():
            store.put([record(1)])
        for one in (store, other):
            thread = threading.Thread(target=attempt, args=(one,))
            thread.start()
            thread.join()
    assert len(refused) == 2 and all(f"process {os.getpid()}" in message for message in refused)
    other.put([record(2)])
    other.close()
    assert check_whole(store) == 2


def test_threads_share_a_store(store: Store) -> None:
    store.put(record(number) for number in range(10))
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for version in range(4):
                store.put([record(10 + number, version)])
                with store.reading() as state:
                    assert check_whole(state) >= 10
                assert len(store.nearest(np.ones(DIMENSIONS, np.float32), 3)) == 3
                assert store.keyword("river", 3)
        except BaseException as error:  # noqa: BLE001  (told to the test)
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and check_whole(store) == 16


def test_an_abandoned_reader_does_no_harm(store: Store) -> None:
    store.put(record(number, chunks=1) for number in range(20))
    for _ in range(30):
        chunks = store.chunks()
        next(chunks)
        documents = store.documents()
        next(documents)
        chunks.close()  # pyright: ignore[reportAttributeAccessIssue]
    store.put([record(1, 3)])
    assert check_whole(store) == 20


def test_read_only_and_closed_stores_say_so(store: Store) -> None:
    store.put([record(1)])
    reader = open_store(store.location, read_only=True)
    assert list(reader.dump()) == list(store.dump())
    for attempt in (
        lambda: reader.put([record(2)]),
        lambda: reader.delete([record(1).document.id]),
        lambda: reader.vacuum(),
        lambda: reader.writing().__enter__(),
    ):
        with pytest.raises(InputError, match="reading only"):
            attempt()
    reader.close()
    with pytest.raises(InputError, match="was closed"):
        reader.counts()
    other = open_store(store.location)
    other.close()
    with pytest.raises(InputError, match="was closed"):
        other.put([record(2)])
    assert check_whole(store) == 1


# Histories -------------------------------------------------------------------------------------------------


def _assert_like_fresh(store: Store, places: Places) -> None:
    """The store's dump is that of a fresh build, what was extracted left aside; its file is little larger."""
    fresh = places.make()
    fresh.put(rebuilt(store))

    def content(one: Store) -> list[str]:
        return [line for line in one.dump() if '"kind": "extracted"' not in line]

    assert content(store) == content(fresh)
    store.vacuum()
    fresh.vacuum()
    assert content(store) == content(fresh)
    assert places.size(store) <= 1.3 * places.size(fresh)
    places.check(store)
    fresh.close()


def test_a_long_history_leaves_no_trace(store: Store, places: Places) -> None:
    change_at_random(store.location, seed=5, changes=150, documents=60)
    store.put(record(number, 9) for number in range(200, 400))
    store.delete([record(number).document.id for number in range(240, 400)])
    assert check_whole(store) > 40
    _assert_like_fresh(store, places)


def test_stores_of_both_kinds_are_dumped_alike(both_places: list[Places]) -> None:
    dumps: list[list[str]] = []
    for places in both_places:
        one = places.make()
        one.put(record(number) for number in range(20))
        chunk = record(1).chunks[0]
        one.put_triples(
            chunk.id, [Triple(chunk.id, "Ü", "b", "c", "x"), Triple(chunk.id, "Z", "b", "c", "x")]
        )
        dumps.append(list(one.dump()))
        one.close()
    assert dumps[0] == dumps[1] and len(dumps[0]) > 40


def _kill_many_times(store: Store, places: Places, kills: int) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([change_at_random.__module__])
    rng = random.Random(kills)
    done = threading.Event()
    errors: list[BaseException] = []
    read = [0]

    def reader() -> None:
        mine = open_store(store.location)
        try:
            while not done.wait(0.01):
                with mine.reading() as state:
                    check_whole(state)
                read[0] += 1
        except BaseException as error:  # noqa: BLE001  (told to the test)
            errors.append(error)
        mine.close()

    thread = threading.Thread(target=reader)
    thread.start()
    generations = [store.generation]
    try:
        for round_ in range(kills):
            writer = context.Process(target=change_at_random, args=(store.location, round_))
            writer.start()
            # It dies somewhere between its first and its thirtieth write or so.
            deadline = time.monotonic() + 60
            while store.generation == generations[-1] and writer.is_alive() and not errors:
                assert time.monotonic() < deadline, "nothing that the writer wrote was seen"
                time.sleep(0.002)
            time.sleep(rng.random() * 0.15)
            assert writer.is_alive(), "the writer failed by itself"
            writer.kill()
            writer.join()
            writer.close()
            generations.append(store.generation)
            with store.reading() as state:
                check_whole(state)
            assert not errors
    finally:
        done.set()
        thread.join()
    assert errors == [] and read[0] > 0
    assert generations == sorted(set(generations))
    _assert_like_fresh_when_free(store, places)


def _assert_like_fresh_when_free(store: Store, places: Places) -> None:
    for _ in range(100):
        try:
            with store.writing():
                break
        except InputError:  # a server needs a moment to notice that the writer is dead
            time.sleep(0.05)
    _assert_like_fresh(store, places)


def test_killed_writers_leave_whole_documents(store: Store, places: Places) -> None:
    _kill_many_times(store, places, 20)


@pytest.mark.slow
def test_writers_killed_many_times_leave_whole_documents(store: Store, places: Places) -> None:
    _kill_many_times(store, places, 200 if LONG else 30)
