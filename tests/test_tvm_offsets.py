"""Weights whose last element an offset of 32 bits does not reach. They are mapped, and only what a kernel
reads of them is in memory.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from llmc.codegen.tvm import kernels
from llmc.codegen.tvm.kernels.builder import WIDE
from llmc.codegen.tvm.kernels.layout import QuantLayout, pack_rows, packed_shape
from llmc.ir.dtypes import to_numpy

from .kernel_harness import HERE, blank, close, compiled, normal, tvm

ISA = HERE[-1]


def mapped(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Zeros that take no memory until they are written."""
    try:
        size = math.prod(shape) * to_numpy(dtype).itemsize
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        pytest.skip(f"this machine maps no gigabytes: {error}")
    return np.frombuffer(memory, to_numpy(dtype)).reshape(shape)


@cache
def built(maker: Callable[..., Any], static: tuple[tuple[str, Any], ...]) -> Any:
    return compiled(maker(**dict(static), isa=ISA), ISA)["f"]


def run(maker: Callable[..., Any], static: dict[str, Any], *arrays: np.ndarray) -> np.ndarray:
    """The last array, after a kernel has written it; mapped ones are not copied."""
    large = [array.nbytes >= WIDE for array in arrays]
    tensors = [
        tvm.runtime.from_dlpack(a) if as_it_is else tvm.runtime.tensor(a)
        for a, as_it_is in zip(arrays, large, strict=True)
    ]
    built(maker, tuple(static.items()))(*tensors)
    return arrays[-1] if large[-1] else tensors[-1].numpy()


def chosen(experts: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """offsets and active where all rows are the last expert's."""
    offsets, active = np.zeros(experts + 1, np.int32), np.zeros(experts + 1, np.int32)
    offsets[-1], active[:2] = rows, (1, experts - 1)
    return offsets, active


def test_the_last_of_many_experts_in_floats() -> None:
    n, k, rows = 1024, 2048, 3
    experts = WIDE // (n * k) + 1
    blocks = packed_shape(n, k)[0]
    weight = mapped((experts * blocks, k, 16), "float32")
    w, x = normal(n, k), normal(rows, k, seed=1)
    weight[-blocks:] = pack_rows(w)
    static = {"n": n, "k": k, "experts": experts}
    source = np.arange(rows, dtype=np.int32)
    got = run(kernels.make_moe_linear, static, x, source, *chosen(experts, rows), weight, blank(rows, n))
    close(got, x.astype(np.float64) @ w.T.astype(np.float64), 2e-6)


@pytest.mark.parametrize("rows", [3, 70])  # as they lie, and spread to bytes
def test_the_last_of_many_experts_in_codes(rows: int) -> None:
    n, k = 1024, 2048
    experts = WIDE // (n * k) + 1
    form = {"bits": 8, "group_size": 32}
    lay, whole = QuantLayout(n, k, 8, 32), QuantLayout(experts * n, k, 8, 32)
    weight, scale = mapped(whole.weight_shape, "uint8"), mapped(whole.scale_shape, "float16")
    rng = np.random.default_rng(rows)
    codes = rng.integers(0, 256, (n, k), dtype=np.uint8)
    weight[-lay.blocks :], scale[-lay.blocks :] = lay.pack(codes), 1
    a = rng.integers(-127, 128, (rows, k)).astype(np.int8)
    sums = a.reshape(rows, lay.groups, -1).sum(-1).astype(np.float32)
    static = {"n": n, "k": k, "experts": experts, **form}
    given = [a, sums, np.ones_like(sums), *chosen(experts, rows), weight, scale, blank(rows, n)]
    got = run(kernels.make_moe_quantized_linear, static, *given)
    assert np.array_equal(got, a.astype(np.float64) @ (codes.astype(np.float64) - 128).T)


@pytest.mark.parametrize("packed", [False, True])
def test_the_last_row_of_a_large_table(packed: bool) -> None:
    width = 4096
    rows = WIDE // width + 16
    table = mapped(packed_shape(rows, width) if packed else (rows, width), "float16")
    last = normal(16, width).astype(np.float16)
    table[-1 if packed else -16 :] = pack_rows(last) if packed else last
    ids = np.array([rows - 1, 0, rows - 16], np.int32)
    static = {"rows": rows, "width": width, "packed": packed, "weight_dtype": "float16"}
    got = run(kernels.make_embedding, static, ids, table, blank(3, width))
    assert np.array_equal(got, np.stack([last[-1], np.zeros(width), last[0]]).astype(np.float32))


def test_the_last_pages_of_a_large_cache() -> None:
    heads, dim, tokens = 8, 128, 20
    static = {"kv_heads": heads, "head_dim": dim, "kv_dtype": "float16"}
    attend = {**static, "heads": heads, "scale": 0.1, "causal": True}
    q, k, v = (normal(tokens, heads, dim, seed=i) for i in range(3))
    starts, context = np.array([0, tokens], np.int32), np.array([tokens], np.int32)
    found: list[np.ndarray] = []
    for pages in (2, WIDE // (2 * heads * 16 * dim) + 2):
        shape = (2, pages, heads, 16, dim)
        held = mapped(shape, "float16") if pages > 2 else np.zeros(shape, np.float16)
        slots = np.arange(tokens, dtype=np.int32) + 16 * (pages - 2)
        table = np.array([[pages - 2, pages - 1]], np.int32)
        written = run(kernels.make_append_kv, static, k, v, slots, held)
        out = run(kernels.make_paged_attention, attend, q, written, starts, context, table, blank(*q.shape))
        found.append(out)
    assert np.isfinite(found[0]).all() and np.array_equal(found[0], found[1])


def test_the_last_state_of_many() -> None:
    channels, width = 4096, 4
    slots = WIDE // ((width - 1) * channels) + 2
    x, weight = normal(5, channels), normal(width, channels, seed=1)
    state = mapped((slots, width - 1, channels), "float32")
    static = {
        "channels": channels,
        "width": width,
        "bias": False,
        "activation": None,
        "source": (channels, 0),
    }
    slot, starts, context = (np.array(a, np.int32) for a in ([slots - 1], [0, 5], [5]))
    out = run(kernels.make_causal_conv1d, static, x, weight, state, slot, starts, context, blank(5, channels))
    assert np.array_equal(state[-1], x[2:])
    close(out[-1], (weight * x[1:]).sum(0), 1e-6)
