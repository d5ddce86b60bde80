"""`quantized_linear`: activations quantized to int8 per token and group, weights of 4 or 8 bits, integer dot
products by groups.

A row's result is, for each output n and with groups g in order:

    acc = 0
    acc = fma(scale[n, g] · a_scale[g], float(Σ_k a[k] · q[n, k] - zero_point[n, g] · Σ_k a[k]), acc)

The sums are exact integers, so that the bits of a row depend neither on the number of rows nor on the level
(but for the rounding of the multiply-add where a level has no fused one).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm.script.ir_builder import tirx as T

from .builder import (
    LANES,
    Buffer,
    Expr,
    Kernel,
    call,
    f32s,
    fma,
    i32s,
    let,
    load_float,
    put,
    register,
    register_i32,
    row_tiles,
    splat,
    vec,
)
from .isa import Isa
from .layout import QuantLayout
from .linear import for_each_panel, store_block

UNPACK_ROWS = 8
"""Rows from which on it pays to unpack a panel of 4-bit weights once instead of in every tile."""


@dataclass(frozen=True)
class _Operands:
    """The buffers of one kernel."""

    layout: QuantLayout
    a: Buffer
    sums: Buffer
    a_scale: Buffer
    weight: Buffer
    scale: Buffer
    zero_point: Buffer | None
    bias: Buffer | None
    residual: Buffer | None
    out: Buffer

    @property
    def float_correction(self) -> bool:
        """Whether sums and products of a group are exact in float32 (below 2^24)."""
        return self.layout.real_group * 127 * ((1 << self.layout.bits) - 1) < 1 << 24

    def word(self, row: Expr, index: Expr) -> Expr:
        """Activations 4·index … 4·index+3 of a row, as the int32 that a dot product broadcasts."""
        return T.reinterpret(vec(self.a, row, index * 4, lanes=4), dtype="int32")

    def scales(self, block: Expr, group: Expr) -> Expr:
        return load_float(self.scale, "float16", block, group, 0)

    def zeros(self, block: Expr, group: Expr) -> Expr:
        """Negative zero points of 16 outputs, float32 or int32 as the correction wants them."""
        negative = i32s(0) - T.Cast("int32x16", vec(self.zero_point, block, group, 0))
        return T.Cast("float32x16", negative) if self.float_correction else negative


class _Packed:
    """Weights read as they lie in memory."""

    def __init__(self, ops: _Operands, first: Expr, count: int) -> None:
        self.ops, self.first, self.count = ops, first, count

    def words(self, group: Expr, step: Expr) -> list[list[Expr]]:
        """The vectors of one step: [words a step][block]."""
        raw = [let(vec(self.ops.weight, self.first + c, group, step, 0, lanes=64)) for c in range(self.count)]
        if self.ops.layout.bits == 8:
            return [raw]
        low = [let(T.bitwise_and(w, T.broadcast(T.uint8(15), 64))) for w in raw]
        return [low, [let(T.shift_right(w, T.broadcast(T.uint8(4), 64))) for w in raw]]

    def scale(self, group: Expr, c: int) -> Expr:
        return self.ops.scales(self.first + c, group)

    def zero(self, group: Expr, c: int) -> Expr:
        return self.ops.zeros(self.first + c, group)


class _Unpacked(_Packed):
    """A panel of 4-bit weights spread to bytes, scales and zero points widened, in memory of this thread."""

    def __init__(self, ops: _Operands, first: Expr, count: int) -> None:
        super().__init__(ops, first, count)
        lay = ops.layout
        self.bytes = T.alloc_buffer((lay.groups, lay.steps, 2, count, 64), "uint8")
        self.wide = T.alloc_buffer((lay.groups, count, LANES), "float32")
        self.offset: Buffer = None
        if ops.zero_point is not None:
            kind = "float32" if ops.float_correction else "int32"
            self.offset = T.alloc_buffer((lay.groups, count, LANES), kind)
        with T.serial(0, lay.groups) as g:
            for c in range(count):
                put(self.wide, super().scale(g, c), g, c, 0)
                if self.offset is not None:
                    put(self.offset, super().zero(g, c), g, c, 0)
            with T.serial(0, lay.steps) as s:
                for half, blocks in enumerate(super().words(g, s)):
                    for c, w in enumerate(blocks):
                        put(self.bytes, w, g, s, half, c, 0, lanes=64)

    def words(self, group: Expr, step: Expr) -> list[list[Expr]]:
        return [
            [let(vec(self.bytes, group, step, half, c, 0, lanes=64)) for c in range(self.count)]
            for half in range(2)
        ]

    def scale(self, group: Expr, c: int) -> Expr:
        return vec(self.wide, group, c, 0)

    def zero(self, group: Expr, c: int) -> Expr:
        return vec(self.offset, group, c, 0)


def _tile_sizes(isa: Isa, bits: int) -> tuple[Sequence[int], Sequence[int], int]:
    """Row-tile sizes for unpacked and for packed panels, and 16-column blocks of a panel."""
    if isa.live_vectors >= 32:
        return (6, 2, 1), ((6, 4, 2, 1) if bits == 8 else (4, 2, 1)), 2
    if isa.live_vectors >= 8:
        return (3, 1), (2, 1), 1
    return (2, 1), (1,), 1


def _add_steps(
    ops: _Operands,
    row: Expr,
    panel: _Packed,
    at: tuple[Expr, Expr],
    steps: int,
    total: list[list[Buffer]],
    dot: str = "",
) -> None:
    """Add the products of `steps` steps from at = (group, first step) to a tile's integer accumulators."""
    group, first = at
    words = 8 // ops.layout.bits
    for s in range(steps):
        for half, weights in enumerate(panel.words(group, first + s)):
            for t, cells in enumerate(total):
                a = let(ops.word(row + t, (group * ops.layout.steps + first + s) * words + half))
                for cell, w in zip(cells, weights, strict=True):
                    put(cell, call("int32x16", dot or f"llmc_dot{ops.layout.bits}", vec(cell, 0), w, a), 0)


def _add_narrow(
    ops: _Operands, row: Expr, panel: _Packed, at: tuple[Expr, Expr], steps: int, total: list[list[Buffer]]
) -> None:
    """`_add_steps` of at most 4 steps with sums in int16: fewer instructions where there is no `vpdpbusd`."""
    narrow = [[register_i32(i32s(0)) for _ in cells] for cells in total]
    _add_steps(ops, row, panel, at, steps, narrow, "llmc_narrow4")
    for cells, sums in zip(total, narrow, strict=True):
        for cell, sum_ in zip(cells, sums, strict=True):
            bits = T.reinterpret(vec(sum_, 0), dtype="uint8x64")
            put(cell, call("int32x16", "llmc_widen", vec(cell, 0), bits, T.int32(0)), 0)


def _multiply(ops: _Operands, row: Expr, rows: int, panel: _Packed, narrow: bool) -> None:
    """One tile: `rows` tokens by the panel's blocks. `narrow`: the level multiplies by `pmaddubsw`."""
    lay, count = ops.layout, panel.count
    acc = [[register(f32s(0)) for _ in range(count)] for _ in range(rows)]
    with T.serial(0, lay.groups) as g:
        total = _start(ops, row, rows, count, g)
        add = _add_narrow if narrow and lay.bits == 4 else _add_steps
        unit = next(u for u in (4, 2, 1) if lay.steps % u == 0) if add is _add_narrow else 1
        if lay.steps <= 8:
            for s in range(0, lay.steps, unit):
                add(ops, row, panel, (g, T.int32(s)), unit, total)
        else:
            with T.serial(0, lay.steps // unit) as s:
                add(ops, row, panel, (g, s * unit), unit, total)
        _finish_group(ops, row, panel, g, total, acc)
    for t in range(rows):
        for c in range(count):
            value = let(vec(acc[t][c], 0))
            store_block(value, ops.out, row + t, panel.first + c, lay.n, ops.bias, ops.residual)


def _start(ops: _Operands, row: Expr, rows: int, count: int, group: Expr) -> list[list[Buffer]]:
    """Integer accumulators; a constant zero point's correction is where they start."""
    constant = 1 << (ops.layout.bits - 1)
    total: list[list[Buffer]] = []
    for t in range(rows):
        initial = i32s(0)
        if ops.zero_point is None:
            initial = let(splat(ops.sums[row + t, group] * T.int32(-constant)))
        total.append([register_i32(initial) for _ in range(count)])
    return total


def _finish_group(
    ops: _Operands, row: Expr, panel: _Packed, group: Expr, total: list[list[Buffer]], acc: list[list[Buffer]]
) -> None:
    """acc += scale · float(total - zero_point · sum)."""
    scale = [let(panel.scale(group, c)) for c in range(panel.count)]
    zero = [let(panel.zero(group, c)) for c in range(panel.count)] if ops.zero_point is not None else None
    for t, row_total in enumerate(total):
        sum_ = splat(ops.sums[row + t, group])
        factor = let(splat(ops.a_scale[row + t, group]))
        if zero is not None and ops.float_correction:
            sum_ = let(T.Cast("float32x16", sum_))
        for c, cell in enumerate(row_total):
            value: Expr = T.Cast("float32x16", vec(cell, 0))
            if zero is not None and ops.float_correction:
                value = fma(zero[c], sum_, value)
            elif zero is not None:
                value = T.Cast("float32x16", vec(cell, 0) + zero[c] * sum_)
            # A fused multiply-add with 0 is a rounded product that nothing fuses with: LLVM might fuse
            # `a * b` in one tile and not in another.
            both = let(fma(scale[c], factor, f32s(0)))
            put(acc[t][c], fma(both, value, vec(acc[t][c], 0)), 0)


def make_quantized_linear(
    *,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    zero_point: bool,
    bias: bool = False,
    residual: bool = False,
    isa: str,
) -> Any:
    """out = Σ_g a_scale · scale · (a · q - zero_point · sums) (+ bias) (+ residual).

    With L = QuantLayout(n, k, bits, group_size): a int8 [T, L.k_padded], sums int32 [T, L.groups] and a_scale
    float32 [T, L.groups] from `quantize_activation`; weight uint8 L.weight_shape; scale float16
    L.scale_shape; zero_point uint8 L.scale_shape, or absent and 2^(bits-1); bias float32 [n]; residual and
    out float32 [T, n].
    """
    kernel = Kernel("quantized_linear", isa)
    lay = QuantLayout(n, k, bits, group_size)
    narrow = kernel.isa.dot == "maddubs"
    unpacked_sizes, packed_sizes, width = _tile_sizes(kernel.isa, bits)
    with kernel:
        tokens = kernel.symbol("T")
        ops = _Operands(
            lay,
            kernel.argument("a", (tokens, lay.k_padded), "int8"),
            kernel.argument("sums", (tokens, lay.groups), "int32"),
            kernel.argument("a_scale", (tokens, lay.groups), "float32"),
            kernel.argument("weight", lay.weight_shape, "uint8"),
            kernel.argument("scale", lay.scale_shape, "float16"),
            kernel.argument("zero_point", lay.scale_shape, "uint8") if zero_point else None,
            kernel.argument("bias", (n,), "float32") if bias else None,
            kernel.argument("residual", (tokens, n), "float32") if residual else None,
            kernel.argument("out", (tokens, n), "float32"),
        )

        def direct(first: Expr, count: int) -> None:
            panel = _Packed(ops, first, count)
            row_tiles(tokens, packed_sizes, lambda row, rows: _multiply(ops, row, rows, panel, narrow))

        def unpacked(first: Expr, count: int) -> None:
            panel = _Unpacked(ops, first, count)
            row_tiles(tokens, unpacked_sizes, lambda row, rows: _multiply(ops, row, rows, panel, narrow))

        with kernel.body():
            if bits == 8:
                for_each_panel(lay.blocks, width, direct)
            else:
                with T.If(tokens < UNPACK_ROWS):
                    with T.Then():
                        for_each_panel(lay.blocks, width, direct)
                    with T.Else():
                        for_each_panel(lay.blocks, width, unpacked)
    return kernel.function


def reference_quantized_linear(
    layout: QuantLayout,
    a: np.ndarray,
    sums: np.ndarray,
    a_scale: np.ndarray,
    q: np.ndarray,
    scale: np.ndarray,
    zero_point: np.ndarray | None,
) -> np.ndarray:
    """float64 [T, n] from unpacked q uint8 [n, k], scale [n, groups], zero_point [n, groups] and padded
    activations.
    """
    out = np.zeros((a.shape[0], q.shape[0]))
    for g in range(layout.groups):
        columns = q[:, g * layout.real_group : (g + 1) * layout.real_group].astype(np.int64)
        part = a[:, g * layout.group : g * layout.group + columns.shape[1]].astype(np.int64)
        zero = 1 << (layout.bits - 1) if zero_point is None else zero_point[None, :, g].astype(np.int64)
        both = a_scale[:, g, None].astype(np.float64) * scale[None, :, g].astype(np.float64)
        out += (part @ columns.T - zero * sums[:, g, None]) * both
    return out
