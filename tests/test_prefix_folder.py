"""The folder of kept prefixes beside other people's files, several writers and little room."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llmc.runtime import prefix_store
from llmc.runtime.prefix_store import PrefixStore
from llmc.runtime.sampling_params import SamplingParams

from .fake_executor import generate_alone
from .test_prefix_store import KEY, OTHER, SIZE, Paged, answers, ended, engine_with, name, opened, page

FILE = SIZE + 96


def put_all(store: PrefixStore, numbers: range) -> None:
    for i in numbers:
        store.put(name(i), page(i))
    store.flush()


def test_only_files_of_ours_are_ever_removed(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "cache", tmp_path / "elsewhere"
    right, part = KEY.hex(), "00"
    hash_ = name(77).hex()
    strangers = [
        "notes/ab/book.page",
        f"notes/ab/{hash_}.page",
        f"{right}/long/{hash_}.page",
        f"{right}/{part}/book.page",
        f"{right}/{part}/{hash_}.pages",
        f"{right}/{part}/{hash_}.page.old",
        f"{right}/{part}/{hash_}.page.1-1.bak",
        f"{right}/{part}/{hash_.upper()}x.page",
        f"{right[:-1]}/{part}/{hash_}.page",
        f"{right.upper()}/{part}/{hash_}.page",
    ]
    for stranger in [*(folder / one for one in strangers), elsewhere / part / f"{hash_}.page"]:
        stranger.parent.mkdir(parents=True, exist_ok=True)
        stranger.write_bytes(bytes(10 * FILE))
        os.utime(stranger, (1, 1))
    (folder / ("a" * 64)).symlink_to(elsewhere)  # a link to a folder whose contents look like ours
    (folder / right / "ee").symlink_to(elsewhere / part)
    link = folder / right / part / f"{name(78).hex()}.page"
    link.symlink_to(elsewhere / part / f"{hash_}.page")
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file() or path.is_symlink())

    store = opened(folder, limit=2 * FILE)
    put_all(store, range(5))  # trims
    store.close()
    kept = {path for path in tmp_path.rglob("*") if path.is_file() or path.is_symlink()}
    ours = {store._path(name(i)) for i in range(5)}
    assert sorted(kept - ours) == before
    assert len(kept & ours) == 1
    assert (elsewhere / part / f"{hash_}.page").read_bytes() == bytes(10 * FILE)


def test_a_link_in_the_place_of_a_page_is_not_read_or_touched(tmp_path: Path) -> None:
    store = opened(tmp_path / "cache")
    put_all(store, range(1))
    outside = tmp_path / "outside"
    store._path(name(0)).rename(outside)
    os.utime(outside, (1, 1))
    store._path(name(0)).symlink_to(outside)
    assert store.get(name(0)) is None and store.counts.damaged == 1
    put_all(store, range(1))  # it is replaced, not what it names
    assert store.get(name(0)) is not None and not store._path(name(0)).is_symlink()
    assert outside.stat().st_mtime == 1
    store.close()


def test_several_writers_hold_one_limit(tmp_path: Path) -> None:
    """Each counts what the others wrote after a twentieth of the limit."""
    limit = 100 * FILE
    stores = [PrefixStore(tmp_path, key, page_bytes=SIZE, limit=limit) for key in (KEY, OTHER)]
    most = 0
    for i in range(150):
        for store in stores:
            put_all(store, range(i, i + 1))
        found = sum(path.stat().st_size for path in tmp_path.glob("*/??/*.page"))
        most = max(most, found)
    assert limit < 300 * FILE and most <= limit * 1.1 + 2 * FILE
    for store in stores:
        store.close()


def test_files_that_cannot_be_removed_still_count_and_are_not_listed_for_each_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(tmp_path, limit=100 * FILE)
    put_all(store, range(100))
    listed: list[int] = []
    files = prefix_store._files

    def counted(root: Path) -> Any:
        listed.append(1)
        return files(root)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("not yours")

    with monkeypatch.context() as patched:
        patched.setattr(prefix_store, "_files", counted)
        patched.setattr(Path, "unlink", refuse)
        put_all(store, range(100, 130))
    assert 2 <= len(listed) <= 8 and store._kept == 130 * FILE
    put_all(store, range(130, 140))  # now they can be
    store.close()
    assert sum(path.stat().st_size for path in tmp_path.glob("*/??/*.page")) <= 100 * FILE


def test_pages_are_kept_as_they_are_filled_and_a_prompt_ends_at_its_first_drop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = Paged()
    reads: list[int] = []
    read_pages = executor.read_pages
    executor.read_pages = lambda pages: reads.extend(pages) or read_pages(pages)  # type: ignore[method-assign]
    engine = engine_with(tmp_path, executor, max_batch_tokens=16, max_sequences=4)
    prefixes: Any = engine.scheduler.prefixes
    prompt = [(11 * i) % 97 for i in range(100)]
    engine.add_request(prompt, SamplingParams(max_tokens=2))
    found: list[int] = []
    while engine.has_work:
        engine.step()
        prefixes.store.flush()
        found.append(prefixes.store.counts.written)
    assert found[:3] == [4, 8, 12] and found[-1] == 25  # four pages a step
    # No room: nothing is copied, and nothing behind the first page that found none is kept.
    monkeypatch.setattr(prefix_store, "_PENDING_BYTES", 3 * 64)
    go_on = threading.Event()
    prefixes.store._writer.submit(go_on.wait, 30)
    reads.clear()
    other = [(13 * i + 5) % 97 for i in range(100)]
    engine.add_request(other, SamplingParams(max_tokens=2))
    for _ in range(3):
        engine.step()
    go_on.set()
    prefixes.store.flush()  # there is room again, too late for this prompt
    while engine.has_work:
        engine.step()
    assert len(reads) == 3 and prefixes.store.counts.dropped == 1
    ended(engine)
    second = engine_with(tmp_path, Paged())
    assert answers(second, [other]) == [generate_alone(other, 5)]
    assert second.counters.tokens_from_disk == 12
    ended(second)


def test_a_page_that_could_not_be_written_to_memory_is_not_found_there(tmp_path: Path) -> None:
    prompt = [(7 * i) % 97 for i in range(41)]
    first = engine_with(tmp_path, Paged())
    answers(first, [prompt])
    ended(first)

    class Failing(Paged):
        def write_pages(self, pages: Any, contents: np.ndarray) -> None:
            if len(self.written) == 3:
                self.written += pages
                raise OSError("the device is gone")
            super().write_pages(pages, contents)

    second = engine_with(tmp_path, Failing())
    second.add_request(prompt, SamplingParams(max_tokens=5))
    with pytest.raises(OSError, match="the device is gone"):
        second.step()
    second.check()
    assert answers(second, [prompt]) == [generate_alone(prompt, 5)]  # its other pages are right
    ended(second)


def test_a_beside_file_is_left_to_its_writer_for_an_hour(tmp_path: Path) -> None:
    store = opened(tmp_path, limit=3 * FILE)
    put_all(store, range(1))
    beside = store._path(name(0)).with_name(f"{name(0).hex()}.page.12-34")
    beside.write_bytes(b"half")
    os.utime(beside, (time.time() - 1800,) * 2)
    put_all(store, range(1, 6))
    assert beside.exists()
    os.utime(beside, (time.time() - 4000,) * 2)
    put_all(store, range(6, 12))
    assert not beside.exists()
    store.close()
