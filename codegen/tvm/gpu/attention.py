"""Attention over the paged cache (`attention.cuh`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..kernels.layout import round_up
from .launches import KINDS, pages_argument, present
from .source import Argument, Code, Launch, Size

SPLIT = 256
"""Positions of a context that are a block of their own in steps of few tokens."""
FEW = 64
"""Tokens up to which a context is split."""
THREADS = 128
"""Of a block; all fetch (`FETCHERS`)."""


def paged_attention(
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
    """q [T, H, D] over pages of D elements (`attention.cuh`)."""
    padded, group = round_up(head_dim, 16), heads // kv_heads
    chunk = 64 if padded <= 128 else 16
    tokens = max(1, 16 // group)
    shape: tuple[Size, ...] = ("T", heads, head_dim)
    arguments = [
        Argument("q", shape, "float32"),
        pages_argument(kv_heads, head_dim, kv_dtype, page_size, False),
        Argument("query_start", ("B1",), "int32"),
        Argument("context_len", ("B",), "int32"),
        Argument("block_table", ("B", "P"), "int32"),
    ]
    arguments += [
        Argument(n, (heads,), "float32") for n, there in (("sinks", sinks), ("slopes", slopes)) if there
    ]
    if distances:
        arguments.append(Argument("distances", (heads, distances), "float32"))
    arguments.append(Argument("out", shape, "float32", True))
    count = f"((P * {page_size} + {SPLIT - 1}) // {SPLIT})"
    adders = min(THREADS, round_up(head_dim, 32))
    by_heads = kv_heads * -(-group // 16)
    shared = 4 * chunk * (padded + 8) * 2
    given = (
        *("q", "pages", "query_start", "context_len", "block_table"),
        *present(("sinks", sinks), ("slopes", slopes), ("distances", bool(distances))),
        *("out", "part", "rows", "T", "B", "P", "N"),
    )
    last = ("query_start", "context_len", *present(("sinks", sinks)), "out", "part", "rows", "T", "B")
    few, many = ("T", 1, FEW), ("T", FEW + 1, 1 << 30)

    def attend(name: str, warps: int, splits: Size, when: tuple[Size, int, int]) -> Launch:
        call = f"attend<P<{warps}>, {'true' if when is few else 'false'}>"
        grid: tuple[Size, Size, Size] = (f"T // {tokens * warps} + B", by_heads, splits)
        return Launch(name, call, given, grid, THREADS, shared, when)

    launches = (
        attend("few", 1, count, few),
        Launch("sum", "combine<P<1>>", last, ("T", heads, 1), adders, 0, few),
        attend("many", 4, 1, many),
    )
    scratch: dict[str, tuple[str, Size]] = {
        "part": ("float*", f"min(T, {FEW}) * {count} * {4 * heads * head_dim}"),
        "rows": ("Row*", f"min(T, {FEW}) * {count} * {8 * heads}"),
    }
    parameters: Mapping[str, Any] = {
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "padded": padded,
        "chunk": chunk,
        "split": SPLIT,
        "adders": adders,
        "page_size": page_size,
        "kind": KINDS[kv_dtype],
        "scale": float(scale),
        "causal": causal,
        "window": window or 0,
        "softcap": float(softcap or 0.0),
        "sinks": sinks,
        "slopes": slopes,
        "distances": distances,
    }
    return Code(tuple(arguments), launches, parameters, scratch, warps=True)
