"""Quantized experts.

    moe(x, i, w, @up [E, 2I, D], @down [E, D, I])  →  quantized_moe(x, i, w, @up.q, @up.scale, …, @down.q, …)

Each expert is a matrix for itself, on the grid of the linear layers, and is read for itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...ir.core import Graph, Value
from ...ir.ops.moe import Moe, QuantizedMoe
from ...ir.types import Quantization, TensorType
from ...ir.weights import LazyTensor
from .nearest import QuantizedWeight

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Parts:
    """A stacked weight in codes: uint8 [E, N, K], scale [E, N, G], zero_point [E, N, G] or None."""

    quant: Quantization
    codes: LazyTensor
    scale: LazyTensor
    zero_point: LazyTensor | None


def experts_of(graph: Graph) -> list[Moe]:
    """The mixtures whose experts can be quantized: weights of their own, with rows along K."""
    return [
        op
        for op in graph
        if isinstance(op, Moe) and not op.transposed and all(_is_own(v) for v in (op.gate_up, op.down))
    ]


def _is_own(weight: Value) -> bool:
    return weight.weight is not None and len(weight.uses) == 1


def attach_experts(graph: Graph, op: Moe, up: Parts, down: Parts) -> None:
    """Let a mixture read codes. The caller drops what is dead afterwards."""
    made = QuantizedMoe(
        op.x,
        op.indices,
        op.weights,
        *_added(graph, op.gate_up, up),
        *_added(graph, op.down, down),
        op.up_bias,
        op.down_bias,
        activation=op.activation,
        alpha=op.alpha,
        limit=op.limit,
        offset=op.offset,
        gated=op.gated,
        limits_active=op.limits_active,
    )
    made.loc = op.loc
    graph.insert(made, before=op)
    graph.replace(op, [made.result])


def _added(graph: Graph, weight: Value, parts: Parts) -> tuple[Value, Value, Value | None]:
    shape = parts.codes.shape
    q = graph.add_weight(f"{weight.name}.q", parts.codes, TensorType("uint8", shape, parts.quant))
    scale = graph.add_weight(f"{weight.name}.scale", parts.scale)
    zero = parts.zero_point
    return q, scale, None if zero is None else graph.add_weight(f"{weight.name}.zero_point", zero)


def nearest_experts(weight: Value, bits: int, group: int, symmetric: bool) -> Parts:
    """Round to nearest, expert by expert as they are read; in groups along K (0: whole rows)."""
    assert weight.weight is not None
    _, n, k = weight.weight.shape
    quant = Quantization(bits, min(group or k, k), symmetric)
    data = QuantizedWeight(StackedRows(weight.weight), quant)
    zero_point = None if symmetric else StackedPart(data, "zero_point", n)
    return Parts(quant, StackedPart(data, "codes", n), StackedPart(data, "scale", n, "float16"), zero_point)


def fall_back(graph: Graph, what: str, bits: int, group: int, symmetric: bool = False) -> list[str]:
    """Round all experts to nearest for a method, `what`, that has none of its own for them; its note."""
    if not round_experts(graph, {}, bits, group, symmetric):
        return []
    form = f"int{bits}-g{group}{'-sym' if symmetric else ''}"
    return [f"experts are rounded to nearest ({form}): {what} is for linear layers"]


def round_experts(graph: Graph, bits: dict[str, int], default: int, group: int, symmetric: bool) -> int:
    """Round the experts of every mixture to nearest; how many mixtures there were.

    `bits`: by a weight's name, where they are not the default.
    """
    found = experts_of(graph)
    for op in found:
        parts = [
            nearest_experts(w, bits.get(w.name, default), group, symmetric) for w in (op.gate_up, op.down)
        ]
        attach_experts(graph, op, *parts)
    return len(found)


class StackedRows:
    """Stacked matrices [E, N, K] as one below the other, [E · N, K].

    An expert is read as a whole, and kept until its last row or another expert was asked for: those who want
    rows want all of them, in order.
    """

    def __init__(self, base: LazyTensor) -> None:
        experts, self.n, k = base.shape
        self.base = base
        self.shape: tuple[int, ...] = (experts * self.n, k)
        self.dtype, self.source = base.dtype, base.source
        self._kept: tuple[int, Array] | None = None

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        end = self.shape[0] if stop is None else min(stop, self.shape[0])
        pieces: list[Array] = []
        while start < end:
            e, row = divmod(start, self.n)
            last = min(self.n, row + end - start)
            pieces.append(self._expert(e)[row:last])
            start += last - row
            if last == self.n:
                self._kept = None
        if not pieces:
            return self.base.read(0, 0).reshape(0, self.shape[1])
        return np.concatenate(pieces)

    def _expert(self, e: int) -> Array:
        kept = self._kept  # once: another thread may want another expert
        if kept is None or kept[0] != e:
            kept = self._kept = (e, self.base.read(e, e + 1)[0])
        return kept[1]


class StackedPart:
    """Codes, scales or zero points of stacked matrices as a lazy tensor [E, N, …]."""

    def __init__(self, data: QuantizedWeight, part: str, n: int, dtype: str = "uint8") -> None:
        self.data, self.part, self.n = data, part, n
        width = data.k if part == "codes" else data.groups
        self.shape: tuple[int, ...] = (data.rows // n, n, width)
        self.dtype = dtype
        self.source = f"{part}({data.base.source})"

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        first, last, _ = slice(start, stop).indices(self.shape[0])
        rows = self.data.read(self.part, first * self.n, max(first, last) * self.n)
        return np.ascontiguousarray(rows).reshape(-1, *self.shape[1:])
