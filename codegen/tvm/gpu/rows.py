"""Kernels over rows or elements (`rows.cuh`), and `top_k` (`experts.cuh`)."""

from __future__ import annotations

from ..kernels.layout import round_up
from .launches import (
    ACTIVATIONS,
    FLAT_THREADS,
    KINDS,
    ROW_THREADS,
    Source,
    flat_launch,
    heads_argument,
    pages_argument,
    per_row_launch,
    present,
)
from .source import Argument, Code, Launch, Size


def rms_norm(*, width: int, eps: float, weight: bool, heads: int = 0, source: Source = None) -> Code:
    x = heads_argument("x", heads, width, source) if heads else Argument("x", ("T", width), "float32")
    out: tuple[Size, ...] = ("T", heads, width) if heads else ("T", width)
    count = max(1, heads)
    arguments = (
        x,
        *((Argument("weight", (width,), "float32"),) if weight else ()),
        Argument("out", out, "float32", True),
    )
    stride, first = source or (count * width, 0)
    return Code(
        arguments,
        (
            per_row_launch(
                "rows", "rms_norm<P>", present(("x", True), ("weight", weight), ("out", True)), f"T * {count}"
            ),
        ),
        {
            "width": width,
            "heads": count,
            "stride": stride,
            "first": first,
            "eps": float(eps),
            "weight": weight,
            "threads": ROW_THREADS,
        },
    )


def layer_norm(*, width: int, eps: float, weight: bool, bias: bool) -> Code:
    arguments = [Argument("x", ("T", width), "float32")]
    arguments += [
        Argument(name, (width,), "float32") for name, there in (("weight", weight), ("bias", bias)) if there
    ]
    given = present(("x", True), ("weight", weight), ("bias", bias), ("out", True))
    return Code(
        (*arguments, Argument("out", ("T", width), "float32", True)),
        (per_row_launch("rows", "layer_norm<P>", given, "T"),),
        {"width": width, "eps": float(eps), "weight": weight, "bias": bias, "threads": ROW_THREADS},
    )


def rope(*, heads: int, head_dim: int, rotary_dim: int, interleaved: bool, source: Source) -> Code:
    stride, first = source or (heads * head_dim, 0)
    return Code(
        (
            heads_argument("x", heads, head_dim, source),
            Argument("cosines", ("T", rotary_dim), "float32"),
            Argument("sines", ("T", rotary_dim), "float32"),
            Argument("out", ("T", heads, head_dim), "float32", True),
        ),
        (flat_launch("turn", "rope<P>", ("x", "cosines", "sines", "out", "T"), f"T * {heads * head_dim}"),),
        {
            "heads": heads,
            "head_dim": head_dim,
            "rotary_dim": rotary_dim,
            "interleaved": interleaved,
            "stride": stride,
            "first": first,
            "threads": FLAT_THREADS,
        },
    )


def gated_mlp(*, width: int, activation: str) -> Code:
    return Code(
        (
            Argument("gate_up", ("T", 2 * width), "float32"),
            Argument("out", ("T", width), "float32", True),
        ),
        (flat_launch("gate", "gated_mlp<P>", ("gate_up", "out", "T"), f"T * {width}"),),
        {"width": width, "activation": ACTIVATIONS[activation], "threads": FLAT_THREADS},
    )


def activation(*, width: int, activation: str) -> Code:
    return Code(
        (Argument("x", ("T", width), "float32"), Argument("out", ("T", width), "float32", True)),
        (flat_launch("each", "activation<P>", ("x", "out", "T"), f"T * {width}"),),
        {"width": width, "activation": ACTIVATIONS[activation], "threads": FLAT_THREADS},
    )


def gather_last(*, width: int) -> Code:
    return Code(
        (
            Argument("x", ("T", width), "float32"),
            Argument("index", ("R",), "int32"),
            Argument("out", ("R", width), "float32", True),
        ),
        (per_row_launch("rows", "gather_rows<P>", ("index", "x", "out", "T"), "R"),),
        {"width": width, "kind": KINDS["float32"], "threads": ROW_THREADS},
    )


def append_kv(
    *, kv_heads: int, head_dim: int, kv_dtype: str, page_size: int, k_source: Source, v_source: Source
) -> Code:
    whole = (kv_heads * head_dim, 0)
    (k_stride, k_first), (v_stride, v_first) = k_source or whole, v_source or whole
    threads = min(ROW_THREADS, round_up(head_dim, 32))
    call = ("k", "v", "slot_mapping", "pages", "N")
    return Code(
        (
            heads_argument("k", kv_heads, head_dim, k_source),
            heads_argument("v", kv_heads, head_dim, v_source),
            Argument("slot_mapping", ("T",), "int32"),
            pages_argument(kv_heads, head_dim, kv_dtype, page_size, True),
        ),
        (Launch("write", "append_kv<P>", call, ("T", kv_heads, 1), threads),),
        {
            "heads": kv_heads,
            "head_dim": head_dim,
            "kind": KINDS[kv_dtype],
            "page_size": page_size,
            "k_stride": k_stride,
            "k_first": k_first,
            "v_stride": v_stride,
            "v_first": v_first,
            "threads": threads,
        },
    )


def top_k(*, width: int, k: int) -> Code:
    return Code(
        (Argument("x", ("T", width), "float32"), Argument("out", ("T", k), "int64", True)),
        (Launch("rows", "top_k<P>", ("x", "out"), ("T", 1, 1), 32),),
        {"width": width, "k": k},
    )
