"""Attention and the cache's writer that turn heads as they read them, beside `rope` as its own kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from llmc.codegen.tvm.kernels.attention import make_paged_attention
from llmc.codegen.tvm.kernels.cache import make_append_kv, to_physical
from llmc.codegen.tvm.kernels.elementwise import make_rope
from llmc.codegen.tvm.lower import turned
from llmc.ir.core import Graph, Value
from llmc.ir.dtypes import to_numpy
from llmc.ir.ops import cache, nn
from llmc.ir.types import TensorType, sym

from .kernel_harness import blank, call, normal, tile_levels

T, B, B1, P, N = (sym(s) for s in ("T", "B", "B1", "P", "N"))
CASES = [
    pytest.param(64, 64, "bfloat16", marks=pytest.mark.slow),
    (96, 32, "bfloat16"),
    (48, 32, "float32"),
    (64, 64, "int8"),
]
"""(head_dim, rotary_dim, dtype of the cache)"""


def _pages(count: int, heads: int, dim: int, dtype: str) -> np.ndarray:
    """Pages [2, count, 16, heads, width] of numbers, as they are stored."""
    if dtype != "int8":
        return to_physical(normal(2, count, 16, heads, dim, seed=3).astype(to_numpy(dtype)))
    codes = np.random.default_rng(3).integers(-127, 128, (2, count, 16, heads, dim)).astype(np.int8)
    scales = np.full((2, count, 16, heads, 1), 0.01, np.float32).view(np.int8)
    return to_physical(np.concatenate([codes, scales], axis=-1))


def _turn(isa: str, merged: np.ndarray, at: tuple[int, int, int], cos: np.ndarray, sin: np.ndarray) -> Any:
    """at = (heads, head_dim, first column)."""
    heads, dim, first = at
    static = {"heads": heads, "head_dim": dim, "rotary_dim": cos.shape[1], "source": (merged.shape[1], first)}
    return call(make_rope, isa, static, merged, cos, sin, blank(len(merged), heads, dim))


@pytest.mark.parametrize(("dim", "rotary", "dtype"), CASES)
@tile_levels
def test_heads_turned_on_the_way_have_the_same_bits(dim: int, rotary: int, dtype: str, isa: str) -> None:
    heads, kv_heads, rows = 4, 2, 37
    width = (heads + 2 * kv_heads) * dim + 3
    first = heads * dim + 3
    merged = normal(rows, width)
    angle = normal(rows, rotary, seed=1) * 3
    cos, sin = np.cos(angle), np.sin(angle)

    form = {"kv_heads": kv_heads, "head_dim": dim, "kv_dtype": dtype}
    # A page that is filled whole, single slots, and one that is skipped.
    slots = np.array([5, *range(16, 32), -1, *range(34, 53)], np.int32)
    pages, v_source = _pages(4, kv_heads, dim, dtype), (width, first + kv_heads * dim)
    keys = _turn(isa, merged, (kv_heads, dim, first), cos, sin)
    plain = call(make_append_kv, isa, form | {"v_source": v_source}, keys, merged, slots, pages)
    there = form | {"k_source": (width, first), "k_rotary": rotary, "v_source": v_source}
    assert np.array_equal(call(make_append_kv, isa, there, merged, cos, sin, merged, slots, pages), plain)
    assert not np.array_equal(plain, pages)

    attend = form | {"heads": heads, "scale": 0.3}
    queries = _turn(isa, merged, (heads, dim, 0), cos, sin)
    there = attend | {"q_source": (width, 0), "q_rotary": rotary}
    # Prompts, and a few rows behind a context that is cut into segments.
    for starts, context, width in (([0, 20, rows], 50, 4), ([0, 1, 3], 600, 40)):
        last, table = starts[-1], np.arange(2 * width, dtype=np.int32).reshape(2, width) % 4
        lengths = np.array([context, context - 3], np.int32)
        rest = (pages, np.array(starts, np.int32), lengths, table, blank(last, heads, dim))
        alone = call(make_paged_attention, isa, attend, queries[:last], *rest)
        out = call(make_paged_attention, isa, there, merged[:last], cos[:last], sin[:last], *rest)
        assert np.array_equal(out, alone)
        assert np.isfinite(out).all()


def _graph(interleaved: bool, rotary: int, kept: bool) -> Graph:
    """Queries and keys that turn; `kept`: the turned queries are an output too."""
    graph = Graph()

    def put(name: str, *dims: Any, dtype: str = "int32") -> Value:
        return graph.add_input(name, TensorType(dtype, dims))

    queries, keys = (put(name, T, n, 64, dtype="float32") for name, n in (("q", 4), ("k", 2)))
    angles = [put(name, T, rotary, dtype="float32") for name in ("cos", "sin")]
    pages = put("pages", 2, N, 16, 2, 64, dtype="float32")
    q, k = (graph.append(nn.Rope(x, *angles, interleaved)).result for x in (queries, keys))
    filled = graph.append(cache.AppendKv(k, keys, pages, put("slot_mapping", T))).result
    where = (put("query_start", B1), put("context_len", B), put("block_table", B, P))
    out = graph.append(cache.PagedAttention(q, filled, *where, None, None, None, scale=1.0)).result
    graph.outputs = [out, q] if kept else [out]
    return graph


@pytest.mark.parametrize(
    ("interleaved", "rotary", "kept", "count"),
    [(False, 64, False, 2), (False, 16, False, 0), (True, 64, False, 0), (False, 32, True, 1)],
)
def test_what_is_turned_on_the_way(interleaved: bool, rotary: int, kept: bool, count: int) -> None:
    graph = _graph(interleaved, rotary, kept)
    found = turned(graph)
    assert len(found) == count
    assert all(graph.output_uses(value) == 0 for value in found)
