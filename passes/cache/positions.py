"""Where the positions of tokens go in a graph: whoever changes them (eviction, rotary embeddings that depend
on a sequence's length) must know that nothing else reads them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from ...ir.core import Graph, Op, Value
from ...ir.errors import UnsupportedError
from ...ir.ops import math as m
from ...ir.ops.cache import PagedAttention
from ...ir.ops.nn import Embedding, Rope
from ...ir.ops.quant import QuantizedEmbedding
from ...ir.ops.shape import Arange
from ..base import Pass, PassContext, PassResult


class PositionsError(Exception):
    """Why positions cannot be changed."""


def check_positions(graph: Graph, positions: Iterable[Value], lengths: Value | None = None) -> set[Value]:
    """The values that depend on `positions` alone, or on nothing. Raises PositionsError where positions flow
    into anything but the tables of rotary embeddings, or `lengths` into anything but attention.
    """
    positional = set(positions)
    fixed: set[Value] = set(graph.weights.values())  # the same for every step
    for op in graph:
        where = f"{op.opname} in {op.loc or graph.name}"
        if lengths is not None and lengths in op.operands and not isinstance(op, PagedAttention):
            raise PositionsError(f"{where} depends on the length of the sequence")
        found = [v for v in op.operands if v in positional]
        if not found:
            if all(v in fixed for v in op.operands) and not positional.intersection(op.results):
                fixed.update(op.results)
        elif all(v in positional or v in fixed for v in op.operands):
            positional.update(op.results)
        elif not isinstance(op, Rope) or op.x in positional:
            if any(isinstance(v.producer, Embedding | QuantizedEmbedding) for v in found):
                raise PositionsError(f"absolute positions, learned ones, enter {where}")
            if any(isinstance(made, m.Cos | m.Sin) for v in found for made in cone(v)):
                known = "in no form of rotary embedding known"
                raise PositionsError(f"{where} takes cosines of positions, {known}")
            raise PositionsError(f"positions enter {where}")
    return positional | fixed


def cone(v: Value, seen: dict[Op, None] | None = None) -> dict[Op, None]:
    """The ops that a value comes from, each after those that it needs."""
    found = {} if seen is None else seen
    if v.producer is not None and v.producer not in found:
        for operand in v.producer.operands:
            cone(operand, found)
        found[v.producer] = None
    return found


@dataclass(frozen=True)
class CheckPositions(Pass):
    """Refuse a fused graph whose positions enter anything but rotary embeddings."""

    name = "check-positions"
    asked: ClassVar[str] = "--rope-scaling …,when=needed"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        # A traced model counts its tokens by arange(T), which becomes the step's `positions` later.
        counted = [op.result for op in graph if isinstance(op, Arange) and not isinstance(op.length, int)]
        try:
            check_positions(graph, counted)
        except PositionsError as reason:
            raise UnsupportedError(
                f"{self.asked}: {reason}", remedy="leave when=needed away, or --rope-scaling"
            ) from None
        return PassResult(graph, changed=False)


__all__ = ["CheckPositions", "PositionsError", "check_positions", "cone"]
