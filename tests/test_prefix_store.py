"""Prefixes that are kept on disk: files that are right or ignored, engines that answer the same with them."""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import llmc
import numpy as np
import pytest
from llmc.cli.serve import _prefix_cache
from llmc.ir.errors import InputError
from llmc.runtime import prefix_store
from llmc.runtime.engine import Engine, EngineOptions, ModelFacts
from llmc.runtime.executor.pages import pages_as_bytes, pages_from_bytes
from llmc.runtime.prefix_pages import attach
from llmc.runtime.prefix_store import PrefixStore
from llmc.runtime.sampling_params import SamplingParams
from llmc.runtime.server.metrics import Metrics

from .fake_executor import FakeExecutor, generate_alone
from .models import save_tiny
from .tvm_graphs import ISA

SIZE = 100
KEY, OTHER = b"k" * 32, b"o" * 32
FACTS = ModelFacts(vocab_size=97, context_length=200)


def name(i: int) -> bytes:
    return i.to_bytes(16, "big")


def page(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, SIZE, np.uint8)


def opened(folder: Path, key: bytes = KEY, limit: int = 1 << 20) -> PrefixStore:
    return PrefixStore(folder, key, page_bytes=SIZE, limit=limit)


def file_of(folder: Path) -> Path:
    (path,) = folder.glob("*/??/*.page")
    return path


def test_what_is_put_is_found_by_the_next_process_under_its_key(tmp_path: Path) -> None:
    with_some = opened(tmp_path)
    assert with_some.get(name(1)) is None and not with_some.touch(name(1))
    for i in (1, 2):
        with_some.put(name(i), page(i))
    with_some.close()
    with_some.put(name(3), page(3))  # after the end it is dropped
    assert with_some.counts.dropped == 1
    assert {p.stat().st_mode & 0o077 for p in tmp_path.rglob("*") if p.is_dir()} == {0}  # its owner's alone
    again = opened(tmp_path)
    for i in (1, 2):
        found = again.get(name(i))
        assert found is not None and np.array_equal(found, page(i)) and again.touch(name(i))
    assert again.get(name(3)) is None and opened(tmp_path, OTHER).get(name(1)) is None
    assert (again.counts.hits, again.counts.misses, again.counts.damaged) == (2, 1, 0)


def _flip(at: int) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)

    return change


DAMAGE: dict[str, Callable[[Path], object]] = {
    "magic": _flip(0),
    "key": _flip(8),
    "hash": _flip(40),
    "length": _flip(56),
    "checksum": _flip(64),
    "first byte": _flip(96),
    "last byte": _flip(-1),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "head alone": lambda path: path.write_bytes(path.read_bytes()[:96]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(96 + SIZE)),
    "another's": lambda path: path.write_text("something else"),
}


@pytest.mark.parametrize("kind", sorted(DAMAGE))
def test_a_damaged_or_foreign_file_is_ignored_with_one_warning_and_replaced(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = opened(tmp_path)
    store.put(name(1), page(1))
    store.flush()
    DAMAGE[kind](file_of(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert store.get(name(1)) is None and store.get(name(1)) is None
    assert store.counts.damaged == 2 and len(caplog.records) == 1
    assert str(file_of(tmp_path)) in caplog.text
    assert not store.touch(name(1))  # so that it is put again
    store.put(name(1), page(1))
    store.close()
    assert np.array_equal(opened(tmp_path).get(name(1)), page(1))


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_is_no_file_is_not_waited_for(make: Callable[[Path], object], tmp_path: Path) -> None:
    store = opened(tmp_path)
    store._path(name(1)).parent.mkdir()
    make(store._path(name(1)))
    assert store.get(name(1)) is None and store.counts.damaged == 1
    store.put(name(1), page(1))
    store.close()
    assert store.counts.written == (make is os.mkfifo)


def test_another_models_page_under_this_name_is_not_taken(tmp_path: Path) -> None:
    other = opened(tmp_path, OTHER)
    other.put(name(1), page(1))
    other.close()
    path = file_of(tmp_path)
    here = tmp_path / KEY.hex() / path.parent.name / path.name
    store = opened(tmp_path)
    here.parent.mkdir()
    here.write_bytes(path.read_bytes())
    assert store.get(name(1)) is None and store.counts.damaged == 1


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    store = opened(tmp_path, limit=10 * (SIZE + 96))
    other = opened(tmp_path, OTHER, limit=10 * (SIZE + 96))
    other.put(name(100), page(100))
    other.close()
    for i in range(9):
        store.put(name(i), page(i))
    store.flush()
    old = time.time() - 1000
    for i, path in enumerate(sorted(tmp_path.glob("*/??/*.page"), key=lambda p: p.stat().st_mtime_ns)):
        os.utime(path, (old + i, old + i))  # in the order in which they were written
    assert store.get(name(0)) is not None and store.touch(name(2))
    beside = tmp_path / KEY.hex() / "00" / f"{name(50).hex()}.page.1-1"
    beside.write_bytes(b"half")
    os.utime(beside, (old - 10_000, old - 10_000))
    store.put(name(9), page(9))
    store.close()
    kept = [i for i in range(10) if store._path(name(i)).exists()]
    # The other model's is the oldest, then 1: nine of ten stay.
    assert kept == [0, 2, 3, 4, 5, 6, 7, 8, 9]
    assert not other._path(name(100)).exists() and not beside.exists()


def test_half_written_pages_are_no_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = opened(tmp_path)
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
    store.put(name(1), page(1))
    store.put(name(2), page(2))
    store.close()
    assert store.counts.dropped == 2 and store.counts.written == 0
    assert caplog.text.count("could not be written (No space left") == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_pages_wait_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_store, "_PENDING_BYTES", 3 * SIZE)
    store = opened(tmp_path)
    put = threading.Event()
    blocked = store._writer.submit(put.wait, 30)  # the writer cannot finish a page meanwhile
    for i in range(5):
        store.put(name(i), page(i))
    put.set()
    assert blocked.result()
    store.close()
    assert (store.counts.written, store.counts.dropped) == (3, 2)


def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="no prefix cache can be kept there"):
        opened(tmp_path / "file")
    with pytest.raises(InputError, match="holds not one page of 100"):
        opened(tmp_path, limit=150)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_pages_as_bytes_come_back(axis: int) -> None:
    random_ = np.random.default_rng(0)
    shapes = ([2, 5, 3, 4], [3, 2, 1, 7])
    kinds = (np.float32, np.uint8)
    for shape in shapes:
        shape[axis] = 6
    arrays = [random_.integers(0, 200, shape).astype(kind) for shape, kind in zip(shapes, kinds, strict=True)]
    copies = [array.copy() for array in arrays]
    contents = pages_as_bytes(arrays, axis, [4, 1])
    for array in arrays:
        np.moveaxis(array, axis, 0)[[0, 2, 1, 4]] = 0
    pages_from_bytes(arrays, axis, [4, 1], contents)
    for array, copy in zip(arrays, copies, strict=True):
        found, before = np.moveaxis(array, axis, 0), np.moveaxis(copy, axis, 0)
        assert np.array_equal(found[[1, 3, 4, 5]], before[[1, 3, 4, 5]]) and not found[[0, 2]].any()
    assert pages_as_bytes(arrays, axis, []).shape == (0, contents.shape[1])


# Engines


class Paged(FakeExecutor):
    """The fake executor with pages that can be kept."""

    def __init__(self) -> None:
        super().__init__(kv_bytes_per_page=64)
        self.written: list[int] = []

    def identity(self) -> dict[str, str]:
        return {"target": "fake"}

    def read_pages(self, pages: Any) -> np.ndarray:
        return pages_as_bytes([self.tokens, self.positions], 0, pages)

    def write_pages(self, pages: Any, contents: np.ndarray) -> None:
        self.written += pages
        pages_from_bytes([self.tokens, self.positions], 0, pages, contents)


def engine_with(folder: Path, executor: FakeExecutor, kv_tokens: int = 400, **options: Any) -> Engine:
    engine = Engine(executor, None, FACTS, EngineOptions(kv_tokens=kv_tokens, **options))
    (folder / "manifest.json").write_text("{}")
    attach(engine, SimpleNamespace(root=folder), folder / "cache")  # type: ignore[arg-type]
    return engine


def answers(engine: Engine, prompts: list[list[int]], count: int = 5) -> list[list[int]]:
    found: dict[str, list[int]] = {
        engine.add_request(prompt, SamplingParams(max_tokens=count, temperature=0.0)): []
        for prompt in prompts
    }
    while engine.has_work:
        for output in engine.step():
            found[output.request_id] += output.token_ids
        engine.check()
    return list(found.values())


def ended(engine: Engine) -> None:
    assert engine.scheduler.prefixes is not None
    engine.scheduler.prefixes.close()


def test_after_a_restart_a_prompt_is_read_and_not_computed(tmp_path: Path) -> None:
    prompt = [(7 * i) % 97 for i in range(41)]
    first = engine_with(tmp_path, Paged())
    assert answers(first, [prompt]) == [generate_alone(prompt, 5)]
    assert first.counters.tokens_from_disk == 0 and first.counters.tokens_computed == 41 + 4
    ended(first)
    second = engine_with(tmp_path, Paged())
    assert answers(second, [prompt]) == [generate_alone(prompt, 5)]
    assert second.counters.tokens_from_disk == second.counters.tokens_from_cache == 40
    assert second.counters.tokens_computed == 1 + 4
    # What is in memory is not read again; another end of the same prompt takes the pages that it has.
    assert answers(second, [prompt, [*prompt[:30], 5]]) == [
        generate_alone(prompt, 5),
        generate_alone([*prompt[:30], 5], 5),
    ]
    assert second.counters.tokens_from_disk == 40
    metrics = Metrics()
    metrics.watch({"m": second})
    assert b'llmc:prefix_cache_disk_hits_total{model_name="m"} 40.0' in metrics.page()
    ended(second)


def test_restarts_in_the_middle_of_anything_change_no_token(tmp_path: Path) -> None:
    """Few pages, so that prefixes are evicted, preempted, restored in part; some files are damaged."""
    rng = random.Random(5)
    stems = [[rng.randrange(97) for _ in range(rng.randrange(10, 60))] for _ in range(4)]
    restored = 0
    for _ in range(12):
        engine = engine_with(tmp_path, Paged(), kv_tokens=rng.choice([80, 120, 400]), max_sequences=4)
        for _ in range(3):
            prompts = [
                [*stem[: rng.randrange(1, len(stem) + 1)], *[rng.randrange(97)] * rng.randrange(5)]
                for stem in rng.choices(stems, k=6)
            ]
            assert answers(engine, prompts) == [generate_alone(prompt, 5) for prompt in prompts]
        restored += engine.counters.tokens_from_disk
        ended(engine)
        for path in (tmp_path / "cache").glob("*/??/*.page"):
            if rng.random() < 0.1:
                path.write_bytes(path.read_bytes()[: rng.randrange(160)])
    assert restored > 200


def test_a_prefix_is_restored_when_there_is_room_for_its_prompt(tmp_path: Path) -> None:
    long = [i % 97 for i in range(100)]
    first = engine_with(tmp_path, Paged())
    answers(first, [long])
    ended(first)
    executor = Paged()
    second = engine_with(tmp_path, executor, kv_tokens=112)
    other = [50 + i % 40 for i in range(60)]
    greedy = SamplingParams(max_tokens=5, temperature=0.0)
    found: dict[str, list[int]] = {second.add_request(prompt, greedy): [] for prompt in (other, long)}
    while second.has_work:  # the first one takes 15 of the 28 pages, 25 are too many beside it
        meanwhile = len(second.scheduler.running) == 1 and len(second.scheduler.waiting) == 1
        for output in second.step():
            found[output.request_id] += output.token_ids
        second.check()
        assert not (meanwhile and second.scheduler.waiting and executor.written), "read before its time"
    assert list(found.values()) == [generate_alone(other, 5), generate_alone(long, 5)]
    assert len(executor.written) == 24, "all that are kept"
    ended(second)


def test_scored_prompts_are_computed_and_salted_ones_are_not_kept(tmp_path: Path) -> None:
    prompt = [3] * 20
    first = engine_with(tmp_path, Paged())
    for salt in (b"adapter 1", b""):
        for request in (first.make_request(prompt, SamplingParams(max_tokens=1)),):
            first.submit(request)
            request.live[0].salt = salt
            while first.has_work:
                first.step()
        assert first.scheduler.prefixes is not None
        first.scheduler.prefixes.store.flush()  # type: ignore[attr-defined]
        assert bool(list((tmp_path / "cache").rglob("*.page"))) == (salt == b"")
    ended(first)
    second = engine_with(tmp_path, Paged())
    second.add_request(prompt, SamplingParams(max_tokens=1, prompt_logprobs=1))
    while second.has_work:
        second.step()
    assert second.counters.tokens_from_disk == 0
    ended(second)


def test_what_cannot_be_kept_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(InputError, match="pages of this target cannot be kept on disk"):
        engine_with(tmp_path, FakeExecutor())
    with caplog.at_level(logging.WARNING):
        engine = engine_with(tmp_path, Paged(), prefix_cache=False)
    assert engine.scheduler.prefixes is None and "no prefix cache on disk" in caplog.text


def test_the_option_of_serve() -> None:
    assert _prefix_cache(None) == (None, None)
    assert _prefix_cache("a,b/c") == ("a,b/c", None)
    assert _prefix_cache("a,b,size=2GiB") == ("a,b", 2 << 30)
    with pytest.raises(InputError, match="names no folder"):
        _prefix_cache(",size=1GB")
    with pytest.raises(InputError, match="'much' is no size"):
        _prefix_cache("a,size=much")


def test_a_compiled_model_answers_the_same_from_disk(tmp_path: Path) -> None:
    source, out = save_tiny("llama", tmp_path / "model"), tmp_path / "m.llmc"
    llmc.compile(source, out, targets=[f"tvm-cpu:isa={ISA}"], quant="int8")
    prompt = [(5 * i) % 90 + 5 for i in range(70)]
    params = SamplingParams(max_tokens=12, temperature=0.0)
    found: list[list[int]] = []
    counts: list[int] = []
    for folder in (None, tmp_path / "cache", tmp_path / "cache"):
        with llmc.load(out, prefix_cache_dir=folder, kv_tokens=256) as llm:
            found.append(list(llm.generate(prompt, params).token_ids))
            counts.append(llm.engine.engine.counters.tokens_from_disk)
    assert found[0] == found[1] == found[2]
    assert counts == [0, 0, 64]
    with pytest.raises(InputError, match="prefix_cache_dir without prefix_cache"):
        llmc.load(out, prefix_cache=False, prefix_cache_dir=tmp_path / "cache")
