"""`quantized_linear`: activations quantized to int8 per token and group, weights of 2 to 8 bits or of a
codebook of integers, integer dot products by groups.

A row's result is, for each output n and with groups g in order:

    acc = 0
    acc = fma(a_scale[g], scale[n, g] · float(Σ_k a[k] · q[n, k] - zero_point[n, g] · Σ_k a[k]), acc)
    acc = fma(a_scale[g], fma(scale[n, g], float(Σ_k a[k] · q[n, k]), minimum[n, g] · Σ_k a[k]), acc)

and at last acc = fma(x, weight as a float, acc) for each activation x that is kept apart (`Quantized.apart`).

Where `Operands.lifted`, the product with the scale is fma(scale, LIFT + total, -scale · LIFT): rounded once,
it is the same. A group of 32 is 8 `vpdpbusd` an output, so each further instruction counts: here there are
two, and one for a zero point.

The sums are exact integers, so that the bits of a row depend neither on the number of rows nor on the level
(but for the rounding of the multiply-add where a level has no fused one).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tvm.script.ir_builder import tirx as T

from ....ir.codebooks import codebook as table_of
from .activation import quantized_arguments
from .builder import (
    Buffer,
    Expr,
    Kernel,
    call,
    f32s,
    fma,
    for_each_row,
    i32s,
    let,
    put,
    register,
    register_i32,
    row_tiles,
    scalar,
    splat,
    vec,
)
from .isa import Isa
from .layout import QuantLayout
from .linear import for_each_panel, row_shares
from .panels import LIFT, Operands, Packed, Unpacked, pair_steps, weight_arguments
from .schedule import Schedule, default_schedule
from .tile_layout import as_they_lie, in_pairs, in_tiles
from .tile_pairs import multiply_pairs
from .tile_registers import TILE_ROWS
from .tiles import multiply_tiles

_ROWS_BYTES = 1 << 18
"""Bytes of rows that a thread multiplies by panel after panel: the second cache keeps them."""
_FEW, _FEW_PAIRS, _PAIRS = 64, 3, 8
"""Rows below which a thread takes few pairs of blocks at a time, how many then, at most, and of more rows."""
_TASKS = 8
"""Tasks of few rows, at least, where there are as many pairs."""


def _add_steps(
    ops: Operands,
    row: Expr,
    panel: Packed,
    at: tuple[Expr, Expr],
    steps: int,
    total: list[list[Buffer]],
    dot: str = "",
) -> None:
    """Add the products of `steps` steps from at = (group, first step) to a tile's integer accumulators."""
    group, first = at
    words = ops.layout.words
    for s in range(steps):
        for word, weights in enumerate(panel.words(group, first + s)):
            for t, cells in enumerate(total):
                a = let(ops.word(row + t, (group * ops.layout.steps + first + s) * words + word))
                for cell, w in zip(cells, weights, strict=True):
                    put(cell, call("int32x16", dot or ops.dot, vec(cell, 0), w, a), 0)


def _add_rolled(
    ops: Operands,
    row: Expr,
    panel: Packed,
    at: tuple[Expr, Expr],
    steps: int,
    total: list[list[Buffer]],
    dot: str = "",
) -> None:
    """`_add_steps` as a loop that LLVM does not unroll. Where a product of bytes is several instructions, it
    would sort the sums of several steps by rows, and keep all their weights on the stack meanwhile.
    """
    group, first = at
    with T.serial(0, call("int32", "llmc_opaque", T.int32(steps))) as s:
        _add_steps(ops, row, panel, (group, first + s), 1, total, dot)


def _add_narrow(
    ops: Operands, row: Expr, panel: Packed, at: tuple[Expr, Expr], steps: int, total: list[list[Buffer]]
) -> None:
    """`_add_steps` of at most 8 words with sums in int16: fewer instructions where there is no `vpdpbusd`."""
    narrow = [[register_i32(i32s(0)) for _ in cells] for cells in total]
    _add_rolled(ops, row, panel, at, steps, narrow, "llmc_narrow4")
    for cells, sums in zip(total, narrow, strict=True):
        for cell, sum_ in zip(cells, sums, strict=True):
            bits = T.reinterpret(vec(sum_, 0), dtype="uint8x64")
            put(cell, call("int32x16", "llmc_widen", vec(cell, 0), bits, T.int32(0)), 0)


def _add_group(
    ops: Operands, row: Expr, panel: Packed, group: Expr, total: list[list[Buffer]], dot: str
) -> None:
    """Add the products of a group. `dot`: how the level multiplies bytes (`Isa.dot`)."""
    lay = ops.layout
    add, unit = (_add_rolled, lay.steps) if dot == "maddubs" else (_add_steps, 1)
    if dot == "maddubs" and ops.narrow:
        add = _add_narrow
        unit = next(u for u in (4, 2, 1) if lay.steps % u == 0 and u * lay.words <= 8)
    if lay.steps // unit <= 8:
        for s in range(0, lay.steps, unit):
            add(ops, row, panel, (group, T.int32(s)), unit, total)
    else:
        with T.serial(0, lay.steps // unit) as s:
            add(ops, row, panel, (group, s * unit), unit, total)


def _pair_totals(ops: Operands, row: Expr, rows: int, panel: Packed, group: Expr) -> list[list[Buffer]]:
    """The totals of a group for `Operands.paired`, two rows at once; an odd last one beside zeros."""
    lay, count = ops.layout, panel.count
    halves = [[register_i32(i32s(0)) for _ in range(count)] for _ in range(rows + rows % 2)]
    unit = pair_steps(lay)

    def add(u: Expr) -> None:
        words = [word for j in range(unit) for word in panel.words(group, u * unit + j)]
        for i in range(0, len(words), 2):
            at = ((group * lay.steps + u * unit) * lay.words + i) * 4
            for t in range(0, rows, 2):
                first, second = (
                    let(T.reinterpret(vec(ops.a, row + t + j, at, lanes=8), dtype="int64"))
                    if t + j < rows
                    else T.int64(0)
                    for j in range(2)
                )
                for j in range(2):  # columns 0 … 7, then 8 … 15
                    for cell, w in zip(halves[t + j], words[i + j], strict=True):
                        put(cell, call("int32x16", "llmc_mmla", vec(cell, 0), w, first, second), 0)

    with T.serial(0, lay.steps // unit) as u:
        add(u)
    total = _start(ops, row, rows, panel, group)
    for t, cells in enumerate(total):
        which, low, high = ("first", "second")[t % 2], halves[t - t % 2], halves[t - t % 2 + 1]
        for c, cell in enumerate(cells):
            own = call("int32x16", f"llmc_row_{which}", vec(low[c], 0), vec(high[c], 0))
            put(cell, vec(cell, 0) + own, 0)
    return total


def _multiply(ops: Operands, row: Expr, rows: int, panel: Packed, dot: str) -> None:
    """One tile: `rows` tokens by the panel's blocks."""
    lay, count = ops.layout, panel.count
    for t in range(rows):
        for c in range(count):
            ops.expect(row + t, panel.first + c)
    acc = [[register(f32s(0)) for _ in range(count)] for _ in range(rows)]
    with T.serial(0, lay.groups) as g:
        if ops.paired and isinstance(panel, Unpacked):
            total = _pair_totals(ops, row, rows, panel, g)
        else:
            total = _start(ops, row, rows, panel, g)
            _add_group(ops, row, panel, g, total, dot)
        _finish_group(ops, row, panel, g, total, acc, range(count))
    for t in range(rows):
        for c, total in enumerate(panel.add_apart([let(vec(x, 0)) for x in acc[t]], row + t, range(count))):
            ops.write(total, row + t, panel.first + c)


def _start(ops: Operands, row: Expr, rows: int, panel: Packed, group: Expr) -> list[list[Buffer]]:
    """Integer accumulators; LIFT and what zero points take off for all tokens alike are where they start."""
    if isinstance(panel, Unpacked) and ops.shifted:
        starts = [let(panel.start(group, c)) for c in range(panel.count)]
        return [[register_i32(start) for start in starts] for _ in range(rows)]
    total: list[list[Buffer]] = []
    for t in range(rows):
        initial = i32s(0)
        sum_ = ops.sums[row + t, group]
        if ops.lifted:
            lift = f32s(LIFT)
            if ops.constant:
                lift = fma(splat(sum_), f32s(-ops.constant), lift)
            initial = let(T.reinterpret(lift, dtype="int32x16"))
        elif ops.constant:
            initial = let(splat(T.Cast("int32", sum_) * T.int32(-ops.constant)))
        total.append([register_i32(initial) for _ in range(panel.count)])
    return total


def _finish_group(
    ops: Operands,
    row: Expr,
    panel: Packed,
    group: Expr,
    total: Iterable[list[Buffer]],
    acc: list[list[Buffer]],
    columns: Sequence[Expr],
) -> None:
    """For those blocks of the panel: acc += a_scale · (scale · float(total - zero_point · sum)), or
    a_scale · (scale · total + minimum · sum).
    """
    scale = [let(panel.scale(group, c)) for c in columns]
    lift = [let(panel.lift(group, c)) if ops.lifted else f32s(0) for c in columns]
    zero = [let(panel.zero(group, c)) for c in columns] if ops.corrects else None
    for t, row_total in enumerate(total):
        factor = let(splat(ops.a_scale[row + t, group]))
        sum_ = let(splat(ops.sums[row + t, group])) if zero is not None else None
        for c, cell in enumerate(row_total):
            # A fused multiply-add with 0 is a rounded product that nothing fuses with: LLVM might fuse
            # `a * b` in one tile and not in another.
            if zero is not None and ops.minimum:
                whole = T.Cast("float32x16", vec(cell, 0))
                scaled = fma(scale[c], whole, fma(zero[c], sum_, f32s(0)))
            else:
                whole = _corrected(ops, vec(cell, 0), None if zero is None else zero[c], sum_)
                scaled = fma(scale[c], whole, lift[c])
            put(acc[t][c], fma(factor, scaled, vec(acc[t][c], 0)), 0)


def _corrected(ops: Operands, total: Expr, zero: Expr | None, sum_: Expr | None) -> Expr:
    """total - zero_point · sum as a float, plus LIFT where totals are counted from there.

    `zero` is the negative zero point.
    """
    if zero is not None and not ops.float_correction:
        return T.Cast("float32x16", total + zero * T.Cast("int32x16", sum_))
    value = T.reinterpret(total, dtype="float32x16") if ops.lifted else T.Cast("float32x16", total)
    return value if zero is None else fma(zero, sum_, value)


@dataclass(frozen=True)
class Plan:
    """How a kernel goes about its products."""

    ops: Operands
    isa: Isa
    schedule: Schedule

    @staticmethod
    def make(ops: Operands, isa: Isa, schedule: Schedule | None) -> Plan:
        """`schedule` None: what is shipped."""
        chosen = schedule or default_schedule(isa, ops.layout, tiles=in_tiles(isa, ops.layout))
        return Plan(replace(ops, ahead=chosen.ahead), isa, chosen)

    @property
    def tiles(self) -> bool:
        """Whether many rows are multiplied in tile registers."""
        return in_tiles(self.isa, self.ops.layout)

    @property
    def as_they_lie(self) -> bool:
        """Whether tile registers take panels as they lie in memory."""
        return self.tiles and as_they_lie(self.ops.layout)

    @property
    def many(self) -> int | None:
        """Rows from which on panels are unpacked first; None where that never pays. Tiles have 16 rows."""
        least = max(self.schedule.unpack, TILE_ROWS) if self.tiles else self.schedule.unpack
        return least or None

    @property
    def width(self) -> int:
        """Blocks of a panel."""
        return self.schedule.width

    def few(self, tokens: Expr) -> None:
        """All panels as they lie in memory."""
        # Panels that are wide for tiles would be too wide for registers.
        width = min(self.width, 2) if self.tiles else self.width

        def direct(first: Expr, count: int) -> None:
            self.multiply_packed((T.int32(0), tokens), Packed(self.ops, first, count))

        for_each_panel(self.ops.layout.blocks, width, direct)

    def given(self, tokens: Expr, used: Expr | None = None) -> Operands:
        """The operands as unpacked panels are multiplied by. `used`: how many tokens are, where not all."""
        if self.tiles:
            return replace(self.ops, signed=True, as_they_lie=self.as_they_lie)
        if self.isa.pairs_rows:
            return replace(self.ops, paired=pair_steps(self.ops.layout) > 0)
        if self.isa.dot in ("vnni512", "vnni256"):
            return _with_unsigned(self.ops, tokens, tokens if used is None else used)
        return self.ops

    def panel(self, given: Operands, first: Expr, count: int) -> Packed:
        """A panel that many rows are multiplied by."""
        return (Packed if self.as_they_lie else Unpacked)(given, first, count)

    def multiply_many(self, rows: tuple[Expr, Expr], panel: Packed) -> None:
        """Rows [first, stop) by such a panel; in tiles `stop` is 16 at least."""
        if not isinstance(panel, Unpacked) or (self.tiles and in_pairs(self.ops.layout)):
            multiply_pairs(rows, [panel], finish_block)
        elif self.tiles:
            multiply_tiles(rows, [panel], finish_block)
        else:
            self.multiply_unpacked(rows, panel)

    def multiply_packed(self, rows: tuple[Expr, Expr], panel: Packed) -> None:
        """Rows [first, stop) by a panel as it lies in memory."""
        first, stop = rows
        row_tiles(
            stop - first,
            self.schedule.few,
            lambda row, count: self._multiply(panel.ops, first + row, count, panel),
        )

    def multiply_unpacked(self, rows: tuple[Expr, Expr], panel: Unpacked) -> None:
        """Rows [first, stop) by a panel, by vectors."""
        sizes = self.schedule.many
        first, stop = rows
        row_tiles(
            stop - first, sizes, lambda row, count: self._multiply(panel.ops, first + row, count, panel)
        )

    def _multiply(self, ops: Operands, row: Expr, rows: int, panel: Packed) -> None:
        _multiply(ops, row, rows, panel, self.isa.dot)


def _products(plan: Plan, tokens: Expr) -> None:
    """All panels of the weight: read as they lie for few rows; for many, unpacked first and multiplied by
    vectors or in tiles.
    """

    def many() -> None:
        given, blocks = plan.given(tokens), plan.ops.layout.blocks

        def panel(first: Expr, count: int) -> None:
            plan.multiply_many((T.int32(0), tokens), plan.panel(given, first, count))

        if plan.as_they_lie:
            _as_they_lie(given, tokens)
        else:
            for_each_panel(blocks, plan.width, panel)

    if plan.many is None:
        plan.few(tokens)
        return
    with T.If(tokens < plan.many):
        with T.Then():
            plan.few(tokens)
        with T.Else():
            many()


def _as_they_lie(given: Operands, tokens: Expr) -> None:
    """In tile registers, from the weight itself: parallel over (rows, pairs of blocks), since nothing is lost
    where several threads read a panel, and each has its own of the rows near it.
    """
    lay = given.layout
    pairs = (lay.blocks + 1) // 2
    count, share = row_shares(tokens, max(32, _ROWS_BYTES // lay.k_padded // 32 * 32))
    # Of few rows fewer, so that threads finish together; but what is fetched ahead is of the next pair, which
    # another thread may take where it is of the next task.
    few = max(1, min(_FEW_PAIRS, pairs // _TASKS))
    each = let(T.Select(tokens < _FEW, T.int32(few), T.int32(min(pairs, _PAIRS))))
    parts = let(T.floordiv(pairs + each - 1, each))
    with T.parallel(0, count * parts) as w:
        first = let(T.floordiv(w, parts) * share)
        begin = let(T.floormod(w, parts) * each)
        rows = _hidden(first), _hidden(T.min(first + share, tokens))
        span = _hidden(begin), _hidden(T.min(begin + each, T.int32(pairs)))
        multiply_pairs(rows, [Packed(given, T.int32(0), lay.blocks)], finish_block, pairs=span)


def _hidden(value: Expr) -> Expr:
    """An int32 of which the simplifier knows nothing: it spends seconds on quotients by what is computed."""
    return scalar(value, "int32")[0]


def finish_block(
    panel: Packed, row: Expr, c: Expr, group: Expr, totals: Iterable[list[Buffer]], sums: list[list[Buffer]]
) -> None:
    """For `multiply_tiles` and `multiply_pairs`."""
    _finish_group(panel.ops, row, panel, group, totals, sums, [c])


def _with_unsigned(ops: Operands, tokens: Expr, used: Expr) -> Operands:
    """The operands with activations as a + 128 in memory of this call, for weights with a sign; those of the
    first `used` tokens.
    """
    width = ops.layout.k_padded
    unsigned = T.alloc_buffer((tokens, width), "uint8")

    def row(t: Expr) -> None:
        with T.serial(0, width // 8) as i:
            signed = T.reinterpret(vec(ops.a, t, i * 8, lanes=8), dtype="uint8x8")
            put(unsigned, T.bitwise_xor(signed, T.broadcast(T.uint8(128), 8)), t, i * 8, lanes=8)

    for_each_row(used, width, row)
    return replace(ops, a=unsigned, signed=True, shifted=True)


def quantized_operands(kernel: Kernel, lay: QuantLayout, bias: bool, apart: int) -> Operands:
    """The first parameters of a kernel that multiplies by a quantized weight; residual and out are None."""
    rows = quantized_arguments(kernel, lay, apart=apart)
    return Operands(
        lay,
        kernel.isa,
        rows.a,
        rows.sums,
        rows.scale,
        *weight_arguments(kernel, lay),
        kernel.argument("bias", (lay.n,), "float32") if bias else None,
        None,
        None,
        apart,
    )


def make_quantized_linear(
    *,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    zero_point: str | None = None,
    codebook: str | None = None,
    scale_dtype: str = "float16",
    super_group: int = 0,
    bias: bool = False,
    residual: bool = False,
    apart: int = 0,
    schedule: Schedule | None = None,
    isa: str,
) -> Any:
    """out = Σ_g a_scale · scale · (a · q - zero_point · sums) (+ bias) (+ residual), or with a minimum Σ_g
    a_scale · (scale · a · q + minimum · sums).

    With L the QuantLayout of these: a int8 [T, L.k_padded], sums and a_scale float32 [T, L.groups + apart]
    from `quantize_activation`; weight uint8 L.weight_shape; scale L.scale_storage L.scale_shape;
    zero_point L.zero_storage L.zero_shape, or absent and 2^(bits-1); bias float32 [n]; residual and out
    float32 [T, n]. A codebook is one of integers. `schedule` None: what is shipped.
    """
    kernel = Kernel("quantized_linear", isa)
    lay = QuantLayout(n, k, bits, group_size, codebook, scale_dtype, zero_point, super_group)
    with kernel:
        tokens = kernel.symbol("T")
        ops = quantized_operands(kernel, lay, bias, apart)
        ops = replace(
            ops,
            residual=kernel.argument("residual", (tokens, n), "float32") if residual else None,
            out=kernel.argument("out", (tokens, n), "float32"),
        )
        with kernel.body():
            _products(Plan.make(ops, kernel.isa, schedule), tokens)
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
    """float64 [T, n] from unpacked q uint8 [n, k], scale [n, groups], zero_point [n, groups] (of
    `layout.zero_point`'s dtype) and padded activations, of which some are kept apart where sums are longer.
    """
    out = np.zeros((a.shape[0], q.shape[0]))
    values = q.astype(np.float64)
    if layout.codebook is not None:
        values = table_of(layout.codebook)[q].astype(np.float64)
    elif zero_point is None:
        values -= 1 << (layout.bits - 1)
    for g in range(layout.groups):
        columns = values[:, g * layout.real_group : (g + 1) * layout.real_group]
        part = a[:, g * layout.group : g * layout.group + columns.shape[1]].astype(np.float64)
        total = (part @ columns.T) * scale[None, :, g].astype(np.float64)
        if zero_point is not None:
            offset = sums[:, g, None] * zero_point[None, :, g].astype(np.float64)
            minimum = layout.zero_point != "uint8"
            total += offset if minimum else -offset * scale[None, :, g].astype(np.float64)
        out += total * a_scale[:, g, None].astype(np.float64)
    for at in range(layout.groups, sums.shape[1]):
        column = sums[:, at].astype(int)
        g = column // layout.real_group
        weight = values[:, column] * scale[:, g].astype(np.float64)
        if zero_point is not None:
            offset = zero_point[:, g].astype(np.float64)
            weight += offset if layout.zero_point != "uint8" else -offset * scale[:, g].astype(np.float64)
        out += a_scale[:, at, None].astype(np.float64) * weight.T
    return out
