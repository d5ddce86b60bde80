"""Rows by index: `embedding` (also out of the packed table that a tied head multiplies by), `gather_last`."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from .builder import (
    LANES,
    Buffer,
    Expr,
    Kernel,
    call,
    fma1,
    for_each_row,
    let,
    load_float,
    loop,
    put,
    put1,
    splat,
)
from .layout import ROWS, QuantLayout, packed_shape
from .panels import weight_arguments


def load_one(buffer: Buffer, dtype: str, *index: Expr) -> Expr:
    """One element of a float32, float16 or bfloat16 buffer as float32."""
    if dtype == "float32":
        return buffer[index]
    bits = T.reinterpret(buffer[index], dtype="uint16")
    if dtype == "float16":
        return call("float32", "llmc_max", call("float32x16", "llmc_from_half", splat(bits)))
    return T.reinterpret(T.shift_left(T.Cast("uint32", bits), T.uint32(16)), dtype="float32")


def _copy_row(width: int, dtype: str, table: Buffer, source: Expr, out: Buffer, row: Expr) -> None:
    with T.serial(0, width // LANES) as c:
        put(out, load_float(table, dtype, source, c * LANES), row, c * LANES)
    with loop(width // LANES * LANES, width) as i:
        put1(out, load_one(table, dtype, source, i), row, i)


def _held(index: Expr, rows: int) -> Expr:
    """The index, kept inside the table: a bad token id must not read memory that is not ours."""
    return let(T.max(T.min(index, T.int32(rows - 1)), T.int32(0)))


def make_embedding(
    *, rows: int, width: int, packed: bool = False, weight_dtype: str = "float32", isa: str
) -> Any:
    """out[t] = table[ids[t]].

    ids int32 [T]; table `weight_dtype` (float32, float16, bfloat16) [rows, width], or where `packed`
    [ceil(rows/16), width, 16] as `linear` wants it; out float32 [T, width].
    """
    kernel = Kernel("embedding", isa)
    with kernel:
        tokens = kernel.symbol("T")
        ids = kernel.argument("ids", (tokens,), "int32")
        shape = packed_shape(rows, width) if packed else (rows, width)
        table = kernel.argument("table", shape, weight_dtype)
        out = kernel.argument("out", (tokens, width), "float32")

        def row(t: Expr) -> None:
            source = _held(ids[t], rows)
            if not packed:
                _copy_row(width, weight_dtype, table, source, out, t)
                return
            with T.serial(0, width) as i:
                put1(out, load_one(table, weight_dtype, source // ROWS, i, source % ROWS), t, i)

        with kernel.body():
            for_each_row(tokens, 2 * width, row)
    return kernel.function


def make_gather_last(*, width: int, isa: str) -> Any:
    """out[r] = x[index[r]]: x float32 [T, width], index int32 [R] → out float32 [R, width]."""
    kernel = Kernel("gather_last", isa)
    with kernel:
        tokens, wanted = kernel.symbol("T"), kernel.symbol("R")
        x = kernel.argument("x", (tokens, width), "float32")
        index = kernel.argument("index", (wanted,), "int32")
        out = kernel.argument("out", (wanted, width), "float32")
        with kernel.body():
            for_each_row(wanted, width, lambda r: _copy_row(width, "float32", x, index[r], out, r))
    return kernel.function


def make_quantized_embedding(
    *,
    rows: int,
    width: int,
    bits: int,
    group_size: int,
    zero_point: str | None = None,
    codebook: str | None = None,
    scale_dtype: str = "float16",
    super_group: int = 0,
    isa: str,
) -> Any:
    """out[t] = row ids[t] dequantized, from the layout that `quantized_linear` multiplies by.

    ids int32 [T]; with L the QuantLayout of these: weight uint8 L.weight_shape, scale L.scale_storage
    L.scale_shape, zero_point L.zero_storage L.zero_shape or absent; out float32 [T, width].
    """
    lay = QuantLayout(rows, width, bits, group_size, codebook, scale_dtype, zero_point, super_group)
    whole = width % lay.real_group == 0 and lay.group == lay.real_group
    kernel = Kernel("quantized_embedding", isa)
    with kernel:
        tokens = kernel.symbol("T")
        ids = kernel.argument("ids", (tokens,), "int32")
        weight, scale, zero = weight_arguments(kernel, lay)
        out = kernel.argument("out", (tokens, width), "float32")

        def row(t: Expr) -> None:
            source = _held(ids[t], rows)
            block, lane = let(source // ROWS), let(source % ROWS)
            with T.serial(0, lay.groups) as g:
                factor = let(_group_float(lay, scale, scale_dtype, (block, g), lane))
                offset = _offset(lay, zero, block, g, lane)
                count = let(T.min(T.int32(lay.real_group), T.int32(width) - g * lay.real_group))

                def store(i: Expr, code: Expr) -> None:
                    put1(out, _real(lay, code, factor, offset), t, g * lay.real_group + i)

                with T.serial(0, lay.steps) as step:
                    for j in range(4 * lay.words):
                        i = step * (4 * lay.words) + j
                        code = _code(lay, weight, (block, g), step, j, lane)
                        if whole:
                            store(i, code)
                            continue
                        with T.If(i < count), T.Then():
                            store(i, code)

        with kernel.body():
            for_each_row(tokens, 4 * width, row)
    return kernel.function


def _group_float(lay: QuantLayout, buffer: Buffer, dtype: str, at: tuple[Expr, Expr], lane: Expr) -> Expr:
    """A scale or minimum of one row's group, at = (block, group)."""
    block, group = at
    if not lay.super_group:
        return load_one(buffer, dtype, block, group, lane)
    place, part = T.floordiv(group, lay.per_super), T.floormod(group, lay.per_super)
    low, high = (T.Cast("uint16", buffer[block, place, 2 * lane + i]) for i in (0, 1))
    bits = T.bitwise_or(low, T.shift_left(high, T.uint16(8)))
    base = call("float32", "llmc_max", call("float32x16", "llmc_from_half", splat(bits)))
    whole = T.reinterpret(buffer[block, place, (2 + part) * ROWS + lane], dtype="int8")
    return base * T.Cast("float32", T.Cast("int32", whole))


def _offset(lay: QuantLayout, zero: Buffer, block: Expr, group: Expr, lane: Expr) -> Expr:
    """The zero point of one row's group: int32, or a minimum as float32."""
    if lay.zero_point is None:
        return T.int32(1 << (lay.bits - 1))
    if lay.zero_point != "uint8":
        return let(_group_float(lay, zero, lay.zero_point, (block, group), lane))
    if lay.packs_zero_points:
        both = T.Cast("int32", zero[block, group, lane % 8])
        return let(T.bitwise_and(T.shift_right(both, lane // 8 * 4), T.int32(15)))
    return let(T.Cast("int32", zero[block, group, lane]))


def _real(lay: QuantLayout, code: Expr, factor: Expr, offset: Expr) -> Expr:
    """The number that a code stands for, float32."""
    if lay.codebook is not None:
        found = call("float32x16", f"llmc_floats_{lay.codebook}", splat(code))
        return factor * call("float32", "llmc_max", found)
    if lay.zero_point not in (None, "uint8"):
        return fma1(factor, T.Cast("float32", code), offset)
    return factor * T.Cast("float32", code - offset)


def _code(lay: QuantLayout, weight: Buffer, at: tuple[Expr, Expr], step: Expr, j: int, lane: Expr) -> Expr:
    """Element j of a step of one row of the packed weight, int32; at = (block, group).

    j is no variable: where LLVM vectorised a loop over it, with shifts that vary from lane to lane, AVX2 and
    AVX-512 gave other bits than SSE.
    """
    value: Expr = None
    for plane in lay.planes:
        word, w = j // 4 // plane.words, j // 4 % plane.words
        size = 64 * lay.words * plane.width // 8  # bytes of a step
        row = lane % 8 if plane.width == 1 else lane
        byte = weight[(*at, plane.offset + step * size + word * 64 + row * 4 + j % 4)]
        bits = T.Cast("int32", byte)
        if plane.width == 1:  # rows from 8 on in the high halves
            bits = T.shift_right(bits, lane // 8 * 4)
        if w:
            bits = T.shift_right(bits, T.int32(w * plane.width))
        if plane.width < 8:
            bits = T.bitwise_and(bits, T.int32((1 << plane.width) - 1))
        part = T.shift_left(bits, T.int32(plane.shift)) if plane.shift else bits
        value = part if value is None else T.bitwise_or(value, part)
    return value
