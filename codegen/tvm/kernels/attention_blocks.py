"""Attention of a block of rows and heads by vectors, with softmax computed on the way.

For a query row and head, tiles of some pages of its context (`Block.tile`) are taken in order (Milakov &
Gimelshein 2018; Dao et al. 2022):

    s[j] = Σ_d q[d] · scale · k[j, d]            one chain of multiply-adds over d, 16 tokens j at once
    m' = max(m, max_j s[j]);  p[j] = 2^(s[j] - m');  c = 2^(m - m')
    l = l · c + Σ_j p[j];  acc[d] = acc[d] · c + Σ_j p[j] · v[j, d]      one chain over j

over segments of 512 tokens, each from nothing; then the segments are merged in order by the same rule, and
the result is acc / l. So segments of a long context can be computed in parallel. The scores carry a factor
log2(e). Neighbouring rows of a prompt share the loads of a page, but not arithmetic: a token that a row may
not see adds exactly 0 to it, so a row's bits do not depend on its block.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

from tvm.script.ir_builder import tirx as T

from ....ir.dtypes import itemsize
from .attention_spec import (
    LOG2E,
    NOTHING,
    SEGMENT,
    TILE,
    Attention,
    Buffers,
    Memory,
    all_lanes,
    for_elements,
    get_lanes,
    put_lanes,
)
from .builder import (
    LANES,
    Buffer,
    Expr,
    f32s,
    fma,
    fma1,
    lane_maxima,
    lane_sums,
    let,
    loop,
    prefetch,
    put,
    put1,
    register,
    scalar,
    splat,
    vec,
)
from .cache import PAGE_SIZE, in_pairs, load_half, load_page, load_page_one, page_scales
from .isa import Isa
from .vector_math import exp2, tanh

Add = Callable[[Expr, list[Expr]], None]


def _cells(size: tuple[int, int]) -> list[tuple[int, int, int]]:
    """(index, row, head) of each result of a block of (rows, heads)."""
    rows, heads = size
    return [(r * heads + h, r, h) for r in range(rows) for h in range(heads)]


@contextmanager
def every_cell(rows: int, heads: int) -> Generator[tuple[Expr, Expr, Expr]]:
    """Loops over the cells of a block where nothing is won by writing them out one by one, as for registers:
    (index, row, head).
    """
    with T.serial(0, rows) as r, T.serial(0, heads) as h:
        yield r * heads + h, r, h


def _clear(acc: Buffer, size: tuple[int, int], width: int) -> None:
    """0 for each element of each cell."""
    with every_cell(*size) as (i, _, _):
        for_elements(width, lambda d, lanes: put_lanes(lanes, acc, all_lanes(lanes, T.float32(0)), i, d))


class Block:
    """`rows` consecutive query rows of one sequence, by `heads` query heads of one key/value head."""

    tile = TILE
    """Pages that are taken at once: a multiple of 4 that divides a segment. The same for prompts and for
    answers, since a maximum is taken of each.
    """
    rough = False
    """Whether weights need no more digits than bfloat16 has."""

    def __init__(
        self, spec: Attention, at: Buffers, first: tuple[Expr, Expr, Expr], size: tuple[int, int], isa: Isa
    ) -> None:
        self.spec, self.at = spec, at
        most = spec.most(isa)
        self.few_registers = isa.live_vectors < 32
        self.row, self.sequence, self.head = first
        self.rows, self.heads = size
        self.kv_head = let(self.head // spec.group)
        self.chunks = spec.head_dim // LANES
        self.pairs = in_pairs(spec.kv_dtype, spec.head_dim)
        self.cells = _cells(size)
        self.memory = Memory(len(self.cells) * (3 * spec.head_dim + self.tile * PAGE_SIZE))
        self.query = self.memory.take(len(self.cells), self.query_width)
        self.acc = self.memory.take(len(self.cells), spec.head_dim)
        self.weights = self.memory.take(len(self.cells), self.tile * PAGE_SIZE)
        # Enough independent chains of multiply-adds to hide their latency, with few cells too; what they
        # multiply by, a vector for each and one for all, must fit into the registers beside them.
        count = len(self.cells)
        fits = [n for n in (4, 2, 1) if n == 1 or (n * count <= most and n * (count + 1) < isa.live_vectors)]
        self.together = fits[0]
        self.parts = next(n for n in fits if self.chunks % n == 0)
        self.rescale = register()
        self.best = register()
        self.total = register()

    @property
    def query_width(self) -> int:
        """float32 elements that hold the query of a cell."""
        return self.spec.head_dim

    def run(self) -> None:
        """All segments, and the result."""
        self.prepare()
        first = let(self.first // SEGMENT)
        stop = let(T.floordiv(self.last + (SEGMENT - 1), SEGMENT))

        # To merge one segment with nothing would multiply it by 1. A sink is something.
        several = T.bool(True) if self.at.sinks is not None else stop - first > 1
        merged = Merged(self.spec, self.at, (self.row, self.head), (self.rows, self.heads), self.memory)
        with T.If(several), T.Then():
            merged.clear()
        with loop(first, stop) as segment:
            self.segment(segment)
            with T.If(several), T.Then():
                merged.add(vec(self.best, 0), vec(self.total, 0), self.acc, T.int32(0))
        with T.If(several):
            with T.Then():
                finish(merged)
            with T.Else():
                finish(self)

    def prepare(self) -> None:
        """What all segments need: the pages seen, [first, last), and the scaled query."""
        self._visible()
        self.first = let(self.low[0] // PAGE_SIZE)
        self.last = let(T.floordiv(self.high[self.rows - 1] + (PAGE_SIZE - 1), PAGE_SIZE))
        spec = self.spec
        factor = T.float32(spec.scale / spec.softcap if spec.softcap else spec.scale * LOG2E)
        with every_cell(self.rows, self.heads) as (i, r, h):

            def scale(d: Expr, lanes: int, i: Expr = i, r: Expr = r, h: Expr = h) -> None:
                q = self.at.q.lanes(lanes, self.row + r, self.head + h, d)
                self._put_query(lanes, q * all_lanes(lanes, factor), i, d)

            for_elements(spec.head_dim, scale)

    def _put_query(self, lanes: int, query: Expr, cell: Expr, d: Expr) -> None:
        """Keep elements d … of a cell's query."""
        put_lanes(lanes, self.query, query, cell, d)

    def segment(self, segment: Expr) -> None:
        """best, total and acc of one segment; it may hold no page that is seen."""
        put(self.best, f32s(NOTHING), 0)
        put(self.total, f32s(0), 0)
        _clear(self.acc, (self.rows, self.heads), self.spec.head_dim)
        start = let(T.max(self.first, segment * SEGMENT))
        stop = let(T.min(self.last, segment * SEGMENT + SEGMENT))
        with loop(T.floordiv(start, self.tile), T.floordiv(stop + (self.tile - 1), self.tile)) as tile:
            begin, end = let(T.max(start, tile * self.tile)), let(T.min(stop, tile * self.tile + self.tile))
            self._scores(begin, end)
            self._softmax(begin, end)
            self._values(begin, end)

    def keep(self, acc: Buffer, first: Expr) -> None:
        """Copy acc of one row's cells to rows first … of another buffer."""
        with every_cell(self.rows, self.heads) as (i, _, _):

            def copy(d: Expr, lanes: int, i: Expr = i) -> None:
                put_lanes(lanes, acc, get_lanes(lanes, self.acc, i, d), first + i, d)

            for_elements(self.spec.head_dim, copy)

    def _visible(self) -> None:
        """Token range [low, high) that each row sees."""
        spec, at = self.spec, self.at
        n = let(at.context_len[self.sequence])
        # The new tokens are the last ones of the context.
        position = self.position = let(n - at.query_start[self.sequence + 1] + self.row)
        self.low: list[Expr] = []
        self.high: list[Expr] = []
        for r in range(self.rows):
            low, high = T.int32(0), n
            if spec.window is not None:
                low = T.max(position + (r + 1 - spec.window), T.int32(0))
                high = T.min(n, position + (r + spec.window))
            if spec.causal:
                high = T.min(n, position + (r + 1))
            self.low.append(let(low))
            self.high.append(let(high))

    def _scores(self, begin: Expr, end: Expr) -> None:
        """weights = scores of the tokens of pages begin … end-1, and of what follows in turns of several."""
        spec, together = self.spec, self.together
        with T.serial(0, T.floordiv(end - begin + (together - 1), together)) as turn:
            slots = [turn * together + u for u in range(together)]
            # A page beyond the last is the last again; no row sees the tokens that it would hold.
            pages = [let(self.at.block_table[self.sequence, T.min(begin + slot, end - 1)]) for slot in slots]
            score = [[register(f32s(0)) for _ in pages] for _ in self.cells]
            width = 2 if self.pairs else 1
            with T.serial(0, spec.head_dim // width) as d:
                place = d * width * PAGE_SIZE
                for page in pages:  # its values are next, and the processor foresees no jump to another page
                    prefetch(self.at.pages, 1, page, self.kv_head, 0, place)
                self._add_keys(score, pages, d, place)
            slopes = self._slopes()
            for u, (slot, page) in enumerate(zip(slots, pages, strict=True)):
                seen = self._seen(begin + slot)
                scale = self._scales(0, page)
                for i, r, h in self.cells:
                    s = vec(score[i][u], 0)
                    s = s if scale is None else let(s * scale)
                    if spec.softcap:
                        s = tanh(s) * f32s(spec.softcap * LOG2E)
                    if slopes:
                        s = fma(splat(slopes[i]), self._distances(begin + slot, r), let(s))
                    if self.at.distances is not None:
                        s = fma(self._by_distance(begin + slot, r, h), f32s(LOG2E), let(s))
                    put(self.weights, T.Select(seen[r], s, f32s(NOTHING)), i, slot * PAGE_SIZE)

    def _add_keys(self, score: list[list[Buffer]], pages: list[Expr], d: Expr, place: Expr) -> None:
        """Add to score[cell][page] the products of what stands at `place` of the pages' keys: element d of
        them, or, in pages of pairs, elements 2 · d and 2 · d + 1.
        """
        width = 2 if self.pairs else 1
        for half in range(width):
            keys = [(u, self._element(0, page, place, half)) for u, page in enumerate(pages)]
            for i, _, _ in self.cells:
                query = let(splat(self.query[i, d * width + half]))
                for u, key in keys:
                    put(score[i][u], fma(query, key, vec(score[i][u], 0)), 0)

    def _element(self, which: int, page: Expr, at: Expr, half: int) -> Expr:
        """16 elements of the keys (0) or values (1) of a page; in a page of pairs, the first (`half` = 0) or
        the second (1) of 16 words.
        """
        if not self.pairs:
            return let(load_page(self.at.pages, self.spec.kv_dtype, which, page, self.kv_head, 0, at))
        return load_half(self.at.pages, half, which, page, self.kv_head, 0, at, again=self.few_registers)

    def _seen(self, page: Expr) -> list[Expr]:
        """For each row, which of the 16 tokens of page number `page` it sees."""
        tokens = let(T.ramp(page * PAGE_SIZE, 1, LANES))
        return [
            T.And(tokens < splat(high), tokens >= splat(low))
            for low, high in zip(self.low, self.high, strict=True)
        ]

    def _slopes(self) -> list[Expr]:
        """The slope of each cell's head, with the factor of all scores; none where scores have none."""
        slopes = self.at.slopes
        if slopes is None:
            return []
        return [let(slopes[self.head + h] * T.float32(LOG2E)) for _, _, h in self.cells]

    def _distances(self, page: Expr, row: int) -> Expr:
        """j - position for the 16 tokens j of page number `page`."""
        tokens = T.ramp(page * PAGE_SIZE - (self.position + row), 1, LANES)
        return let(T.Cast("float32x16", tokens))

    def _by_distance(self, page: Expr, row: int, head: int) -> Expr:
        """What is added for the 16 tokens of page number `page`. Where their distances leave the row, all of
        them take what stands at its end, 16 times.
        """
        width = self.spec.distances
        start = page * PAGE_SIZE - (self.position + row) + T.int32(width // 2)
        within = let(T.max(T.min(start, T.int32(width - LANES)), T.int32(0)))
        return let(vec(self.at.distances, self.head + head, within))

    def _scales(self, which: int, page: Expr) -> Expr | None:
        """Scales of the page's 16 keys (0) or values (1); None where it holds floats."""
        if self.spec.kv_dtype != "int8":
            return None
        return let(page_scales(self.at.pages, which, page, self.kv_head, self.spec.head_dim))

    def _softmax(self, begin: Expr, end: Expr) -> None:
        """Scores to weights: the new maximum and sum. Lane i of a vector belongs to cell i in the end."""
        top = [register(f32s(NOTHING)) for _ in self.cells]
        with T.serial(0, end - begin) as slot:
            for i, _, _ in self.cells:
                score = vec(self.weights, i, slot * PAGE_SIZE)
                put(top[i], T.max(vec(top[i], 0), score), 0)
        new = let(T.max(vec(self.best, 0), lane_maxima([vec(cell, 0) for cell in top])))
        rescale = exp2(vec(self.best, 0) - new)
        put(self.best, new, 0)
        put(self.rescale, rescale, 0)
        sums = [register(f32s(0)) for _ in self.cells]
        with T.serial(0, end - begin) as slot:
            seen = self._seen(begin + slot)
            scale = None
            if self.spec.kv_dtype == "int8":
                scale = self._scales(1, self.at.block_table[self.sequence, begin + slot])
            for i, r, _ in self.cells:
                score = vec(self.weights, i, slot * PAGE_SIZE)
                weight = let(T.Select(seen[r], exp2(score - splat(self.best[i]), rough=self.rough), f32s(0)))
                put(sums[i], vec(sums[i], 0) + weight, 0)
                # The scale of a token that the row does not see may be NaN, and 0 · NaN is no 0.
                scaled = weight if scale is None else T.Select(seen[r], weight * scale, f32s(0))
                self._put_weights(scaled, i, slot)
        put(self.total, fma(vec(self.total, 0), rescale, lane_sums([vec(cell, 0) for cell in sums])), 0)

    def _put_weights(self, weights: Expr, cell: int, slot: Expr) -> None:
        """Keep the weights of a page where its scores are, or were those of an earlier page."""
        put(self.weights, weights, cell, slot * PAGE_SIZE)

    def _add_value(self, acc: Expr, weight: Expr, value: Expr) -> Expr:
        return fma(weight, value, acc)

    def _values(self, begin: Expr, end: Expr) -> None:
        """acc = acc · rescale + Σ_j weight[j] · v[j], over the tokens that any row of the block sees."""
        width, parts = self.spec.head_dim, self.parts
        if self.chunks:
            # A number of turns that LLVM does not know: unrolled, it would keep all accumulators of the block
            # in registers from tile to tile, of which there are too few.
            with T.serial(0, T.min(T.int32(self.chunks // parts), end * self.chunks)) as c:
                places = [(c * parts + u) * LANES for u in range(parts)]
                acc = [
                    [register(vec(self.acc, i, place) * splat(self.rescale[i])) for place in places]
                    for i, _, _ in self.cells
                ]

                def add(column: Expr, values: list[Expr], acc: list[list[Buffer]] = acc) -> None:
                    for i, _, _ in self.cells:
                        weight = let(splat(self.weights[i, column]))
                        for u, value in enumerate(values):
                            put(acc[i][u], self._add_value(vec(acc[i][u], 0), weight, value), 0)

                self._each_value((begin, end), (c, self.chunks // parts), places, add)
                for i, _, _ in self.cells:
                    for cell, place in zip(acc[i], places, strict=True):
                        put(self.acc, vec(cell, 0), i, place)
        if self.chunks * LANES == width:
            return
        with loop(self.chunks * LANES, width) as d:
            for i, _, _ in self.cells:
                one = scalar(self.acc[i, d] * self.rescale[i])
                with self._tokens(begin, end) as (page, j, column):
                    at = (1, page, self.kv_head, 0, self._value_at(j, d))
                    value = load_page_one(self.at.pages, self.spec.kv_dtype, *at)
                    put1(one, fma1(self.weights[i, column], value, one[0]), 0)
                put1(self.acc, one[0], i, d)

    def _value_at(self, token: Expr, d: Expr) -> Expr:
        """Where element d of a token's values stands in a page."""
        width = self.spec.head_dim
        if self.pairs:
            return T.floordiv(token, 2) * (2 * width) + d * 2 + T.floormod(token, 2)
        return token * width + d

    def _each_value(
        self, pages: tuple[Expr, Expr], turn: tuple[Expr, int], places: list[Expr], add: Add
    ) -> None:
        """`add(column of weights, vectors from these places of its values)` for each token that any row sees.
        turn = (number, of how many) of the walks over the pages, each of which fetches its share of keys.

        Only those are touched: what stands beside them may be NaN, and 0 · NaN is no 0.
        """
        width, (begin, end) = self.spec.head_dim, pages
        if not self.pairs:
            with self._tokens(begin, end) as (page, j, column):
                self._prefetch_keys(begin + T.floordiv(column, PAGE_SIZE), turn, j, PAGE_SIZE)
                add(column, [self._element(1, page, j * width + place, 0) for place in places])
            return
        with self._seen_pairs(begin, end) as (page, pair, column, first, last):
            self._prefetch_keys(begin + T.floordiv(column, PAGE_SIZE), turn, pair, PAGE_SIZE // 2)
            seen = [T.And(2 * pair + half >= first, 2 * pair + half < last) for half in range(2)]
            at = [(pair * width + place) * 2 for place in places]
            self._each_of_pair((page, column), seen, at, add)

    def _each_of_pair(self, where: tuple[Expr, Expr], seen: list[Expr], at: list[Expr], add: Add) -> None:
        """`_each_value` of two tokens; where = (page, column of the first), seen: whether any row sees each,
        at: where words of both begin.
        """
        page, column = where
        for half, one in enumerate(seen):
            with T.If(one), T.Then():
                add(column + half, [self._element(1, page, place, half) for place in at])

    def _prefetch_keys(self, page: Expr, turn: tuple[Expr, int], unit: Expr, units: int) -> None:
        """In unit number `unit` of a walk over page number `page`: its share of the keys of the page that
        stands a tile behind, or of the first pages that are likely read next. turn: as in `_each_value`.
        """
        number, turns = turn
        if turns > 1 and self.rows > 1:  # then there is more to do for each page than to fetch
            return
        part, parts = number * units + unit, turns * units
        size = itemsize(self.spec.kv_dtype)
        lines = -(-PAGE_SIZE * self.spec.head_dim * size // (64 * parts))
        ahead, head = self._behind(page + self.tile)
        for line in range(lines):
            prefetch(self.at.pages, 0, ahead, head, 0, (part * lines + line) * (64 // size))

    def _behind(self, number: Expr) -> tuple[Expr, Expr]:
        """(page, key/value head) of page number `number` of this sequence; behind its last page the first
        ones of the next head, and behind those of the last head the next sequence's.
        """
        table, heads = self.at.block_table, self.spec.kv_heads
        sequences, width = table.shape
        within, same = number < self.last, self.kv_head + 1 < heads
        head = T.Select(within, self.kv_head, T.Select(same, self.kv_head + 1, T.int32(0)))
        sequence = T.Select(T.Or(within, same), self.sequence, T.min(self.sequence + 1, sequences - 1))
        place = T.Select(within, number, T.min(number - self.last + self.first, width - 1))
        return let(table[sequence, place]), let(head)

    @contextmanager
    def _tokens(self, begin: Expr, end: Expr) -> Generator[tuple[Expr, Expr, Expr]]:
        """Loops over the tokens of pages begin … end-1 that any row sees: page, token in it, column of
        `weights`.
        """
        with T.serial(0, end - begin) as slot:
            page = let(self.at.block_table[self.sequence, begin + slot])
            token = let((begin + slot) * PAGE_SIZE)
            first = let(T.max(self.low[0] - token, T.int32(0)))
            last = let(T.min(self.high[self.rows - 1] - token, T.int32(PAGE_SIZE)))
            with loop(first, last) as j:
                yield page, j, slot * PAGE_SIZE + j

    @contextmanager
    def _seen_pairs(self, begin: Expr, end: Expr) -> Generator[tuple[Expr, ...]]:
        """Loops over pairs of tokens one of which any row sees: page, pair in it, column of `weights` of its
        first token, and the tokens [first, last) of the page that are seen.
        """
        with T.serial(0, end - begin) as slot:
            page = let(self.at.block_table[self.sequence, begin + slot])
            token = let((begin + slot) * PAGE_SIZE)
            first = let(T.max(self.low[0] - token, T.int32(0)))
            last = let(T.min(self.high[self.rows - 1] - token, T.int32(PAGE_SIZE)))
            with loop(T.floordiv(first, 2), T.floordiv(last + 1, 2)) as pair:
                yield page, pair, slot * PAGE_SIZE + 2 * pair, first, last


class Merged:
    """Segments merged so far, of `rows` query rows by `heads` query heads, and what becomes of them."""

    def __init__(
        self, spec: Attention, at: Buffers, first: tuple[Expr, Expr], size: tuple[int, int], memory: Memory
    ) -> None:
        """first = (row, head). To be cleared before anything is added."""
        self.spec, self.at = spec, at
        self.row, self.head = first
        self.rows, self.heads = size
        self.acc = memory.take(self.rows * self.heads, spec.head_dim)
        self.keep, self.take = register(), register()
        self.best = register(f32s(NOTHING))
        self.total = register(f32s(0))
        if at.sinks is not None:
            for i, _, h in _cells(size):
                put1(self.best, at.sinks[self.head + h] * T.float32(LOG2E), i)
                put1(self.total, T.float32(1), i)

    def clear(self) -> None:
        _clear(self.acc, (self.rows, self.heads), self.spec.head_dim)

    def add(self, best: Expr, total: Expr, acc: Buffer, first: Expr) -> None:
        """Merge a segment: lane i of best and total, and row first + i of acc, belong to cell i.

        A segment that saw nothing changes nothing.
        """
        new = let(T.max(vec(self.best, 0), best))
        put(self.keep, exp2(vec(self.best, 0) - new), 0)
        put(self.take, exp2(best - new), 0)
        put(self.best, new, 0)
        put(self.total, fma(vec(self.total, 0), vec(self.keep, 0), let(total * vec(self.take, 0))), 0)
        with every_cell(self.rows, self.heads) as (i, _, _):
            keep, take = let(self.keep[i]), let(self.take[i])

            def merge(d: Expr, lanes: int, i: Expr = i, keep: Expr = keep, take: Expr = take) -> None:
                more = let(get_lanes(lanes, acc, first + i, d) * all_lanes(lanes, take))
                mine = get_lanes(lanes, self.acc, i, d)
                put_lanes(
                    lanes, self.acc, (fma1 if lanes == 1 else fma)(mine, all_lanes(lanes, keep), more), i, d
                )

            for_elements(self.spec.head_dim, merge)


def finish(done: Block | Merged) -> None:
    """out = acc / total; 0 for a row that sees nothing."""
    with every_cell(done.rows, done.heads) as (i, r, h):
        some = done.total[i] > T.float32(0)
        inverse = let(T.Select(some, T.float32(1) / done.total[i], T.float32(0)))

        def divide(d: Expr, lanes: int, i: Expr = i, r: Expr = r, h: Expr = h, by: Expr = inverse) -> None:
            quotient = get_lanes(lanes, done.acc, i, d) * all_lanes(lanes, by)
            put_lanes(lanes, done.at.out, quotient, done.row + r, done.head + h, d)

        for_elements(done.spec.head_dim, divide)
