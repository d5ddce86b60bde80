"""Random schedules on compiled kernels: greedy tokens, bit for bit those of each request alone.

The same schedules run on the fake executor in test_runtime_schedules.py, where they test the bookkeeping.
Here they test that no kernel lets a row depend on what else is in the batch, on how a prompt was cut, or on
whether its beginning came from the cache.
"""

from __future__ import annotations

import ctypes
import gc
import math
import time
from collections import Counter
from pathlib import Path

import llmc
import numpy as np
import pytest
from llmc.codegen.artifact import Artifact
from llmc.ir.errors import InputError
from llmc.runtime.engine import ModelFacts
from llmc.runtime.executor import Executor, open_executor
from llmc.runtime.executor.base import PreparesSampling, Profiles, StepInputs
from llmc.runtime.probabilities import Probabilities

from .conftest import LONG
from .models import CONTEXT, VOCAB_SIZE, save_tiny
from .schedules import check_schedule, random_schedule
from .tvm_graphs import ISA

# Full attention with int4 weights and a bfloat16 cache; a sliding window in float8; soft-capped scores in
# float32; a cache of int8, and groups that tile registers take.
MODELS: dict[str, tuple[str, str | None]] = {
    "llama": ("int4-g32", None),
    "mistral": ("int8", "float8_e4m3fn"),
    "gemma2": ("none", None),
    "qwen3": ("int4-g64", "int8"),
}
SCHEDULES = {
    "llama": range(100),
    "mistral": range(100, 150),
    "gemma2": range(150, 200),
    "qwen3": range(200, 230),
}
HERE = f"tvm-cpu:isa={ISA}"
FACTS = ModelFacts(vocab_size=VOCAB_SIZE, context_length=CONTEXT, eos_token_ids=(2,))


SLOW = ("gemma2", "qwen3")


@pytest.fixture(
    scope="module",
    params=[pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in sorted(MODELS)],
)
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Executor]:
    name: str = request.param
    folder = tmp_path_factory.mktemp(name)
    source = save_tiny(name, folder / "model")
    quant, kv_dtype = MODELS[name]
    out = folder / "tiny.llmc"
    artifact: Artifact = llmc.compile(source, out, targets=[HERE], quant=quant, kv_dtype=kv_dtype)
    return name, open_executor(artifact)


def test_schedules_give_each_request_its_own_tokens(compiled: tuple[str, Executor]) -> None:
    name, executor = compiled
    assert executor.batch_invariant
    events: Counter[str] = Counter()
    for seed in SCHEDULES[name][:: 1 if LONG else 3]:
        events += check_schedule(executor, FACTS, random_schedule(seed, FACTS, executor.page_size))
    # The schedules are only worth something if all of this happened.
    for event in ("preempted", "from_cache", "cancelled", "forked", "second_turns"):
        assert events[event] > 5, events


def _step(executor: Executor, ids: np.ndarray, cuts: list[int], first_page: int) -> np.ndarray:
    """Logits of every row of a sequence that is computed in pieces ending at `cuts`."""
    rows: list[np.ndarray] = []
    start = 0
    pages = np.arange(first_page, first_page + -(-len(ids) // executor.page_size), dtype=np.int32)
    for stop in cuts:
        positions = np.arange(start, stop, dtype=np.int32)
        slots = pages[positions // executor.page_size] * executor.page_size + positions % executor.page_size
        count = np.array([0, stop - start], np.int32)
        inputs = StepInputs(
            ids[start:stop],
            positions,
            slots,
            count,
            np.array([stop], np.int32),
            pages[None],
            positions - start,
        )
        rows.append(executor.step(inputs).copy())
        start = stop
    return np.concatenate(rows)


def test_logits_do_not_depend_on_how_a_prompt_is_cut(compiled: tuple[str, Executor]) -> None:
    _, executor = compiled
    executor.allocate_kv(32)
    ids = np.random.default_rng(1).integers(5, VOCAB_SIZE, 75).astype(np.int32)
    whole = _step(executor, ids, [75], 0)
    assert np.isfinite(whole).all()
    for cuts in ([1, 75], [16, 32, 48, 75], [7, 8, 9, 60, 75], list(range(1, 76))):
        assert np.array_equal(_step(executor, ids, cuts, 7), whole)


def test_a_prompt_is_the_same_with_as_many_threads_as_one_likes(tmp_path: Path) -> None:
    source, out = save_tiny("qwen2", tmp_path / "model"), tmp_path / "tiny.llmc"
    artifact: Artifact = llmc.compile(source, out, targets=[HERE], quant="int4-g64")
    ids = np.random.default_rng(2).integers(5, VOCAB_SIZE, 50).astype(np.int32)
    found: list[np.ndarray] = []
    for threads in (1, 2, 3):
        executor = open_executor(artifact, threads=threads)
        executor.allocate_kv(8)
        found.append(_step(executor, ids, [20, 50], 0))
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])


def test_a_profile_accounts_for_the_steps_time(compiled: tuple[str, Executor]) -> None:
    name, executor = compiled
    assert isinstance(executor, Profiles)
    executor.allocate_kv(8)
    ids = np.arange(32, dtype=np.int32)
    with executor.profile() as times:
        began = time.perf_counter()
        profiled = _step(executor, ids, [16, 32], 0)
        passed = time.perf_counter() - began
    kernels = Counter(kernel for kernel, _ in times.calls)
    layers = kernels["paged_attention"]
    assert layers == kernels["append_kv"] > 1
    if MODELS[name][0] == "int4-g32":  # norms and MLPs quantize what they make, attention does not
        assert kernels["quantize_activation"] == layers
    assert (times.cycles > 0).all()
    assert 0 < times.seconds < passed
    np.testing.assert_allclose(times.seconds_of_calls().sum(), times.seconds)
    weights = {weight for kernel, weight in times.calls if kernel.endswith("linear")}
    assert None not in weights and len(weights) == sum(k.endswith("linear") for k, _ in times.calls)
    before = times.cycles.copy()
    assert np.array_equal(_step(executor, ids, [16, 32], 0), profiled)
    assert np.array_equal(times.cycles, before)  # nobody counts after the block


def test_the_executor_prepares_what_numpy_would(compiled: tuple[str, Executor]) -> None:
    _, executor = compiled
    assert isinstance(executor, PreparesSampling)
    executor.allocate_kv(8)
    logits = _step(executor, np.arange(5, 25, dtype=np.int32), [20], 0)
    temperatures = np.where(np.arange(20) % 3, np.linspace(0.3, 2, 20), 0)
    scale = np.divide(math.log2(math.e), temperatures, out=np.zeros(20), where=temperatures > 0)
    for start in (0, 1, 7):  # memory that is not aligned comes out the same
        work = np.zeros(logits.size + 16, np.float32)[start:][: logits.size].reshape(logits.shape)
        work[:] = logits
        prepared = executor.prepare_sampling(work, scale.astype(np.float32))
        assert prepared is not None
        assert prepared.best.tolist() == logits.argmax(axis=1).tolist()
        for row, temperature in enumerate(temperatures):
            if not temperature:
                assert np.array_equal(work[row], logits[row])
                continue
            expected = Probabilities.of(logits[row].copy(), temperature)
            assert expected is not None
            found = Probabilities.prepared(work[row], row, prepared)
            np.testing.assert_allclose(found.weights, expected.weights, rtol=1e-5)
            for u in (0.0, 0.3, 0.77, 1 - 2**-53):
                assert found.draw(u) == expected.draw(u)
            kept = [p.kept(40, 0.9, 0.01) for p in (found, expected)]
            assert kept[0] is not None and kept[1] is not None and np.array_equal(*kept)
    with pytest.raises(InputError, match="give float32 \\[R"):
        executor.prepare_sampling(logits, scale[:3].astype(np.float32))


class _Heap(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [(f"field{i}", ctypes.c_size_t) for i in range(10)]


def _allocated() -> int:
    """Bytes that malloc has given out."""
    info = ctypes.CDLL(None).mallinfo2
    info.restype = _Heap
    heap = info()
    return heap.field7 + heap.field4  # uordblks, hblkhd


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="malloc does not say what it gave out"
)
def test_a_step_frees_what_its_kernels_allocate(compiled: tuple[str, Executor]) -> None:
    _, executor = compiled
    executor.allocate_kv(8)
    ids = np.arange(40, dtype=np.int32) % VOCAB_SIZE
    cuts = [24, 25, 26, 32, 39, 40]  # a prompt, single rows, a few

    def run(times: int) -> None:
        for _ in range(times):
            _step(executor, ids, cuts, 1)

    run(3)  # arrays that grow to their size
    gc.collect()
    before = _allocated()
    run(30)
    gc.collect()
    assert _allocated() - before < 32 << 10, "bytes after 180 steps"
