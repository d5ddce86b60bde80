"""Products of many rows in AMX's tile registers: a part of `quantized_linear`, one tile at a time; for groups
of several tiles see `tile_pairs`.

A tile holds 16 rows of up to 64 bytes. The words of a panel are the second operand of `tdpbssd` as they lie
there, and rows of activations the first; the result is a group's totals of 16 rows by 16 outputs. They go
through memory, since vectors cannot read tiles, and are scaled there as everywhere: the bits of a result are
those of the other levels.

A tile instruction is many micro-operations, and several in a row leave no room for others: what multiplies a
group stands between the rows of the group before that are scaled meanwhile.

The last tile starts 16 rows before the end and computes some rows again, to the same bits (two threads may
write the same there).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from tvm.script.ir_builder import tirx as T

from .builder import LANES, Buffer, Expr, f32s, let, register, register_i32, vec
from .panels import Packed, Unpacked
from .tile_layout import tile_depth
from .tile_registers import (
    TILE_ROWS,
    Operation,
    Steps,
    configure_bytes,
    load,
    multiply_bytes,
    release,
    store,
    zero,
)

Finish = Callable[[Packed, Expr, Expr, Expr, Iterable[list[Buffer]], list[list[Buffer]]], None]
"""(panel, row, c, group, totals, sums): add that group's scaled totals of rows from `row` on by block c of
the panel, int32 [row][0], to the float32 sums [row][0]. Totals are asked for row by row, each when the row
before was added.
"""


def multiply_tiles(
    rows: tuple[Expr, Expr],
    panels: Sequence[Unpacked],
    finish: Finish,
) -> None:
    """Rows [first, stop) by the blocks of panels. `stop` is 16 at least."""
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
    products = _Products(row, panel, c, totals)
    last = ops.layout.groups - 1

    def scale(g: Expr, beside: Sequence[Operation]) -> None:
        """Add the totals of group g; `beside`: what is done meanwhile."""
        steps = Steps(beside, TILE_ROWS)

        def rows() -> Iterator[list[Buffer]]:
            for t in range(TILE_ROWS):
                steps.step()
                yield [register_i32(vec(totals, T.bitwise_and(g, T.int32(1)), t, 0))]

        finish(panel, row, c, g, rows(), acc)

    products.load(T.int32(0))
    for operation in products.group(T.int32(0), more=last > 0):
        operation()
    if last > 1:
        with T.serial(0, last - 1) as g:
            scale(g, products.group(g + 1, more=True))
    if last > 0:
        scale(T.int32(last - 1), products.group(T.int32(last), more=False))
    scale(T.int32(last), [])
    for t in range(TILE_ROWS):
        ops.write(panel.add_apart([let(vec(acc[t][0], 0))], row + t, [c])[0], row + t, block)


class _Products:
    """Totals of the groups of 16 rows from `row` on by block c of a panel."""

    def __init__(self, row: Expr, panel: Unpacked, c: Expr, totals: Buffer) -> None:
        self.row, self.panel, self.c, self.totals = row, panel, c, totals
        lay = panel.ops.layout
        self.depth = tile_depth(lay)
        self.parts = lay.group // self.depth

    def load(self, g: Expr) -> None:
        """Load both tiles of a group's first part."""
        for operation in self._loads(g, 0):
            operation()

    def group(self, g: Expr, *, more: bool) -> list[Operation]:
        """Operations that multiply group g, whose first part is loaded, and leave its totals in
        totals[g % 2]; `more`: the first part of the next group is loaded on the way.
        """
        operations: list[Operation] = []
        for part in range(self.parts):
            operations.append(partial(self._multiply, first=part == 0))
            if part + 1 < self.parts:
                operations += self._loads(g, part + 1)
            elif more:
                operations += self._loads(g + 1, 0)
        return [*operations, partial(self._store, g)]

    def _multiply(self, *, first: bool) -> None:
        if first:
            zero(0)
        multiply_bytes(0, 4, 6)

    def _store(self, g: Expr) -> None:
        store(0, address(self.totals, T.bitwise_and(g, T.int32(1)), 0, 0), 4 * LANES)

    def _loads(self, g: Expr, part: int) -> list[Operation]:
        ops, lay = self.panel.ops, self.panel.ops.layout

        def rows() -> None:
            load(4, address(ops.a, self.row, g * lay.group + part * self.depth), lay.k_padded)

        def words() -> None:
            word = g * (lay.group // 4) + part * (self.depth // 4)
            load(6, address(self.panel.bytes, self.c, word, 0), 64)

        return [rows, words]


def address(buffer: Buffer, *index: Expr) -> Expr:
    """Of an element, as tile instructions take it."""
    return T.address_of(buffer[index])
