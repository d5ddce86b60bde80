"""Target onnx-cpu: the paged step against the interpreter.

The interpreter runs the same graph with the ops' reference meanings and keeps its own cache, so every step
compares attention over what both have written before. Tolerance 1e-5 of the largest output: float32 sums over
at most a few hundred keys in another order.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from llmc.codegen.onnx.lower import lower
from llmc.ir import interpreter
from llmc.ir.core import Graph, Value
from llmc.ir.errors import InputError, UnsupportedError
from llmc.ir.ops import cache, math, nn, shape
from llmc.ir.types import TensorType
from llmc.runtime.executor.base import StepInputs
from llmc.runtime.executor.onnx import OnnxExecutor

from .attention_biases import distance_table
from .test_onnx_target import (
    RNG,
    B,
    N,
    P,
    R,
    T,
    build,
    check,
    close,
    f32,
    function,
    normal,
    private_bytes,
    weight,
)

PAGE = 16
VOCAB = 61


@dataclass(frozen=True)
class Heads:
    """Shape and variant of the attention under test."""

    heads: int = 4
    kv_heads: int = 2
    dim: int = 8
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    slopes: bool = False
    distances: bool = False
    kv_dtype: str = "float32"
    layers: int = 1


def step_graph(h: Heads) -> Graph:
    """A language model of `layers` residual attention layers, made by hand with the paged interface."""
    g = Graph("main", "paged")
    int32 = {
        "token_ids": (T,),
        "positions": (T,),
        "slot_mapping": (T,),
        "query_start": (B + 1,),
        "context_len": (B,),
    }
    ins = {n: g.add_input(n, TensorType("int32", s)) for n, s in int32.items()}
    ins["block_table"] = g.add_input("block_table", TensorType("int32", (B, P)))
    ins["output_index"] = g.add_input("output_index", TensorType("int32", (R,)))
    pages = TensorType(h.kv_dtype, (2, N, PAGE, h.kv_heads, cache.page_width(h.kv_dtype, h.dim)))
    caches = [g.add_input(f"kv_pages.{i}", pages) for i in range(h.layers)]
    width, kv = h.heads * h.dim, h.kv_heads * h.dim
    x = g.append(nn.Embedding(ins["token_ids"], weight(g, "embed", normal(VOCAB, width)))).result
    written: list[Value] = []
    for i, pages_in in enumerate(caches):
        merged = weight(g, f"qkv.{i}", normal(width + 2 * kv, width, seed=10 + i) / np.float32(width**0.5))
        qkv = g.append(nn.Linear(g.append(nn.RmsNorm(x, None, eps=1e-6)).result, merged, None)).result
        bounds = (0, width, width + kv, width + 2 * kv)
        parts = [g.append(shape.Slice(qkv, -1, a, b)).result for a, b in itertools.pairwise(bounds)]
        q = g.append(shape.Reshape(parts[0], (T, h.heads, h.dim))).result
        k, v = (g.append(shape.Reshape(p, (T, h.kv_heads, h.dim))).result for p in parts[1:])
        if h.kv_dtype in ("float16", "bfloat16"):
            k, v = (g.append(math.Cast(p, h.kv_dtype)).result for p in (k, v))
        new = g.append(cache.AppendKv(k, v, pages_in, ins["slot_mapping"])).result
        written.append(new)
        numbers = weight(g, f"per_head.{i}", normal(h.heads, seed=20 + i)) if h.sinks or h.slopes else None
        table = weight(g, f"distances.{i}", distance_table(h.heads, 32, i)) if h.distances else None
        per_head = (numbers if h.sinks else None, numbers if h.slopes else None, table)
        where = (ins["query_start"], ins["context_len"], ins["block_table"])
        a = cache.PagedAttention(
            q, new, *where, *per_head, scale=0.7, causal=h.causal, window=h.window, softcap=h.softcap
        )
        flat = g.append(shape.Reshape(g.append(a).result, (T, width))).result
        x = g.append(math.Add(x, flat)).result
    wanted = g.append(cache.GatherLast(x, ins["output_index"])).result
    g.outputs, g.output_names = [wanted, *written], ["logits", *(f"kv.{i}" for i in range(h.layers))]
    return g


@dataclass
class Batch:
    """Sequences with random tokens in randomly chosen pages, cut into steps as a test says."""

    pages: int
    seed: int = 0
    context: dict[int, int] = field(default_factory=dict)
    table: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng = RNG(self.seed)
        self.free = [int(p) for p in self.rng.permutation(self.pages)]

    def step(self, new: list[tuple[int, int]], spare_columns: int = 1) -> StepInputs:
        """Inputs for `new` tokens of each (sequence, count); all rows are wanted."""
        slots: list[int] = []
        positions: list[int] = []
        for name, count in new:
            done = self.context.get(name, 0)
            pages = self.table.setdefault(name, [])
            while len(pages) * PAGE < done + count:
                pages.append(self.free.pop())
            slots += [pages[p // PAGE] * PAGE + p % PAGE for p in range(done, done + count)]
            positions += range(done, done + count)
            self.context[name] = done + count
        width = max((len(self.table[n]) for n, _ in new), default=0) + spare_columns
        tables = [self.table[n] + [0] * (width - len(self.table[n])) for n, _ in new]
        edges = np.cumsum([0, *(count for _, count in new)])
        total = int(edges[-1])
        arrays = (
            self.rng.integers(0, VOCAB, total), positions, slots, edges, [self.context[n] for n, _ in new],
            np.reshape(tables, (len(new), width)), np.arange(total),
        )  # fmt: skip
        return StepInputs(*(np.ascontiguousarray(a, np.int32) for a in arrays))


class Oracle:
    """The interpreter with a cache of its own."""

    def __init__(self, graph: Graph, h: Heads, pages: int) -> None:
        import torch

        self.graph = graph
        dtype = getattr(torch, h.kv_dtype)
        shape = (2, pages, PAGE, h.kv_heads, cache.page_width(h.kv_dtype, h.dim))
        self.caches = [torch.zeros(shape, dtype=dtype) for _ in range(h.layers)]

    def step(self, inputs: StepInputs) -> np.ndarray:
        feed = {name: interpreter.to_torch(array) for name, array in inputs.given().items()}
        feed |= {f"kv_pages.{i}": c for i, c in enumerate(self.caches)}
        logits, *self.caches = interpreter.run(self.graph, feed)
        return logits.numpy()


def compare(
    h: Heads, schedule: list[list[tuple[int, int]]], folder: Path, pages: int = 64, tolerance: float = 1e-5
) -> None:
    """Run a schedule on both sides, comparing every step's outputs and at the end the caches."""
    graph = step_graph(h)
    executor = OnnxExecutor(build(graph, folder, kind="causal_lm"), threads=1)
    executor.allocate_kv(pages)
    oracle, batch = Oracle(graph, h, pages), Batch(pages)
    for new in schedule:
        inputs = batch.step(new)
        close(executor.step(inputs), oracle.step(inputs), tolerance)
    for layer, (ours, theirs) in enumerate(zip(executor._cache, oracle.caches, strict=True)):
        held = ours.astype(np.float32)
        if h.kv_dtype == "int8":
            held, theirs = held * executor._scales[layer][..., None], cache.dequantize_heads(theirs)
        close(held.transpose(0, 2, 3, 1, 4), theirs.float().numpy(), tolerance)


MIXED = [[(0, 20), (1, 1), (2, 33)], [(0, 1), (2, 1), (1, 5)], [(1, 1), (0, 1), (2, 1)], [(3, 7), (2, 16)]]
VARIANTS = {
    "grouped": Heads(),
    "one head each": Heads(kv_heads=4),
    "one kv head": Heads(kv_heads=1, dim=6),
    "window": Heads(window=5),
    "window of one page": Heads(window=16),
    "softcap": Heads(softcap=0.8),
    "sinks": Heads(sinks=True),
    "sinks, a head each": Heads(kv_heads=4, sinks=True),
    "slopes": Heads(slopes=True),
    "slopes, a head each": Heads(kv_heads=4, slopes=True, window=7, softcap=1.5),
    "distances": Heads(distances=True, causal=False),
    "distances, window": Heads(kv_heads=4, distances=True, window=20),
    "everything": Heads(heads=6, kv_heads=3, dim=10, window=7, softcap=1.5, sinks=True, layers=2),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name: str, tmp_path: Path) -> None:
    compare(VARIANTS[name], MIXED, tmp_path)


@pytest.mark.parametrize("bias", ["", "slopes", "distances"])
def test_how_far_keys_stand_is_computed_for_what_needs_it(bias: str) -> None:
    (function,) = lower(step_graph(Heads(slopes=bias == "slopes", distances=bias == "distances"))).functions
    assert any("behind" in name for name in function.input) == (bias == "slopes")
    assert any("_distance" in name for name in function.input) == (bias == "distances")
    assert any("mask" in name for name in function.input)


SCHEDULES = {
    "one token": [[(0, 1)], [(0, 1)]],
    "last page full": [[(0, 16), (1, 32)], [(0, 1), (1, 1)]],
    "page filled by this step": [[(0, 15), (1, 31)], [(0, 1), (1, 1)], [(0, 16), (1, 1)]],
    "an empty sequence": [[(0, 3), (1, 0), (2, 1)], [(1, 0), (0, 1), (2, 0)]],
    "nothing at all": [[(0, 0)], []],
    "chunked prefill": [[(0, 7)], [(0, 16)], [(0, 2)], [(0, 40)]],
    "several query chunks": [[(0, 300), (1, 1), (2, 128)], [(0, 129), (2, 1)]],
    "more decoding than a group": [[(i, 1 + 3 * (i % 7)) for i in range(37)], [(i, 1) for i in range(37)]],
}


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name: str, window: int | None, tmp_path: Path) -> None:
    compare(Heads(window=window, layers=2), SCHEDULES[name], tmp_path, pages=128)


def test_decoding_groups_are_bounded_by_their_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmc.codegen.onnx.attention_plan.DECODE_TOKENS", 64)
    compare(Heads(), [[(0, 70), (1, 30), (2, 20), (3, 3)], [(i, 1) for i in range(4)]], tmp_path)


@pytest.mark.parametrize("window", [None, 4])
def test_encoder(window: int | None, tmp_path: Path) -> None:
    compare(Heads(causal=False, window=window), [[(0, 5), (1, 1), (2, 140)], [(3, 17)]], tmp_path)


def test_half_precision_cache(tmp_path: Path) -> None:
    """Rows are rounded to float16 before they are attended to, as when they come back from the cache.

    Both sides round the same float32 rows, which differ in the last places: now and then one goes the other
    way.
    """
    compare(Heads(kv_dtype="float16", layers=2), MIXED, tmp_path, tolerance=2e-3)


@pytest.mark.parametrize(("dtype", "instead"), [("bfloat16", "float16"), ("float8_e4m3fn", "int8")])
def test_a_cache_that_numpy_cannot_hand_over_is_refused(dtype: str, instead: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=rf"no cache of {dtype}.*--kv-dtype {instead}"):
        compare(Heads(kv_dtype=dtype), MIXED, tmp_path)


@pytest.mark.parametrize("name", ["grouped", "window", "everything"])
def test_int8_cache(name: str, tmp_path: Path) -> None:
    """Rows are quantized before they are attended to. Where the rows of both sides differ in the last places,
    now and then a code goes the other way: 1/127 of a head's largest element.
    """
    compare(dataclasses.replace(VARIANTS[name], kv_dtype="int8"), MIXED, tmp_path, tolerance=4e-3)


def test_int8_rows_have_the_reference_s_bytes(tmp_path: Path) -> None:
    """Codes and scales of one layer, whose rows come from one embedding and are the same on both sides."""
    g = Graph("main", "paged")
    ids = g.add_input("token_ids", TensorType("int32", (T,)))
    slots = g.add_input("slot_mapping", TensorType("int32", (T,)))
    pages = g.add_input("kv_pages.0", TensorType("int8", (2, N, PAGE, 2, 12)))
    table = normal(VOCAB, 16) * np.logspace(-8, 8, VOCAB, dtype=np.float32)[:, None]
    table[0], table[1, :3], table[2, 12] = 0, [np.nan, 1, -2], -np.inf
    table[3], table[4, :8] = 3e-31, np.arange(8) - 0.5
    rows = g.append(nn.Embedding(ids, weight(g, "table", table))).result
    heads = g.append(shape.Reshape(rows, (T, 2, 8))).result
    new = g.append(cache.AppendKv(heads, heads, pages, slots)).result
    g.outputs, g.output_names = [rows, new], ["rows", "kv.0"]
    model = OnnxExecutor(build(g, tmp_path, kind="causal_lm"), threads=1)
    feed = {"token_ids": np.arange(VOCAB, dtype=np.int32)}
    names = ["new_k.0", "new_k_scale.0", "new_v.0", "new_v_scale.0"]
    found = dict(zip(names, model._session.run(names, feed | _no_pages(8)), strict=True))
    stored = cache.quantize_heads(interpreter.to_torch(table.reshape(VOCAB, 2, 8))).numpy()
    for part in "kv":
        np.testing.assert_array_equal(found[f"new_{part}.0"], stored[..., :8])
        scales = np.ascontiguousarray(stored[..., 8:]).view(np.float32)[..., 0]
        np.testing.assert_array_equal(found[f"new_{part}_scale.0"], scales)


def _no_pages(dim: int) -> dict[str, np.ndarray]:
    pages = {f"{p}_pages.0": np.zeros((2, 1, PAGE, dim), np.int8) for p in "kv"}
    return pages | {f"{p}_scales.0": np.zeros((2, 1, PAGE), np.float32) for p in "kv"}


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
def test_what_a_sequence_left_in_a_page_does_not_spoil_the_next_one(kv_dtype: str, tmp_path: Path) -> None:
    h = Heads(kv_dtype=kv_dtype)
    executor = OnnxExecutor(build(step_graph(h), tmp_path, kind="causal_lm"), threads=1)
    executor.allocate_kv(8)
    clean = executor.step(Batch(8).step([(0, 20)])).copy()
    for array in (*executor._cache, *executor._scales):
        array[...] = 1 if array.dtype == np.int8 else np.nan
    np.testing.assert_array_equal(executor.step(Batch(8).step([(0, 20)])), clean)


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
def test_copied_pages_are_read(kv_dtype: str, tmp_path: Path) -> None:
    """A fork: the second sequence's pages are copies of the first one's, and both continue alike."""
    h = Heads(layers=2, kv_dtype=kv_dtype)
    executor = OnnxExecutor(build(step_graph(h), tmp_path, kind="causal_lm"), threads=1)
    executor.allocate_kv(16)
    batch = Batch(16)
    executor.step(batch.step([(0, 20)]))
    batch.table[1], batch.context[1] = [batch.free.pop(), batch.free.pop()], 20
    executor.copy_pages(batch.table[0], batch.table[1])
    inputs = batch.step([(0, 1), (1, 1)])
    inputs.token_ids[1] = inputs.token_ids[0]
    first, second = executor.step(inputs)
    np.testing.assert_array_equal(first, second)


def test_the_cache_is_read_in_place(tmp_path: Path) -> None:
    """What is written into the cache by hand is what the next step sees."""
    h = Heads()
    executor = OnnxExecutor(build(step_graph(h), tmp_path, kind="causal_lm"), threads=1)
    executor.allocate_kv(8)
    assert executor.kv_bytes_per_page == 2 * PAGE * h.kv_heads * h.dim * 4
    small = step_graph(dataclasses.replace(h, kv_dtype="int8"))
    quantized = OnnxExecutor(build(small, tmp_path / "int8", kind="causal_lm"), threads=1)
    assert quantized.kv_bytes_per_page == 2 * PAGE * h.kv_heads * (h.dim + 4)
    batch = Batch(8)
    executor.step(batch.step([(0, 4)]))
    cache_before = executor._cache[0]
    inputs = batch.step([(0, 1)])
    plain = executor.step(inputs).copy()
    assert executor._cache[0] is cache_before
    cache_before[1] += 1.0
    assert np.abs(executor.step(inputs) - plain).max() > 0.1


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_the_cache_is_not_copied(tmp_path: Path) -> None:
    """A step over a cache of 400 MB, of which nearly nothing was ever written, takes less than 40 MB."""
    executor = OnnxExecutor(build(step_graph(Heads()), tmp_path, kind="causal_lm"), threads=1)
    executor.allocate_kv(200_000)
    assert sum(c.nbytes for c in executor._cache) > 400e6
    batch = Batch(8)
    before = private_bytes()
    for _ in range(3):
        executor.step(batch.step([(0, 1)]))
    assert private_bytes() - before < 40 << 20


def test_only_wanted_rows_are_returned(tmp_path: Path) -> None:
    executor = OnnxExecutor(build(step_graph(Heads()), tmp_path, kind="causal_lm"), threads=1)
    executor.allocate_kv(8)
    inputs = Batch(8).step([(0, 4), (1, 2)])
    every = executor.step(inputs).copy()
    for wanted in ([3, 5], [], [0]):
        index = np.array(wanted, np.int32)
        part = executor.step(StepInputs(**{**inputs.given(), "output_index": index}))
        close(part, every[wanted], 1e-6)


def test_misuse_is_refused(tmp_path: Path) -> None:
    executor = OnnxExecutor(build(step_graph(Heads()), tmp_path, kind="causal_lm"), threads=1)
    with pytest.raises(InputError, match="allocate_kv"):
        executor.step(Batch(8).step([(0, 1)]))
    with pytest.raises(InputError, match="no function"):
        executor.run({})
    graph = function({"x": f32(T, 3)}, lambda g, x: math.Neg(x))
    plain = OnnxExecutor(build(graph, tmp_path / "f"), threads=1)
    with pytest.raises(InputError, match="y are missing or unknown"):
        plain.run({"x": normal(2, 3), "y": normal(1)})
    with pytest.raises(InputError, match="does not fit"):
        plain.run({"x": normal(2, 4)})
    with pytest.raises(InputError, match="accuracy_level=3"):
        build(graph, tmp_path / "g", accuracy_level=3)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("slot_mapping", 8 * PAGE, "slot_mapping holds a value outside of 0 .. 127"),
        ("slot_mapping", -1, "slot_mapping holds"),
        ("token_ids", -1, "token_ids holds"),
        ("block_table", 8, "block_table holds"),
        ("context_len", 1000, "context_len holds"),
        ("output_index", 4, "output_index holds"),
        ("query_start", 1, "does not describe the step"),
        ("context_len", 3, "does not describe the step"),
        ("positions", -1, "positions holds"),
    ],
)
def test_indices_that_lead_nowhere_are_refused(name: str, value: int, text: str, tmp_path: Path) -> None:
    executor = OnnxExecutor(build(step_graph(Heads()), tmp_path, kind="causal_lm"), threads=1)
    executor.allocate_kv(8)
    inputs = Batch(8).step([(0, 4)])
    getattr(inputs, name).flat[0] = value
    with pytest.raises(InputError, match=text):
        executor.step(inputs)
    assert not executor._cache[0].any(), "nothing was written"


def test_names_that_would_collide(tmp_path: Path) -> None:
    """A weight named like a generated value is fine; an output named like an input is refused."""

    def body(g: Graph, x: Value) -> list[Value]:
        y = g.append(math.Add(x, weight(g, "add.1", normal(3)))).result
        return [g.append(math.Add(y, y)).result]

    graph = function({"x": f32(T, 3)}, body)
    check(graph, tmp_path / "a", {"x": normal(2, 3)}, 0)
    graph.output_names = ["x"]
    with pytest.raises(UnsupportedError, match="x names two"):
        build(graph, tmp_path / "b")


def test_a_cache_used_otherwise_is_refused(tmp_path: Path) -> None:
    g = Graph("main", "paged")
    pages = g.add_input("kv_pages.0", TensorType("float32", (2, N, PAGE, 2, 8)))
    q = g.add_input("q", f32(T, 4, 8))
    ints = [g.add_input(n, TensorType("int32", s)) for n, s in (("a", (B + 1,)), ("b", (B,)), ("c", (B, P)))]
    op = cache.PagedAttention(q, pages, *ints, None, scale=1.0)
    op.loc = "model.layers.0.self_attn"
    g.outputs, g.output_names = [g.append(op).result], ["y"]
    with pytest.raises(UnsupportedError, match=r"model\.layers\.0\.self_attn reads a cache"):
        build(g, tmp_path)
