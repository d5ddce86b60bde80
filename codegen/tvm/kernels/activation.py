"""`quantize_activation`: a token's activations to int8, one scale a group of the weights, and the sums that
zero points are corrected by. Kernels whose results only quantized weights read do it as they go: `rms_norm`
with the same bits, `gated_mlp` of a rougher activation (`vector_math.ROUGH`).

One scale a token would cost 5% of perplexity: single activations are a hundred times others, and
what stands beside them rounds to nothing. A scale a group keeps the damage within the group, and the largest
of a row can be kept apart, as float32 whose codes are 0 (`Quantized.apart`): one of each norm's halves what
is lost. LLM.int8() (Dettmers et al., 2022, section 3.2) does so for whole columns, found by a threshold; a
number for each row costs the same for every model and needs no text at compile time.

Where the weights were rotated (`Quantized.rotate`), each run of a group's columns is rotated too before its
scale is taken: nothing stands out then, and nothing is kept apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from tvm.script.ir_builder import tirx as T

from ....ir.hadamard import WIDEST
from .builder import (
    LANES,
    Buffer,
    Expr,
    Kernel,
    call,
    f32s,
    for_each_row,
    for_each_row_beside,
    i32s,
    let,
    put,
    put1,
    register_i32,
    scalar,
    splat,
    vec,
)
from .layout import QuantLayout
from .rotation import store_made
from .vector_math import BESIDE

_ABS = 0x7FFFFFFF
_FINITE = 3.4028234663852886e38
_BITS_BESIDE = 0x4B400000
"""Those of `BESIDE`."""
SMALLEST: Final = 2.0**-100
"""A group whose largest is less is zeros: 127 / largest might be infinite."""
_HELD = 2048
"""Elements of a row that are made before they are quantized."""
Read = Callable[[Expr], Expr]


@dataclass(frozen=True)
class Quantized:
    """Quantized rows, or where they go: a int8 [T, L.k_padded], sums and scale float32 [T, L.groups].

    Sums and scale are `apart` longer: there scale holds that many of a row's largest activations, the largest
    first, and sums their columns, whole numbers. They count as 0 among the others.

    `rotate`: columns that are rotated together first (`rotation`), or 0; it divides a group.
    """

    layout: QuantLayout
    a: Buffer
    sums: Buffer
    scale: Buffer
    apart: int = 0
    rotate: int = 0


def activation_layout(k: int, group_size: int, align: int) -> QuantLayout:
    """The layout of any weights that pad groups of k columns to `align`."""
    return QuantLayout(1, k, 8 if align == 8 else 2, group_size)


def quantized_arguments(
    kernel: Kernel, lay: QuantLayout, prefix: str = "", rows: str = "T", apart: int = 0, rotate: int = 0
) -> Quantized:
    """The parameters a, sums and a_scale of a kernel, or others' with a prefix; `rows`: their symbol."""
    tokens = kernel.symbol(rows)
    return Quantized(
        lay,
        kernel.argument(f"{prefix}a", (tokens, lay.k_padded), "int8"),
        kernel.argument(f"{prefix}sums", (tokens, lay.groups + apart), "float32"),
        kernel.argument(f"{prefix}a_scale", (tokens, lay.groups + apart), "float32"),
        apart,
        rotate,
    )


def fits_producer(lay: QuantLayout) -> bool:
    """Whether a kernel can quantize its result as it makes it: groups of whole vectors that stay in the
    nearest cache.
    """
    return whole_groups(lay) and lay.group <= WIDEST


def whole_groups(lay: QuantLayout) -> bool:
    """Whether groups are whole vectors and none is padded: then columns in memory are those of x, and a row's
    largest activation can be kept apart.
    """
    return lay.real_group % LANES == 0 and lay.k % lay.real_group == 0


def _size(v: Expr) -> Expr:
    """|v| as bits: non-negative floats order as their bits do, and NaN's are above infinity's, which a
    comparison of floats would lose.
    """
    return T.bitwise_and(T.reinterpret(v, dtype="int32x16"), i32s(_ABS))


def _largest(read: Read, count: int) -> Expr:
    """max |x| of `count` elements (a multiple of 16) as a float32; NaN where one of them is."""
    best = register_i32(i32s(0))
    with T.serial(0, count // LANES) as i:
        put(best, T.max(vec(best, 0), _size(read(i * LANES))), 0)
    return let(T.reinterpret(call("int32", "llmc_max_i32", vec(best, 0)), dtype="float32"))


def _usable(largest: Expr) -> Expr:
    """Whether a group has a scale: its largest is a number, and 127 / largest is one."""
    return T.And(largest >= T.float32(SMALLEST), largest <= T.float32(_FINITE))


def _inverse(largest: Expr) -> Expr:
    return let(T.Select(_usable(largest), T.float32(127) / largest, T.float32(0)))


def _lifted(x: Expr, inverse: Expr) -> Expr:
    """The nearest integer of x · inverse (ties to even) in the lowest bits of 16 lanes of uint32, beside
    those of `BESIDE`, for |x · inverse| < 2^22. Of NaN they are any; its group's scale makes NaN of them.
    """
    value = call("float32x16", "llmc_add", x * inverse, f32s(BESIDE))
    return let(T.reinterpret(value, dtype="uint32x16"))


def _put_group(to: Quantized, row: Expr, g: Expr, read: Read, largest: Expr) -> None:
    """Quantize group g of a row, whose 16 elements from i on are `read(i)`, by its largest."""
    group = to.layout.group
    put1(to.scale, largest / T.float32(127), row, g)
    inverse = splat(_inverse(largest))
    # Sums wrap: what they are too large by is taken off first.
    total = T.alloc_buffer((LANES,), "uint32")
    put(total, T.broadcast(T.uint32(-(group // LANES) * _BITS_BESIDE % 2**32), LANES), 0)
    with T.serial(0, group // LANES) as i:
        value = _lifted(read(i * LANES), inverse)
        put(to.a, T.Cast("int8x16", value), row, g * group + i * LANES)
        put(total, vec(total, 0) + value, 0)
    summed = call("int32", "llmc_sum_i32", T.reinterpret(vec(total, 0), dtype="int32x16"))
    put1(to.sums, T.Select(_usable(largest), T.Cast("float32", summed), T.float32(0)), row, g)


def _hold(held: Buffer, first: Expr, count: int, make: Read, rotate: int) -> Expr:
    """Put `count` elements, of which `make(i)` computes 16 from i on, into `held` from `first` on, rotated as
    `Quantized.rotate` says; the largest |x| of them.
    """
    best = register_i32(i32s(0))

    def seen(value: Expr) -> None:
        put(best, T.max(vec(best, 0), _size(value)), 0)

    store_made(count, make, held, lambda i: (first + i,), rotate, seen)
    return let(T.reinterpret(call("int32", "llmc_max_i32", vec(best, 0)), dtype="float32"))


def quantize_group(to: Quantized, row: Expr, g: Expr, read: Read) -> None:
    """Quantize group g of a row, whose 16 elements from i on are `read(i)`, rotated already."""
    _put_group(to, row, g, read, _largest(read, to.layout.group))


def quantize_held(to: Quantized, row: Expr, g: Expr, held: Buffer, first: Expr) -> None:
    """Quantize group g of a row from held[first …], where it is rotated first as `to` says."""

    def read(i: Expr) -> Expr:
        return vec(held, first + i)

    group = to.layout.group
    largest = _hold(held, first, group, read, to.rotate) if to.rotate else _largest(read, group)
    _put_group(to, row, g, read, largest)


def elements_held(lay: QuantLayout, apart: int) -> int:
    """How many of a row's elements are made before they are quantized, by `quantize_as_made`."""
    return lay.k if apart else lay.group * min(lay.groups, max(1, _HELD // lay.group))


def quantize_as_made(to: Quantized, row: Expr, held: Buffer, make: Read) -> None:
    """Quantize a row whose 16 elements from i on are computed by `make(i)`; for `fits_producer`.

    held: float32 [`elements_held`]. Groups are made before their scales are known, and do not leave the
    nearest cache: several, so that the processor has others to work at while it waits for a group's maximum.
    Where the largest of a row are kept apart it is the whole row.
    """
    group, groups = to.layout.group, to.layout.groups
    at_once = elements_held(to.layout, to.apart) // group
    with T.serial(0, -(-groups // at_once)) as turn:
        first = let(turn * at_once)
        count = let(T.min(T.int32(groups) - first, T.int32(at_once)))
        with T.serial(0, count) as g:
            start = let((first + g) * group)
            largest = _hold(held, g * group, group, lambda i, start=start: make(start + i), to.rotate)
            put1(to.scale, largest, row, first + g)
        if to.apart:
            with T.serial(0, to.apart) as n:
                _keep_apart(to, row, held, n)
        with T.serial(0, count) as g:
            largest = let(to.scale[row, first + g])
            _put_group(to, row, first + g, lambda i: vec(held, g * group + i), largest)


def _keep_apart(to: Quantized, row: Expr, held: Buffer, n: Expr) -> None:
    """Keep the largest |x| of a row apart (the first of equals first): 0 takes its place in `held`.

    `to.scale` holds each group's largest, which say where to look, and does afterwards.
    """
    group, groups = to.layout.group, to.layout.groups
    best, where = scalar(T.int32(-1), "int32"), scalar(T.int32(0), "int32")
    with T.serial(0, groups) as g:
        size = let(T.reinterpret(to.scale[row, g], dtype="int32"))
        put1(where, T.Select(size > best[0], g, where[0]), 0)
        put1(best, T.max(size, best[0]), 0)
    g, largest = let(where[0]), let(best[0])
    # -(column) of each that is as large: their maximum is the first.
    place = register_i32(i32s(-group))
    with T.serial(0, group // LANES) as i:
        column = T.ramp(T.int32(0) - i * LANES, -1, LANES)
        same = _size(vec(held, g * group + i * LANES)) == splat(largest)
        put(place, T.max(vec(place, 0), T.Select(same, column, i32s(-group))), 0)
    column = let(T.int32(0) - call("int32", "llmc_max_i32", vec(place, 0)))
    put1(to.sums, T.Cast("float32", g * group + column), row, groups + n)
    put1(to.scale, held[g * group + column], row, groups + n)

    def rest(i: Expr) -> Expr:
        # Whole vectors are stored: a load would wait for a part of it.
        value = let(T.Select(T.ramp(i, 1, LANES) == splat(column), f32s(0), vec(held, g * group + i)))
        put(held, value, g * group + i)
        return value

    put1(to.scale, _largest(rest, group), row, g)


def _quantize_row(x: Buffer, row: Expr, held: Buffer | None, to: Quantized) -> None:
    lay = to.layout
    if held is not None:
        quantize_as_made(to, row, held, lambda i: vec(x, row, i))
        return
    with T.serial(0, lay.groups) as g:
        if whole_groups(lay):
            quantize_group(to, row, g, lambda i: vec(x, row, g * lay.group + i))
        else:
            _ragged_group(lay, x, row, g, to.a, to.sums, to.scale)


def _ragged_group(
    lay: QuantLayout, x: Buffer, row: Expr, g: Expr, a: Buffer, sums: Buffer, scale: Buffer
) -> None:
    """A group that vectors do not fit, one element at a time; what pads it is zero."""
    total = scalar(T.int32(0), "int32")
    count = let(T.min(T.int32(lay.real_group), T.int32(lay.k) - g * lay.real_group))
    best = scalar(T.int32(0), "int32")
    with T.serial(0, count) as i:
        bits = T.bitwise_and(T.reinterpret(x[row, g * lay.real_group + i], dtype="int32"), T.int32(_ABS))
        put1(best, T.max(best[0], bits), 0)
    largest = let(T.reinterpret(best[0], dtype="float32"))
    put1(scale, largest / T.float32(127), row, g)
    inverse = _inverse(largest)
    with T.serial(0, count) as i:
        value = _lifted(splat(x[row, g * lay.real_group + i]), splat(inverse))
        code = let(T.Cast("int8", call("int32", "llmc_max_i32", T.reinterpret(value, dtype="int32x16"))))
        put1(a, code, row, g * lay.group + i)
        put1(total, total[0] + T.Cast("int32", code), 0)
    with T.serial(0, lay.group - count) as i:
        put1(a, T.int8(0), row, g * lay.group + count + i)
    put1(sums, T.Cast("float32", total[0]), row, g)


def make_quantize_activation(
    *, k: int, group_size: int, align: int = 8, apart: int = 0, rotate: int = 0, isa: str
) -> Any:
    """a = round(x · 127 / max|x|), a_scale = max|x| / 127, sums = Σ a, each over a group.

    x float32 [T, k]; with L the `QuantLayout` of any weights that pad groups to `align`: a int8 [T,
    L.k_padded], sums and a_scale float32 [T, L.groups + apart], the sums whole numbers: they are factors of
    floats. A group of zeros, or of less than `SMALLEST`, gives zeros; a NaN or an infinity makes the group's
    scale NaN or infinite, or is what is kept `apart` (as in `Quantized`; for `whole_groups`). x is rotated
    first in runs of `rotate` columns, where that is not 0.
    """
    lay = activation_layout(k, group_size, align)
    kernel = Kernel("quantize_activation", isa)
    with kernel:
        tokens = kernel.symbol("T")
        x = kernel.argument("x", (tokens, k), "float32")
        to = quantized_arguments(kernel, lay, apart=apart, rotate=rotate)
        with kernel.body():
            if apart or rotate:
                held = elements_held(lay, apart)
                for_each_row_beside(tokens, 2 * k, held, lambda row, at: _quantize_row(x, row, at, to))
            else:
                for_each_row(tokens, 2 * k, lambda row: _quantize_row(x, row, None, to))
    return kernel.function


def reference_quantize_activation(
    x: np.ndarray, group_size: int, align: int = 8, apart: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """a [T, k_padded], sums and a_scale [T, groups + apart] of x float32 [T, k] in numpy's float32."""
    if apart:
        column = np.abs(x).argmax(1)[:, None]
        rest = x.copy()
        np.put_along_axis(rest, column, np.float32(0), 1)
        a, sums, scale = reference_quantize_activation(rest, group_size, align, apart - 1)
        at = sums.shape[1] - apart + 1
        value = np.take_along_axis(x, column, 1)
        return a, np.insert(sums, [at], column, 1), np.insert(scale, [at], value, 1)
    lay = QuantLayout(1, x.shape[1], 8 if align == 8 else 2, group_size)
    whole = np.zeros((x.shape[0], lay.groups * lay.real_group), np.float32)
    whole[:, : x.shape[1]] = x
    grouped = whole.reshape(x.shape[0], lay.groups, lay.real_group)
    largest = np.abs(grouped).max(2)
    usable = (largest >= SMALLEST) & np.isfinite(largest)
    inverse = np.where(usable, np.float32(127) / np.where(usable, largest, 1), 0).astype(np.float32)
    grouped = np.rint(np.where(usable[:, :, None], grouped, 0) * inverse[:, :, None])
    padded = np.pad(grouped, ((0, 0), (0, 0), (0, lay.group - lay.real_group)))
    sums = grouped.sum(2)
    return padded.reshape(x.shape[0], -1).astype(np.int8), sums, largest / np.float32(127)
