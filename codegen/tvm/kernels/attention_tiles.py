"""`paged_attention` over a cache of bfloat16 in AMX's tile registers, in the order of `attention`.

As where pairs of bfloat16 are multiplied by vectors (`attention_words`), queries, once scaled, and weights
are rounded to bfloat16, and what the result is divided by is the sum of weights before. Keys are multiplied
where they lie in their pages; values are copied, since a tile takes those of two pages.

A row of a tile is a *cell*: a query row and head. Its scores of some pages, and then its weighted values, are
each a product of tiles whose other rows do not touch it, so that its bits depend on no neighbour: the rows
of a prompt fill a tile for each head, one row alone fills it with the heads that share keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from tvm.script.ir_builder import tirx as T

from .attention_cells import DEPTH, Cells, State, Take, Words, heads_a_tile, rows_a_block
from .attention_spec import LOG2E, NOTHING, SEGMENT, TILE, Attention, Buffers, Memory, advance
from .builder import (
    LANES,
    Buffer,
    Expr,
    f32s,
    fma,
    lane_maxima,
    lane_sums,
    let,
    loop,
    prefetch,
    put,
    put1,
    scalar,
    splat,
    vec,
)
from .cache import PAGE_SIZE
from .tile_registers import (
    TILE_ROWS,
    Operation,
    Steps,
    configure_floats,
    load,
    multiply_floats,
    release,
    store,
    zero,
)
from .vector_math import exp2, power_of_two, tanh

_TOKENS = TILE * PAGE_SIZE
_HIDDEN = 2 * NOTHING
"""The score of a token that is not seen: so far below any maximum that its weight is 0."""
_TASKS = 48
"""Pieces that a step is cut into, about, so that threads get equal shares."""


def fits(spec: Attention) -> bool:
    """Whether heads fill tiles. Slopes and distances are left to vectors."""
    biased = spec.slopes or spec.distances
    return spec.head_dim % DEPTH == 0 and spec.kv_dtype == "bfloat16" and not biased


def _within(page: Expr, start: Expr, stop: Expr) -> Expr:
    return T.min(T.max(page, start), stop - 1)


class _Scratch:
    """What a block of `most` tiles of `count` cells computes in."""

    def __init__(self, spec: Attention, take: Take, count: int, most: int) -> None:
        dim = spec.head_dim
        self.query = Words(take, most, count, dim // DEPTH)
        self.values = take(dim // LANES, _TOKENS // 2, LANES)
        self.weights = Words(take, 2, count, TILE // 2)
        self.scores = take(2, count, _TOKENS)
        self.rescale = take(2, LANES)
        self.sums = take(count, dim)
        self.lanes = take(count, LANES)
        self.state = State(take, most, count, dim)
        self.merged = State(take, most, count, dim)


def _elements(spec: Attention, *form: int) -> int:
    """Size of a `_Scratch`."""
    shapes: list[tuple[int, ...]] = []
    _Scratch(spec, lambda *shape: shapes.append(shape), *form)
    return sum(math.prod(shape) for shape in shapes)


class _Block:
    """Attention of the cells: one softmax a segment, merged where there are several."""

    def __init__(self, cells: Cells, memory: Memory) -> None:
        self.cells, self.spec, self.at = cells, cells.spec, cells.at
        scratch = _Scratch(self.spec, memory.again().take, cells.count, cells.most)
        self.query, self.values, self.weights = scratch.query, scratch.values, scratch.weights
        self.scores, self.rescale, self.sums = scratch.scores, scratch.rescale, scratch.sums
        self.lanes, self.state, self.merged = scratch.lanes, scratch.state, scratch.merged
        self.pages = T.alloc_buffer((2, TILE), "int32")
        self._prepare()

    def _prepare(self) -> None:
        """The pages that any cell sees, [first, last), and the scaled queries."""
        cells, spec = self.cells, self.spec
        self.first = let(T.floordiv(cells.low(cells.row), T.int32(PAGE_SIZE)))
        self.last = let(T.floordiv(cells.high(cells.last_row) + (PAGE_SIZE - 1), T.int32(PAGE_SIZE)))
        factor = f32s(spec.scale / spec.softcap if spec.softcap else spec.scale * LOG2E)
        with T.serial(0, cells.tiles) as tile, T.serial(0, cells.count) as i:
            row, head = cells.place(tile, i)
            row, head = let(row), let(head)
            with T.serial(0, spec.head_dim // DEPTH) as k:
                parts = [self.at.q.vector(row, head, k * DEPTH + at) * factor for at in (0, LANES)]
                self.query.put(*parts, tile, i, k)

    def run(self) -> None:
        """All segments, and the result."""
        tiles, sinks, out = self.cells.tiles, self.at.sinks, self.at.out
        begin = let(T.floordiv(self.first, T.int32(SEGMENT)))
        stop = let(T.floordiv(self.last + (SEGMENT - 1), T.int32(SEGMENT)))
        merged = self.merged
        # To merge one segment with nothing would multiply it by 1; a sink is something.
        several = T.bool(True) if sinks is not None else let(T.Or(stop > begin + 1, stop <= begin))
        with T.If(several), T.Then(), T.serial(0, tiles) as tile:
            merged.clear(tile, sinks, self.cells)
        with loop(begin, stop) as segment:
            self.segment(segment)
            with T.If(several), T.Then(), T.serial(0, tiles) as tile:
                merged.add(tile, self.state, tile)
        with T.serial(0, tiles) as tile, T.If(several):
            with T.Then():
                merged.finish(tile, self.cells, out)
            with T.Else():
                self.state.finish(tile, self.cells, out)

    def segment(self, segment: Expr) -> None:
        """The state of one segment; it may hold no page that is seen."""
        cells = self.cells
        with T.serial(0, cells.tiles) as tile:
            self.state.clear(tile)
        configure_floats(cells.count)
        start = let(T.max(self.first, segment * SEGMENT))
        stop = let(T.min(self.last, segment * SEGMENT + SEGMENT))
        turns = let(T.floordiv(start, T.int32(TILE))), let(T.floordiv(stop + (TILE - 1), T.int32(TILE)))
        if cells.many:
            with loop(*turns) as turn:
                self._find(turn, start, stop)
                self._copy_values(turn, start, stop)
                self._many(turn)
        else:
            self._few(turns, start, stop)
        release()

    def _few(self, turns: tuple[Expr, Expr], start: Expr, stop: Expr) -> None:
        """One tile. While its products wait for each other, the scores of the next pages are computed and the
        sums of the last ones are added.
        """
        begin, end = turns
        tile = T.int32(0)

        def score(turn: Expr) -> None:
            self._find(turn, start, stop)
            operations = [op for half in (0, 1) for op in self._score(tile, turn, T.int32(half))]
            fetches = Steps(self._prefetches(0, turn + 1), len(operations))
            for operation in operations:
                operation()
                fetches.step()

        with T.If(begin < end), T.Then():
            score(begin)
            with loop(begin, end) as turn:
                with T.If(turn + 1 < end), T.Then():
                    score(turn + 1)
                with T.If(turn > begin), T.Then():
                    self._accumulate(tile, turn - 1)
                self._copy_values(turn, start, stop)
                self._softmax(tile, turn, turn, lambda _: [])
                operations = [op for half in (0, 1) for op in self._value(turn, T.int32(half))]
                fetches = Steps(self._prefetches(1, turn + 1), len(operations))
                for operation in operations:
                    operation()
                    fetches.step()
            self._accumulate(tile, end - 1)

    def _prefetches(self, which: int, turn: Expr) -> list[Operation]:
        """Operations that fetch keys (0) or values (1). Behind the last page those that are likely read next:
        the first ones of the sequence behind.
        """
        at, sequence = self.at, self.cells.sequence
        sequences, width = at.block_table.shape
        behind = let(T.min(sequence + 1, sequences - 1))
        operations: list[Operation] = []
        for u in range(TILE):
            page = let(turn * TILE + u)
            row = T.Select(page < self.last, sequence, behind)
            place = T.Select(page < self.last, page, T.min(T.int32(u), width - 1))
            number = let(at.block_table[row, place])
            operations += [
                partial(prefetch, at.pages, which, number, self.cells.kv_head, 0, line)
                for line in range(0, self.spec.head_dim * PAGE_SIZE, 32)
            ]
        return operations

    def _many(self, pages: Expr) -> None:
        """The tiles that see any of the four pages, which stand together. While the softmax of one is
        computed, the values' products of the one before and the scores of the one behind are.
        """
        cells, group = self.cells, self.spec.group
        token = let(pages * _TOKENS)
        first = scalar(T.int32(0), "int32")
        with T.While(
            T.And(
                first[0] < cells.tiles, cells.high(cells.place(first[0], T.int32(TILE_ROWS - 1))[0]) <= token
            )
        ):
            put1(first, first[0] + group, 0)
        last = scalar(cells.tiles, "int32")
        with T.While(
            T.And(last[0] > first[0], cells.low(cells.place(last[0] - 1, T.int32(0))[0]) >= token + _TOKENS)
        ):
            put1(last, last[0] - group, 0)
        begin, end = let(first[0]), let(last[0])
        with T.If(begin < end), T.Then():
            with T.serial(0, 2) as half:
                for operation in self._score(begin, begin, half, pages):
                    operation()
            with loop(begin, end) as tile:

                def beside(half: Expr) -> list[Operation]:
                    # At the ends something is computed again, or from what lies there, and not used.
                    score = self._score(T.min(tile + 1, end - 1), tile + 1, half, pages)
                    return [*self._value(tile + 1, half), *score]

                self._softmax(tile, tile, pages, beside)
                with T.If(tile > begin), T.Then():
                    self._accumulate(tile - 1, tile - 1)
            with T.serial(0, 2) as half:
                for operation in self._value(end - 1, half):
                    operation()
            self._accumulate(end - 1, end - 1)

    def _find(self, turn: Expr, start: Expr, stop: Expr) -> None:
        """Numbers of some pages in the cache. In place of those outside [start, stop), which no cell sees,
        others stand.
        """
        with T.serial(0, TILE) as u:
            number = self.at.block_table[self.cells.sequence, _within(turn * TILE + u, start, stop)]
            put1(self.pages, number, turn % 2, u)

    def _copy_values(self, turn: Expr, start: Expr, stop: Expr) -> None:
        """Values of some pages, [16 d][pair of tokens][d]: 0 for tokens that are not there, which may be NaN,
        and 0 · NaN is no 0.
        """
        at, spec, kv_head = self.at, self.spec, self.cells.kv_head
        with T.serial(0, TILE) as u:
            page = turn * TILE + u
            number = let(self.pages[turn % 2, u])
            left = let(self.cells.context - _within(page, start, stop) * PAGE_SIZE)
            with T.serial(0, PAGE_SIZE // 2) as pair:
                first = T.Select(2 * pair < left, T.int32(0xFFFF), T.int32(0))
                mask = let(splat(T.Select(2 * pair + 1 < left, T.int32(-1), first)))
                with T.serial(0, spec.head_dim // LANES) as c:
                    place = let((pair * spec.head_dim + c * LANES) * 2)
                    words = vec(at.pages, 1, number, kv_head, 0, place, lanes=2 * LANES)
                    kept = T.bitwise_and(T.reinterpret(words, dtype="int32x16"), mask)
                    kept = T.reinterpret(kept, dtype="float32x16")
                    put(self.values, kept, c, u * (PAGE_SIZE // 2) + pair, 0)

    def _score(self, tile: Expr, turn: Expr, half: Expr, pages: Expr | None = None) -> list[Operation]:
        """Scores of a tile's cells and half of the pages that were found for turn `pages`."""
        found = turn % 2 if pages is None else pages % 2

        def keys(page: Expr, k: int) -> Expr:
            number = self.pages[found, page]
            return T.address_of(self.at.pages[0, number, self.cells.kv_head, 0, k * DEPTH * PAGE_SIZE])

        out = partial(self._row, self.scores, turn % 2)
        return self._products((self.query, tile), keys, (half, TILE), out)

    def _value(self, turn: Expr, half: Expr) -> list[Operation]:
        """Weights times half of the columns of the values."""
        columns = self.spec.head_dim // LANES

        def values(column: Expr, k: int) -> Expr:
            return T.address_of(self.values[column, k * LANES, 0])

        out = partial(self._row, self.sums)
        return self._products((self.weights, turn % 2), values, (half, columns), out)

    def _row(self, buffer: Buffer, *index: Expr) -> Expr:
        """The address of column index[-1] of 16 in the first cell's row."""
        return T.address_of(buffer[(*index[:-1], 0, index[-1] * LANES)])

    def _products(
        self,
        left: tuple[Words, Expr],
        right: Callable[[Expr, int], Expr],
        of: tuple[Expr, int],
        out: Callable[[Expr], Expr],
    ) -> list[Operation]:
        """Operations for half = 0 or 1 of out(column)[cell] = left [cell, words] times words at right(column,
        depth); of = (half, columns).
        """
        (a, which), (half, columns) = left, of
        depth, share = a.depth, columns // 2
        operations: list[Operation] = []

        def multiply(c: int, k: int, column: Expr) -> None:
            if k == 0:
                zero(c)
            if c == 0:
                load(4 + k % 2, T.address_of(a.words[which, 0, k, 0]), 4 * LANES * depth)
            load(6 + c % 2, right(column, k), 4 * LANES)
            multiply_floats(c, 4 + k % 2, 6 + c % 2)

        for start in range(0, share, 4):
            some = [(c, half * share + start + c) for c in range(min(4, share - start))]
            for k in range(depth):
                operations += [partial(multiply, c, k, column) for c, column in some]
            for c, column in some:
                operations.append(partial(self._store, c, out, column, columns))
        return operations

    def _store(self, c: int, out: Callable[[Expr], Expr], column: Expr, columns: int) -> None:
        store(c, out(column), 4 * LANES * columns)

    def _seen(self, row: Expr, page: Expr) -> list[Expr]:
        """For each of four pages, which of the 16 tokens a row sees."""
        low, high = let(self.cells.low(row)), let(self.cells.high(row))
        seen: list[Expr] = []
        for u in range(TILE):
            tokens = let(T.ramp((page + u) * PAGE_SIZE, 1, LANES))
            below = tokens < splat(high)
            seen.append(below if self.spec.window is None else T.And(below, tokens >= splat(low)))
        return seen

    def _cap(self, turn: Expr, softcap: float) -> None:
        with T.serial(0, self.cells.count) as i, T.serial(0, TILE) as u:
            score = tanh(vec(self.scores, turn, i, u * LANES)) * f32s(softcap * LOG2E)
            put(self.scores, score, turn, i, u * LANES)

    def _hide(self, tile: Expr, turn: Expr, pages: Expr) -> None:
        """Take out the scores of tokens that a cell does not see, where any does not see all."""
        cells, token = self.cells, let(pages * _TOKENS)
        first, last = cells.place(tile, T.int32(0))[0], cells.place(tile, T.int32(cells.count - 1))[0]
        part = cells.high(first) < token + _TOKENS
        if self.spec.window is not None:
            part = T.Or(part, cells.low(last) > token)
        with T.If(part), T.Then(), T.serial(0, cells.count) as i:
            seen = self._seen(let(cells.place(tile, i)[0]), pages * TILE)
            for u in range(TILE):
                score = T.Select(seen[u], vec(self.scores, turn, i, u * LANES), f32s(_HIDDEN))
                put(self.scores, score, turn, i, u * LANES)

    def _softmax(
        self, tile: Expr, turn: Expr, pages: Expr, beside: Callable[[Expr], list[Operation]]
    ) -> None:
        """Scores to weights: the new maximum and sum. Lane i of a vector belongs to cell i in the end.

        `beside(half)`: what is done beside each half of the cells' weights.
        """
        cells = self.cells
        turn = let(turn % 2)
        if self.spec.softcap:
            self._cap(turn, self.spec.softcap)
        self._hide(tile, turn, pages)
        with T.serial(0, cells.count) as i:
            scores = [vec(self.scores, turn, i, u * LANES) for u in range(TILE)]
            put(self.lanes, T.max(T.max(scores[0], scores[1]), T.max(scores[2], scores[3])), i, 0)
        each = range(cells.count)
        best = let(vec(self.state.best, tile, 0))
        new = let(T.max(best, lane_maxima([vec(self.lanes, i, 0) for i in each])))
        put(self.state.best, new, tile, 0)
        put(self.rescale, exp2(best - new), turn, 0)
        if cells.many:
            with T.serial(0, 2) as half:
                steps = Steps(beside(half), cells.count // 2)
                for i in range(cells.count // 2):
                    self._weights(tile, turn, let(half * (cells.count // 2) + i))
                    steps.step()
        else:
            with T.serial(0, cells.count) as i:
                self._weights(tile, turn, i)
        sums = lane_sums([vec(self.lanes, i, 0) for i in each])
        total = fma(vec(self.state.total, tile, 0), vec(self.rescale, turn, 0), sums)
        put(self.state.total, total, tile, 0)

    def _weights(self, tile: Expr, turn: Expr, i: Expr) -> None:
        """A cell's scores to weights; exactly 0 where nothing is seen."""
        best = let(splat(self.state.best[tile, i]))
        weights = [power_of_two(vec(self.scores, turn, i, u * LANES) - best) for u in range(TILE)]
        put(self.lanes, (weights[0] + weights[1]) + (weights[2] + weights[3]), i, 0)
        for pair in range(TILE // 2):
            self.weights.put(*weights[2 * pair : 2 * pair + 2], turn, i, pair)

    def _accumulate(self, tile: Expr, turn: Expr) -> None:
        """acc = acc · rescale + what the tiles gave."""
        turn = let(turn % 2)
        with T.serial(0, self.cells.count) as i:
            factor = let(splat(self.rescale[turn, i]))
            for c in range(self.spec.head_dim // LANES):
                old, more = vec(self.state.acc, tile, i, c * LANES), vec(self.sums, i, c * LANES)
                put(self.state.acc, fma(old, factor, more), tile, i, c * LANES)


def by_rows(spec: Attention, at: Buffers, tokens: Expr, sequences: Expr) -> None:
    """Parallel over (block of rows, key/value head)."""
    columns, heads = spec.kv_heads, heads_a_tile(spec)
    most = rows_a_block(spec)
    share = let(T.floordiv(tokens * columns + (_TASKS - 1), T.int32(_TASKS)))
    # Blocks of whole tiles where sequences have several rows; else a block is as many sequences.
    tiles = T.floordiv(share + (TILE_ROWS - 1), T.int32(TILE_ROWS)) * TILE_ROWS
    step = let(T.min(T.Select(tokens >= 2 * sequences, tiles, T.max(share, T.int32(1))), T.int32(most)))
    blocks = let(T.floordiv(tokens + step - 1, step))
    with T.parallel(0, blocks * columns) as w:
        # A thread gets consecutive w. Later rows see more: taking blocks from both ends gives each its share.
        turn = let(T.floordiv(w, T.int32(columns)))
        block = let(T.Select(turn % 2 == 0, turn // 2, blocks - 1 - turn // 2))
        first = let(w % columns * spec.group)
        stop = let(T.min(block * step + step, tokens))
        memory = Memory(
            max(_elements(spec, heads, 1), _elements(spec, TILE_ROWS, most // TILE_ROWS * spec.group))
        )
        sequence = scalar(T.int32(0), "int32")
        row = scalar(block * step, "int32")
        with T.While(row[0] < stop):
            advance(at, sequence, row[0])
            here, start = let(sequence[0]), let(row[0])
            rows = let(T.min(at.query_start[here + 1], stop) - start)
            with T.If(rows == 1):
                with T.Then(), T.serial(0, spec.group // heads) as part:
                    _Block(Cells(spec, at, (start, here, let(first + part * heads))), memory).run()
                with T.Else():
                    _Block(Cells(spec, at, (start, here, first), rows), memory).run()
            put1(row, start + rows, 0)


def by_segments(spec: Attention, at: Buffers, tokens: Expr, segments: Expr) -> None:
    """Few rows with a long context: parallel over (row, tile of heads, segment), then merged."""
    heads = heads_a_tile(spec)
    columns = spec.heads // heads

    def cells(item: Expr, sequence: Expr) -> Cells:
        row, column = let(T.floordiv(item, T.int32(columns))), T.floormod(item, T.int32(columns))
        return Cells(spec, at, (row, sequence, let(column * heads)))

    tile = T.int32(0)

    def take(*shape: Any) -> Buffer:
        return T.alloc_buffer(shape, "float32")

    states = State(take, tokens * columns * segments, heads, spec.head_dim)
    with T.parallel(0, tokens * columns * segments) as w:
        item, segment = let(T.floordiv(w, segments)), let(T.floormod(w, segments))
        sequence = scalar(T.int32(0), "int32")
        advance(at, sequence, T.floordiv(item, T.int32(columns)))
        memory = Memory(_elements(spec, heads, 1))
        block = _Block(cells(item, let(sequence[0])), memory)
        block.segment(segment)
        states.copy(w, block.state, tile)
    merged = State(take, 1, heads, spec.head_dim)
    with T.serial(0, tokens * columns) as item:
        own = cells(item, tile)
        merged.clear(tile, at.sinks, own)
        with T.serial(0, segments) as g:
            merged.add(tile, states, item * segments + g)
        merged.finish(tile, own, at.out)
