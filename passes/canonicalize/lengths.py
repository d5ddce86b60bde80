"""How many tokens there are.

    sum(input_ids ≠ padding)   → T
    arange(T) < T              → true

Models that take texts of different lengths side by side read off the ids how long each is, and hide what is
behind. A text that is compiled for has no padding.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...ir.core import Graph, Op, Value
from ...ir.ops import math as m
from ...ir.ops.shape import Arange, DimValue, Expand, Full, Reshape
from ...ir.rewriter import Match, P, Rewriter, Rule, constant

_OF_TEXT = ("causal_lm", "encoder", "classifier")
_WHOLE = ("int32", "int64")


def count_tokens(graph: Graph) -> list[str]:
    """Replace sums of `input_ids ≠ padding` [1, T] over the tokens by T, in a model of text: this differs
    only for a text that spells the padding token out. A sentence for each.
    """
    notes: list[str] = []
    ids = [v for v in graph.inputs if v.name == "input_ids"] if graph.facts.get("kind") in _OF_TEXT else []
    for op in graph.ops if ids else ():
        padding = _padding(op, ids[0])
        if padding is None:
            continue
        count = DimValue(dim=ids[0].shape[-1], dtype=op.results[0].dtype)
        new: list[Op] = [count, Reshape(count.result, shape=op.results[0].shape)]
        for one in new:
            one.loc = op.loc
            graph.insert(one, before=op)
        graph.replace(op, [new[-1].results[0]])
        where = op.loc or graph.name
        notes.append(f"{where} counts tokens other than {padding}: taken as the number of tokens")
    return notes


def _padding(op: Op, ids: Value) -> int | None:
    """The number that the ids are compared with, where an op counts those that are another; else None."""
    if not isinstance(op, m.ReduceSum) or op.result.dtype not in _WHOLE or op.x.shape != ids.shape:
        return None
    counted = _uncast(op.x).producer
    if -1 not in op.axes or not isinstance(counted, m.NotEqual):
        return None
    for a, b in ((counted.a, counted.b), (counted.b, counted.a)):
        number = constant(b)
        if _uncast(a) is ids and number is not None:
            return int(number)
    return None


def _uncast(v: Value) -> Value:
    while isinstance(v.producer, m.Cast):
        v = v.producer.x
    return v


class BelowTheirNumber(Rule):
    """arange(n) < n → true"""

    pattern = P(m.Less)

    def rewrite(self, found: Match, rw: Rewriter) -> Sequence[Value] | None:
        op = rw.root
        assert isinstance(op, m.Less)
        places, number = _moved(op.a), _moved(op.b)
        if not isinstance(places, Arange) or not isinstance(number, DimValue):
            return None
        beyond = number.dim - (places.start + places.length)  # the last place is one below
        if places.step != 1 or not isinstance(beyond, int) or beyond < 0:
            return None
        return [rw.insert(Full(value=True, dtype="bool", shape=op.result.shape))]


def _moved(v: Value) -> Op | None:
    """What made the whole numbers that a value holds."""
    while isinstance(op := v.producer, Reshape | Expand | m.Cast):
        if isinstance(op, m.Cast) and op.dtype not in _WHOLE:
            return None
        v = op.x
    return v.producer if v.dtype in _WHOLE else None


RULES: tuple[Rule, ...] = (BelowTheirNumber(),)
