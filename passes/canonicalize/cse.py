"""Common subexpressions: two ops of one kind with equal operands and attributes → one.

%a = cos(%x)
%b = cos(%x)      → every use of %b becomes a use of %a
"""

from __future__ import annotations

from dataclasses import dataclass

from ...ir.core import Graph, Op
from ..base import Pass, PassContext, PassResult


@dataclass(frozen=True)
class MergeEqual(Pass):
    """Common subexpression elimination over the whole graph: no op has effects, `append_kv` returns its
    pages.
    """

    name = "merge-equal"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        seen: dict[object, Op] = {}
        count = 0
        for op in graph.ops:
            key = (
                op.opname,
                tuple(id(v) for v in op.operands),
                op.counts,
                tuple((k, repr(v)) for k, v in op.attributes().items()),
            )
            first = seen.setdefault(key, op)
            if first is not op:
                graph.replace(op, first.results)
                count += 1
        return PassResult(graph, count > 0)


@dataclass(frozen=True)
class DropDead(Pass):
    """Erase what nobody uses, weights included."""

    name = "drop-dead"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        return PassResult(graph, graph.drop_dead() > 0)
