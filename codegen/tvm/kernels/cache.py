"""`append_kv`: write the keys and values of new tokens into their pages.

A page holds, for each head, its keys as [head_dim, 16 tokens] and its values as [16 tokens, head_dim]:
attention then multiplies 16 keys at once by one element of the query, and 16 elements of a value by one
weight, and sums nothing across lanes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm.script.ir_builder import tirx as T

from .builder import LANES, Buffer, Expr, Kernel, call, for_each_row, let, padded, put1, vec
from .norms import Source, head_argument, head_index

PAGE_SIZE = 16
KV_LAYOUT = "2,pages,heads,k:dim.token,v:token.dim"


def _chunk(x: Buffer, at: Any, start: Expr, count: int) -> Expr:
    """`count` ≤ 16 elements of a head from `start`, float32."""
    if count == LANES:
        return vec(x, *at(start))
    return padded(count, lambda i: x[at(start + i)])


def _converted(value: Expr, dtype: str) -> Buffer:
    """16 elements in the cache's dtype, to be read one by one."""
    held = T.alloc_buffer((LANES,), dtype)
    if dtype == "float16":
        value = T.reinterpret(call("uint16x16", "llmc_to_half", value), dtype="float16x16")
    T.buffer_store(held, value, [T.ramp(0, 1, LANES)])
    return held


def make_append_kv(
    *, kv_heads: int, head_dim: int, kv_dtype: str, k_source: Source = None, v_source: Source = None, isa: str
) -> Any:
    """pages[:, slot // 16, :, slot % 16] = k, v for each token (in the logical order), in place.

    k and v float32 [T, kv_heads, head_dim], or with a source = (row_width, offset) columns of [T, row_width];
    slot_mapping int32 [T]; pages `kv_dtype` (float32 or float16) [2, N, kv_heads, 16, head_dim]. A negative
    slot is skipped.
    """
    kernel = Kernel("append_kv", isa)
    with kernel:
        tokens, pages_count = kernel.symbol("T"), kernel.symbol("N")
        k = head_argument(kernel, "k", kv_heads, head_dim, k_source)
        v = head_argument(kernel, "v", kv_heads, head_dim, v_source)
        slots = kernel.argument("slot_mapping", (tokens,), "int32")
        pages = kernel.argument("pages", (2, pages_count, kv_heads, PAGE_SIZE, head_dim), kv_dtype)

        def head(t: Expr, h: Expr) -> None:
            page, offset = let(slots[t] // PAGE_SIZE), let(slots[t] % PAGE_SIZE)
            for which, (x, source) in enumerate(((k, k_source), (v, v_source))):
                at = head_index(t, h, head_dim, source)

                def write(start: Expr, count: int, x: Buffer = x, at: Any = at, which: int = which) -> None:
                    held = _converted(_chunk(x, at, start, count), kv_dtype)
                    with T.serial(0, count) as i:
                        # "row 0" with a running index is the head's whole block, whatever its inner order.
                        inner = (
                            (start + i) * PAGE_SIZE + offset if which == 0 else offset * head_dim + start + i
                        )
                        put1(pages, held[i], which, page, h, 0, inner)

                with T.serial(0, head_dim // LANES) as c:
                    write(c * LANES, LANES)
                if head_dim % LANES:
                    write(T.int32(head_dim // LANES * LANES), head_dim % LANES)

        def row(t: Expr) -> None:
            with T.If(slots[t] >= 0), T.Then(), T.serial(0, kv_heads) as h:
                head(t, h)

        with kernel.body():
            for_each_row(tokens, 8 * kv_heads * head_dim, row)
    return kernel.function


def to_physical(logical: np.ndarray) -> np.ndarray:
    """Pages [2, N, 16, heads, head_dim] of the IR → [2, N, heads, 16, head_dim] as they are stored."""
    _, pages, size, heads, dim = logical.shape
    out = np.empty((2, pages, heads, size * dim), logical.dtype)
    out[0] = logical[0].transpose(0, 2, 3, 1).reshape(pages, heads, -1)
    out[1] = logical[1].transpose(0, 2, 1, 3).reshape(pages, heads, -1)
    return out.reshape(2, pages, heads, size, dim)


def to_logical(physical: np.ndarray) -> np.ndarray:
    """Inverse of `to_physical`."""
    _, pages, heads, size, dim = physical.shape
    keys = physical[0].reshape(pages, heads, dim, size).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(np.stack((keys, physical[1].transpose(0, 2, 1, 3))))
