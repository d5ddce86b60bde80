"""Products of many rows in AMX's tile registers, two tiles of rows by those of two blocks: a part of
`quantized_linear`, for groups of several tiles.

Each tile is loaded once for two products, and the four totals need not wait for each other. Vectors of floats
are slow for a while after a tile instruction: the totals of some groups are stored before they are scaled.

Weights of 8 bits are multiplied as they lie in memory, 128 more than they are: totals start at
-128 · Σ activations. Others are spread to bytes first (`Unpacked`).

The last tiles start 16 or 32 rows before the end and compute some rows again, to the same bits (two threads
may write the same there); so do the last two blocks of a panel of an odd number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from tvm.script.ir_builder import tirx as T

from .builder import (
    LANES,
    Buffer,
    Expr,
    f32s,
    in_turns,
    let,
    prefetch_second,
    put,
    register,
    register_i32,
    splat,
    vec,
)
from .panels import LIFT, Packed, Unpacked
from .tile_layout import tile_depth
from .tile_registers import (
    TILE_ROWS,
    configure_bytes,
    load,
    multiply_bytes,
    multiply_unsigned,
    release,
    store,
    zero,
)
from .tiles import Finish, address

_GROUPS, _COLUMNS = 3, 512
"""Groups whose totals are stored before they are scaled, 4 kB each, and columns of them: what two tiles of
rows and of words have of these stays in the nearest cache.
"""
_MOST_PAIRS = 8
"""Pairs of blocks that are multiplied by some rows before others are."""
_AT_ONCE = 8
"""Rows that are scaled at once, their sums in registers."""
_UNROLLED = 8
"""Parts of a group up to which they are written out."""

Columns = Sequence[tuple[Packed, Expr]]
"""One or two blocks, each of a panel."""
Write = Callable[[Expr, Expr, Expr, Sequence[Expr]], None]
"""(row, t, c, values): results of a row, the t-th of its tiles, by block c of each of two panels."""
After = Callable[[Expr, int], None]
"""(row, rows): so many rows from `row` on were multiplied by all blocks."""


def multiply_pairs(
    rows: tuple[Expr, Expr],
    panels: Sequence[Packed],
    finish: Finish,
    write: Write | None = None,
    after: After | None = None,
    pairs: tuple[Expr, Expr] | None = None,
) -> None:
    """Rows [first, stop) by the blocks of panels: `Unpacked` ones, or as they lie in memory where
    `as_they_lie`. `stop` is 16 at least: of fewer rows than 16, some before `first` are computed too.

    `write`: of two panels, what becomes of a row's results by a block of each; None: they are written where
    the panels' operands say. `after`: what is done when some rows were multiplied by all blocks. `pairs`:
    [begin, end) of the pairs of blocks; None: all.
    """
    first, stop = rows
    both = 2 * TILE_ROWS
    products = _Products(panels, finish, write, pairs)
    configure_bytes(tile_depth(products.layout))
    count = let(stop - first)
    # Of 17 rows and more that are left two tiles, of fewer one.
    twos = let(T.Select(count < both, T.int32(0), T.floordiv(count + (TILE_ROWS - 1), T.int32(both))))
    left = let(T.max(count - twos * both, T.int32(0)))

    def some(row: Expr, tiles: int) -> None:
        products.fresh = row == first
        products.blocks(row, tiles)
        if after is not None:
            after(row, tiles * TILE_ROWS)

    with T.serial(0, twos) as i:
        some(let(T.min(first + i * both, stop - both)), 2)
    with T.serial(0, T.floordiv(left + (TILE_ROWS - 1), T.int32(TILE_ROWS))) as i:
        row = first + twos * both + i * TILE_ROWS
        some(let(T.max(T.min(row, stop - TILE_ROWS), T.int32(0))), 1)
    release()


class _Products:
    """Products by panels of one layout, through scratch memory that they share."""

    def __init__(
        self,
        panels: Sequence[Packed],
        finish: Finish,
        write: Write | None,
        pairs: tuple[Expr, Expr] | None,
    ) -> None:
        self.panels, self.finish, self.write, self.pairs = panels, finish, write, pairs
        self.ops = panels[0].ops
        self.layout = self.ops.layout
        self.depth = tile_depth(self.layout)
        self.parts = self.layout.group // self.depth
        self.chunk = min(self.layout.groups, max(1, min(_GROUPS, _COLUMNS // self.layout.group)))
        """Groups of a chunk; the last one may have fewer."""
        self.chunks = -(-self.layout.groups // self.chunk)
        rows = 2 * TILE_ROWS
        self.totals = T.alloc_buffer((self.chunk, 2, rows, LANES), "int32")
        """[group of the chunk, block, row, output]"""
        self.rolled = write is not None or self.ops.apart > 0
        """Whether results are written in a loop of their own: it is much that is done for each."""
        slots = 1 if self.chunks == 1 else _MOST_PAIRS
        held = self.chunks > 1 or self.rolled
        self.sums: Buffer = T.alloc_buffer((slots, 2, rows, LANES), "float32") if held else None
        """[pair, block, row, output] of the chunks so far."""
        self.fresh: Expr = None
        """Whether these are the first rows, for which panels as they lie come from memory."""
        self.starts: Buffer = None
        """[group, row, output]: where totals start that do not at zero."""
        if not isinstance(panels[0], Unpacked):
            self.starts = T.alloc_buffer((self.layout.groups, rows, LANES), "int32")

    def blocks(self, row: Expr, tiles: int) -> None:
        """`tiles` times 16 rows from `row` on by all blocks."""
        if self.starts is not None:
            lift = T.reinterpret(T.float32(LIFT), dtype="int32") if self.ops.lifted else T.int32(0)
            with T.serial(0, tiles * TILE_ROWS) as t, T.serial(0, self.layout.groups) as g:
                sum_ = T.Cast("int32", self.ops.sums[row + t, g])
                put(self.starts, splat(sum_ * T.int32(-self.ops.middle) + lift), g, t, 0)
        if self.write is not None:
            gate, up = self.panels
            self._pairs(row, tiles, (T.int32(0), T.int32(gate.count)), lambda c: [(gate, c), (up, c)])
            return
        for panel in self.panels:
            if panel.count == 1:
                self._pairs(row, tiles, (T.int32(0), T.int32(1)), lambda i, panel=panel: [(panel, i)])
                continue

            def two(i: Expr, panel: Packed = panel) -> Columns:
                c = let(T.min(i * 2, T.int32(panel.count - 2)))
                return [(panel, c), (panel, c + 1)]

            self._pairs(row, tiles, self.pairs or (T.int32(0), T.int32((panel.count + 1) // 2)), two)

    def _pairs(
        self, row: Expr, tiles: int, span: tuple[Expr, Expr], columns: Callable[[Expr], Columns]
    ) -> None:
        """By pairs [begin, end): chunk after chunk, whose part of the rows stays in the nearest cache."""
        begin, end = span
        if self.chunks == 1:
            with T.serial(0, end - begin) as i:
                self._chunk(row, tiles, columns(begin + i), T.int32(0), T.int32(0))
            return
        with T.serial(0, T.floordiv(end - begin + (_MOST_PAIRS - 1), T.int32(_MOST_PAIRS))) as some:
            first = let(begin + some * _MOST_PAIRS)
            count = let(T.min(end - first, T.int32(_MOST_PAIRS)))
            with T.serial(0, self.chunks) as q, T.serial(0, count) as i:
                self._chunk(row, tiles, columns(first + i), q, i)

    def _chunk(self, row: Expr, tiles: int, columns: Columns, q: Expr, slot: Expr) -> None:
        base = let(q * self.chunk)
        groups = let(T.min(T.int32(self.layout.groups) - base, T.int32(self.chunk)))
        with T.serial(0, groups) as g:
            self._total(row, tiles, columns, base + g, g)
        with T.serial(0, tiles * TILE_ROWS // _AT_ONCE) as s:
            for j in range(len(columns)):
                self._scale(row, let(s * _AT_ONCE), (columns, j), (q, base, groups, slot))

        def write_one(t: Expr) -> None:
            values = [let(vec(self.sums, slot, j, t, 0)) for j in range(len(columns))]
            self._write(row, t, columns, values)

        def write() -> None:
            if self.write is None:  # which may end in the middle of a block
                with T.serial(0, tiles * TILE_ROWS) as t:
                    write_one(t)
                return
            with T.serial(0, tiles * TILE_ROWS // _AT_ONCE) as s:
                in_turns([partial(write_one, s * _AT_ONCE + r) for r in range(_AT_ONCE)])

        if self.rolled and self.chunks == 1:
            write()
        elif self.rolled:
            with T.If(q == self.chunks - 1), T.Then():
                write()

    def _write(self, row: Expr, t: Expr, columns: Columns, values: Sequence[Expr]) -> None:
        """Results of row + t."""
        sums = [
            panel.add_apart([value], row + t, [c])[0]
            for (panel, c), value in zip(columns, values, strict=True)
        ]
        if self.write is not None:
            self.write(row + t, t, columns[0][1], sums)
            return
        for (panel, c), value in zip(columns, sums, strict=True):
            panel.ops.write(value, row + t, panel.first + c)

    def _total(self, row: Expr, tiles: int, columns: Columns, group: Expr, at: Expr) -> None:
        """The totals of a group, to self.totals[at]: registers 0 … 3 are totals, 4 and 5 rows, 6 and 7
        words.
        """
        places = [(i, j) for i in range(tiles) for j in range(len(columns))]
        for i, j in places:
            if self.starts is None:
                zero(2 * i + j)
            else:
                load(2 * i + j, address(self.starts, group, i * TILE_ROWS, 0), 4 * LANES)
        multiply = multiply_bytes if self.starts is None else multiply_unsigned

        def part(p: Expr) -> None:
            self._expect(row, tiles, columns, group * self.parts + p)
            column = let(p * self.depth)
            if self.starts is not None:
                self._fetch(columns, group, column)
            for i, j in places:
                panel, c = columns[j]
                if j == 0:
                    of_group = address(self.ops.a, row + i * TILE_ROWS, group * self.layout.group + column)
                    load(4 + i, of_group, self.layout.k_padded)
                if i == 0:
                    load(6 + j, self._words(panel, c, group, column), 64)
                multiply(2 * i + j, 4 + i, 6 + j)

        if self.parts <= _UNROLLED:
            for p in range(self.parts):
                part(T.int32(p))
        else:
            with T.serial(0, self.parts) as p:
                part(p)
        for i, j in places:
            store(2 * i + j, address(self.totals, at, j, i * TILE_ROWS, 0), 4 * LANES)

    def _expect(self, row: Expr, tiles: int, columns: Columns, part: Expr) -> None:
        """Beside a part of the last chunk: some rows of results will be written."""
        if self.write is not None:
            return
        rows, before = tiles * TILE_ROWS, (self.chunks - 1) * self.chunk * self.parts
        each = -(-rows // (self.layout.groups * self.parts - before))
        with T.If(part >= before), T.Then(), T.serial(0, each) as e:
            t = let(T.min((part - before) * each + e, T.int32(rows - 1)))
            for panel, c in columns:
                # Where something is added, what is fetched for it leaves no place to fetch results too.
                added = panel.ops.residual is not None
                (panel.ops.expect_residual if added else panel.ops.expect)(row + t, panel.first + c)

    def _fetch(self, columns: Columns, group: Expr, column: Expr) -> None:
        """The words of the blocks that follow, of these columns, from memory."""
        ahead = 1 if self.write is not None else len(columns)
        with T.If(self.fresh), T.Then(), T.serial(0, self.depth // 4) as word:
            for panel, c in columns:
                place = panel.first + c + ahead, group, column * LANES + word * 64
                prefetch_second(panel.ops.weight, *place)

    def _words(self, panel: Packed, c: Expr, group: Expr, column: Expr) -> Expr:
        """Where the words of a group's columns from `column` on are."""
        if isinstance(panel, Unpacked):
            word = T.floordiv(group * self.layout.group + column, T.int32(4))
            return address(panel.bytes, c, word, 0)
        return address(panel.ops.weight, panel.first + c, group, column * LANES)

    def _scale(
        self, row: Expr, t: Expr, of: tuple[Columns, int], chunk: tuple[Expr, Expr, Expr, Expr]
    ) -> None:
        """Add a chunk's totals of rows from row + t on by a block, and write the sums when all are in."""
        (columns, j), (q, base, groups, slot) = of, chunk
        panel, c = columns[j]
        rows = range(_AT_ONCE)
        if self.chunks == 1:
            acc = [[register(f32s(0))] for _ in rows]
        else:
            # Of the first chunk what lies there may be anything, also not a number: it is not added.
            acc = [[register(T.Select(q > 0, vec(self.sums, slot, j, t + r, 0), f32s(0)))] for r in rows]
        with T.serial(0, groups) as g:
            totals = [[register_i32(vec(self.totals, g, j, t + r, 0))] for r in rows]
            self.finish(panel, row + t, c, base + g, totals, acc)

        def write() -> None:
            for r in rows:
                self._write(row, t + r, [(panel, c)], [let(vec(acc[r][0], 0))])

        def hold() -> None:
            for r in rows:
                put(self.sums, vec(acc[r][0], 0), slot, j, t + r, 0)

        if self.rolled:
            hold()
        elif self.chunks == 1:
            write()
        else:
            with T.If(q == self.chunks - 1):
                with T.Then():
                    write()
                with T.Else():
                    hold()
