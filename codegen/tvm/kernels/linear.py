"""`linear` with float weights.

Each output is one chain of fused multiply-adds over k, from 0 to K-1, whatever block of rows it is computed
in: the bits of a row do not depend on how many rows there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tvm.script.ir_builder import tirx as T

from .builder import (
    LANES,
    Buffer,
    Expr,
    Kernel,
    f32s,
    fma,
    for_each,
    let,
    load_float,
    put,
    put1,
    register,
    row_tiles,
    splat,
    vec,
)
from .isa import Isa
from .layout import packed_shape


def tile_sizes(isa: Isa) -> tuple[tuple[int, ...], int]:
    """Row-tile sizes and 16-column blocks a tile, so that accumulators, weights and one activation fit."""
    if isa.live_vectors >= 32:
        return (12, 4, 1), 2
    return (6, 2, 1) if isa.live_vectors >= 8 else (3, 1), 1


def store_block(
    value: Expr, out: Buffer, row: Expr, block: Expr, n: int, bias: Buffer | None, residual: Buffer | None
) -> None:
    """Write 16 outputs of a row, bias and residual added; the last block of an N that 16 does not divide is
    cut.
    """

    def whole() -> None:
        v = value
        if bias is not None:
            v = v + vec(bias, block * LANES)
        if residual is not None:
            v = v + vec(residual, row, block * LANES)
        put(out, v, row, block * LANES)

    def cut() -> None:
        kept = register(value)
        with T.serial(0, n % LANES) as j:
            v: Expr = kept[j]
            if bias is not None:
                v = v + bias[block * LANES + j]
            if residual is not None:
                v = v + residual[row, block * LANES + j]
            put1(out, v, row, block * LANES + j)

    if n % LANES == 0:
        whole()
        return
    with T.If(block < n // LANES):
        with T.Then():
            whole()
        with T.Else():
            cut()


def for_each_panel(blocks: int, width: int, body: Callable[[Expr, int], None]) -> None:
    """Run `body(first_block, block_count)` in parallel over panels of `width` blocks, the last maybe
    narrower.
    """
    panels = -(-blocks // width)

    def panel(p: Expr) -> None:
        one_panel(p, blocks, width, lambda count: body(p * width, count))

    if blocks < width:
        body(T.int32(0), blocks)
    else:
        for_each(panel, panels, parallel=True)


def row_shares(tokens: Expr, most: int) -> tuple[Expr, Expr]:
    """(number, rows of each) of shares of at most `most` rows, a multiple of 32, that are equally large, but
    for the last.
    """
    count = let(T.floordiv(tokens + (most - 1), T.int32(most)))
    share = T.floordiv(tokens + count - 1, count)
    return count, let(T.floordiv(share + 31, T.int32(32)) * 32)


def one_panel(p: Expr, blocks: int, width: int, body: Callable[[int], None]) -> None:
    """`body(block_count)` for panel p of those of `width` blocks, the last maybe narrower."""
    if blocks % width == 0:
        body(width)
        return
    with T.If(p < blocks // width):
        with T.Then():
            body(width)
        with T.Else():
            body(blocks % width)


def float_products(
    x: Buffer, weight: Buffer, dtype: str, rows: Sequence[Expr], first: Expr, count: int
) -> list[list[Expr]]:
    """Rows of x by `count` blocks of a packed weight from `first` on: 16 outputs for each row and block."""
    acc = [[register(f32s(0)) for _ in range(count)] for _ in rows]
    with T.serial(0, int(x.shape[1])) as i:
        w = [let(load_float(weight, dtype, first + c, i, 0)) for c in range(count)]
        for row, cells in zip(rows, acc, strict=True):
            a = let(splat(x[row, i]))
            for cell, one in zip(cells, w, strict=True):
                put(cell, fma(a, one, vec(cell, 0)), 0)
    return [[vec(cell, 0) for cell in cells] for cells in acc]


def make_linear(
    *, n: int, k: int, bias: bool = False, residual: bool = False, weight_dtype: str = "float32", isa: str
) -> Any:
    """out = x · weightᵀ (+ bias) (+ residual).

    x float32 [T, k]; weight `weight_dtype` (float32, float16 or bfloat16) packed [ceil(n/16), k, 16]; bias
    float32 [n]; residual float32 [T, n]; out float32 [T, n].
    """
    kernel = Kernel("linear", isa)
    sizes, width = tile_sizes(kernel.isa)
    with kernel:
        tokens = kernel.symbol("T")
        x = kernel.argument("x", (tokens, k), "float32")
        weight = kernel.argument("weight", packed_shape(n, k), weight_dtype)
        b = kernel.argument("bias", (n,), "float32") if bias else None
        r = kernel.argument("residual", (tokens, n), "float32") if residual else None
        out = kernel.argument("out", (tokens, n), "float32")

        def panel(first: Expr, count: int) -> None:
            def tile(row: Expr, rows: int) -> None:
                own = [row + t for t in range(rows)]
                products = float_products(x, weight, weight_dtype, own, first, count)
                for t, of_row in zip(own, products, strict=True):
                    for c, product in enumerate(of_row):
                        store_block(product, out, t, first + c, n, b, r)

            row_tiles(tokens, sizes, tile)

        with kernel.body():
            for_each_panel(packed_shape(n, k)[0], width, panel)
    return kernel.function


def reference_linear(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None, residual: np.ndarray | None = None
) -> np.ndarray:
    """x [T, k], weight [n, k] unpacked → float64 [T, n]."""
    out = x.astype(np.float64) @ weight.astype(np.float64).T
    out = out if bias is None else out + bias
    return out if residual is None else out + residual
