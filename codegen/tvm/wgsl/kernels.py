"""The kernels of the `*.wgsl` files by name. Where a kernel for CUDA has the same arrays, launches and
parameters, its maker is taken; the layout of weights is the same throughout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ....ir.codebooks import codebook
from ....ir.errors import CompileError
from ..gpu import products, rows, states
from ..gpu.attention import SPLIT
from ..gpu.launches import ACTIVATIONS, ROW_THREADS, pages_argument, per_row_launch, present
from ..gpu.layout import GpuLayout
from ..gpu.source import Argument, Code, Launch, Size
from ..kernels.layout import QuantLayout

Maker = Callable[..., Code]

VARIANTS = ((1, 1, 1), (4, 2, 16), (8, 17, 1 << 30))
"""Tokens of a workgroup of a product, from how many tokens to how many."""
MOST_ROWS = 8
"""Query heads of a key head that a workgroup of attention takes at once."""
FEW = 32
"""Tokens up to which a context is split: what is kept of the splits is one array, of a limited size."""
_CHUNK = 64
_HELD = 128
"""Elements of a state that a thread holds in registers."""
_NAMES = {number: name for name, number in ACTIVATIONS.items()}


def _like(make: Maker, template: str | None = None) -> Maker:
    """A kernel with the code of CUDA's; `template`: where it is not of the same name."""

    def made(**static: Any) -> Code:
        code = make(**static)
        launches = [
            dataclasses.replace(
                launch, call=template or launch.call.partition("<")[0], arguments=_named(launch.arguments)
            )
            for launch in code.launches
        ]
        parameters = dict(code.parameters)
        if "activation" in parameters:
            parameters["activation"] = _NAMES[parameters["activation"]]
        return dataclasses.replace(code, launches=tuple(launches), parameters=parameters)

    return made


def _named(arguments: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(a for a in arguments if a != "nullptr" and not a.isdigit())


def _scan(make: Maker, column: str | None = None) -> Maker:
    """A recurrence; `column`: the parameter that says how long a thread's part of its state is."""

    def made(**static: Any) -> Code:
        code = _like(make)(**static)
        if column is None:
            return code
        length = code.parameters[column]
        parameters = {**code.parameters, "column": length, "held": length <= _HELD}
        return dataclasses.replace(code, parameters=parameters)

    return made


def _append_kv(**static: Any) -> Code:
    code = _like(rows.append_kv)(**static)
    parameters = {**code.parameters, "kind": static["kv_dtype"], "writes": True}
    return dataclasses.replace(code, parameters=parameters)


def _weight(layout: GpuLayout) -> dict[str, Any]:
    """What templates know of a weight."""
    quant = layout.quant
    book = None if quant is None else quant.codebook
    zero = quant is not None and quant.zero_point == "uint8"
    minimum = quant is not None and quant.zero_point in ("float16", "float32")
    return {
        **products.weight_parameters(layout),
        "codebook": book is not None,
        "symmetric": quant is not None and not zero and not minimum and book is None,
        "values": [] if book is None else _sixteen(codebook(book)),
    }


def _sixteen(values: Any) -> list[float]:
    given = [float(v) for v in values]
    return given + [0.0] * (16 - len(given))


def _product(
    layout: GpuLayout,
    *,
    bias: bool = False,
    residual: bool = False,
    of: products.Experts | None = None,
) -> Code:
    """See `gpu/products.py`, `product`, whose arrays these are; x is read as it is."""
    code = products.product(layout, bias=bias, residual=residual, of=of)
    given = (*(a.name for a in code.arguments), "T" if of is None else "S")
    tokens_of: Size = "T" if of is None else f"(S // {of.top_k})"
    splits = products.splits(layout)
    launches = [
        Launch(
            f"by{tokens}",
            "product",
            given,
            (layout.tiles, f"({tokens_of} + {tokens - 1}) // {tokens}", 1 if of is None else of.count),
            32 * splits,
            rows=(tokens_of, least, most),
            constants={"tokens": tokens},
        )
        for tokens, least, most in VARIANTS
    ]
    parameters = {
        **_weight(layout),
        "bias": bias,
        "residual": residual,
        "splits": splits,
        "fours": layout.k % 4 == 0,
        "whole": layout.k == layout.k_padded,
        "experts": 0 if of is None else of.count,
        "per_row": 0 if of is None else of.per_row,
    }
    return Code(code.arguments, tuple(launches), parameters)


def _linear(*, n: int, k: int, bias: bool, residual: bool, weight_dtype: str) -> Code:
    del weight_dtype  # whatever it was, it is stored as float16
    return _product(GpuLayout(n, k), bias=bias, residual=residual)


def _quantized_linear(*, n: int, k: int, bias: bool, residual: bool, **form: Any) -> Code:
    return _product(GpuLayout(n, k, QuantLayout(n, k, **form)), bias=bias, residual=residual)


def _moe_product(*, n: int, k: int, experts: int, top_k: int, per_row: int, **form: Any) -> Code:
    layout = GpuLayout(n, k, QuantLayout(n, k, **form) if form else None)
    return _product(layout, of=products.Experts(experts, top_k, per_row))


def _embedding(*, rows: int, width: int, packed: bool, weight_dtype: str) -> Code:
    if packed:
        return _table(GpuLayout(rows, width))
    return Code(
        (
            Argument("ids", ("T",), "int32"),
            Argument("table", (rows, width), weight_dtype),
            Argument("out", ("T", width), "float32", True),
        ),
        (per_row_launch("rows", "table_rows", ("ids", "table", "out"), "T"),),
        {"width": width, "rows": rows},
    )


def _quantized_embedding(*, rows: int, width: int, **form: Any) -> Code:
    return _table(GpuLayout(rows, width, QuantLayout(rows, width, **form)))


def _table(layout: GpuLayout) -> Code:
    ids, out = Argument("ids", ("T",), "int32"), Argument("out", ("T", layout.k), "float32", True)
    weight = products.weight_arguments(layout)
    given = ("ids", *(a.name for a in weight), "out")
    return Code((ids, *weight, out), (per_row_launch("rows", "embedding", given, "T"),), _weight(layout))


def _paged_attention(
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    kv_dtype: str,
    page_size: int,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    sinks: bool,
    slopes: bool,
    distances: int = 0,
) -> Code:
    """q [T, H, D] over pages of D elements; see `gpu/attention.py`."""
    group = heads // kv_heads
    rows_ = max(r for r in range(1, MOST_ROWS + 1) if group % r == 0 and r * head_dim <= 1024)
    shape: tuple[Size, ...] = ("T", heads, head_dim)
    more = present(("sinks", sinks), ("slopes", slopes), ("distances", bool(distances)))
    extra = [Argument(n, (heads,), "float32") for n, there in (("sinks", sinks), ("slopes", slopes)) if there]
    if distances:
        extra.append(Argument("distances", (heads, distances), "float32"))
    tables = ("query_start", "context_len", "block_table")
    arguments = (
        Argument("q", shape, "float32"),
        pages_argument(kv_heads, head_dim, kv_dtype, page_size, False),
        Argument("query_start", ("B1",), "int32"),
        Argument("context_len", ("B",), "int32"),
        Argument("block_table", ("B", "P"), "int32"),
        *extra,
        Argument("out", shape, "float32", True),
    )
    count = f"((P * {page_size} + {SPLIT - 1}) // {SPLIT})"
    few, many = ("T", 1, FEW), ("T", FEW + 1, 1 << 30)
    inputs = _named(("q", "pages", *tables, *more))
    sinks_ = ("sinks",) if sinks else ()

    def attend(name: str, splits: bool) -> Launch:
        found = ("part", "rows") if splits else ("out",)
        given = tuple(a for a in (*inputs, *found, "T", "B", "P", "N") if not (splits and a == "sinks"))
        grid: tuple[Size, Size, Size] = ("T", heads // rows_, count if splits else 1)
        constants = {"splits": splits, "sinks": sinks and not splits}
        return Launch(name, "attend", given, grid, _CHUNK, 0, few if splits else many, constants=constants)

    given = ("query_start", "context_len", *sinks_, "out", "part", "rows", "T", "B")
    threads = min(ROW_THREADS, 1 << (head_dim - 1).bit_length())
    launches = (
        attend("few", True),
        Launch("sum", "combine", given, ("T", heads, 1), threads, 0, few),
        attend("many", False),
    )
    scratch: dict[str, tuple[str, Size]] = {
        "part": ("float*", f"min(T, {FEW}) * {count} * {4 * heads * head_dim}"),
        "rows": ("float*", f"min(T, {FEW}) * {count} * {8 * heads}"),
    }
    parameters = {
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "rows": rows_,
        "split": SPLIT,
        "page_size": page_size,
        "kind": kv_dtype,
        "writes": False,
        "scale": float(scale),
        "causal": causal,
        "window": window or 0,
        "softcap": float(softcap or 0.0),
        "sinks": sinks,
        "slopes": slopes,
        "distances": distances,
    }
    return Code(arguments, launches, parameters, scratch)


MAKERS: dict[str, Maker] = {
    "activation": _like(rows.activation),
    "append_kv": _append_kv,
    "causal_conv1d": _scan(states.causal_conv1d),
    "embedding": _embedding,
    "gated_mlp": _like(rows.gated_mlp),
    "gated_delta_rule": _scan(states.gated_delta_rule, "key_dim"),
    "gather_last": _like(rows.gather_last, "gather_last"),
    "layer_norm": _like(rows.layer_norm),
    "linear": _linear,
    "linear_recurrence": _scan(states.linear_recurrence),
    "moe_combine": _like(products.moe_combine),
    "moe_gate": _like(products.moe_gate),
    "moe_product": _moe_product,
    "moe_rows": _like(products.moe_rows),
    "paged_attention": _paged_attention,
    "quantized_embedding": _quantized_embedding,
    "quantized_linear": _quantized_linear,
    "rms_norm": _like(rows.rms_norm),
    "rope": _like(rows.rope),
    "selective_scan": _scan(states.selective_scan, "elements"),
    "ssd_scan": _scan(states.ssd_scan, "elements"),
    "top_k": _like(rows.top_k),
    "wkv": _scan(states.wkv),
}
"""Kernel name → what makes its code from static parameters."""


def make(name: str, static: Mapping[str, Any]) -> Code:
    """The code of a kernel. Raises CompileError for one that there is not."""
    if name not in MAKERS:
        raise CompileError(f"tvm-webgpu has no kernel {name}", remedy="compile for tvm-cpu or tvm-cuda")
    return MAKERS[name](**static)
