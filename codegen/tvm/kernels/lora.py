"""`lora`, `lora_embedding` and `moe_lora`: what each token's adapter adds to the result of a linear layer, to
its row of an embedding, or to the result of the experts that it has chosen, in place.

Rows of one adapter stand together (a sequence's tokens are back to back), so that factors are read once for
four of them; a row without an adapter costs a look at its number, and a step in which none has one a scan
of these. Each sum runs in an order that depends on the row alone: A x in four chains over k, which are added
in pairs; B (A x) in one chain over the rank. Where an adapter scales what a part gives, that is said once a
part, and done as the sums are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tvm.script.ir_builder import tirx as T

from ....ir.ops.lora import LANES, MOST_RANK, column_blocks
from .builder import (
    Buffer,
    Expr,
    Kernel,
    f32s,
    fma,
    let,
    prefetch,
    put,
    put1,
    register,
    scalar,
    splat,
    vec,
)

_CHAINS = 4
_COLUMNS = 4
"""Blocks of columns at once."""
_AHEAD = 64
"""Vectors of A that are fetched before they are needed: 1 or 4 KB, past the end of a page of memory, where
the processor's own fetching stops. Factors of many adapters come from memory, a row's worth at a time.
"""


@dataclass(frozen=True)
class _Gains:
    """gained int32 [A, P]; gain float32 [A, 2, N]; residual float32 [T, N] or None."""

    gained: Buffer
    gain: Buffer
    residual: Buffer | None


class _Change:
    """The statements for rows of one adapter; a row of y, and the row of x that it is computed of."""

    def __init__(self, k: int, dtype: str, buffers: tuple[Buffer, ...], gains: _Gains | None = None) -> None:
        self.k, self.dtype, self.gains = k, dtype, gains
        self.y, self.x, self.rank, self.scale, self.a, self.b = buffers
        self.a_line = 4 if dtype == "int8" else 1  # vectors in a line of the cache

    def _load(self, buffer: Buffer, *index: Expr) -> Expr:
        if self.dtype == "float32":
            return let(vec(buffer, *index))
        return let(T.Cast("float32x16", T.Cast("int32x16", vec(buffer, *index))))

    def add(
        self,
        rows: Sequence[Expr],
        of: Sequence[Expr],
        slot: Expr,
        widths: Sequence[int],
        first: tuple[Expr, Expr] = (0, 0),
    ) -> None:
        """Those rows of y, of the rows `of` x, by parts of so many rows each; `first`: the number of the
        first one, and of its first block of columns.
        """
        held = T.alloc_buffer((len(rows), MOST_RANK), "float32")
        (number, block), start = first, 0
        for i, width in enumerate(widths):
            part = number + i
            rank = let(self.rank[slot, part])
            self._down(held, of, slot, part, rank)
            gained = None if self.gains is None else let(self.gains.gained[slot, part])
            self._up(held, rows, slot, (block, start, width), rank, gained)
            block, start = block + -(-width // LANES), start + width

    def _down(self, held: Buffer, of: Sequence[Expr], slot: Expr, part: Expr, rank: Expr) -> None:
        """held = A x, 16 ranks at a time."""
        rows = len(of)
        with T.serial(0, T.floordiv(rank + (LANES - 1), T.int32(LANES))) as block:
            acc = [[register(f32s(0)) for _ in range(_CHAINS)] for _ in range(rows)]

            def step(i: Expr, chain: int) -> None:
                w = self._load(self.a, slot, part, block, i, 0)
                for t in range(rows):
                    put(acc[t][chain], fma(splat(self.x[of[t], i]), w, vec(acc[t][chain], 0)), 0)

            with T.serial(0, self.k // _CHAINS) as i:
                for chain in range(0, _CHAINS, self.a_line):
                    prefetch(self.a, slot, part, block, i * _CHAINS + chain + _AHEAD, 0)
                for chain in range(_CHAINS):
                    step(i * _CHAINS + chain, chain)
            for chain in range(self.k % _CHAINS):
                step(T.int32(self.k // _CHAINS * _CHAINS + chain), chain)
            for t in range(rows):
                one, two, three, four = (vec(acc[t][chain], 0) for chain in range(_CHAINS))
                total = (one + two) + (three + four)
                put(held, total * vec(self.scale, slot, part, block, 0), t, block * LANES)

    def _up(
        self,
        held: Buffer,
        of: Sequence[Expr],
        slot: Expr,
        part: tuple[Expr, int, int],
        rank: Expr,
        gained: Expr | None,
    ) -> None:
        """y += B held, or that times the gain; `part`: its first block of columns, first column, width."""
        block, start, width = part
        rows = len(of)
        whole = width // LANES

        def blocks(first: Expr, count: int, lanes: int) -> None:
            acc = [[register(f32s(0)) for _ in range(count)] for _ in range(rows)]
            with T.serial(0, rank) as r:
                for c in range(count):
                    prefetch(self.b, slot, block + first + c + _COLUMNS, r, 0)
                    w = self._load(self.b, slot, block + first + c, r, 0)
                    for t in range(rows):
                        put(acc[t][c], fma(splat(held[t, r]), w, vec(acc[t][c], 0)), 0)

            def stored(store: Callable[[Buffer, Expr, Expr, int], None]) -> None:
                for t in range(rows):
                    for c in range(count):
                        store(acc[t][c], of[t], start + (first + c) * LANES, lanes)

            if gained is None:
                stored(self._add)
                return
            with T.If(gained == 0):
                with T.Then():
                    stored(self._add)
                with T.Else():
                    stored(partial(self._scale, slot))

        with T.If(rank > 0), T.Then():
            with T.serial(0, whole // _COLUMNS) as i:
                blocks(i * _COLUMNS, _COLUMNS, LANES)
            if whole % _COLUMNS:
                blocks(T.int32(whole // _COLUMNS * _COLUMNS), whole % _COLUMNS, LANES)
            if width % LANES:
                blocks(T.int32(whole), 1, width % LANES)

    def _add(self, acc: Buffer, row: Expr, column: Expr, lanes: int) -> None:
        if lanes == LANES:
            put(self.y, vec(self.y, row, column) + vec(acc, 0), row, column)
            return
        with T.serial(0, lanes) as j:
            put1(self.y, self.y[row, column + j] + acc[j], row, column + j)

    def _scale(self, slot: Expr, acc: Buffer, row: Expr, column: Expr, lanes: int) -> None:
        assert self.gains is not None
        gain, residual = self.gains.gain, self.gains.residual
        if lanes == LANES:
            rest = f32s(0) if residual is None else let(vec(residual, row, column))
            product = (vec(self.y, row, column) - rest) + vec(acc, 0)
            total = fma(vec(gain, slot, 0, column), product, vec(gain, slot, 1, column))
            put(self.y, rest + total, row, column)
            return
        with T.serial(0, lanes) as j:
            i = column + j
            one = T.float32(0) if residual is None else let(residual[row, i])
            put1(
                self.y,
                one + (gain[slot, 0, i] * ((self.y[row, i] - one) + acc[j]) + gain[slot, 1, i]),
                row,
                i,
            )


class _ChangeOfRows(_Change):
    """Of an embedding's rows: x holds their ids."""

    def _down(self, held: Buffer, of: Sequence[Expr], slot: Expr, part: Expr, rank: Expr) -> None:
        with T.serial(0, T.floordiv(rank + (LANES - 1), T.int32(LANES))) as block:
            for t, row in enumerate(of):
                column = let(T.max(T.min(self.x[row], T.int32(self.k - 1)), T.int32(0)))
                factor = self._load(self.a, slot, part, block, column, 0)
                put(held, factor * vec(self.scale, slot, part, block, 0), t, block * LANES)


def make_lora(
    *, parts: tuple[int, ...], k: int, dtype: str, isa: str, gains: bool = False, residual: bool = False
) -> Any:
    """y += B[adapter] (A[adapter] x) where adapter ≥ 0, as `ir/ops/lora.py` has it.

    y float32 [T, N], written in place; x float32 [T, K]; adapter int32 [T]; rank int32 [A, P]; scale float32
    [A, P, L, 16]; a `dtype` (float32 or int8) [A, P, L, K, 16]; b `dtype` [A, C, 16 · L, 16]; with `gains`
    gained int32 [A, P] and gain float32 [A, 2, N], and where there is one the `residual`, float32 [T, N].
    """
    kernel = Kernel("lora", isa)
    count = len(parts)
    with kernel:
        tokens, slots, blocks = kernel.symbol("T"), kernel.symbol("A"), kernel.symbol("L")
        y = kernel.argument("y", (tokens, sum(parts)), "float32")
        x = kernel.argument("x", (tokens, k), "float32")
        adapter = kernel.argument("adapter", (tokens,), "int32")
        rank = kernel.argument("rank", (slots, count), "int32")
        scale = kernel.argument("scale", (slots, count, blocks, LANES), "float32")
        a = kernel.argument("a", (slots, count, blocks, k, LANES), dtype)
        b = kernel.argument("b", (slots, column_blocks(parts), blocks * LANES, LANES), dtype)
        scaled = None
        if gains:
            gained = kernel.argument("gained", (slots, count), "int32")
            gain = kernel.argument("gain", (slots, 2, sum(parts)), "float32")
            rest = kernel.argument("residual", (tokens, sum(parts)), "float32") if residual else None
            scaled = _Gains(gained, gain, rest)
        change = _Change(k, dtype, (y, x, rank, scale, a, b), scaled)

        def work(rows: Sequence[Expr]) -> None:
            change.add(rows, rows, let(adapter[rows[0]]), parts)

        with kernel.body():
            _by_adapter(kernel, tokens, tokens, adapter, lambda row: adapter[row], work)
    return kernel.function


def make_lora_embedding(*, rows: int, width: int, dtype: str, isa: str) -> Any:
    """y += B[adapter] (column ids of A[adapter]) where adapter ≥ 0, as `ir/ops/lora.py` has it.

    y float32 [T, width], written in place; ids int32 [T], those of 0 … rows - 1 nearest to them; adapter
    int32 [T]; rank int32 [A, 1]; scale float32 [A, 1, L, 16]; a `dtype` (float32 or int8)
    [A, 1, L, rows, 16]; b `dtype` [A, C, 16 · L, 16].
    """
    kernel = Kernel("lora_embedding", isa)
    with kernel:
        tokens, slots, blocks = kernel.symbol("T"), kernel.symbol("A"), kernel.symbol("L")
        y = kernel.argument("y", (tokens, width), "float32")
        ids = kernel.argument("ids", (tokens,), "int32")
        adapter = kernel.argument("adapter", (tokens,), "int32")
        rank = kernel.argument("rank", (slots, 1), "int32")
        scale = kernel.argument("scale", (slots, 1, blocks, LANES), "float32")
        a = kernel.argument("a", (slots, 1, blocks, rows, LANES), dtype)
        b = kernel.argument("b", (slots, column_blocks((width,)), blocks * LANES, LANES), dtype)
        change = _ChangeOfRows(rows, dtype, (y, ids, rank, scale, a, b))

        def work(of: Sequence[Expr]) -> None:
            change.add(of, of, let(adapter[of[0]]), (width,))

        with kernel.body():
            _by_adapter(kernel, tokens, tokens, adapter, lambda row: adapter[row], work)
    return kernel.function


def make_moe_lora(
    *, rows: int, parts: int, k: int, experts: int, top_k: int, by_token: bool, dtype: str, isa: str
) -> Any:
    """y[s] += B[adapter, e] (A[adapter, e] x) where the adapter of row s's token is ≥ 0, e being the row's
    expert, as `ir/ops/lora_experts.py` has it; an expert has `parts` of so many rows each.

    y float32 [S, parts · rows], written in place; x float32 [T, k] with `by_token`, else [S, k]; source int32
    [S] of `moe_rows`, indices int32 [S]; adapter int32 [T]; rank int32 [A, P], P = experts · parts; scale
    float32 [A, P, L, 16]; a `dtype` (float32 or int8) [A, P, L, k, 16]; b `dtype` [A, C, 16 · L, 16].
    """
    kernel = Kernel("moe_lora", isa)
    count, widths = experts * parts, (rows,) * parts
    with kernel:
        pairs, tokens = kernel.symbol("S"), kernel.symbol("T")
        slots, blocks = kernel.symbol("A"), kernel.symbol("L")
        y = kernel.argument("y", (pairs, sum(widths)), "float32")
        x = kernel.argument("x", (tokens if by_token else pairs, k), "float32")
        source = kernel.argument("source", (pairs,), "int32")
        indices = kernel.argument("indices", (pairs,), "int32")
        adapter = kernel.argument("adapter", (tokens,), "int32")
        rank = kernel.argument("rank", (slots, count), "int32")
        scale = kernel.argument("scale", (slots, count, blocks, LANES), "float32")
        a = kernel.argument("a", (slots, count, blocks, k, LANES), dtype)
        b = kernel.argument("b", (slots, experts * column_blocks(widths), blocks * LANES, LANES), dtype)
        change = _Change(k, dtype, (y, x, rank, scale, a, b))

        def token(row: Expr) -> Expr:
            return T.floordiv(source[row], T.int32(top_k))

        def expert(row: Expr) -> Expr:  # what is no expert is the nearest one, as in `moe_rows`
            return T.max(T.min(indices[source[row]], T.int32(experts - 1)), T.int32(0))

        def work(of_y: Sequence[Expr]) -> None:
            of = [let(token(row)) for row in of_y] if by_token else of_y
            e = let(expert(of_y[0]))
            change.add(of_y, of, let(adapter[token(of_y[0])]), widths, (e * parts, e * column_blocks(widths)))

        with kernel.body():
            _by_adapter(kernel, tokens, pairs, adapter, lambda row: adapter[token(row)], work, expert)
    return kernel.function


def _by_adapter(
    kernel: Kernel,
    tokens: Expr,
    rows: Expr,
    adapter: Buffer,
    slot: Callable[[Expr], Expr],
    work: Callable[[Sequence[Expr]], None],
    expert: Callable[[Expr], Expr] | None = None,
) -> None:
    """Parallel over rows that have an adapter, `slot` of each: four of one adapter, and of one expert, at a
    time, where sums of so many stay in registers. Nothing where no token has one.
    """
    together = 4 if kernel.isa.live_vectors >= 32 else 1  # of 16 lanes

    def alone(row: Expr) -> None:
        with T.If(slot(row) >= 0), T.Then():
            work([row])

    def several(row: Expr) -> None:
        """The first of a group that has one adapter works for all; where they differ, each for itself."""
        first = let(T.floordiv(row, T.int32(together)) * together)
        same = rows >= first + together
        for t in range(1, together):
            other = T.min(first + t, rows - 1)
            same = T.And(same, slot(first) == slot(other))
            same = same if expert is None else T.And(same, expert(first) == expert(other))
        with T.If(same):
            with T.Then(), T.If(T.And(row == first, slot(first) >= 0)), T.Then():
                work([first + t for t in range(together)])
            with T.Else():
                alone(row)

    most = scalar(T.int32(-1), "int32")
    with T.serial(0, tokens) as t:
        put1(most, T.max(most[0], adapter[t]), 0)
    with T.If(most[0] >= 0), T.Then(), T.parallel(0, rows) as row:
        (several if together > 1 else alone)(row)
