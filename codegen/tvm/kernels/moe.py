"""Mixtures of experts: the rows of each expert are brought together, and multiplied by its weights alone.

A pair is a token and one of its k experts: pair t · k + j, S = T · k of them. `moe_rows` sorts the pairs by
expert (a counting sort: those of an expert stay in order) and lists the experts that anybody chose; products
run over these and their rows, gate, and `moe_combine` adds a token's k results in the order of j. A row is
computed as `linear` and `quantized_linear` compute it: its bits depend on no other row.

    indices → moe_rows → place [S], source [S], offsets [E+1], active [E+1]
    x       → moe_linear (rows of x by `source`) → moe_gate → moe_linear → moe_combine

What it costs is what the chosen experts cost: an expert without rows is in no list.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tvm.script.ir_builder import tirx as T

from .activation import quantized_arguments
from .builder import (
    LANES,
    Buffer,
    Expr,
    Kernel,
    f32s,
    fma,
    for_each_row,
    for_each_vector,
    let,
    padded,
    put,
    put1,
    put_part,
    row_tiles,
    scalar,
    splat,
    vec,
)
from .elementwise import COST, activation_function, put_active, put_gated
from .layout import ROWS, QuantLayout, packed_shape, round_up
from .linear import float_products, one_panel, store_block, tile_sizes
from .panels import Operands, Packed, weight_arguments
from .quantized import Plan
from .vector_math import sigmoid


def make_moe_rows(*, experts: int, isa: str) -> Any:
    """The pairs of each expert together.

    indices int32 [S] → place int32 [S], where each pair stands; source int32 [S], the pair that stands
    there; offsets int32 [experts + 1], the first place of each expert; active int32 [experts + 1], how many
    experts were chosen, and which. An index that is no expert is taken as the nearest one.
    """
    kernel = Kernel("moe_rows", isa)
    with kernel:
        pairs = kernel.symbol("S")
        indices = kernel.argument("indices", (pairs,), "int32")
        place = kernel.argument("place", (pairs,), "int32")
        source = kernel.argument("source", (pairs,), "int32")
        offsets = kernel.argument("offsets", (experts + 1,), "int32")
        active = kernel.argument("active", (experts + 1,), "int32")

        def expert(p: Expr) -> Expr:
            return let(T.max(T.min(indices[p], T.int32(experts - 1)), T.int32(0)))

        with kernel.body():
            following: Buffer = T.alloc_buffer((experts,), "int32")
            count, total = scalar(T.int32(0), "int32"), scalar(T.int32(0), "int32")
            with T.serial(0, experts) as e:
                put1(following, T.int32(0), e)
            with T.serial(0, pairs) as p:
                e = expert(p)
                put1(following, following[e] + 1, e)
            put1(offsets, T.int32(0), 0)
            with T.serial(0, experts) as e:
                own = let(following[e])
                put1(following, total[0], e)
                put1(total, total[0] + own, 0)
                put1(offsets, total[0], e + 1)
                with T.If(own > 0), T.Then():
                    put1(count, count[0] + 1, 0)
                    put1(active, e, count[0])
            put1(active, count[0], 0)
            with T.serial(0, pairs) as p:
                e = expert(p)
                put1(place, following[e], p)
                put1(source, p, following[e])
                put1(following, following[e] + 1, e)
    return kernel.function


Panel = Callable[[Expr, Expr, Expr, Expr, int], None]
"""(first row, stop, first block of the expert, first block of the panel, blocks): one panel of an expert."""


def _for_each_panel(grouping: tuple[Buffer, Buffer], blocks: int, width: int, body: Panel) -> None:
    """Parallel over the panels of all chosen experts; `grouping`: offsets and active."""
    offsets, active = grouping
    panels = -(-blocks // width)

    with T.parallel(0, active[0] * panels) as w:
        e = let(active[1 + T.floordiv(w, T.int32(panels))])
        p = let(T.floormod(w, T.int32(panels)))
        first, stop = let(offsets[e]), let(offsets[e + 1])
        origin = let(e * blocks)
        start = let(origin + p * width)
        one_panel(p, blocks, width, lambda count: body(first, stop, origin, start, count))


def _grouping(kernel: Kernel, experts: int) -> tuple[Buffer, Buffer]:
    """The parameters offsets and active."""
    offsets = kernel.argument("offsets", (experts + 1,), "int32")
    return offsets, kernel.argument("active", (experts + 1,), "int32")


def make_moe_linear(
    *, n: int, k: int, experts: int, top_k: int = 0, weight_dtype: str = "float32", isa: str
) -> Any:
    """out[s] = x[s] · weight[expert of s]ᵀ, or where top_k is given x[source[s] // top_k].

    x float32 [S, k] or [T, k]; source int32 [S], offsets and active as of `moe_rows`; weight `weight_dtype`
    [experts · ceil(n/16), k, 16]; out float32 [S, n].
    """
    kernel = Kernel("moe_linear", isa)
    sizes, width = tile_sizes(kernel.isa)
    blocks = packed_shape(n, k)[0]
    with kernel:
        pairs = kernel.symbol("S")
        x = kernel.argument("x", (kernel.symbol("T") if top_k else pairs, k), "float32")
        source = kernel.argument("source", (pairs,), "int32")
        grouping = _grouping(kernel, experts)
        weight = kernel.argument("weight", (experts * blocks, k, ROWS), weight_dtype)
        out = kernel.argument("out", (pairs, n), "float32")

        def panel(first: Expr, stop: Expr, origin: Expr, start: Expr, count: int) -> None:
            def tile(row: Expr, rows: int) -> None:
                own = [first + row + t for t in range(rows)]
                given = [let(T.floordiv(source[s], T.int32(top_k))) for s in own] if top_k else own
                products = float_products(x, weight, weight_dtype, given, start, count)
                for s, of_row in zip(own, products, strict=True):
                    for c, product in enumerate(of_row):
                        store_block(product, out, s, start + c - origin, n, None, None)

            row_tiles(stop - first, sizes, tile)

        with kernel.body():
            _for_each_panel(grouping, blocks, min(width, blocks), panel)
    return kernel.function


def make_moe_gather(*, k: int, bits: int, group_size: int, top_k: int, apart: int = 0, isa: str) -> Any:
    """The quantized activations of the token of each pair, in the order of experts.

    a, sums, a_scale of `quantize_activation` for weights of these bits and groups, of T tokens; source int32
    [S] → the same of S rows.
    """
    lay = QuantLayout(1, k, bits, group_size)
    kernel = Kernel("moe_gather", isa)
    with kernel:
        given, pairs = quantized_arguments(kernel, lay, apart=apart), kernel.symbol("S")
        source = kernel.argument("source", (pairs,), "int32")
        made = quantized_arguments(kernel, lay, "out_", rows="S", apart=apart)

        def row(s: Expr) -> None:
            t = let(T.floordiv(source[s], T.int32(top_k)))
            with T.serial(0, lay.k_padded // 8) as i:
                put(made.a, vec(given.a, t, i * 8, lanes=8), s, i * 8, lanes=8)
            with T.serial(0, lay.groups + apart) as g:
                put1(made.sums, given.sums[t, g], s, g)
                put1(made.scale, given.scale[t, g], s, g)

        with kernel.body():
            for_each_row(pairs, lay.k_padded // 4, row)
    return kernel.function


def make_moe_quantized_linear(
    *,
    n: int,
    k: int,
    experts: int,
    bits: int,
    group_size: int,
    zero_point: str | None = None,
    codebook: str | None = None,
    scale_dtype: str = "float16",
    super_group: int = 0,
    apart: int = 0,
    isa: str,
) -> Any:
    """`quantized_linear` of S rows, each by the weights of its expert.

    a, sums, a_scale of S rows; offsets and active as of `moe_rows`; weight, scale and zero_point as of
    `quantized_linear`, those of all experts one below the other; out float32 [S, n].
    """
    kernel = Kernel("moe_quantized_linear", isa)
    form = (k, bits, group_size, codebook, scale_dtype, zero_point, super_group)
    lay, whole = QuantLayout(n, *form), QuantLayout(experts * round_up(n, ROWS), *form)
    with kernel:
        pairs = kernel.symbol("S")
        rows = quantized_arguments(kernel, lay, rows="S", apart=apart)
        grouping = _grouping(kernel, experts)
        weights = weight_arguments(kernel, whole)
        out = kernel.argument("out", (pairs, n), "float32")
        plan = Plan.make(
            Operands(lay, kernel.isa, rows.a, rows.sums, rows.scale, *weights, None, None, out, apart),
            kernel.isa,
            None,
        )

        def panel(first: Expr, stop: Expr, origin: Expr, start: Expr, count: int) -> None:
            ops = replace(plan.ops, origin=origin)

            def many() -> None:
                some = replace(given, origin=origin)
                plan.multiply_many((first, stop), plan.panel(some, start, count))

            if plan.many is None:
                plan.multiply_packed((first, stop), Packed(ops, start, count))
                return
            with T.If(stop - first < plan.many):
                with T.Then():
                    plan.multiply_packed((first, stop), Packed(ops, start, count))
                with T.Else():
                    many()

        with kernel.body():
            # No expert has more rows than there are pairs.
            used = T.Select(pairs < plan.many, T.int32(0), pairs) if plan.many else T.int32(0)
            given = plan.given(pairs, used)
            width = min(plan.width, 2) if plan.tiles else plan.width
            _for_each_panel(grouping, lay.blocks, min(width, lay.blocks), panel)
    return kernel.function


def make_moe_gate(
    *,
    width: int,
    experts: int,
    activation: str,
    alpha: float = 1.0,
    limit: float = 0.0,
    offset: float = 0.0,
    bias: bool = False,
    gated: bool = True,
    limits_active: bool = False,
    isa: str,
) -> Any:
    """out = gate(products + bias of the row's expert), as `ir.ops.moe.Gate` says.

    products float32 [S, wide], 2 · width = [gate, up], or width without a gate; with a bias: source int32 [S]
    of `moe_rows`, indices int32 [S] and bias float32 [experts, wide]; out float32 [S, width].
    """
    function = _function(activation, alpha)
    wide = 2 * width if gated else width
    kernel = Kernel("moe_gate", isa)
    with kernel:
        pairs = kernel.symbol("S")
        x = kernel.argument("products", (pairs, wide), "float32")
        source: Buffer = kernel.argument("source", (pairs,), "int32") if bias else None
        indices: Buffer = kernel.argument("indices", (pairs,), "int32") if bias else None
        b: Buffer = kernel.argument("bias", (experts, wide), "float32") if bias else None
        out = kernel.argument("out", (pairs, width), "float32")

        def both(gate: Expr, up: Expr) -> Expr:
            if limit and not limits_active:
                gate = T.min(gate, f32s(limit))
            active = function(let(gate))
            if limit:
                active = T.min(active, f32s(limit)) if limits_active else active
                up = T.max(T.min(up, f32s(limit)), f32s(-limit))
            return active * (up + f32s(offset) if offset else up)

        def row(s: Expr) -> None:
            e = let(indices[source[s]]) if bias else None

            def read(i: Expr) -> Expr:
                return vec(x, s, i) + vec(b, e, i) if bias else vec(x, s, i)

            def one(i: Expr) -> Expr:
                return x[s, i] + b[e, i] if bias else x[s, i]

            if gated:
                put_gated(out, s, width, both, read, one)
            else:
                put_active(out, s, width, lambda v: function(let(v)), read, one)

        with kernel.body():
            for_each_row(pairs, COST * width, row)
    return kernel.function


def _function(activation: str, alpha: float) -> Callable[[Expr], Expr]:
    """Of 16 lanes, by its name in `ir.ops.moe.GATES`."""
    if activation == "swish":
        return lambda x: x * sigmoid(let(x * f32s(alpha)))
    if activation == "relu2":
        return _positive_squared
    return activation_function(activation)


def _positive_squared(x: Expr) -> Expr:
    positive = let(activation_function("relu")(x))
    return positive * positive


def make_moe_combine(*, width: int, experts: int, top_k: int, bias: bool = False, isa: str) -> Any:
    """out[t] = Σ_j weights[t, j] · (y[place of pair (t, j)] + bias of its expert), in the order of j.

    y float32 [S, width]; place int32 [S]; weights float32 [T, top_k]; with a bias: indices int32 [S] and bias
    float32 [experts, width]; out float32 [T, width].
    """
    kernel = Kernel("moe_combine", isa)
    with kernel:
        tokens, pairs = kernel.symbol("T"), kernel.symbol("S")
        y = kernel.argument("y", (pairs, width), "float32")
        place = kernel.argument("place", (pairs,), "int32")
        weights = kernel.argument("weights", (tokens, top_k), "float32")
        indices: Buffer = kernel.argument("indices", (pairs,), "int32") if bias else None
        b: Buffer = kernel.argument("bias", (experts, width), "float32") if bias else None
        out = kernel.argument("out", (tokens, width), "float32")

        def row(t: Expr) -> None:
            rows = [let(place[t * top_k + j]) for j in range(top_k)]
            chosen = [let(indices[t * top_k + j]) if bias else None for j in range(top_k)]
            factors = [let(splat(weights[t, j])) for j in range(top_k)]

            def total(read: Callable[[Buffer, Expr], Expr]) -> Expr:
                value: Expr = f32s(0)
                for s, e, factor in zip(rows, chosen, factors, strict=True):
                    part = read(y, s) + read(b, e) if bias else read(y, s)
                    value = let(fma(factor, part, value))
                return value

            if width < LANES:
                whole = total(lambda buffer, at: padded(width, lambda i: buffer[at, i]))
                put_part(out, whole, width, t, T.int32(0))
                return
            for_each_vector(width, lambda i: put(out, total(lambda buffer, at: vec(buffer, at, i)), t, i))

        with kernel.body():
            for_each_row(tokens, top_k * width, row)
    return kernel.function
