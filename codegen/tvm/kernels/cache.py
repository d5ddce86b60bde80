"""`append_kv`: write the keys and values of new tokens into their pages.

A page holds, for each head, its keys as [head_dim, 16 tokens] and its values as [16 tokens, head_dim]:
attention then multiplies 16 keys at once by one element of the query, and 16 elements of a value by one
weight, and sums nothing across lanes. Where the cache is int8, the block of a head is its codes in that order
and then 16 float32 scales, one a token: attention multiplies 16 scores by 16 scales. Where it is bfloat16,
keys stand as [head_dim / 2, 16 tokens, 2] and values as [8 pairs of tokens, head_dim, 2]: words of 32 bits,
each half of which is a float32 less its lower half, and as AMX multiplies them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from tvm.script.ir_builder import tirx as T

from ....ir.dtypes import FLOAT8, FLOAT8_LARGEST, KV_SCALE_BYTES
from ....ir.ops.cache import SMALLEST_SCALED
from . import PAGE_SIZE, stored_dtype
from .builder import (
    LANES,
    Buffer,
    Expr,
    Kernel,
    call,
    f32s,
    for_each_row,
    i32s,
    let,
    load_float,
    padded,
    put,
    put1,
    register_i32,
    splat,
    vec,
)
from .gather import load_one
from .heads import Heads, Source
from .whole_pages import by_pages, fits_whole, put_keys, put_values

_ABS, _INFINITY = 0x7FFFFFFF, 0x7F800000
_LARGEST, _SMALLEST_NORMAL = (int(np.float32(x).view(np.int32)) for x in (FLOAT8_LARGEST, 2**-6))
"""Bits of those numbers of float8, as float32."""


def page_width(kv_dtype: str, head_dim: int) -> int:
    """Elements of a page for one token and head."""
    return head_dim + KV_SCALE_BYTES if kv_dtype == "int8" else head_dim


def pages_argument(kernel: Kernel, kv_heads: int, head_dim: int, kv_dtype: str) -> Buffer:
    """The parameter `pages`."""
    shape = (2, kernel.symbol("N"), kv_heads, PAGE_SIZE, page_width(kv_dtype, head_dim))
    return kernel.argument("pages", shape, stored_dtype(kv_dtype), large=True)


def in_pairs(kv_dtype: str, head_dim: int) -> bool:
    """Whether pages hold words of two neighbours."""
    return kv_dtype == "bfloat16" and head_dim % 2 == 0


def load_half(pages: Buffer, half: int, *index: Expr, again: bool = False) -> Expr:
    """16 words from an even element of a page on: their first (half = 0) or second (1) elements in float32.

    `again`: read the words for this half alone, where there is no register for what is not needed yet.
    """
    if again:
        index = (*index[:-1], index[-1] + call("int32", "llmc_opaque", T.int32(0)))
    words = T.reinterpret(vec(pages, *index, lanes=2 * LANES), dtype="uint32x16")
    if half:
        bits = T.bitwise_and(words, T.broadcast(T.uint32(0xFFFF0000), LANES))
    else:
        bits = T.shift_left(words, T.broadcast(T.uint32(16), LANES))
    return let(T.reinterpret(bits, dtype="float32x16"))


def load_page(pages: Buffer, kv_dtype: str, *index: Expr) -> Expr:
    """16 elements of a page in float32: of int8 the codes, not yet scaled."""
    if kv_dtype == "int8":
        return T.Cast("float32x16", vec(pages, *index))
    if kv_dtype == FLOAT8:
        return _from_float8(vec(pages, *index))
    return load_float(pages, kv_dtype, *index)


def load_page_one(pages: Buffer, kv_dtype: str, *index: Expr) -> Expr:
    """One element of a page, like `load_page`."""
    if kv_dtype == "int8":
        return T.Cast("float32", pages[index])
    if kv_dtype == FLOAT8:
        return call("float32", "llmc_max", _from_float8(splat(pages[index])))
    return load_one(pages, kv_dtype, *index)


def _from_float8(stored: Expr) -> Expr:
    """16 bytes of float8_e4m3fn in float32, through float16: there sign, exponent and fraction stand as
    they do here with 8 added to the exponent's bias, in numbers below the normal ones too. Only NaN, all
    ones, would be a number there: the sum is 0x4000 for it, the exponent's bit that is missing.
    """
    wide = T.shift_left(T.Cast("int16x16", T.reinterpret(stored, dtype="int8x16")), _i16s(7))
    size = let(T.bitwise_and(wide, _i16s(0x3F80)))
    nan = T.bitwise_and(size + _i16s(0x80), _i16s(0x4000))
    half = T.bitwise_or(T.bitwise_or(T.bitwise_and(wide, _i16s(-0x8000)), size), nan)
    return call("float32x16", "llmc_from_half", T.reinterpret(half, dtype="uint16x16")) * f32s(256)


def _to_float8(value: Expr) -> Expr:
    """16 of float32 as bytes of float8_e4m3fn, to the nearest and ties to even, no further than the largest
    number; NaN stays one.
    """
    bits = let(T.reinterpret(value, dtype="int32x16"))
    size = let(T.min(T.bitwise_and(bits, i32s(_ABS)), i32s(_LARGEST)))
    even = T.bitwise_and(T.shift_right(size, i32s(20)), i32s(1))
    normal = T.shift_right(size + even + i32s(0x7FFFF), i32s(20)) - i32s((127 - 7) << 3)
    # Below the normal numbers: multiples of 2^-9, which is what the last bit of 2^14 + x is worth.
    moved = call("float32x16", "llmc_add", T.reinterpret(size, dtype="float32x16"), f32s(2**14))
    below = T.bitwise_and(T.reinterpret(moved, dtype="int32x16"), i32s(15))
    code = T.Select(size < i32s(_SMALLEST_NORMAL), below, normal)
    code = T.Select(T.bitwise_and(bits, i32s(_ABS)) > i32s(_INFINITY), i32s(0x7F), code)
    sign = T.bitwise_and(T.shift_right(bits, i32s(24)), i32s(0x80))
    return T.Cast("uint8x16", T.bitwise_or(code, sign))


def _i16s(number: int) -> Expr:
    return T.broadcast(T.int16(number), LANES)


def page_scales(pages: Buffer, which: int, page: Expr, head: Expr, head_dim: int) -> Expr:
    """The scales of a page's 16 tokens; of tokens not yet written they may be anything, NaN included."""
    stored = vec(pages, which, page, head, 0, head_dim * PAGE_SIZE, lanes=LANES * KV_SCALE_BYTES)
    return T.reinterpret(stored, dtype="float32x16")


def _converted(value: Expr, dtype: str) -> Buffer:
    """16 elements in the cache's dtype, to be read one by one."""
    held = T.alloc_buffer((LANES,), stored_dtype(dtype))
    if dtype in ("float16", "bfloat16"):
        name = "llmc_to_half" if dtype == "float16" else "llmc_to_bfloat"
        value = T.reinterpret(call("uint16x16", name, value), dtype=f"{dtype}x16")
    elif dtype == FLOAT8:
        value = _to_float8(value)
    T.buffer_store(held, value, [T.ramp(0, 1, LANES)])
    return held


class _Head:
    """The keys (which = 0) or values (1) of a token and head, to be written into a page."""

    def __init__(self, x: Heads, of: tuple[Expr, Expr], pages: Buffer, place: tuple[int, Expr, Expr]) -> None:
        """of = (token, head); place = (which, page, token in it)."""
        self.x, self.pages = x, pages
        self.token, self.head = of
        self.which, self.page, self.offset = place

    def chunks(self, head_dim: int, body: Callable[[Expr, Expr, int], None]) -> None:
        """`body(start, 16 elements from there in float32, how many of them there are)` over the head."""
        with T.serial(0, head_dim // LANES) as c:
            body(c * LANES, self.x.vector(self.token, self.head, c * LANES), LANES)
        rest, start = head_dim % LANES, T.int32(head_dim // LANES * LANES)
        if rest:
            body(start, padded(rest, lambda i: self.x.one(self.token, self.head, start + i)), rest)

    def put(self, value: Buffer, start: Expr, count: int, head_dim: int) -> None:
        pairs = in_pairs(str(self.pages.dtype), head_dim)
        with T.serial(0, count) as i:
            # "row 0" with a running index is the head's whole block, whatever its inner order.
            row, column = (start + i, self.offset) if self.which == 0 else (self.offset, start + i)
            width = PAGE_SIZE if self.which == 0 else head_dim
            if pairs:
                inner = T.floordiv(row, 2) * (2 * width) + column * 2 + T.floormod(row, 2)
            else:
                inner = row * width + column
            put1(self.pages, value[i], self.which, self.page, self.head, 0, inner)

    def write(self, head_dim: int, kv_dtype: str) -> None:
        """As floats."""
        self.chunks(head_dim, lambda s, v, n: self.put(_converted(v, kv_dtype), s, n, head_dim))

    def write_quantized(self, head_dim: int) -> None:
        """As int8 with a scale; bit for bit `ir.ops.cache.quantize_heads`."""
        best = register_i32(i32s(0))

        def look(start: Expr, value: Expr, count: int) -> None:
            # Magnitudes order as their bits do, NaN above infinity: a comparison of floats would lose it.
            bits = T.bitwise_and(T.reinterpret(value, dtype="int32x16"), i32s(_ABS))
            put(best, T.max(vec(best, 0), bits), 0)

        self.chunks(head_dim, look)
        bits = let(call("int32", "llmc_max_i32", vec(best, 0)))
        largest = let(T.reinterpret(bits, dtype="float32"))
        finite = bits < T.int32(_INFINITY)
        usable = T.And(finite, largest >= T.float32(SMALLEST_SCALED))
        inverse = let(T.Select(usable, T.float32(127) / largest, T.float32(0)))
        scale = T.Select(usable, largest / T.float32(127), T.float32(0))
        scale = let(T.Select(finite, scale, T.float32(math.nan)))

        def encode(start: Expr, value: Expr, count: int) -> None:
            clamped = T.min(T.max(value * splat(inverse), f32s(-127)), f32s(127))
            rounded = T.Cast("int32x16", call("float32x16", "llmc_round", clamped))
            codes = T.alloc_buffer((LANES,), "int8")
            # Beside a NaN or an infinity all codes are 0.
            put(codes, T.Cast("int8x16", T.Select(splat(usable), rounded, i32s(0))), 0)
            self.put(codes, start, count, head_dim)

        self.chunks(head_dim, encode)
        where = head_dim * PAGE_SIZE + self.offset * KV_SCALE_BYTES
        stored = T.reinterpret(scale, dtype="int8x4")
        put(self.pages, stored, self.which, self.page, self.head, 0, where, lanes=KV_SCALE_BYTES)


def make_append_kv(
    *,
    kv_heads: int,
    head_dim: int,
    kv_dtype: str,
    k_source: Source = None,
    k_rotary: int = 0,
    v_source: Source = None,
    isa: str,
) -> Any:
    """pages[:, slot // 16, :, slot % 16] = k, v for each token (in the logical order), in place.

    k and v float32 [T, kv_heads, head_dim], or as k_source, k_rotary and v_source say (`Heads`);
    slot_mapping int32 [T]; pages `kv_dtype` [2, N, kv_heads, 16, head_dim] of floats, [2, N, kv_heads, 16,
    head_dim + 4] in int8, where each head gets a scale. A negative slot is skipped.
    """
    kernel = Kernel("append_kv", isa)
    with kernel:
        tokens = kernel.symbol("T")
        k = Heads(kernel, "k", kv_heads, head_dim, k_source, k_rotary)
        v = Heads(kernel, "v", kv_heads, head_dim, v_source)
        slots = kernel.argument("slot_mapping", (tokens,), "int32")
        pages = pages_argument(kernel, kv_heads, head_dim, kv_dtype)

        def head(t: Expr, h: Expr) -> None:
            page, offset = let(slots[t] // PAGE_SIZE), let(slots[t] % PAGE_SIZE)
            for which, x in enumerate((k, v)):
                new = _Head(x, (t, h), pages, (which, page, offset))
                if kv_dtype == "int8":
                    new.write_quantized(head_dim)
                else:
                    new.write(head_dim, kv_dtype)

        def page(t: Expr) -> None:
            place, first = let(slots[t] // PAGE_SIZE), let(t)
            with T.serial(0, kv_heads) as h:
                for part, x in ((put_keys, k), (put_values, v)):
                    part(pages, (place, h), head_dim, first, lambda t, i, x=x, h=h: x.vector(t, h, i))

        def token(t: Expr) -> None:
            with T.If(slots[t] >= 0), T.Then(), T.serial(0, kv_heads) as h:
                head(t, h)

        def row(t: Expr) -> None:
            if fits_whole(kv_dtype, head_dim):
                by_pages(slots, tokens, t, page, token)
            else:
                token(t)

        with kernel.body():
            for_each_row(tokens, 8 * kv_heads * head_dim, row)
    return kernel.function


def to_physical(logical: np.ndarray) -> np.ndarray:
    """Pages [2, N, 16, heads, head_dim] of the IR → [2, N, heads, 16, head_dim] as they are stored (int8:
    head_dim + 4).
    """
    _, pages, size, heads, width = logical.shape
    dim = width - (KV_SCALE_BYTES if logical.dtype == np.int8 else 0)
    if in_pairs(str(logical.dtype), dim):
        words = np.empty((2, pages, heads, size * dim), logical.dtype)
        keys, values = (np.moveaxis(part, 2, 1) for part in logical)  # [pages, heads, token, dim]
        words[0] = keys.reshape(pages, heads, size, -1, 2).transpose(0, 1, 3, 2, 4).reshape(pages, heads, -1)
        words[1] = values.reshape(pages, heads, -1, 2, dim).swapaxes(3, 4).reshape(pages, heads, -1)
        return words.reshape(2, pages, heads, size, dim)
    codes, scales = logical[..., :dim], logical[..., dim:]
    out = np.empty((2, pages, heads, size * width), logical.dtype)
    out[0, ..., : size * dim] = codes[0].transpose(0, 2, 3, 1).reshape(pages, heads, -1)
    out[1, ..., : size * dim] = codes[1].transpose(0, 2, 1, 3).reshape(pages, heads, -1)
    out[..., size * dim :] = scales.transpose(0, 1, 3, 2, 4).reshape(2, pages, heads, -1)
    return out.reshape(2, pages, heads, size, width)


def to_logical(physical: np.ndarray) -> np.ndarray:
    """Inverse of `to_physical`."""
    _, pages, heads, size, width = physical.shape
    dim = width - (KV_SCALE_BYTES if physical.dtype == np.int8 else 0)
    flat = physical.reshape(2, pages, heads, -1)
    if in_pairs(str(physical.dtype), dim):
        logical = np.empty((2, pages, size, heads, dim), physical.dtype)
        keys, values = flat
        keys = (
            keys.reshape(pages, heads, -1, size, 2).transpose(0, 1, 3, 2, 4).reshape(pages, heads, size, dim)
        )
        values = values.reshape(pages, heads, -1, dim, 2).swapaxes(3, 4).reshape(pages, heads, size, dim)
        logical[0], logical[1] = np.moveaxis(keys, 1, 2), np.moveaxis(values, 1, 2)
        return logical
    keys, values = flat[..., : size * dim]
    out = np.empty((2, pages, size, heads, width), physical.dtype)
    out[0, ..., :dim] = keys.reshape(pages, heads, dim, size).transpose(0, 3, 1, 2)
    out[1, ..., :dim] = values.reshape(pages, heads, size, dim).transpose(0, 2, 1, 3)
    scales = flat[..., size * dim :].reshape(2, pages, heads, size, width - dim)
    out[..., dim:] = scales.transpose(0, 1, 3, 2, 4)
    return out
