"""Attention within chunks of positions, for sequences of one chunk.

    equal(floor_divide(position of the key, C), floor_divide(position of the query, C))  →  true

A query of such a layer sees the keys of its own chunk of C positions alone. Up to C tokens there is but one;
the graph's fact `positions` says that it holds for as many.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...ir.core import Graph, Value
from ...ir.ops import math as m
from ...ir.ops.shape import Full
from ...ir.rewriter import constant
from ..base import Pass, PassContext, PassResult
from .mask_terms import Affine
from .masks import MaskAnalysis


@dataclass(frozen=True)
class OneChunk(Pass):
    """Chunks of positions that attention stays within → sequences of one."""

    name = "one-chunk"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        count, notes = 0, dict[str, None]()
        if graph.facts.get("kind") == "function":  # whose lengths nobody holds to a number
            return PassResult(graph, False)
        for op in graph.ops:
            if not isinstance(op, m.Equal):
                continue
            size = _chunk(op)
            if size is None:
                continue
            count += 1
            held = graph.facts.get("positions")
            graph.facts["positions"] = size if held is None else min(size, held)
            true = Full(value=True, dtype="bool", shape=op.result.shape)
            true.loc = op.loc
            graph.insert(true, before=op)
            graph.replace(op, [true.result])
            if context.context_length is None or context.context_length > size:
                notes[f"attention stays within chunks of {size} tokens: compiled for as many"] = None
        graph.drop_dead()
        return PassResult(graph, count > 0, list(notes))


def _chunk(op: m.Equal) -> int | None:
    """The size of the chunks of which the places of two axes are to be in the same one."""
    a, b = op.a.producer, op.b.producer
    if not isinstance(a, m.FloorDivide) or not isinstance(b, m.FloorDivide):
        return None
    size, other = constant(a.b), constant(b.b)
    if size is None or size != other or size < 2 or {_axis(a.a), _axis(b.a)} != {-1, -2}:
        return None
    return int(size)


def _axis(v: Value) -> int | None:
    """The axis along which a value counts 0, 1, 2, …; None of another value."""
    known = MaskAnalysis().meaning(v)
    if not isinstance(known, Affine) or known.constant != 0 or len(known.coefficients) != 1:
        return None
    ((axis, step),) = known.coefficients
    return axis if step == 1 else None
