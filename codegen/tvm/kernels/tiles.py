"""Products of many rows in AMX's tile registers: a part of `quantized_linear`.

A tile holds 16 rows of up to 64 bytes. The words of a panel are the second operand of `tdpbssd` as they lie
there, and rows of activations the first; the result is a group's totals of 16 rows by 16 outputs. They go
through memory, since vectors cannot read tiles, and are scaled there as everywhere: the bits of a result are
those of the other levels.

The last tile starts 16 rows before the end and computes some rows again, to the same bits (two threads may
write the same there).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm.script.ir_builder import tirx as T

from .builder import LANES, Buffer, Expr, f32s, let, register, register_i32, vec
from .isa import Isa
from .layout import QuantLayout
from .panels import Operands, Unpacked
from .tile_registers import TILE_ROWS, configure_bytes, load, multiply_bytes, release, store, zero

FinishGroup = Callable[[Expr, list[list[Buffer]], list[list[Buffer]]], None]
"""(group, totals, sums): add the scaled totals, int32 [row][0], to the float32 sums [row][0]."""
Finish = Callable[[Unpacked, Expr, Expr], FinishGroup]
"""(panel, row, c): scales totals of 16 rows from `row` on by block c of the panel."""


def tile_depth(lay: QuantLayout) -> int:
    """Columns of a tile of activations: the largest part of a group that a tile holds, or 0 where tiles do
    not pay (scaling a group's totals takes longer than multiplying 32 columns) or where signed bytes do not
    hold the weights less their zero points.
    """
    signed = lay.bits < 8 or lay.zero_point is None
    depth = next(d for d in range(64, 0, -1) if lay.group % d == 0 and d % 4 == 0)
    whole = depth // 4 % lay.words == 0
    return depth if signed and whole and depth >= 48 else 0


def in_tiles(isa: Isa, lay: QuantLayout) -> bool:
    """Whether a level multiplies many rows by weights of a layout in tile registers."""
    return isa.tiles and tile_depth(lay) > 0


def multiply_tiles(
    rows: tuple[Expr, Expr],
    panels: Sequence[Unpacked],
    finish: Finish,
) -> None:
    """Rows [first, stop) by the blocks of panels.

    There are 16 rows at least. A group's totals are scaled while the tiles of the next one are multiplied.
    """
    first, stop = rows
    totals = T.alloc_buffer((2, TILE_ROWS, LANES), "int32")
    configure_bytes(tile_depth(panels[0].ops.layout))
    with T.serial(0, T.floordiv(stop - first + (TILE_ROWS - 1), T.int32(TILE_ROWS))) as i:
        row = let(T.max(T.min(first + i * TILE_ROWS, stop - TILE_ROWS), T.int32(0)))
        for panel in panels:
            with T.serial(0, panel.count) as c:
                _multiply_block(row, panel, c, totals, finish)
    release()


def _multiply_block(row: Expr, panel: Unpacked, c: Expr, totals: Buffer, finish: Finish) -> None:
    """16 rows from `row` on by block c."""
    ops, block = panel.ops, panel.first + c
    for t in range(TILE_ROWS):
        ops.expect(row + t, block)
    acc = [[register(f32s(0))] for _ in range(TILE_ROWS)]
    finish_group = finish(panel, row, c)

    def scale(g: Expr) -> None:
        turn = T.bitwise_and(g, T.int32(1))
        finish_group(g, [[register_i32(vec(totals, turn, t, 0))] for t in range(TILE_ROWS)], acc)

    _multiply_group(ops, row, panel, T.int32(0), c, totals)
    with T.serial(0, ops.layout.groups - 1) as g:
        _multiply_group(ops, row, panel, g + 1, c, totals)
        scale(g)
    scale(T.int32(ops.layout.groups - 1))
    for t in range(TILE_ROWS):
        ops.write(let(vec(acc[t][0], 0)), row + t, block)


def _multiply_group(ops: Operands, row: Expr, panel: Unpacked, g: Expr, c: Expr, totals: Buffer) -> None:
    """Totals of a group: 16 rows from `row` on by block c of the panel, to totals[g % 2]."""
    lay = ops.layout
    depth = tile_depth(lay)
    zero(0)
    steps = depth // 4 // lay.words
    for part in range(lay.group // depth):
        load(1, _address(ops.a, row, g * lay.group + part * depth), lay.k_padded)
        load(2, _address(panel.bytes, c, g, part * steps, 0, 0), 64)
        multiply_bytes()
    store(0, _address(totals, T.bitwise_and(g, T.int32(1)), 0, 0), 4 * LANES)


def _address(buffer: Buffer, *index: Expr) -> Expr:
    return T.address_of(buffer[index])
