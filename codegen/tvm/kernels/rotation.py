"""`hadamard`, and the same for what quantizes a row as it is made: each run of columns times a Hadamard
matrix, by sums and differences in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt
from typing import Any

from tvm.script.ir_builder import tirx as T

from .builder import LANES, Expr, Kernel, call, f32s, for_each_row, let, put, vec


def rotated(vectors: Sequence[Expr]) -> list[Expr]:
    """Vectors that follow one another, as many as a power of two, times `hadamard(16 · their number)`."""
    values, count = list(vectors), len(vectors)
    step = 1
    while step < count:
        for i in range(count):
            if not i & step:
                a, b = values[i], values[i + step]
                values[i], values[i + step] = let(a + b), let(a - b)
        step *= 2
    factor = f32s(1 / sqrt(LANES * count))
    return [let(call("float32x16", "llmc_hadamard16", v) * factor) for v in values]


def store_made(
    count: int, make: Callable[[Expr], Expr], store: Callable[[Expr, Expr], None], rotate: int
) -> None:
    """`store(i, value)` for `count` elements, of which `make(i)` computes 16 from i on: as they are where
    `rotate` is 0, else each run of so many rotated.
    """
    run = rotate or LANES
    with T.serial(0, count // run) as n:
        places = [n * run + i for i in range(0, run, LANES)]
        values = [let(make(place)) for place in places]
        for place, value in zip(places, rotated(values) if rotate else values, strict=True):
            store(place, value)


def make_hadamard(*, width: int, size: int, isa: str) -> Any:
    """out = x, each run of `size` columns times `hadamard(size)`: x and out float32 [T, width]; for
    `layout.fits_rotation`, and a width that is a multiple of `size`.
    """
    kernel = Kernel("hadamard", isa)
    with kernel:
        tokens = kernel.symbol("T")
        x = kernel.argument("x", (tokens, width), "float32")
        out = kernel.argument("out", (tokens, width), "float32")

        def row(t: Expr) -> None:
            store_made(width, lambda i: vec(x, t, i), lambda i, value: put(out, value, t, i), size)

        with kernel.body():
            for_each_row(tokens, 3 * width, row)
    return kernel.function
