"""`paged_attention`: attention of a ragged batch over the paged cache, with softmax computed on the way.

For a query row and head, pages of its context are taken in order (Milakov & Gimelshein 2018; Dao et al.
2022):

    s[j] = Σ_d q[d] · scale · k[j, d]            one chain of multiply-adds over d, 16 tokens j at once
    m' = max(m, max_j s[j]);  p[j] = 2^(s[j] - m');  c = 2^(m - m')
    l = l · c + Σ_j p[j];  acc[d] = acc[d] · c + Σ_j p[j] · v[j, d]      one chain over j

and the result is acc / l. The scores carry a factor log2(e). Neighbouring rows of a prompt share the loads of
a page, but not arithmetic: a token that a row may not see adds exactly 0 to it, so a row's bits do not depend
on its block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from .builder import (
    LANES,
    Buffer,
    Expr,
    Kernel,
    f32s,
    fma,
    fma1,
    lane_maxima,
    lane_sums,
    let,
    load_float,
    put,
    put1,
    register,
    scalar,
    splat,
    vec,
)
from .cache import PAGE_SIZE
from .gather import load_one
from .isa import Isa
from .vector_math import exp2, tanh

_LOG2E = math.log2(math.e)
_NOTHING = -1e30
"""The maximum before any score; a number, since infinity minus infinity is none."""
_MANY_ROWS = 16
"""Tokens in a step from which on rows are taken in blocks."""


@dataclass(frozen=True)
class Attention:
    """What is known when the kernel is made."""

    heads: int
    kv_heads: int
    head_dim: int
    kv_dtype: str
    scale: float
    causal: bool
    window: int | None
    softcap: float | None

    @property
    def group(self) -> int:
        """Query heads that share a key/value head."""
        return self.heads // self.kv_heads

    def blocking(self, isa: Isa) -> tuple[int, int]:
        """(query heads, query rows) computed together: their scores and weights must fit the registers."""
        most = 12 if isa.live_vectors >= 32 else 6 if isa.live_vectors >= 8 else 3
        assert most <= LANES
        heads = max(h for h in range(1, min(self.group, most) + 1) if self.group % h == 0)
        return heads, max(1, min(8, most // heads))


@dataclass(frozen=True)
class _Buffers:
    q: Buffer
    pages: Buffer
    query_start: Buffer
    context_len: Buffer
    block_table: Buffer
    sinks: Buffer | None
    out: Buffer


class _Block:
    """`rows` consecutive query rows of one sequence, by `heads` query heads of one key/value head."""

    def __init__(
        self, spec: Attention, at: _Buffers, first: tuple[Expr, Expr, Expr], size: tuple[int, int]
    ) -> None:
        self.spec, self.at = spec, at
        self.row, self.sequence, self.head = first
        self.rows, self.heads = size
        self.kv_head = let(self.head // spec.group)
        self.chunks = spec.head_dim // LANES
        cells = self.rows * self.heads
        self.query = T.alloc_buffer((cells, spec.head_dim), "float32")
        self.acc = T.alloc_buffer((cells, spec.head_dim), "float32")
        self.weights = T.alloc_buffer((cells, PAGE_SIZE), "float32")
        self.rescale = register()
        self.best = register(f32s(_NOTHING))
        self.total = register(f32s(0))

    def cells(self) -> list[tuple[int, int, int]]:
        """(index, row, head) of each of the block's results."""
        return [(r * self.heads + h, r, h) for r in range(self.rows) for h in range(self.heads)]

    def run(self) -> None:
        self._visible()
        self._start()
        first = let(self.low[0] // PAGE_SIZE)
        last = let(T.floordiv(self.high[self.rows - 1] + (PAGE_SIZE - 1), PAGE_SIZE))
        with T.serial(first, last) as p:
            page = let(self.at.block_table[self.sequence, p])
            self._scores(page, let(p * PAGE_SIZE))
            self._values(page, let(p * PAGE_SIZE))
        self._finish()

    def _visible(self) -> None:
        """Token range [low, high) that each row sees."""
        spec, at = self.spec, self.at
        n = let(at.context_len[self.sequence])
        # The new tokens are the last ones of the context.
        position = let(n - at.query_start[self.sequence + 1] + self.row)
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

    def _start(self) -> None:
        spec, at = self.spec, self.at
        factor = T.float32(spec.scale / spec.softcap if spec.softcap else spec.scale * _LOG2E)
        for i, r, h in self.cells():
            with T.serial(0, spec.head_dim) as d:
                put1(self.query, at.q[self.row + r, self.head + h, d] * factor, i, d)
                put1(self.acc, T.float32(0), i, d)
            if at.sinks is not None:
                put1(self.best, at.sinks[self.head + h] * T.float32(_LOG2E), i)
                put1(self.total, T.float32(1), i)

    def _scores(self, page: Expr, token: Expr) -> None:
        """Scores of 16 tokens, then their weights and the new maximum and sum."""
        spec = self.spec
        score = [register(f32s(0)) for _ in self.cells()]
        with T.serial(0, spec.head_dim) as d:
            key = let(load_float(self.at.pages, spec.kv_dtype, 0, page, self.kv_head, 0, d * PAGE_SIZE))
            for i, _, _ in self.cells():
                put(score[i], fma(splat(self.query[i, d]), key, vec(score[i], 0)), 0)
        tokens = let(T.ramp(token, 1, LANES))
        seen = [
            T.And(tokens < splat(high), tokens >= splat(low))
            for low, high in zip(self.low, self.high, strict=True)
        ]
        for i, r, _ in self.cells():
            s = vec(score[i], 0)
            if spec.softcap:
                s = tanh(s) * f32s(spec.softcap * _LOG2E)
            put(score[i], T.Select(seen[r], s, f32s(_NOTHING)), 0)
        # From here on lane i of a vector belongs to cell i.
        new = let(T.max(vec(self.best, 0), lane_maxima([vec(cell, 0) for cell in score])))
        rescale = exp2(vec(self.best, 0) - new)
        put(self.best, new, 0)
        put(self.rescale, rescale, 0)
        for i, r, _ in self.cells():
            weight = let(T.Select(seen[r], exp2(vec(score[i], 0) - splat(self.best[i])), f32s(0)))
            put(score[i], weight, 0)
            put(self.weights, weight, i, 0)
        put(self.total, fma(vec(self.total, 0), rescale, lane_sums([vec(cell, 0) for cell in score])), 0)

    def _values(self, page: Expr, token: Expr) -> None:
        """acc = acc · rescale + Σ_j weight[j] · v[j], over the tokens of the page that any row of the block
        sees.
        """
        spec = self.spec
        first = let(T.max(self.low[0] - token, T.int32(0)))
        last = let(T.min(self.high[self.rows - 1] - token, T.int32(PAGE_SIZE)))

        def value_at(j: Expr, d: Expr) -> tuple[Expr, ...]:
            return (1, page, self.kv_head, 0, j * spec.head_dim + d)

        if self.chunks:
            with T.serial(0, self.chunks) as c:
                acc = [
                    register(vec(self.acc, i, c * LANES) * splat(self.rescale[i])) for i, _, _ in self.cells()
                ]
                with T.serial(first, last) as j:
                    value = let(load_float(self.at.pages, spec.kv_dtype, *value_at(j, c * LANES)))
                    for i, _, _ in self.cells():
                        put(acc[i], fma(splat(self.weights[i, j]), value, vec(acc[i], 0)), 0)
                for i, _, _ in self.cells():
                    put(self.acc, vec(acc[i], 0), i, c * LANES)
        with T.serial(self.chunks * LANES, spec.head_dim) as d:
            for i, _, _ in self.cells():
                one = scalar(self.acc[i, d] * self.rescale[i])
                with T.serial(first, last) as j:
                    value = load_one(self.at.pages, spec.kv_dtype, *value_at(j, d))
                    put1(one, fma1(self.weights[i, j], value, one[0]), 0)
                put1(self.acc, one[0], i, d)

    def _finish(self) -> None:
        for i, r, h in self.cells():
            # A row that sees nothing has the result 0.
            some = self.total[i] > T.float32(0)
            inverse = let(T.Select(some, T.float32(1) / self.total[i], T.float32(0)))
            with T.serial(0, self.spec.head_dim) as d:
                put1(self.at.out, self.acc[i, d] * inverse, self.row + r, self.head + h, d)


def _work(spec: Attention, at: _Buffers, tokens: Expr, isa: Isa) -> None:
    """Parallel over (block of rows, block of heads)."""
    heads, rows = spec.blocking(isa)
    columns = spec.heads // heads
    step = let(T.Select(tokens < T.int32(_MANY_ROWS), T.int32(1), T.int32(rows)))
    tiles = let(T.floordiv(tokens + step - 1, step))
    with T.parallel(0, tiles * columns) as w:
        # A thread gets consecutive w. Later rows see more: taking tiles from both ends gives each its share.
        turn = let(T.floordiv(w, T.int32(columns)))
        tile = let(T.Select(turn % 2 == 0, turn // 2, tiles - 1 - turn // 2))
        head = let(w % columns * heads)
        first = let(tile * step)
        stop = let(T.min(first + step, tokens))
        sequence = scalar(T.int32(0), "int32")
        row = scalar(first, "int32")
        with T.While(row[0] < stop):
            with T.While(at.query_start[sequence[0] + 1] <= row[0]):
                put1(sequence, sequence[0] + 1, 0)
            here = let(sequence[0])
            start = let(row[0])

            def take(count: int, start: Expr = start, here: Expr = here) -> None:
                _Block(spec, at, (start, here, head), (count, heads)).run()
                put1(row, start + count, 0)

            if rows == 1:
                take(1)
            else:
                fits = T.And(step == rows, T.min(at.query_start[here + 1], stop) - start >= rows)
                with T.If(fits):
                    with T.Then():
                        take(rows)
                    with T.Else():
                        take(1)


def make_paged_attention(
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    kv_dtype: str,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
    isa: str,
) -> Any:
    """Attention of each query row over its sequence's context.

    q float32 [T, heads, head_dim]; pages `kv_dtype` [2, N, kv_heads, 16, head_dim] in the order of `cache`;
    query_start int32 [B + 1] with query_start[0] = 0 and query_start[B] = T; context_len int32 [B];
    block_table int32 [B, P]; sinks float32 [heads] (a logit more in each softmax, with no value); out float32
    [T, heads, head_dim]. Sequences may have no rows. A row sees token j of its context where causal: j ≤ its
    position, and window w: |position - j| < w. softcap c: scores become c · tanh(score / c).
    """
    spec = Attention(heads, kv_heads, head_dim, kv_dtype, scale, causal, window, softcap)
    kernel = Kernel("paged_attention", isa)
    with kernel:
        tokens, sequences = kernel.symbol("T"), kernel.symbol("B")
        at = _Buffers(
            q=kernel.argument("q", (tokens, heads, head_dim), "float32"),
            pages=kernel.argument("pages", (2, kernel.symbol("N"), kv_heads, PAGE_SIZE, head_dim), kv_dtype),
            query_start=kernel.argument("query_start", (kernel.symbol("B1"),), "int32"),
            context_len=kernel.argument("context_len", (sequences,), "int32"),
            block_table=kernel.argument("block_table", (sequences, kernel.symbol("P")), "int32"),
            sinks=kernel.argument("sinks", (heads,), "float32") if sinks else None,
            out=kernel.argument("out", (tokens, heads, head_dim), "float32"),
        )
        with kernel.body():
            _work(spec, at, tokens, kernel.isa)
    return kernel.function
