"""`codebook_linear`: products by weights whose codes stand for floats that bytes can't hold (NF4), with
activations in float32.

A row's result is, for each output n and with groups g and the k of a group in order:

    acc = 0
    total = 0;  total = fma(x[k], TABLE[q[n, k]], total)
    acc = fma(scale[n, g], total, acc)

The bits of a row depend neither on the number of rows nor on the level (but for the rounding of the
multiply-add where a level has no fused one).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm.script.ir_builder import tirx as T

from ....ir.codebooks import codebook as table_of
from .builder import Buffer, Expr, Kernel, call, f32s, fma, i32s, let, put, register, row_tiles, splat, vec
from .isa import Isa
from .layout import QuantLayout
from .linear import for_each_panel
from .panels import Operands, weight_arguments

STEP = 8
"""Consecutive k in 64 bytes."""


def _tile_sizes(isa: Isa) -> tuple[tuple[int, ...], int]:
    """Row-tile sizes and 16-column blocks a tile: two accumulators an output, codes and a weight must fit."""
    if isa.live_vectors >= 32:
        return (6, 2, 1), 2
    return (2, 1) if isa.live_vectors >= 8 else (1,), 1


def _weight(name: str, codes: Expr, j: int) -> Expr:
    """Element j of a step, float32x16: byte j % 4 of each lane, its low half if j < 4."""
    shift = 8 * (j % 4) + 4 * (j // 4)
    moved = T.shift_right(codes, i32s(shift)) if shift else codes
    return let(call("float32x16", f"llmc_floats_{name}", moved))


def _add_step(
    ops: Operands, x: Buffer, row: Expr, at: tuple[Expr, Expr, Expr], count: int, total: list[list[Buffer]]
) -> None:
    """Add `count` elements of the step at = (first block, group, step) to a tile's sums."""
    first, group, step = at
    lay = ops.layout
    blocks = range(len(total[0]))
    codes = [
        let(T.reinterpret(vec(ops.weight, first + c, group, step * 64, lanes=64), dtype="int32x16"))
        for c in blocks
    ]
    for j in range(count):
        weights = [_weight(str(lay.codebook), codes[c], j) for c in blocks]
        for t, cells in enumerate(total):
            a = let(splat(x[row + t, group * lay.real_group + step * STEP + j]))
            for cell, w in zip(cells, weights, strict=True):
                put(cell, fma(a, w, vec(cell, 0)), 0)


def _add_group(
    ops: Operands, x: Buffer, row: Expr, first: Expr, group: Expr, length: int, acc: list[list[Buffer]]
) -> None:
    """acc += scale · Σ over `length` elements of a group."""
    total = [[register(f32s(0)) for _ in cells] for cells in acc]
    with T.serial(0, length // STEP) as s:
        _add_step(ops, x, row, (first, group, s), STEP, total)
    if length % STEP:
        _add_step(ops, x, row, (first, group, T.int32(length // STEP)), length % STEP, total)
    scale = [let(ops.scales(first + c, group)) for c in range(len(acc[0]))]
    for cells, sums in zip(acc, total, strict=True):
        for c, cell in enumerate(cells):
            put(cell, fma(scale[c], vec(sums[c], 0), vec(cell, 0)), 0)


def _panel(ops: Operands, x: Buffer, blocks: tuple[Expr, int], sizes: tuple[int, ...]) -> None:
    """All rows by blocks = (first, count) of the weight, in tiles of `sizes` rows."""
    first, count = blocks
    lay = ops.layout
    short = lay.k % lay.real_group

    def tile(row: Expr, rows: int) -> None:
        acc = [[register(f32s(0)) for _ in range(count)] for _ in range(rows)]
        with T.serial(0, lay.groups - (short > 0)) as g:
            _add_group(ops, x, row, first, g, lay.real_group, acc)
        if short:
            _add_group(ops, x, row, first, T.int32(lay.groups - 1), short, acc)
        for t in range(rows):
            for c in range(count):
                ops.write(vec(acc[t][c], 0), row + t, first + c)

    row_tiles(x.shape[0], sizes, tile)


def make_codebook_linear(
    *,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    codebook: str,
    zero_point: str | None = None,
    scale_dtype: str = "float16",
    super_group: int = 0,
    bias: bool = False,
    residual: bool = False,
    isa: str,
) -> Any:
    """out = Σ_g scale · Σ_k x · TABLE[q] (+ bias) (+ residual).

    With L the QuantLayout of these: x float32 [T, k]; weight uint8 L.weight_shape; scale L.scale_storage
    L.scale_shape; bias float32 [n]; residual and out float32 [T, n].
    """
    assert zero_point is None and bits == 4, "a codebook has 4 bits and no zero points"
    kernel = Kernel("codebook_linear", isa)
    lay = QuantLayout(n, k, bits, group_size, codebook, scale_dtype, None, super_group)
    sizes, width = _tile_sizes(kernel.isa)
    with kernel:
        tokens = kernel.symbol("T")
        x = kernel.argument("x", (tokens, k), "float32")
        ops = Operands(
            lay,
            kernel.isa,
            None,
            None,
            None,
            *weight_arguments(kernel, lay),
            kernel.argument("bias", (n,), "float32") if bias else None,
            kernel.argument("residual", (tokens, n), "float32") if residual else None,
            kernel.argument("out", (tokens, n), "float32"),
        )
        with kernel.body():
            for_each_panel(lay.blocks, width, lambda first, count: _panel(ops, x, (first, count), sizes))
    return kernel.function


def reference_codebook_linear(
    layout: QuantLayout, x: np.ndarray, q: np.ndarray, scale: np.ndarray
) -> np.ndarray:
    """float64 [T, n] from x float32 [T, k], unpacked q uint8 [n, k] and scale [n, groups]."""
    values = table_of(str(layout.codebook))[q].astype(np.float64)
    spread = scale.astype(np.float64).repeat(layout.real_group, 1)[:, : layout.k]
    return x.astype(np.float64) @ (values * spread).T
