"""`quantized_gated_mlp`: the first half of a gated MLP in one kernel, activation(x · gateᵀ) · (x · upᵀ) of
quantized weights, quantized for those that read it.

A thread multiplies some rows by those blocks of both weights that make a group of the result, and leaves the
group behind as bytes: the products, eight times as large, stay in the nearest caches. The bits are those of
`quantized_linear`, then `gated_mlp`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tvm.script.ir_builder import tirx as T

from .activation import (
    Quantized,
    activation_layout,
    elements_held,
    fits_producer,
    quantize_as_made,
    quantize_group,
    quantize_held,
    quantized_arguments,
)
from .builder import LANES, Buffer, Expr, Kernel, for_each_row_beside, let, put, vec
from .elementwise import COST, activation_function
from .layout import QuantLayout
from .linear import row_shares
from .panels import Held, Operands, Unpacked
from .quantized import Plan, finish_block, quantized_operands
from .rotation import store_made
from .schedule import Schedule
from .tile_layout import in_pairs
from .tile_pairs import After, multiply_pairs
from .tile_registers import TILE_ROWS
from .tiles import multiply_tiles

_ROWS = 256
"""Rows that a thread multiplies, at most; a power of 2. More would leave threads without work."""
_HELD = 1 << 16
"""Products or results that are held, at most: 256 kB, which the second cache keeps."""
_SPREAD = 1 << 20
"""Bytes of weights by which some rows are multiplied before others are, at most, for the same reason."""


def fits_gated(width: int, lay: QuantLayout) -> bool:
    """Whether the kernel can make a result of `width` for weights with the layout of activations `lay`."""
    return fits_producer(lay) and width % lay.group == 0


def _make(function: Callable[[Expr], Expr], x: Buffer, row: Expr, gate: Expr, up: Expr) -> Expr:
    """16 elements from columns `gate` and `up` of a row."""
    return function(vec(x, row, gate)) * vec(x, row, up)


def _fused(plan: Plan, tokens: Expr, to: Quantized, function: Callable[[Expr], Expr]) -> None:
    """Parallel over (rows, group of the result)."""
    given, group = plan.given(tokens), to.layout.group
    pairs = plan.tiles and in_pairs(plan.ops.layout)
    held = group if pairs else 2 * group  # of a row
    rows = min(_ROWS, 1 << (_HELD // held).bit_length() - 1)
    count, share = row_shares(tokens, rows)

    with T.parallel(0, count * to.layout.groups) as w:
        g = let(T.floormod(w, T.int32(to.layout.groups)))
        first = let(T.floordiv(w, T.int32(to.layout.groups)) * share)
        stop = let(T.min(first + share, tokens))
        task = _Task(plan, given, to, function, first, stop, rows, g)
        task.in_pairs() if pairs else task.one_by_one()


@dataclass(frozen=True)
class _Task:
    """Group `g` of the result, of rows [first, stop), which are `rows` at most."""

    plan: Plan
    given: Operands
    to: Quantized
    function: Callable[[Expr], Expr]
    first: Expr
    stop: Expr
    rows: int
    g: Expr

    @property
    def span(self) -> tuple[Expr, Expr]:
        return self.first, self.stop

    @property
    def blocks(self) -> int:
        """Of gate and of up, that make a group."""
        return self.to.layout.group // LANES

    def block(self, start: int) -> Expr:
        """The first of them, of the weight whose columns begin at `start`: 0 for gate, K for up."""
        return let(start // LANES + self.g * self.blocks)

    def place(self, row: Expr) -> Expr:
        """Where a row is held."""
        return T.floormod(row, T.int32(self.rows))

    def one_by_one(self) -> None:
        """The products by gate and by up are held, then multiplied."""
        plan, to, blocks = self.plan, self.to, self.blocks
        group, width = to.layout.group, to.layout.k
        # A panel for vectors is as wide as any: one block's sums alone would wait for each other.
        together = 1 if plan.tiles else max(n for n in range(1, plan.width + 1) if blocks % n == 0)
        products = T.alloc_buffer((self.rows, 2 * group), "float32")
        with T.serial(0, blocks // together) as c:
            panels: list[Unpacked] = []
            for start, column in ((0, 0), (width, group)):
                block = self.block(start)
                held = Held(products, self.rows, block, column)
                panels.append(Unpacked(replace(self.given, held=held), block + c * together, together))
            if plan.tiles:
                multiply_tiles(self.span, panels, finish_block)
            else:
                for one in panels:
                    plan.multiply_unpacked(self.span, one)
        with T.serial(0, self.stop - self.first) as t:
            at = let(self.place(self.first + t))

            def make(i: Expr, at: Expr = at) -> Expr:
                return _make(self.function, products, at, i, group + i)

            store_made(group, make, products, lambda i, at=at: (at, i), to.rotate)
        with T.serial(0, self.stop - self.first) as t:
            at = let(self.place(self.first + t))
            quantize_group(to, self.first + t, self.g, lambda i: vec(products, at, i))

    def in_pairs(self) -> None:
        """By two tiles at a time, whose results of gate and up are multiplied before they are held."""
        plan, given, to, blocks = self.plan, self.given, self.to, self.blocks
        fits = max(1, _SPREAD // (2 * LANES * plan.ops.layout.k_padded))
        together = max(n for n in range(1, blocks + 1) if blocks % n == 0 and n <= fits)
        whole = together == blocks
        # Rows that stand a power of two apart would meet in few sets of a cache.
        stride = to.layout.group + LANES
        held = T.alloc_buffer(((2 * TILE_ROWS if whole else self.rows) * stride,), "float32")
        starts = [self.block(start) for start in (0, to.layout.k)]

        def multiply(c: Expr, after: After | None) -> None:
            panels = [plan.panel(given, start + c, together) for start in starts]

            def write(row: Expr, t: Expr, block: Expr, values: Sequence[Expr]) -> None:
                if given.bias is not None:
                    values = [
                        value + vec(given.bias, (start + c + block) * LANES)
                        for value, start in zip(values, starts, strict=True)
                    ]
                gate, up = values
                at = t if whole else self.place(row)
                put(held, self.function(let(gate)) * up, at * stride + (c + block) * LANES)

            multiply_pairs(self.span, panels, finish_block, write, after)

        def after(row: Expr, count: int) -> None:
            with T.serial(0, count) as t:
                quantize_held(to, row + t, self.g, held, t * stride)

        if whole:
            multiply(T.int32(0), after)
            return
        with T.serial(0, blocks // together) as c:
            multiply(c * together, None)
        with T.serial(0, self.stop - self.first) as t:
            quantize_held(to, self.first + t, self.g, held, let(self.place(self.first + t) * stride))


def make_quantized_gated_mlp(
    *,
    width: int,
    k: int,
    bits: int,
    group_size: int,
    zero_point: str | None = None,
    codebook: str | None = None,
    scale_dtype: str = "float16",
    super_group: int = 0,
    bias: bool = False,
    apart: int = 0,
    activation: str,
    quantize: tuple[int, int],
    rotate: int = 0,
    schedule: Schedule | None = None,
    isa: str,
) -> Any:
    """gated_mlp(quantized_linear(x)), quantized: operands as in `make_quantized_linear` for n = 2 · width =
    [gate, up], results as in `make_gated_mlp` with quantize = (group_size, align) and `rotate`; for
    `fits_gated`.
    """
    function = activation_function(activation, rough=True)
    kernel = Kernel("quantized_gated_mlp", isa)
    lay = QuantLayout(2 * width, k, bits, group_size, codebook, scale_dtype, zero_point, super_group)
    with kernel:
        tokens = kernel.symbol("T")
        ops = quantized_operands(kernel, lay, bias, apart)
        to = quantized_arguments(kernel, activation_layout(width, *quantize), "out_", rotate=rotate)

        def few() -> None:
            products = T.alloc_buffer((tokens, 2 * width), "float32")
            replace(plan, ops=replace(plan.ops, out=products)).few(tokens)

            def row(t: Expr, held: Buffer) -> None:
                quantize_as_made(to, t, held, lambda i: _make(function, products, t, i, width + i))

            for_each_row_beside(tokens, COST * width, elements_held(to.layout, 0), row)

        plan = Plan.make(ops, kernel.isa, schedule)
        with kernel.body():
            if plan.many is None:
                few()
            else:
                with T.If(tokens < plan.many):
                    with T.Then():
                        few()
                    with T.Else():
                        _fused(plan, tokens, to, function)
    return kernel.function
