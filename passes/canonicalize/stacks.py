"""Values that stand in front of the batch axis, taken apart.

    slice(concat([a, b]: [2, 1, T, D], first axis), 1:2)   → a reshape of b
    mul(stack [2, 1, T, D], y)                              → mul(a, y), mul(b, y)
    reduce_mean(stack, first axis)                          → (a + b) / 2

Models that carry several hidden states at once (alternating updates: Baykal et al. 2023, arXiv:2301.13310)
stack them as [n, batch, tokens, …]. What follows (norms, attention, paging, which takes the leading axis as
the batch) is written for [batch, tokens, …]: here each of the n becomes a value of its own.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from ...ir.core import Graph, Op, Value
from ...ir.ops import math as m
from ...ir.ops.nn import Linear
from ...ir.ops.shape import Concat, Expand, Full, Reshape, Slice, Transpose
from ...ir.types import DimExpr
from ..base import Pass, PassContext, PassResult

_MOST = 16
"""Values in a stack; more are no hidden states."""


def _is_stack(v: Value) -> bool:
    """Whether a value is [n, 1, …] with tokens behind."""
    shape = v.shape
    if len(shape) < 3 or not isinstance(shape[0], int) or not 2 <= shape[0] <= _MOST or shape[1] != 1:
        return False
    return any(isinstance(d, DimExpr) for d in shape[2:])


@dataclass(frozen=True)
class Unstack(Pass):
    """Ops on stacks → ops on their pieces, as far as they are known; the others keep the stack."""

    name = "unstack"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        if not any(_is_stack(r) for op in graph for r in op.results):
            return PassResult(graph, False)
        pieces: dict[Value, list[Value]] = {}
        changed = False
        for op in graph.ops:
            if len(op.results) != 1:
                continue
            at = _Place(graph, op, pieces)
            if _is_stack(op.results[0]):
                made = at.pieces()
                if made is not None:
                    pieces[op.results[0]] = made
                continue
            # [n, 1, T] alone may be anything, slopes of n heads for one; [n, 1, T, D] are hidden states.
            states = any(v in pieces and v.type.rank > 3 for v in op.operands)
            whole = at.whole() if states else None
            if whole is not None:
                graph.replace(op, [whole])
                changed = True
        graph.drop_dead()
        return PassResult(graph, changed)


class _Place:
    """An op, and what is inserted in front of it."""

    def __init__(self, graph: Graph, op: Op, known: dict[Value, list[Value]]) -> None:
        self.graph, self.op, self.known = graph, op, known

    def emit(self, op: Op) -> Value:
        op.loc = self.op.loc
        return self.graph.insert(op, before=self.op).results[0]

    def pieces(self) -> list[Value] | None:
        """What the op's stack is made of, each without the leading axis; None where that is not known."""
        op = self.op
        result = op.results[0]
        count = result.shape[0]
        assert isinstance(count, int)
        match op:
            case Concat() if op.axis == -result.type.rank:
                parts = [self.parts(x) for x in op.xs]
                return [p for some in parts for p in some] if all(parts) else None
            case Slice() if op.axis == -result.type.rank and op.x in self.known:
                assert isinstance(op.start, int) and isinstance(op.stop, int)
                return self.known[op.x][op.start : op.stop : op.step]
            case m.Unary() | m.Binary() | m.Cast() | m.Where():
                return self.each(count)
            case Linear() if op.x in self.known:
                return self.each(count)
            case Reshape() if op.x in self.known and op.x.shape[0] == count:
                return [self.emit(Reshape(p, shape=op.shape[1:])) for p in self.known[op.x]]
            case Full():
                return [self.emit(Full(value=op.value, dtype=op.dtype, shape=op.shape[1:]))] * count
            case Expand():
                some = self.operand(op.x, count)
                return None if some is None else [self.emit(Expand(p, shape=op.shape[1:])) for p in some]
            case Transpose():
                return self.along(op, count)
            case _:
                return None

    def parts(self, x: Value) -> list[Value]:
        """Pieces of one operand of a concatenation along the leading axis; none where they are not known."""
        if x in self.known:
            return self.known[x]
        return [self.emit(Reshape(x, shape=x.shape[1:]))] if x.shape[0] == 1 else []

    def operand(self, x: Value, count: int) -> list[Value] | None:
        """What each piece of the result sees of an operand that is broadcast to it."""
        if x in self.known:
            return self.known[x]
        if x.type.rank < self.op.results[0].type.rank:
            return [x] * count
        return [self.emit(Reshape(x, shape=x.shape[1:]))] * count if x.shape[0] == 1 else None

    def each(self, count: int) -> list[Value] | None:
        """The op on each piece."""
        given = [self.operand(x, count) for x in self.op.operands]
        if isinstance(self.op, Linear):
            given = [self.known[self.op.x], *([x] * count for x in self.op.operands[1:])]
        if any(some is None or len(some) != count for some in given):
            return None
        columns = zip(*(some for some in given if some is not None), strict=True)
        return [
            self.emit(self.op.clone(dict(zip(self.op.operands, column, strict=True)))) for column in columns
        ]

    def along(self, op: Transpose, count: int) -> list[Value]:
        """Pieces of an axis that a transpose brings to the front."""
        perm = op.full_perm()
        axis, rank = perm[0], op.x.type.rank
        rest = [p - (p > axis) for p in perm[1:]]  # among the axes that are left
        shape = tuple(d for i, d in enumerate(op.x.shape) if i != axis)
        found: list[Value] = []
        for i in range(count):
            one = self.emit(Slice(op.x, axis=axis - rank, start=i, stop=i + 1))
            found.append(self.transposed(self.emit(Reshape(one, shape=shape)), rest))
        return found

    def transposed(self, x: Value, perm: list[int]) -> Value:
        """x with its axes permuted, all of them given from the left."""
        if perm == sorted(perm):
            return x
        return self.emit(Transpose(x, perm=tuple(p - len(perm) for p in perm)))

    def whole(self) -> Value | None:
        """What an op makes of a stack that is none itself; None where that is not known."""
        op = self.op
        result = op.results[0]
        match op:
            case Slice() if op.axis == -op.x.type.rank:
                assert isinstance(op.start, int)
                return self.emit(Reshape(self.known[op.x][op.start], shape=result.shape))
            case Transpose():
                perm = op.full_perm()
                place = perm.index(0)
                rest = [p - 1 for p in perm if p]
                columns = [
                    self.emit(Reshape(self.transposed(p, rest), shape=_one(result, place)))
                    for p in self.known[op.x]
                ]
                return self.emit(Concat(columns, axis=place - result.type.rank))
            case m.ReduceMean() | m.ReduceSum() if op.axes == (-op.x.type.rank,):
                some = self.known[op.x]
                total = functools.reduce(lambda a, b: self.emit(m.Add(a, b)), some)
                if isinstance(op, m.ReduceMean):
                    count = self.emit(Full(value=float(len(some)), dtype=result.dtype))
                    total = self.emit(m.Div(total, count))
                return self.emit(Reshape(total, shape=result.shape)) if op.keepdim else total
            case _:
                return None


def _one(v: Value, axis: int) -> tuple[int | DimExpr, ...]:
    """The shape of a value with one element along an axis."""
    return (*v.shape[:axis], 1, *v.shape[axis + 1 :])


__all__ = ["Unstack"]
