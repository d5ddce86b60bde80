"""`quantized_gated_mlp`: the first half of a gated MLP in one kernel, activation(x · gateᵀ) · (x · upᵀ) of
quantized weights, quantized for those that read it.

A thread multiplies some rows by those blocks of both weights that make a group of the result, and leaves the
group behind as bytes: the products, eight times as large, stay in the nearest caches. The bits are those of
`quantized_linear`, then `gated_mlp`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tvm.script.ir_builder import tirx as T

from .activation import (
    Quantized,
    activation_layout,
    elements_held,
    fits_producer,
    quantize_as_made,
    quantize_group,
    quantized_arguments,
)
from .builder import LANES, Buffer, Expr, Kernel, for_each_row_beside, let, put, vec
from .elementwise import COST, activation_function
from .layout import QuantLayout
from .panels import Held, Unpacked
from .quantized import Plan, finish_groups, quantized_operands
from .rotation import store_made
from .schedule import Schedule
from .tile_registers import TILE_ROWS
from .tiles import multiply_tiles

_ROWS = 256
"""Rows whose products are held, at most; a power of 2. More would leave threads without work."""
_HELD = 1 << 15
"""Results of which products are held, at most: 256 kB, which the second cache keeps."""


def fits_gated(width: int, lay: QuantLayout) -> bool:
    """Whether the kernel can make a result of `width` for weights with the layout of activations `lay`."""
    return fits_producer(lay) and width % lay.group == 0


def _make(function: Callable[[Expr], Expr], x: Buffer, row: Expr, gate: Expr, up: Expr) -> Expr:
    """16 elements from columns `gate` and `up` of a row."""
    return function(vec(x, row, gate)) * vec(x, row, up)


def _fused(plan: Plan, tokens: Expr, to: Quantized, function: Callable[[Expr], Expr]) -> None:
    """Parallel over (rows, group of the result)."""
    given, group, width = plan.given(tokens), to.layout.group, to.layout.k
    blocks, rows = group // LANES, min(_ROWS, 1 << (_HELD // group).bit_length() - 1)
    # A panel for vectors is as wide as any: one block's sums alone would wait for each other.
    together = 1 if plan.tiles else max(n for n in range(1, plan.width + 1) if blocks % n == 0)
    count = let(T.floordiv(tokens + (rows - 1), T.int32(rows)))
    share = T.floordiv(tokens + count - 1, count)
    share = let(T.floordiv(share + (TILE_ROWS - 1), T.int32(TILE_ROWS)) * TILE_ROWS)

    with T.parallel(0, count * to.layout.groups) as w:
        g = let(T.floormod(w, T.int32(to.layout.groups)))
        first = let(T.floordiv(w, T.int32(to.layout.groups)) * share)
        stop = let(T.min(first + share, tokens))
        products = T.alloc_buffer((rows, 2 * group), "float32")

        def panel(start: int, column: int, c: Expr) -> Unpacked:
            block = let(start // LANES + g * blocks)
            held = Held(products, rows, block, column)
            return Unpacked(replace(given, held=held), block + c * together, together)

        with T.serial(0, blocks // together) as c:
            panels = [panel(0, 0, c), panel(width, group, c)]
            if plan.tiles:
                multiply_tiles((first, stop), panels, finish_groups)
            else:
                for one in panels:
                    plan.multiply_unpacked((first, stop), one)
        with T.serial(0, stop - first) as t:
            at = let(T.floormod(first + t, T.int32(rows)))
            store_made(
                group,
                lambda i, at=at: _make(function, products, at, i, group + i),
                lambda i, value, at=at: put(products, value, at, i),
                to.rotate,
            )
        with T.serial(0, stop - first) as t:
            at = let(T.floormod(first + t, T.int32(rows)))
            quantize_group(to, first + t, g, lambda i: vec(products, at, i))


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
    function = activation_function(activation)
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
