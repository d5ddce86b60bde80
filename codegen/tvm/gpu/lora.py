"""What a token's adapter adds to a linear layer's result (`lora.cuh`)."""

from __future__ import annotations

from ....ir.ops.lora import LANES, column_blocks
from .launches import KINDS
from .source import Argument, Code, Launch, Size

THREADS = 128
MOST_RANK = 256
"""The largest rank: a tile's A x is held in memory that its threads share."""
_ROWS = 8
"""Of a tile, `LORA_ROWS` of lora.cuh."""
_FEW = 32
"""Up to so many rows each has blocks of its own: they are likely as many sequences, and there is more of the
GPU than rows to fill it.
"""
_SPLIT, _MOST_SPLITS = 1024, 8
"""Columns of x that are worth a block of their own, and the most blocks that share out a row."""


def columns_of_split(k: int) -> int:
    """How many columns of x [T, k] a block of A x takes: by k alone, since it decides the order of sums.
    Whole turns of its warps, of 32 columns each.
    """
    splits = max(1, min(_MOST_SPLITS, k // _SPLIT))
    return -(-k // (splits * THREADS)) * THREADS


def lora(*, parts: tuple[int, ...], k: int, dtype: str) -> Code:
    """y += B[adapter] (scale[adapter] · A[adapter] x) where adapter ≥ 0, as `ir/ops/lora.py` has it.

    y float32 [T, N], written in place; x float32 [T, K]; adapter int32 [T], slots below A; rank int32 [A, P];
    scale float32 [A, P, L, 16]; a `dtype` (float32 or int8) [A, P, L, K, 16]; b `dtype` [A, C, 16 · L, 16].
    An L of 0 launches nothing: for steps in which no row has an adapter.
    """
    n, count, columns = sum(parts), len(parts), columns_of_split(k)
    splits = -(-k // columns)
    arguments = (
        Argument("y", ("T", n), "float32", True),
        Argument("x", ("T", k), "float32"),
        Argument("adapter", ("T",), "int32"),
        Argument("rank", ("A", count), "int32"),
        Argument("scale", ("A", count, "L", LANES), "float32"),
        Argument("a", ("A", count, "L", k, LANES), dtype),
        Argument("b", ("A", column_blocks(parts), "R", LANES), dtype),
    )
    groups = sum(-(-width // (4 * THREADS)) for width in parts)
    launches: list[Launch] = []
    for rows, least, most in ((1, 1, _FEW), (_ROWS, _FEW + 1, 1 << 30)):
        tiles, when = f"(T + {rows - 1}) // {rows}", ("T", least, most)
        down: tuple[Size, Size, Size] = (tiles, f"{count} * L", splits)
        up: tuple[Size, Size, Size] = (tiles, f"{groups} * min(L, 1)", 1)
        factors = ("x", "adapter", "rank", "scale", "a", "held", "T", "L")
        launches.append(Launch(f"down{rows}", f"lora_down<P, {rows}>", factors, down, THREADS, rows=when))
        factors = ("adapter", "rank", "b", "held", "y", "T", "L")
        launches.append(Launch(f"up{rows}", f"lora_up<P, {rows}>", factors, up, THREADS, rows=when))
    parameters = {
        "n": n,
        "k": k,
        "parts": count,
        "width": list(parts),
        "column_blocks": column_blocks(parts),
        "whole": all(width % 4 == 0 for width in parts),
        "kind": KINDS[dtype],
        "columns": columns,
        "splits": splits,
        "most_rank": MOST_RANK,
        "threads": THREADS,
    }
    held = f"T * L * {count * splits * LANES * 4}"
    return Code(arguments, tuple(launches), parameters, {"held": ("float*", held)})
