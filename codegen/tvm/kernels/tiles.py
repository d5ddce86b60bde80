"""Products of many rows in AMX's tile registers (Intel SDM vol. 1, chapter 18): a part of `quantized_linear`.

A tile holds 16 rows of up to 64 bytes. The words of a panel are the second operand of `tdpbssd` as they lie
there, and rows of activations the first; the result is a group's totals of 16 rows by 16 outputs. They go
through memory, since vectors cannot read tiles, and are scaled there as everywhere: the bits of a result are
those of the other levels.

The last tile starts 16 rows before the end and computes some rows again, to the same bits.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm.script.ir_builder import tirx as T

from .builder import LANES, Buffer, Expr, f32s, let, prefetch_to_write, register, register_i32, vec
from .layout import QuantLayout
from .linear import store_block
from .panels import Operands, Unpacked

TILE_ROWS = 16
"""Rows of activations in a tile."""
LEAST_ROWS = 24
"""Rows from which on two tiles, some of whose rows are computed twice, take less time than `vpdpbusd`;
measured.
"""
FinishGroup = Callable[[Expr, list[list[Buffer]], list[list[Buffer]]], None]
"""(group, totals, sums): add the scaled totals, int32 [row][0], to the float32 sums [row][0]."""


def tile_depth(lay: QuantLayout) -> int:
    """Columns of a tile of activations: the largest part of a group that a tile holds, or 0 where tiles do
    not pay (scaling a group's totals takes longer than multiplying 32 columns) or where signed bytes do not
    hold the weights less their zero points.
    """
    signed = lay.bits < 8 or lay.zero_point is None
    depth = next(d for d in range(64, 0, -1) if lay.group % d == 0 and d % 4 == 0)
    whole = depth // 4 % lay.words == 0
    return depth if signed and whole and depth >= 48 else 0


def multiply_tiles(
    ops: Operands, tokens: Expr, panel: Unpacked, finish: Callable[[Expr, Expr], FinishGroup]
) -> None:
    """All rows (16 at least) by the panel's blocks; `finish(row, c)` scales those from `row` on by block c.

    A group's totals are scaled while the tiles of the next one are multiplied.
    """
    groups = ops.layout.groups
    totals = T.alloc_buffer((2, TILE_ROWS, LANES), "int32")
    _tile("config", T.int32(tile_depth(ops.layout)))
    with T.serial(0, T.floordiv(tokens + (TILE_ROWS - 1), T.int32(TILE_ROWS))) as i:
        row = let(T.min(i * TILE_ROWS, tokens - TILE_ROWS))
        with T.serial(0, panel.count) as c:
            for t in range(TILE_ROWS):
                prefetch_to_write(ops.out, row + t, (panel.first + c) * LANES)
            acc = [[register(f32s(0))] for _ in range(TILE_ROWS)]
            finish_group = finish(row, c)

            def scale(g: Expr) -> None:
                turn = T.bitwise_and(g, T.int32(1))
                finish_group(g, [[register_i32(vec(totals, turn, t, 0))] for t in range(TILE_ROWS)], acc)

            _multiply_group(ops, row, panel, T.int32(0), c, totals)
            with T.serial(0, groups - 1) as g:
                _multiply_group(ops, row, panel, g + 1, c, totals)
                scale(g)
            scale(T.int32(groups - 1))
            for t in range(TILE_ROWS):
                value = let(vec(acc[t][0], 0))
                store_block(value, ops.out, row + t, panel.first + c, ops.layout.n, ops.bias, ops.residual)
    _tile("release")


def _multiply_group(ops: Operands, row: Expr, panel: Unpacked, g: Expr, c: Expr, totals: Buffer) -> None:
    """Totals of a group: 16 rows from `row` on by block c of the panel, to totals[g % 2]."""
    lay = ops.layout
    depth = tile_depth(lay)
    _tile("zero_0")
    steps = depth // 4 // lay.words
    for part in range(lay.group // depth):
        _tile("load_1", _address(ops.a, row, g * lay.group + part * depth), T.int64(lay.k_padded))
        _tile("load_2", _address(panel.bytes, g, part * steps, 0, c, 0), T.int64(64 * panel.count))
        _tile("multiply")
    _tile("store_0", _address(totals, T.bitwise_and(g, T.int32(1)), 0, 0), T.int64(4 * LANES))


def _address(buffer: Buffer, *index: Expr) -> Expr:
    return T.address_of(buffer[index])


def _tile(name: str, *args: Expr) -> None:
    """One of the functions `intrinsics.library` has for tile registers 0 (totals), 1 (activations) and 2."""
    T.evaluate(T.call_extern("int32", f"llmc_tile_{name}", *args))
