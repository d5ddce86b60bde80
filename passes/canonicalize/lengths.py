"""Tokens that a text's length hides, of which there are none.

    arange(T) < sum(input_ids ≠ padding)   → true

Models that take texts of different lengths side by side read off the ids how long each is, and hide what is
behind. A text that is compiled for has nothing behind it.
"""

from __future__ import annotations

from ...ir.core import Graph, Op, Value
from ...ir.ops import math as m
from ...ir.ops.shape import Arange, Expand, Full, Reshape
from ...ir.rewriter import constant

_OF_TEXT = ("causal_lm", "encoder", "classifier")
_WHOLE = ("int32", "int64")


def show_whole_texts(graph: Graph) -> list[str]:
    """Replace comparisons of places with the number of `input_ids` [1, T] that are no padding by true, in a
    model of text: this differs only for a text that spells the padding token out. A sentence for each.
    """
    ids = [v for v in graph.inputs if v.name == "input_ids"] if graph.facts.get("kind") in _OF_TEXT else []
    notes: list[str] = []
    for op in graph.ops if ids else ():
        padding = _hidden_behind(op, ids[0])
        if padding is None:
            continue
        seen = Full(value=True, dtype="bool", shape=op.results[0].shape)
        seen.loc = op.loc
        graph.insert(seen, before=op)
        graph.replace(op, [seen.result])
        where = op.loc or graph.name
        notes.append(f"{where} hides as many tokens at the end as are {padding}: none, a text has no padding")
    return notes


def _hidden_behind(op: Op, ids: Value) -> int | None:
    """The padding token, where an op says which places are below the number of ids that are another; else
    None.
    """
    if not isinstance(op, m.Less | m.Greater):
        return None
    below, above = (op.a, op.b) if isinstance(op, m.Less) else (op.b, op.a)
    places, number = _moved(below), _moved(above)
    if not isinstance(places, Arange) or number is None:
        return None
    first = (places.start, places.step, places.length) == (0, 1, ids.shape[-1])
    return _padding(number, ids) if first else None


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


def _moved(v: Value) -> Op | None:
    """What made the whole numbers that a value holds."""
    while isinstance(op := v.producer, Reshape | Expand | m.Cast):
        if isinstance(op, m.Cast) and op.dtype not in _WHOLE:
            return None
        v = op.x
    return v.producer if v.dtype in _WHOLE else None
