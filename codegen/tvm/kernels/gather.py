"""Rows by index: `embedding` (also out of the packed table that a tied head multiplies by), `gather_last`."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm.script.ir_builder import tirx as T

from .builder import (
    LANES,
    Buffer,
    Expr,
    Kernel,
    call,
    for_each_row,
    let,
    load_float,
    loop,
    put,
    put1,
    splat,
)
from .layout import ROWS, QuantLayout, packed_shape


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
    *, rows: int, width: int, bits: int, group_size: int, zero_point: bool, isa: str
) -> Any:
    """out[t] = scale · (q - zero_point) of row ids[t], from the layout that `quantized_linear` multiplies by.

    ids int32 [T]; with L = QuantLayout(rows, width, bits, group_size): weight uint8 L.weight_shape, scale
    float16 L.scale_shape, zero_point uint8 L.scale_shape or absent; out float32 [T, width].
    """
    lay = QuantLayout(rows, width, bits, group_size)
    kernel = Kernel("quantized_embedding", isa)
    with kernel:
        tokens = kernel.symbol("T")
        ids = kernel.argument("ids", (tokens,), "int32")
        weight = kernel.argument("weight", lay.weight_shape, "uint8")
        scale = kernel.argument("scale", lay.scale_shape, "float16")
        zero = kernel.argument("zero_point", lay.scale_shape, "uint8") if zero_point else None
        out = kernel.argument("out", (tokens, width), "float32")

        def row(t: Expr) -> None:
            source = _held(ids[t], rows)
            block, lane = let(source // ROWS), let(source % ROWS)
            with T.serial(0, lay.groups) as g:
                factor = let(load_one(scale, "float16", block, g, lane))
                offset: Expr = T.int32(1 << (bits - 1))
                if zero is not None:
                    offset = let(T.Cast("int32", zero[block, g, lane]))
                count = T.min(T.int32(lay.real_group), T.int32(width) - g * lay.real_group)
                with T.serial(0, count) as i:
                    q = T.Cast("int32", _code(lay, weight, block, g, i, lane)) - offset
                    put1(out, factor * T.Cast("float32", q), t, g * lay.real_group + i)

        with kernel.body():
            for_each_row(tokens, 4 * width, row)
    return kernel.function


def _code(lay: QuantLayout, weight: Buffer, block: Expr, group: Expr, i: Expr, lane: Expr) -> Expr:
    """Element i of a group of one row of the packed weight, uint8."""
    if lay.bits == 8:
        return weight[block, group, i // 4, lane * 4 + i % 4]
    byte = weight[block, group, i // 8, lane * 4 + i % 4]
    shift = T.Cast("uint8", i % 8 // 4 * 4)
    return T.bitwise_and(T.shift_right(byte, shift), T.uint8(15))


def reference_quantized_embedding(
    ids: np.ndarray,
    q: np.ndarray,
    scale: np.ndarray,
    zero_point: np.ndarray | None,
    group_size: int,
    bits: int,
) -> np.ndarray:
    """float32 [T, width] from unpacked q [rows, width], scale and zero_point [rows, groups]."""
    width = q.shape[1]
    offset: Any = 1 << (bits - 1)
    if zero_point is not None:
        offset = zero_point[ids].astype(np.float32).repeat(group_size, 1)[:, :width]
    return (q[ids].astype(np.float32) - offset) * scale[ids].astype(np.float32).repeat(group_size, 1)[
        :, :width
    ]
