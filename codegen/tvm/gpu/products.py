"""Kernels that read weights: products and embeddings (`linear.cuh`), mixtures of experts (`experts.cuh`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ....ir.codebooks import codebook
from ..kernels.layout import QuantLayout
from .launches import ACTIVATIONS, FLAT_THREADS, KINDS, ROW_THREADS, flat_launch, per_row_launch, present
from .layout import UNIT, GpuLayout
from .source import Argument, Code, Launch, Size

VARIANTS = ((1, 1, 1, 8), (2, 1, 9, 16), (4, 1, 17, 32))
"""Tokens of a block by 8, tiles of a warp, from how many tokens to how many."""


def weight_parameters(layout: GpuLayout) -> dict[str, Any]:
    """What the templates know of a weight (`P`)."""
    quant = layout.quant
    found: dict[str, Any] = {
        "n": layout.n,
        "k": layout.k,
        "k_padded": layout.k_padded,
        "tiles": layout.tiles,
        "bits": layout.bits,
        "span": layout.span,
        "groups": layout.groups,
        "group_size": layout.group_size,
        "offset": 0 if quant is None else 1 << (quant.bits - 1),
        "zero": quant is not None and quant.zero_point == "uint8",
        "minimum": quant is not None and quant.zero_point in ("float16", "float32"),
        "book": quant is not None and quant.codebook is not None,
        "scale_kind": KINDS["float32" if quant is None else quant.scale_dtype],
        "zero_kind": KINDS.get("float32" if quant is None else str(quant.zero_point), 0),
    }
    book = None if quant is None else quant.codebook
    found["value"] = [0.0, 0.0] if book is None else [float(v) for v in codebook(book)]
    return found


def weight_arguments(layout: GpuLayout, count: int = 1) -> list[Argument]:
    """A weight's arrays, or those of `count` experts."""
    quant = layout.quant
    codes = (count * layout.tiles, *layout.codes_shape[1:])
    if quant is None:
        return [Argument("codes", codes, "float16")]
    groups = (count * layout.tiles, *layout.groups_shape[1:])
    parts = [Argument("codes", codes, "uint8"), Argument("scales", groups, quant.scale_dtype)]
    if quant.zero_point is not None:
        parts.append(Argument("zeros", groups, quant.zero_point))
    return parts


@dataclass(frozen=True)
class Experts:
    """Whose weights stand in one array, and what their rows are made of."""

    count: int
    top_k: int
    """Of a token."""
    per_row: int
    """Pairs that read one row of x: `top_k`, or 0 where each has its own."""


def splits(layout: GpuLayout) -> int:
    """Warps that share out the columns of a product."""
    units = layout.k_padded // UNIT
    return 8 if units >= 24 else 4 if units >= 8 else 2 if units >= 4 else 1


def variants(layout: GpuLayout) -> tuple[tuple[int, int, int, int], ...]:
    """As `VARIANTS`, for any number of tokens. Beside codes stand the sums of their group: of 64 tokens they
    are more than there are registers.
    """
    return (*VARIANTS, (8 if layout.quant is None else 4, 2, 33, 1 << 30))


def product(
    layout: GpuLayout, *, bias: bool = False, residual: bool = False, of: Experts | None = None
) -> Code:
    """x float32 [T, K] by a weight [N, K] (`linear.cuh`), plus bias [N] and residual [T, N] → [T, N].

    `of` experts: x [T, K] or [S, K], source and offsets as `moe_rows` makes them → [S, N].
    """
    n, k, quant, warps = layout.n, layout.k, layout.quant, splits(layout)
    minimum = quant is not None and quant.zero_point in ("float16", "float32")
    rows = "S" if of is not None and not of.per_row else "T"
    weights = weight_arguments(layout, of.count if of is not None else 1)
    arguments = [Argument("x", (rows, k), "float32")]
    if of is not None:
        arguments += [Argument("source", ("S",), "int32"), Argument("offsets", (of.count + 1,), "int32")]
    arguments += weights
    if bias:
        arguments.append(Argument("bias", (n,), "float32"))
    if residual:
        arguments.append(Argument("residual", ("T", n), "float32"))
    arguments.append(Argument("out", ("T" if of is None else "S", n), "float32", True))
    given = present(
        ("halves", True),
        ("factors", True),
        ("sums", minimum),
        ("codes", True),
        ("scales", quant is not None),
        ("zeros", quant is not None and quant.zero_point is not None),
        ("bias", bias),
        ("residual", residual),
        ("out", True),
        (rows, True),
    )
    if of is not None:
        given += ("source", "offsets")
    tokens_of = "T" if of is None else f"(S // {of.top_k})"
    half = present(("x", True), ("halves", True), ("factors", True), ("sums", minimum))
    launches = [per_row_launch("half", "to_half<P>", half, rows)]
    for tokens, tiles, least, most in variants(layout):
        blocks = f"({tokens_of} + {8 * tokens - 1}) // {8 * tokens}"
        grid: tuple[Size, Size, Size] = (-(-layout.tiles // tiles), blocks, 1 if of is None else of.count)
        shared = warps * 8 * tokens * (16 * tiles + 4) * 4
        name, call, when = (
            f"by{8 * tokens}x{tiles}",
            f"product<P, {tokens}, {tiles}>",
            (tokens_of, least, most),
        )
        launches.append(Launch(name, call, given, grid, 32 * warps, shared, when))
    scratch: dict[str, tuple[str, Size]] = {
        "halves": ("u16*", f"({rows} + 63) // 64 * 64 * {2 * layout.k_padded}"),
        "factors": ("float*", f"{rows} * 4"),
    }
    if minimum:
        scratch["sums"] = ("float*", f"{rows} * {4 * layout.groups}")
    parameters = {
        **weight_parameters(layout),
        "bias": bias,
        "residual": residual,
        "splits": warps,
        "threads": ROW_THREADS,
        "experts": 0 if of is None else of.count,
        "per_row": 0 if of is None else of.per_row,
    }
    return Code(tuple(arguments), tuple(launches), parameters, scratch)


def linear(*, n: int, k: int, bias: bool, residual: bool, weight_dtype: str) -> Code:
    del weight_dtype  # whatever it was, it is stored as float16
    return product(GpuLayout(n, k), bias=bias, residual=residual)


def quantized_linear(*, n: int, k: int, bias: bool, residual: bool, **form: Any) -> Code:
    return product(GpuLayout(n, k, QuantLayout(n, k, **form)), bias=bias, residual=residual)


def embedding(*, rows: int, width: int, packed: bool, weight_dtype: str) -> Code:
    ids, out = Argument("ids", ("T",), "int32"), Argument("out", ("T", width), "float32", True)
    if packed:
        layout = GpuLayout(rows, width)
        table = Argument("codes", layout.codes_shape, "float16")
        call = ("ids", "codes", "nullptr", "nullptr", "out")
        return Code(
            (ids, table, out),
            (per_row_launch("rows", "embedding<P>", call, "T"),),
            {**weight_parameters(layout), "threads": ROW_THREADS},
        )
    return Code(
        (ids, Argument("table", (rows, width), weight_dtype), out),
        (per_row_launch("rows", "gather_rows<P>", ("ids", "table", "out", str(rows)), "T"),),
        {"width": width, "kind": KINDS[weight_dtype], "threads": ROW_THREADS},
    )


def quantized_embedding(*, rows: int, width: int, **form: Any) -> Code:
    layout = GpuLayout(rows, width, QuantLayout(rows, width, **form))
    zeros = layout.quant is not None and layout.quant.zero_point is not None
    call = present(("ids", True), ("codes", True), ("scales", True), ("zeros", zeros), ("out", True))
    return Code(
        (
            Argument("ids", ("T",), "int32"),
            *weight_arguments(layout),
            Argument("out", ("T", width), "float32", True),
        ),
        (per_row_launch("rows", "embedding<P>", call, "T"),),
        {**weight_parameters(layout), "threads": ROW_THREADS},
    )


def moe_rows(*, experts: int) -> Code:
    call = ("indices", "place", "source", "offsets", "active", "S")
    return Code(
        (
            Argument("indices", ("S",), "int32"),
            Argument("place", ("S",), "int32", True),
            Argument("source", ("S",), "int32", True),
            Argument("offsets", (experts + 1,), "int32", True),
            Argument("active", (experts + 1,), "int32", True),
        ),
        (Launch("sort", "moe_rows<P>", call, (1, 1, 1), FLAT_THREADS),),
        {"experts": experts, "threads": FLAT_THREADS},
    )


def moe_product(*, n: int, k: int, experts: int, top_k: int, per_row: int, **form: Any) -> Code:
    """The rows of each expert by its weight; `form` of a quantized one."""
    layout = GpuLayout(n, k, QuantLayout(n, k, **form) if form else None)
    return product(layout, of=Experts(experts, top_k, per_row))


def moe_gate(
    *,
    width: int,
    experts: int,
    activation: str,
    alpha: float,
    limit: float,
    offset: float,
    bias: bool,
    gated: bool,
    limits_active: bool = False,
) -> Code:
    products = (2 if gated else 1) * width
    arguments = [Argument("products", ("S", products), "float32")]
    if bias:
        arguments += [
            Argument("source", ("S",), "int32"),
            Argument("indices", ("S",), "int32"),
            Argument("up_bias", (experts, products), "float32"),
        ]
    given = present(
        *(
            ("products", True),
            ("source", bias),
            ("indices", bias),
            ("up_bias", bias),
            ("out", True),
            ("S", True),
        )
    )
    return Code(
        (*arguments, Argument("out", ("S", width), "float32", True)),
        (flat_launch("gate", "moe_gate<P>", given, f"S * {width}"),),
        {
            "width": width,
            "experts": experts,
            "gated": gated,
            "swish": activation == "swish",
            "squared": activation == "relu2",
            "activation": ACTIVATIONS.get("relu" if activation == "relu2" else activation, 0),
            "alpha": float(alpha),
            "limit": float(limit),
            "limits_active": limits_active,
            "offset": float(offset),
            "bias": bias,
            "threads": FLAT_THREADS,
        },
    )


def moe_combine(*, width: int, experts: int, top_k: int, bias: bool) -> Code:
    arguments = [
        Argument("y", ("S", width), "float32"),
        Argument("place", ("S",), "int32"),
        Argument("weights", ("T", top_k), "float32"),
    ]
    if bias:
        arguments += [
            Argument("indices", ("S",), "int32"),
            Argument("down_bias", (experts, width), "float32"),
        ]
    given = present(
        *(
            ("y", True),
            ("place", True),
            ("weights", True),
            ("indices", bias),
            ("down_bias", bias),
            ("out", True),
        )
    )
    return Code(
        (*arguments, Argument("out", ("T", width), "float32", True)),
        (per_row_launch("rows", "moe_combine<P>", given, "T"),),
        {"width": width, "experts": experts, "top_k": top_k, "bias": bias, "threads": ROW_THREADS},
    )
