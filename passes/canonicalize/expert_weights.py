"""Weights of experts that are put together in the graph, as lazy weights: an expert is then read for itself.

    concat([reshape(@gate [E · I, D]), reshape(@up [E · I, D])], rows)   →  @gate.rows [E, 2I, D]
    slice(@up [E + 2, 2I, D], experts 0 to E)                            →  @up.rows [E, 2I, D]
    transpose(@down [E, I, D])                                           →  @down.rows [E, D, I]

Models whose experts are traced from modules of their own (`frontend/expert_loops.py`) hold them so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...ir.core import Graph, Value
from ...ir.ops.moe import Moe
from ...ir.ops.shape import Concat, Reshape, Slice, Transpose
from ...ir.weights import LazyTensor, QuantizedTensors, concat_quantized, quantized_of, straight_of
from ..derived import SliceRows

Array = np.ndarray[Any, Any]


class Stacked:
    """A tensor [E · N, K] as [E, N, K]."""

    def __init__(self, base: LazyTensor, experts: int) -> None:
        rows, width = base.shape
        self.base, self.n = base, rows // experts
        self.shape: tuple[int, ...] = (experts, self.n, width)
        self.dtype, self.source = base.dtype, base.source

    @property
    def quantized(self) -> QuantizedTensors | None:
        """The base's quantized parts, stacked as it is."""
        stored = quantized_of(self.base)
        return stored and stored.map_rows(lambda part: Stacked(part, self.shape[0]))

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        first, last, _ = slice(start, stop).indices(self.shape[0])
        rows = self.base.read(first * self.n, max(first, last) * self.n)
        return rows.reshape(-1, *self.shape[1:])


class Joined:
    """Stacked tensors [E, …] joined along one of their last two axes, each expert for itself."""

    def __init__(self, parts: Sequence[LazyTensor], axis: int) -> None:
        self.parts, self.axis = tuple(parts), axis
        shape = list(parts[0].shape)
        shape[axis] = sum(p.shape[axis] for p in parts)
        self.shape, self.dtype = tuple(shape), parts[0].dtype
        self.source = f"concat({', '.join(p.source for p in parts)})"

    @property
    def quantized(self) -> QuantizedTensors | None:
        """The parts' own quantized parts, where rows are joined and all have them on one grid."""
        if self.axis != -2:
            return None
        return concat_quantized(self.parts, lambda parts: Joined(parts, -2))

    @property
    def straight(self) -> LazyTensor | None:
        """Of parts whose columns are stored as rows: those rows, joined."""
        stored = [straight_of(p) for p in self.parts]
        held = [one for one in stored if one is not None]
        return Joined(held, -2) if self.axis == -1 and len(held) == len(stored) else None

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        return np.concatenate([p.read(start, stop) for p in self.parts], self.axis)


class Turned:
    """Stacked matrices [E, N, K], each transposed."""

    def __init__(self, base: LazyTensor) -> None:
        experts, rows, columns = base.shape
        self.base, self.dtype = base, base.dtype
        self.shape: tuple[int, ...] = (experts, columns, rows)
        self.source = f"transpose({base.source})"

    @property
    def straight(self) -> LazyTensor:
        """What is turned."""
        return self.base

    @property
    def quantized(self) -> QuantizedTensors | None:
        """The stored parts of a base that turns what is stored itself: codes lie in rows."""
        return quantized_of(straight_of(self.base))

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        return np.ascontiguousarray(self.base.read(start, stop).swapaxes(1, 2))


def gathered(graph: Graph, value: Value) -> Value:
    """The weight [E, N, K] that stands for a value made of weights alone by the forms above; the value itself
    where it is a weight, or made in another way.
    """
    if value.is_weight:
        return value
    found = _lazy(value)
    if found is None:
        return value
    data, first = found
    name = f"{first}.rows"
    if name in graph.weights:  # of the same experts, or of others that are put together of the same weight
        known = graph.weights[name]
        if known.weight is not None and known.weight.source == data.source and known.shape == value.shape:
            return known
        return value
    return graph.add_weight(name, data)


def _lazy(value: Value) -> tuple[LazyTensor, str] | None:
    """Stacked experts, and the name of the first weight in them."""
    if value.weight is not None:
        return value.weight, value.name
    op = value.producer
    if not isinstance(op, Concat | Reshape | Slice | Transpose) or value.type.rank != 3:
        return None
    parts = [_lazy(v) for v in op.operands]
    known = [one for one in parts if one is not None]
    shape = tuple(d for d in value.shape if isinstance(d, int))
    if len(known) < len(parts) or len(shape) != 3:
        return None
    made = _made(op, [data for data, _ in known], shape)
    return None if made is None else (made, known[0][1])


def _made(
    op: Concat | Reshape | Slice | Transpose, parts: list[LazyTensor], shape: tuple[int, ...]
) -> LazyTensor | None:
    base = parts[0]
    match op:
        case Concat() if op.axis in (-1, -2) and len({(p.shape[0], p.dtype) for p in parts}) == 1:
            return Joined(parts, op.axis)
        case Reshape() if len(base.shape) == 2 and base.shape[1] == shape[2]:
            return Stacked(base, shape[0])
        case Slice() if op.axis == -3 and op.step == 1 and isinstance(op.start, int):
            return SliceRows(base, op.start, op.start + shape[0])
        case Transpose() if op.perm == (-1, -2) and len(base.shape) == 3:
            return Turned(base)
        case _:
            return None


def gather_experts(graph: Graph) -> int:
    """Let every mixture read stacked weights. How many values became weights."""
    count = 0
    for op in list(graph):
        if not isinstance(op, Moe):
            continue
        for i, v in enumerate(op.operands):
            weight = gathered(graph, v) if v in (op.gate_up, op.down) else v
            if weight is not v:
                graph.set_operand(op, i, weight)
                count += 1
    if count:
        graph.drop_dead()
    return count
