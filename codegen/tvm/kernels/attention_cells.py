"""What `attention_tiles` keeps of the cells that it computes: operands, places, and softmax so far."""

from __future__ import annotations

from collections.abc import Callable

from tvm.script.ir_builder import tirx as T

from .attention_spec import LOG2E, NOTHING, Attention, Buffers
from .builder import LANES, Buffer, Expr, call, f32s, fma, let, put, put1, register, splat, vec
from .tile_registers import TILE_ROWS
from .vector_math import exp2

DEPTH = 32
"""Elements of a row of a tile."""
_ROW_TILES = 12
"""Tiles of cells that share the copy of a page's values, about."""


def heads_a_tile(spec: Attention) -> int:
    """Query heads that one row fills a tile with."""
    return max(h for h in range(1, TILE_ROWS + 1) if spec.group % h == 0)


def rows_a_block(spec: Attention) -> int:
    """The most query rows of a block."""
    return TILE_ROWS * max(1, min(8, _ROW_TILES // spec.group))


Take = Callable[..., Buffer]
"""A function that gives a float32 buffer of a shape."""


class Words:
    """The first operand of a product: words of two neighbouring bfloat16."""

    def __init__(self, take: Take, *shape: int) -> None:
        self.words, self.depth = take(*shape, LANES), shape[-1]

    def put(self, first: Expr, second: Expr, *index: Expr) -> None:
        """Words of 32 neighbours of a row, float32."""
        put(self.words, call("float32x16", "llmc_bfloat_pairs", first, second), *index, 0)


class Cells:
    """Rows of one sequence by the query heads of one key/value head, in tiles of `count` cells."""

    def __init__(
        self, spec: Attention, at: Buffers, place: tuple[Expr, Expr, Expr], rows: Expr | None = None
    ) -> None:
        """place = (first row, sequence, first query head). Where rows is None there is one row, and one tile
        holds its heads; else a tile holds 16 rows of a head, of which the last may stand several times.
        """
        self.spec, self.at = spec, at
        self.row, self.sequence, self.head = place
        self.kv_head = let(T.floordiv(self.head, T.int32(spec.group)))
        self.many = rows is not None
        if rows is None:
            self.last_row, self.count, self.most, self.tiles = self.row, heads_a_tile(spec), 1, T.int32(1)
        else:
            self.last_row, self.count = let(self.row + rows - 1), TILE_ROWS
            self.most = rows_a_block(spec) // TILE_ROWS * spec.group
            self.tiles = let(T.floordiv(rows + (TILE_ROWS - 1), T.int32(TILE_ROWS)) * spec.group)
        self.context = let(at.context_len[self.sequence])
        self.offset = let(self.context - at.query_start[self.sequence + 1])

    def place(self, tile: Expr, i: Expr) -> tuple[Expr, Expr]:
        """(row, head) of cell i of a tile."""
        if not self.many:
            return self.row, self.head + i
        start = self.row + T.floordiv(tile, self.spec.group) * TILE_ROWS
        return T.min(start + i, self.last_row), self.head + T.floormod(tile, self.spec.group)

    def low(self, row: Expr) -> Expr:
        """The first token that a row sees."""
        if self.spec.window is None:
            return T.int32(0)
        return T.max(self.offset + row + (1 - self.spec.window), T.int32(0))

    def high(self, row: Expr) -> Expr:
        """The first token behind those that a row sees."""
        if self.spec.causal:
            return T.min(self.context, self.offset + row + 1)
        if self.spec.window is not None:
            return T.min(self.context, self.offset + row + self.spec.window)
        return self.context


class State:
    """Softmax of each cell so far: lane i of `best` and `total`, and row i of `acc`, belong to cell i of a
    tile.
    """

    def __init__(self, take: Take, tiles: Expr, cells: int, head_dim: int) -> None:
        self.count, self.chunks = cells, head_dim // LANES
        self.best, self.total = take(tiles, LANES), take(tiles, LANES)
        self.acc = take(tiles, cells, head_dim)

    def clear(self, at: Expr, sinks: Buffer | None = None, cells: Cells | None = None) -> None:
        """Nothing seen, but for the sinks of the heads of tile `at` of the cells."""
        put(self.best, f32s(NOTHING), at, 0)
        put(self.total, f32s(0 if sinks is None else 1), at, 0)
        with T.serial(0, self.count) as i:
            if sinks is not None and cells is not None:
                put1(self.best, sinks[cells.place(at, i)[1]] * T.float32(LOG2E), at, i)
            with T.serial(0, self.chunks) as c:
                put(self.acc, f32s(0), at, i, c * LANES)

    def add(self, at: Expr, other: State, other_at: Expr) -> None:
        """Merge a segment; one that saw nothing changes nothing."""
        old, best = vec(self.best, at, 0), vec(other.best, other_at, 0)
        new = let(T.max(old, best))
        keep, take = register(exp2(old - new)), register(exp2(best - new))
        put(self.best, new, at, 0)
        more = let(vec(other.total, other_at, 0) * vec(take, 0))
        put(self.total, fma(vec(self.total, at, 0), vec(keep, 0), more), at, 0)
        with T.serial(0, self.count) as i:
            mine, its = let(splat(keep[i])), let(splat(take[i]))
            with T.serial(0, self.chunks) as c:
                more = let(vec(other.acc, other_at, i, c * LANES) * its)
                put(self.acc, fma(vec(self.acc, at, i, c * LANES), mine, more), at, i, c * LANES)

    def copy(self, at: Expr, other: State, other_at: Expr) -> None:
        put(self.best, vec(other.best, other_at, 0), at, 0)
        put(self.total, vec(other.total, other_at, 0), at, 0)
        with T.serial(0, self.count) as i, T.serial(0, self.chunks) as c:
            put(self.acc, vec(other.acc, other_at, i, c * LANES), at, i, c * LANES)

    def finish(self, at: Expr, cells: Cells, out: Buffer) -> None:
        """out = acc / total for tile `at` of the cells; 0 for one that sees nothing."""
        with T.serial(0, self.count) as i:
            row, head = (let(x) for x in cells.place(at, i))
            some = self.total[at, i] > T.float32(0)
            inverse = let(splat(T.Select(some, T.float32(1) / self.total[at, i], T.float32(0))))
            with T.serial(0, self.chunks) as c:
                put(out, vec(self.acc, at, i, c * LANES) * inverse, row, head, c * LANES)
