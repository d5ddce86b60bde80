"""`paged_attention`: attention of a ragged batch over the paged cache, and who computes which part of it.

Blocks of rows and heads are computed by vectors (`attention_blocks.py`, with the rule that all follow) or in
tile registers (`attention_tiles.py`): in parallel over rows, or over segments of the context where rows are
few. Which way a row is computed does not change its bits.
"""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from . import attention_tiles as in_tiles
from .attention_blocks import Merged, finish
from .attention_spec import MANY_ROWS, SEGMENT, Attention, Buffers, Memory, advance
from .attention_words import block_of
from .builder import LANES, Expr, Kernel, let, put, put1, scalar, vec
from .cache import pages_argument
from .heads import Heads, Source
from .isa import Isa


def _by_rows(spec: Attention, at: Buffers, tokens: Expr, isa: Isa, block: tuple[int, int]) -> None:
    """Parallel over (block of rows, block of heads); `block` = (heads, rows)."""
    heads, rows = block
    columns = spec.heads // heads
    step = let(T.Select(tokens < T.int32(MANY_ROWS), T.int32(1), T.int32(rows)))
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
            advance(at, sequence, row[0])
            here = let(sequence[0])
            start = let(row[0])

            def take(count: int, start: Expr = start, here: Expr = here) -> None:
                block_of(spec, isa)(spec, at, (start, here, head), (count, heads), isa).run()
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


def _by_blocks(spec: Attention, at: Buffers, counts: tuple[Expr, Expr], isa: Isa) -> None:
    """`_by_rows` with the blocks that fit how many rows a sequence has; counts = (rows, sequences)."""
    many, single = spec.blocking(isa), (spec.row_heads(isa), 1)
    if single[0] == many[0]:
        _by_rows(spec, at, counts[0], isa, many)
        return
    with T.If(T.Or(counts[0] < MANY_ROWS, counts[0] <= counts[1])):
        with T.Then():
            _by_rows(spec, at, counts[0], isa, single)
        with T.Else():
            _by_rows(spec, at, counts[0], isa, many)


def _by_segments(spec: Attention, at: Buffers, tokens: Expr, segments: Expr, isa: Isa) -> None:
    """Few rows with a long context: parallel over (row, block of heads, segment), then merged."""
    heads = spec.row_heads(isa)
    columns = spec.heads // heads
    acc = T.alloc_buffer((tokens * columns * segments * heads, spec.head_dim), "float32")
    state = T.alloc_buffer((tokens * columns * segments, 2, LANES), "float32")
    with T.parallel(0, tokens * columns * segments) as w:
        item, segment = let(T.floordiv(w, segments)), let(T.floormod(w, segments))
        row, head = let(item // columns), let(item % columns * heads)
        sequence = scalar(T.int32(0), "int32")
        advance(at, sequence, row)
        block = block_of(spec, isa)(spec, at, (row, let(sequence[0]), head), (1, heads), isa)
        block.prepare()
        block.segment(segment)
        put(state, vec(block.best, 0), w, 0, 0)
        put(state, vec(block.total, 0), w, 1, 0)
        block.keep(acc, w * heads)
    with T.serial(0, tokens * columns) as item:
        first = let(item // columns), let(item % columns * heads)
        merged = Merged(spec, at, first, (1, heads), Memory(heads * spec.head_dim))
        merged.clear()
        with T.serial(0, segments) as g:
            w = let(item * segments + g)
            merged.add(vec(state, w, 0, 0), vec(state, w, 1, 0), acc, w * heads)
        finish(merged)


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
    slopes: bool = False,
    distances: int = 0,
    q_source: Source = None,
    q_rotary: int = 0,
    isa: str,
) -> Any:
    """Attention of each query row over its sequence's context.

    q float32 [T, heads, head_dim], or as q_source and q_rotary say (`Heads`); pages `kv_dtype` [2, N,
    kv_heads, 16, head_dim] in the order of `cache` (int8: head_dim + 4, and softmax(q · k · k_scale) ·
    v_scale · v is computed on the codes); query_start int32 [B + 1] with query_start[0] = 0 and
    query_start[B] = T; context_len int32 [B]; block_table int32 [B, P]; sinks float32 [heads] (a logit
    more in each softmax, with no value); slopes float32 [heads]; out float32 [T, heads, head_dim].
    Sequences may have no rows. A row sees token j of its context where causal: j ≤ its position, and
    window w: |position - j| < w. softcap c: scores become c · tanh(score / c); then slope · (j -
    position) is added to each, or element clip(distances / 2 + j - position, 0, distances - 1) of a row
    of distances float32 [heads, distances], of which the first 16 are alike and so are the last.
    """
    spec = Attention(heads, kv_heads, head_dim, kv_dtype, scale, causal, window, softcap, slopes, distances)
    kernel = Kernel("paged_attention", isa)
    with kernel:
        tokens, sequences, width = kernel.symbol("T"), kernel.symbol("B"), kernel.symbol("P")
        at = Buffers(
            q=Heads(kernel, "q", heads, head_dim, q_source, q_rotary),
            pages=pages_argument(kernel, kv_heads, head_dim, kv_dtype),
            query_start=kernel.argument("query_start", (kernel.symbol("B1"),), "int32"),
            context_len=kernel.argument("context_len", (sequences,), "int32"),
            block_table=kernel.argument("block_table", (sequences, width), "int32"),
            sinks=kernel.argument("sinks", (heads,), "float32") if sinks else None,
            slopes=kernel.argument("slopes", (heads,), "float32") if slopes else None,
            distances=kernel.argument("distances", (heads, distances), "float32") if distances else None,
            out=kernel.argument("out", (tokens, heads, head_dim), "float32"),
        )
        with kernel.body():
            segments = let(T.floordiv(width + (SEGMENT - 1), T.int32(SEGMENT)))
            tiles = kernel.isa.tiles and in_tiles.fits(spec)
            with T.If(T.And(tokens < MANY_ROWS, segments > 1)):
                with T.Then():
                    if tiles:
                        in_tiles.by_segments(spec, at, tokens, segments)
                    else:
                        _by_segments(spec, at, tokens, segments, kernel.isa)
                with T.Else():
                    if tiles:
                        in_tiles.by_rows(spec, at, tokens, sequences)
                    else:
                        _by_blocks(spec, at, (tokens, sequences), kernel.isa)
    return kernel.function
