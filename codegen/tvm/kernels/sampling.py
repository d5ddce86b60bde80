"""`sampling`: logits to unnormalised probabilities, with sums and maxima of their blocks, so that whoever
draws a token looks at a few hundred numbers of a vocabulary, not at all of it.
"""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from .builder import (
    LANES,
    Buffer,
    Expr,
    Kernel,
    f32s,
    i32s,
    lane_max,
    lane_sum,
    let,
    loop,
    put,
    put1,
    register,
    scalar,
    splat,
    vec,
)
from .layout import SAMPLING_BLOCK as BLOCK
from .vector_math import exp2

_PART = 32
"""Blocks that a thread takes at once."""
_INFINITY = 0x7F800000  # its bits
_SMALLEST = -125
"""2 to less than that is 0: below the normal numbers `exp2` is not exact, and a token that is out of reach
must have no share.
"""


def make_sampling(*, isa: str) -> Any:
    """Where scale[r] > 0, logits[r] = 2^((logits[r] - their maximum) · scale[r]); in any case their maximum's
    first place in best[r], or -1 where that is no finite number or a logit is NaN: then the row stays as it
    is.

    scale float32 [R]; best int32 [R]; sums, tops float32 [R, V // 256]: of what the blocks of 256 tokens hold
    now, where scale[r] > 0; logits float32 [R, V], written in place. The tokens behind the last whole block
    are in none.
    """
    kernel = Kernel("sampling", isa)
    with kernel:
        rows, vocab, blocks = kernel.symbol("R"), kernel.symbol("V"), kernel.symbol("C")
        scale = kernel.argument("scale", (rows,), "float32")
        best = kernel.argument("best", (rows,), "int32")
        sums = kernel.argument("sums", (rows, blocks), "float32")
        tops = kernel.argument("tops", (rows, blocks), "float32")
        logits = kernel.argument("logits", (rows, vocab), "float32")
        with kernel.body():
            parts = let(T.floordiv(blocks + (_PART - 1), T.int32(_PART)))
            peaks: Buffer = T.alloc_buffer((rows,), "float32")
            with T.parallel(0, rows * parts) as w:
                row, first = let(T.floordiv(w, parts)), let(T.floormod(w, parts) * _PART)
                with loop(first, let(T.min(first + _PART, blocks))) as block:
                    put1(tops, _top(logits, row, let(block * BLOCK)), row, block)
            with T.parallel(0, rows) as row:
                _find(logits, tops, row, (vocab, blocks), peaks, best)
            with T.parallel(0, rows * (parts + 1)) as w:
                row, part = let(T.floordiv(w, parts + 1)), let(T.floormod(w, parts + 1))
                with T.If(T.And(best[row] >= 0, scale[row] > T.float32(0))), T.Then():
                    weigh = _Weigh(let(splat(peaks[row])), let(splat(scale[row])))
                    first = let(part * _PART)
                    with loop(first, let(T.min(first + _PART, blocks))) as block:
                        weigh.block(logits, row, let(block * BLOCK), block, sums, tops)
                    with T.If(part == parts), T.Then():
                        weigh.rest(logits, row, let(blocks * BLOCK), vocab)
    return kernel.function


def _number(x: Expr, infinity: Expr) -> Expr:
    """x, and infinity for NaN, so that a maximum is found whatever it meets first. By its bits: TIR takes
    x == x for true.
    """
    lanes = str(x.ty).removeprefix("float32")
    constant = i32s if lanes else T.int32
    magnitude = T.bitwise_and(T.reinterpret(x, dtype=f"int32{lanes}"), constant(0x7FFFFFFF))
    return T.Select(magnitude > constant(_INFINITY), infinity, x)


def _infinity(sign: int) -> Expr:
    return T.reinterpret(T.int32(_INFINITY if sign > 0 else _INFINITY - (1 << 31)), dtype="float32")


def _top(logits: Buffer, row: Expr, start: Expr) -> Expr:
    """The largest of a block."""
    infinity = let(splat(_infinity(1)))
    top = register(_number(let(vec(logits, row, start)), infinity))
    with T.serial(0, BLOCK // LANES - 1) as i:
        x = let(vec(logits, row, start + (i + 1) * LANES))
        put(top, T.max(vec(top, 0), _number(x, infinity)), 0)
    return lane_max(vec(top, 0))


def _find(
    logits: Buffer, tops: Buffer, row: Expr, sizes: tuple[Expr, Expr], peaks: Buffer, best: Buffer
) -> None:
    """The largest logit of a row, and its first place."""
    vocab, blocks = sizes
    peak, place = scalar(_infinity(-1)), scalar(T.int32(-1), "int32")
    with T.serial(0, blocks) as block, T.If(tops[row, block] > peak[0]), T.Then():
        put1(peak, tops[row, block], 0)
        put1(place, block, 0)
    with T.If(place[0] >= 0), T.Then():
        start = let(place[0] * BLOCK)
        with T.serial(0, BLOCK) as i:
            at = let(start + (BLOCK - 1) - i)
            with T.If(logits[row, at] == peak[0]), T.Then():
                put1(place, at, 0)
    with loop(let(blocks * BLOCK), vocab) as at:
        x = let(_number(logits[row, at], _infinity(1)))
        with T.If(x > peak[0]), T.Then():
            put1(peak, x, 0)
            put1(place, at, 0)
    put1(peaks, peak[0], row)
    put1(best, T.Select(peak[0] < _infinity(1), place[0], T.int32(-1)), row)


class _Weigh:
    """Probabilities beside that of the most likely token, which is 1."""

    def __init__(self, peak: Expr, scale: Expr) -> None:
        self.peak, self.scale = peak, scale

    def __call__(self, x: Expr) -> Expr:
        power = let((x - self.peak) * self.scale)
        return let(T.Select(power < f32s(_SMALLEST), f32s(0), exp2(power)))

    def block(self, logits: Buffer, row: Expr, start: Expr, block: Expr, sums: Buffer, tops: Buffer) -> None:
        total, top = register(f32s(0)), register(f32s(0))
        with T.serial(0, BLOCK // LANES) as i:
            weight = self(vec(logits, row, start + i * LANES))
            put(logits, weight, row, start + i * LANES)
            put(total, vec(total, 0) + weight, 0)
            put(top, T.max(vec(top, 0), weight), 0)
        put1(sums, lane_sum(vec(total, 0)), row, block)
        put1(tops, lane_max(vec(top, 0)), row, block)

    def rest(self, logits: Buffer, row: Expr, start: Expr, stop: Expr) -> None:
        """What is behind the last whole block, a token at a time."""
        with loop(start, stop) as at:
            held = register(self(splat(logits[row, at])))
            put1(logits, held[0], row, at)
