"""The kernels of `tvm-cpu` over a KV cache of int8, against the reference meanings of their ops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from llmc.codegen.tvm.kernels.attention import make_paged_attention
from llmc.codegen.tvm.kernels.cache import make_append_kv, to_logical, to_physical
from llmc.ir.ops import cache as ops

from .attention_biases import distance_table
from .conftest import LONG
from .kernel_harness import blank, call, close, meaning, normal, value, vector_levels
from .test_tvm_attention_kernels import ATTENTION, LENGTHS


def stored(x: np.ndarray) -> np.ndarray:
    """Heads [..., D] as the cache holds them, int8 [..., D + 4]."""
    return ops.quantize_heads(torch.from_numpy(x)).numpy()


def any_bytes(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).integers(-128, 128, shape).astype(np.int8)


@pytest.mark.parametrize("dim", [16, 24])
@vector_levels
def test_append_quantizes_as_the_reference_does_and_touches_nothing_else(dim: int, isa: str) -> None:
    merged = normal(9, 2 * 2 * dim + 3) * np.logspace(-6, 6, 9, dtype=np.float32)[:, None]
    merged[0, : 2 * dim] = 0
    merged[1, 3] = 1e-31  # among the smallest that get a scale, and alone below them
    merged[2, :dim] = np.linspace(-3e-31, 3e-31, dim)
    merged[3, :3] = [np.nan, np.inf, 1]
    merged[4, dim] = -np.inf
    merged[5, :dim] = np.float32(3.4e38)
    merged[6, :dim] = np.arange(dim) - 0.5  # ties
    k, v = (np.ascontiguousarray(merged[:, s : s + 2 * dim].reshape(9, 2, dim)) for s in (0, 2 * dim + 3))
    slots = np.array([0, 17, 31, 79, 64, 5, 6, 22, 40], np.int32)
    logical = any_bytes(2, 5, 16, 2, dim + 4)
    before = to_physical(logical)
    assert np.array_equal(to_logical(before), logical)
    parameters = {"kv_heads": 2, "head_dim": dim, "kv_dtype": "int8"}
    after = call(make_append_kv, isa, parameters, k, v, slots, before)
    op = ops.AppendKv(value(k), value(v), value(logical), value(slots))
    expected = meaning(op, k, v, logical, slots)
    assert np.array_equal(to_logical(after), expected)  # bytes: NaN is one bit pattern too
    sources = {"k_source": (merged.shape[1], 0), "v_source": (merged.shape[1], 2 * dim + 3)}
    skipped = np.where(np.arange(9) == 2, -1, slots).astype(np.int32)
    within = call(make_append_kv, isa, parameters | sources, merged, merged, skipped, before)
    expected[:, 1, 15] = logical[:, 1, 15]
    assert np.array_equal(to_logical(within), expected)


class Batch:
    """Sequences of (context length, new tokens) over shuffled pages; unwritten scales are NaN."""

    def __init__(self, lengths: list[tuple[int, int]], heads: int, kv_heads: int, dim: int) -> None:
        rng = np.random.default_rng(1)
        self.lengths = lengths
        pages = [-(-n // 16) for n, _ in lengths]
        order = rng.permutation(sum(pages)).astype(np.int32)
        self.table = np.zeros((len(lengths), max(pages) + 1), np.int32)
        unwritten = stored(np.full((2, sum(pages) + 1, 16, kv_heads, dim), np.nan, np.float32))
        unwritten[..., :dim] = 127
        self.logical = unwritten
        used = 0
        for b, (n, _) in enumerate(lengths):
            own = order[used : used + pages[b]]
            used += pages[b]
            self.table[b, : pages[b]] = own
            flat = np.concatenate([self.logical[:, page] for page in own], 1)
            sizes = rng.uniform(0.3, 2, (2, n, kv_heads, 1))
            new = (rng.standard_normal((2, n, kv_heads, dim)) * sizes).astype(np.float32)
            flat[:, :n] = stored(new)
            self.logical[:, own] = flat.reshape(2, pages[b], 16, kv_heads, dim + 4)
        self.pages = to_physical(self.logical)
        self.start = np.cumsum([0] + [new for _, new in lengths]).astype(np.int32)
        self.context = np.array([n for n, _ in lengths], np.int32)
        self.q = rng.standard_normal((int(self.start[-1]), heads, dim)).astype(np.float32)
        self.sinks = rng.standard_normal(heads).astype(np.float32)


def attend(
    isa: str, batch: Batch, options: dict[str, Any], pick: tuple[int, int, int] | None = None
) -> np.ndarray:
    """The kernel on a whole batch, or on new rows [start, stop) of sequence b alone, a chunk of a prompt."""
    heads, dim = batch.q.shape[1:]
    parameters = {"heads": heads, "kv_heads": batch.logical.shape[3], "head_dim": dim, "scale": 0.3}
    parameters |= {"kv_dtype": "int8"} | options
    q, start, context, table = batch.q, batch.start, batch.context, batch.table
    if pick is not None:
        b, first, stop = pick
        q = q[start[b] + first : start[b] + stop]
        context = context[[b]] - np.int32(batch.lengths[b][1] - stop)
        start, table = np.array([0, stop - first], np.int32), table[[b]]
    sinks = [batch.sinks] if options.get("sinks") or options.get("slopes") else []
    sinks += [distance_table(heads)] if options.get("distances") else []
    arrays = (q, batch.pages, start, context, table, *sinks, blank(*q.shape))
    return call(make_paged_attention, isa, parameters, *arrays)


def check(
    isa: str, lengths: list[tuple[int, int]], case: Any, chunks: tuple[tuple[int, int, int], ...]
) -> None:
    """A batch against the reference; sequences alone, and chunks (sequence, start, stop), bit for bit."""
    heads, kv_heads, dim, options = case
    batch = Batch(lengths, heads, kv_heads, dim)
    whole = attend(isa, batch, options)
    fields = {key: v for key, v in options.items() if key not in ("sinks", "slopes", "distances")}
    per_head = [batch.sinks if options.get(name) else None for name in ("sinks", "slopes")]
    per_head.append(distance_table(heads) if options.get("distances") else None)
    arrays = (batch.q, batch.logical, batch.start, batch.context, batch.table)
    operands = [None if x is None else value(x) for x in per_head]
    op = ops.PagedAttention(*map(value, arrays), *operands, scale=0.3, **fields)
    # The reference multiplies by the scales before it sums, the kernel afterwards: both are float32.
    close(whole, meaning(op, *arrays, *per_head), 5e-6)
    alone = [(b, 0, new) for b, (_, new) in enumerate(lengths) if new]
    for b, start, stop in (*alone, *(chunks if options.get("causal", True) else ())):
        first = batch.start[b]
        part = attend(isa, batch, options, (b, start, stop))
        assert np.array_equal(part, whole[first + start : first + stop])


@pytest.mark.parametrize("case", (ATTENTION if LONG else ATTENTION[::4]) + ATTENTION[-1:], ids=str)
@vector_levels
def test_attention_over_int8_alone_in_a_batch_and_in_chunks(case: Any, isa: str) -> None:
    check(isa, LENGTHS, case, ((5, 0, 1), (5, 29, 30), (5, 3, 20), (5, 7, 30)))


@pytest.mark.parametrize("case", [(6, 2, 16, {}), (2, 1, 24, {"window": 520, "sinks": True})], ids=str)
@vector_levels
def test_long_contexts_over_int8_by_rows_and_by_segments(case: Any, isa: str) -> None:
    lengths = [(512, 1), (513, 2), (1100, 30), (3, 3), (1030, 9)]
    check(isa, lengths, case, ((2, 0, 1), (2, 5, 20), (2, 4, 30), (4, 8, 9)))


@vector_levels
def test_a_step_over_int8_may_hold_no_tokens(isa: str) -> None:
    assert attend(isa, Batch([(20, 0), (40, 0)], 4, 2, 16), {}).shape == (0, 4, 16)
    none = np.zeros((0, 2, 16), np.float32)
    pages = to_physical(any_bytes(2, 3, 16, 2, 20))
    parameters = {"kv_heads": 2, "head_dim": 16, "kv_dtype": "int8"}
    after = call(make_append_kv, isa, parameters, none, none, np.zeros(0, np.int32), pages)
    assert np.array_equal(after, pages)


@vector_levels
def test_a_token_that_is_nan_spoils_only_the_rows_that_see_it(isa: str) -> None:
    lengths = [(40, 30), (20, 5)]
    batch, clean = Batch(lengths, 4, 2, 16), Batch(lengths, 4, 2, 16)
    bad = np.full((2, 2, 16), np.inf, np.float32)
    page, offset = batch.table[0, 30 // 16], 30 % 16
    batch.logical[:, page, offset] = stored(bad)
    batch.pages = to_physical(batch.logical)
    found, wanted = attend(isa, batch, {}), attend(isa, clean, {})
    sees = np.arange(30) + 10 >= 30
    assert np.isnan(found[:30][sees]).all()
    assert np.array_equal(found[:30][~sees], wanted[:30][~sees])
    assert np.array_equal(found[30:], wanted[30:])
