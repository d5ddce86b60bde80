"""`hadamard`, and the same for what quantizes a row as it is made: each run of columns times
`ir.hadamard.rotation`, by sums and differences in a fixed order.

64 columns are four vectors: they are rotated in registers, and stored. Runs of more are m times 64, whose
vectors of the same place are then rotated among each other: `rotation(64 · m)` is that of m, Kronecker that
of 64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import gcd, sqrt
from typing import Any

from tvm.script.ir_builder import tirx as T

from ....ir.hadamard import reflections
from .builder import LANES, Buffer, Expr, Kernel, call, f32s, fma, for_each_row, let, put, vec

_RUN = 64
"""Columns that are rotated in registers."""
Read = Callable[[Expr], Expr]
Index = Callable[[Expr], tuple[Expr, ...]]


def _among(vectors: Sequence[Expr]) -> list[Expr]:
    """Vectors times `rotation` of their number, but not divided by the root of its part that is a power of
    two: that one first.
    """
    values, count = list(vectors), len(vectors)
    step = 1
    while count // step % 2 == 0:
        for i in range(count):
            if not i // step & 1:
                a, b = values[i], values[i + step]
                values[i], values[i + step] = let(a + b), let(a - b)
        step *= 2
    factors = reflections(count // step)
    assert factors is not None, f"no rotation among {count} vectors"
    for factor in reversed(factors):
        for i in range(count):
            if not i // step % factor:
                places = range(i, i + factor * step, step)
                total = values[i]
                for at in places[1:]:
                    total = let(total + values[at])
                for at in places:
                    values[at] = let(fma(total, f32s(-2 / factor), values[at]))
        step *= factor
    return values


def store_made(
    count: int, make: Read, to: Buffer, at: Index, rotate: int, seen: Callable[[Expr], None] | None = None
) -> None:
    """Put `count` elements, of which `make(i)` computes 16 from i on, to `to[at(i)]`: as they are where
    `rotate` is 0, else each run of so many rotated. `seen`: what is done with each vector that is put.
    """
    run = gcd(rotate, _RUN) if rotate else LANES
    among = rotate // run if rotate else 1
    scale = f32s(1 / sqrt(max(1, rotate & -rotate)))

    def store(places: Sequence[Expr], values: Sequence[Expr], *, last: bool) -> None:
        for place, value in zip(places, values, strict=True):
            put(to, value, *at(place))
            if last and seen is not None:
                seen(value)

    def first(start: Expr) -> None:
        places = [start + i for i in range(0, run, LANES)]
        values = [let(make(place)) for place in places]
        if rotate:
            values = [let(call("float32x16", "llmc_hadamard16", v) * scale) for v in _among(values)]
        store(places, values, last=among == 1)

    if among == 1:
        with T.serial(0, count // run) as n:
            first(n * run)
        return
    with T.serial(0, count // rotate) as n:
        with T.serial(0, among) as part:
            first(n * rotate + part * run)
        with T.serial(0, run // LANES) as v:
            places = [n * rotate + part * run + v * LANES for part in range(among)]
            store(places, _among([let(vec(to, *at(place))) for place in places]), last=True)


def make_hadamard(*, width: int, size: int, isa: str) -> Any:
    """out = x, each run of `size` columns times `rotation(size)`: x and out float32 [T, width]; for
    `layout.fits_rotation`, and a width that is a multiple of `size`.
    """
    kernel = Kernel("hadamard", isa)
    with kernel:
        tokens = kernel.symbol("T")
        x = kernel.argument("x", (tokens, width), "float32")
        out = kernel.argument("out", (tokens, width), "float32")

        def row(t: Expr) -> None:
            store_made(width, lambda i: vec(x, t, i), out, lambda i: (t, i), size)

        with kernel.body():
            for_each_row(tokens, 3 * width, row)
    return kernel.function
