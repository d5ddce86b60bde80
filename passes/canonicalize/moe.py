"""Experts in one form, whatever order a checkpoint keeps them in.

    moe(x, …, @up [E, D, 2I], @down [E, I, D]) {transposed}  →  moe(x, …, @up.rows [E, 2I, D], @down.rows)
    moe(…) {interleaved}: gate0, up0, gate1, up1, …          →  gate0, gate1, …, up0, up1, … of rows and bias

Weights are turned expert by expert as they are read. Those that are put together in the graph become weights
first (`expert_weights.py`).

`graph.facts["experts"]` says of which parameters the turned stacks are, whether their gates and ups
alternated, and whether their module leaves it unsaid that it has them transposed, as those do that compute
all experts: {"….gate_up_proj.rows": {"of": "….gate_up_proj", "interleaved": true, "unsaid": false}, …}.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...ir.core import Graph, Value
from ...ir.errors import CompileError
from ...ir.ops.moe import Moe
from ...ir.weights import LazyTensor, QuantizedTensors, quantized_of, straight_of
from ..base import Pass, PassContext, PassResult
from .expert_weights import Joined, Turned, gather_experts

Array = np.ndarray[Any, Any]


class MappedExperts:
    """A stacked tensor [E, …] whose experts are changed as they are read, each for itself."""

    quantized: QuantizedTensors | None = None

    def __init__(
        self, base: LazyTensor, shape: tuple[int, ...], change: Callable[[Array], Array], what: str
    ) -> None:
        self.base, self._change = base, change
        self.shape, self.dtype = shape, base.dtype
        self.source = f"{what}({base.source})"

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        return np.ascontiguousarray(self._change(self.base.read(start, stop)))


@dataclass(frozen=True)
class NormalizeExperts(Pass):
    """Experts as [E, 2I, D] and [E, D, I], gates before ups."""

    name = "normalize-experts"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        gathered = gather_experts(graph)
        found = [op for op in graph if isinstance(op, Moe) and (op.transposed or op.interleaved)]
        for op in found:
            turned, apart = op.transposed, op.interleaved
            rw = Moe(
                op.x,
                op.indices,
                op.weights,
                _changed(graph, op.gate_up, turned=turned, apart=apart),
                _changed(graph, op.down, turned=turned, apart=False),
                None if op.up_bias is None else _changed(graph, op.up_bias, turned=False, apart=apart),
                op.down_bias,
                activation=op.activation,
                alpha=op.alpha,
                limit=op.limit,
                offset=op.offset,
                gated=op.gated,
                limits_active=op.limits_active,
            )
            rw.loc = op.loc
            graph.insert(rw, before=op)
            graph.replace(op, [rw.result])
        if found:
            graph.drop_dead()
        return PassResult(graph, bool(found) or gathered > 0)


def _changed(graph: Graph, value: Value, *, turned: bool, apart: bool) -> Value:
    """The weight [E, N, K] of a stored one; the same one for the same."""
    if not (turned or apart):
        return value
    name = f"{value.name}.rows"
    if name in graph.weights:
        return graph.weights[name]
    if value.weight is None:
        raise CompileError(
            f"experts {value.name or '?'} are computed in the graph", remedy="report the model"
        )

    def change(experts: Array) -> Array:
        rows = experts.swapaxes(1, 2) if turned else experts
        return _gates_first(rows) if apart else rows

    shape = value.weight.shape
    shape = (shape[0], shape[2], shape[1]) if turned else shape
    rows = MappedExperts(value.weight, shape, change, "rows")
    stored = quantized_of(straight_of(value.weight) if turned else value.weight)
    if stored is not None:
        rows.quantized = stored.map_rows(_part_with_gates_first) if apart else stored
    if len(shape) == 3 and ".rows" not in value.name:
        known = graph.facts.get("experts", {})
        unsaid = value.name in graph.facts.get("all_experts", ())
        entry = {"of": value.name, "interleaved": apart, "unsaid": unsaid}
        graph.facts["experts"] = {**known, name: entry}
    return graph.add_weight(name, rows)


def why_floats(tensor: LazyTensor | None) -> str | None:
    """Why experts have no codes although codes are stored of them; None where none are known of."""
    if tensor is None or quantized_of(tensor) is not None:
        return None
    base: LazyTensor | None = getattr(tensor, "base", None)
    parts: Sequence[LazyTensor] = getattr(tensor, "parts", None) or ([] if base is None else [base])
    held = [quantized_of(part) is not None for part in parts]
    if not any(held):
        return next((why for part in parts if (why := why_floats(part)) is not None), None)
    if isinstance(tensor, Turned | MappedExperts) or (isinstance(tensor, Joined) and tensor.axis == -1):
        return "stored transposed, with codes in groups along the axis that is not summed over"
    if len(parts) < 2:
        return None
    return "stored as gates and ups in codes of two kinds" if all(held) else "stored as floats in part"


def _gates_first(rows: Array) -> Array:
    return np.concatenate((rows[:, ::2], rows[:, 1::2]), 1)


def _part_with_gates_first(part: LazyTensor) -> LazyTensor:
    return MappedExperts(part, part.shape, _gates_first, "rows")
