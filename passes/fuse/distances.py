"""Scores with a bias that depends on how far a key stands from the query: relative position biases.

    scores [B, H, T, T] + embedding(bucket(j - i), table [buckets, H]).permute → distances of `attention`

Raffel et al. 2020, arXiv:1910.10683, section 2.1. Buckets are computed by tensor ops from positions alone;
what they are is found by computing them for `_TOKENS` positions. They must depend on j - i, and be the same
for all distances from some one on, on both sides: then a row of so many numbers a head says it for texts of
any length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from ...ir.core import Op, Value
from ...ir.ops.attention import VECTOR
from ...ir.ops.nn import Embedding
from ...ir.ops.shape import Arange, Expand, Reshape, Transpose
from ...ir.rewriter import Rewriter
from ...ir.types import DimExpr
from ...ir.weights import LazyTensor

_TOKENS = 1024
"""Positions for which buckets are computed."""
_OPS = 64
"""Operations that may lie between positions and buckets."""
_known: WeakKeyDictionary[Op, tuple[int, np.ndarray[Any, Any] | None]] = WeakKeyDictionary()
"""What `_buckets` found, by the op that looks them up, and of which value: all layers add the same ones."""


class RowsByDistance:
    """distances [H, W] out of a table [buckets, H]."""

    def __init__(self, table: LazyTensor, buckets: np.ndarray[Any, Any]) -> None:
        self.table, self.buckets = table, buckets
        self.shape, self.dtype = (table.shape[1], len(buckets)), "float32"
        self.source = f"by_distance({table.source})"

    def same(self, other: RowsByDistance) -> bool:
        """Whether another one is made of the same table in the same way."""
        return self.table is other.table and np.array_equal(self.buckets, other.buckets)

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray[Any, Any]:
        rows = self.table.read()[self.buckets].T[start:stop]
        return np.ascontiguousarray(rows, np.float32)


@dataclass(frozen=True)
class Distances:
    """A table [buckets, H], and the bucket of each of W distances."""

    table: Value
    buckets: tuple[int, ...]

    def emit(self, rw: Rewriter) -> Value:
        """float32 [H, W]; the same one for the same table and buckets."""
        assert self.table.weight is not None
        made = RowsByDistance(self.table.weight, np.array(self.buckets))
        name = f"{self.table.name}.by_distance"
        while (known := rw.graph.weights.get(name)) is not None:
            held = known.weight
            if isinstance(held, RowsByDistance) and held.same(made):
                return known
            name += "_"
        return rw.graph.add_weight(name, made)


def read_distances(bias: Value, heads: object) -> Distances | None:
    """What a bias added to scores [..., heads, T, T] is; None where it is no row of each distance."""
    while isinstance(op := bias.producer, Reshape | Expand) and bias.shape[-3:] == op.x.shape[-3:]:
        bias = op.x
    if not isinstance(op, Transpose) or op.perm != (-1, -3, -2) or bias.shape[-3] != heads:
        return None
    looked_up = op.x.producer
    if not isinstance(looked_up, Embedding) or looked_up.weight.weight is None:
        return None
    ids = looked_up.ids
    if len(looked_up.weight.shape) != 2 or ids.type.rank != 2:
        return None
    if _known.get(looked_up, (0, None))[0] != id(ids):
        _known[looked_up] = (id(ids), _buckets(ids))
    found = _known[looked_up][1]
    rows = looked_up.weight.shape[0]
    if found is None or not isinstance(rows, int) or not 0 <= found.min() <= found.max() < rows:
        return None
    return Distances(looked_up.weight, tuple(found.tolist()))


def _buckets(ids: Value) -> np.ndarray[Any, Any] | None:
    """[W], by distance from -W / 2 on, of ids [T, T]; None where they depend on more than distances, or go on
    changing.
    """
    made = _from_positions(ids)
    if made is None:
        return None
    square = _computed(ids, made)
    if square.shape != (_TOKENS, _TOKENS) or not np.array_equal(square[1:, 1:], square[:-1, :-1]):
        return None
    line = np.concatenate([square[:0:-1, 0], square[0]])  # by j - i, from 1 - _TOKENS to _TOKENS - 1
    changes = np.flatnonzero(line[1:] != line[:-1])
    far = 0 if not len(changes) else int(np.abs(changes + 1.5 - _TOKENS).max() + 1)
    half = -(-(far + VECTOR) // VECTOR) * VECTOR
    return line[_TOKENS - 1 - half : _TOKENS - 1 + half] if half < _TOKENS else None


def _from_positions(ids: Value) -> list[Op] | None:
    """The ops from positions to ids, each after those that it needs; None where anything else enters."""
    found: dict[Op, None] = {}
    symbols: set[object] = set()

    def visit(v: Value) -> bool:
        op = v.producer
        if op is None or (op not in found and len(found) == _OPS):
            return False
        if op in found:
            return True
        if isinstance(op, Arange) and isinstance(op.length, DimExpr):
            symbols.update(op.length.symbols())
        if not all(visit(operand) for operand in op.operands):
            return False
        found[op] = None
        return True

    return list(found) if visit(ids) and len(symbols) == 1 else None


def _computed(ids: Value, ops: list[Op]) -> np.ndarray[Any, Any]:
    import torch

    dims = {name: _TOKENS for op in ops if isinstance(op, Arange) for name in _symbols(op)}
    values: dict[Value, Any] = {}
    with torch.no_grad():
        for op in ops:
            result = op.reference(dims, *op.grouped([values[operand] for operand in op.operands]))
            results = list(result) if isinstance(result, tuple | list) else [result]
            values.update(zip(op.results, results, strict=True))
    return values[ids].numpy()


def _symbols(op: Arange) -> set[str]:
    return set(op.length.symbols()) if isinstance(op.length, DimExpr) else set()


__all__ = ["Distances", "RowsByDistance", "read_distances"]
