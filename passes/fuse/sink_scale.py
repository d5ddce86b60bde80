"""Attention sinks written as a factor behind the softmax, brought into the form of a column in it.

    (softmax(scores) · v) · sigmoid(logsumexp(scores) - sinks)
        → slice(softmax(concat([scores, sinks]))) · v

Both are the same: e^lse / (e^lse + e^sink) is the share of the softmax that a further logit leaves to the
others. `attention.py` knows the column.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any as Anything

from ...ir.core import Value
from ...ir.ops import math as m
from ...ir.ops.shape import Concat, Expand, Reshape, Slice
from ...ir.rewriter import Any, Match, P, Rewriter, Rule
from ...ir.types import product
from ..base import RulePass


def _bare(v: Value) -> Value:
    """A value without casts and added or dropped axes of length one."""
    while isinstance(op := v.producer, m.Cast | Reshape):
        if isinstance(op, Reshape) and [d for d in op.shape if d != 1] != [d for d in op.x.shape if d != 1]:
            break
        v = op.x
    return v


def _summed(v: Value) -> Value | None:
    """scores of logsumexp(scores) over the last axis: log(Σ exp(scores - top)) + top."""
    op = v.producer
    if not isinstance(op, m.Add):
        return None
    logs, top = (_bare(one) for one in (op.a, op.b))
    if not isinstance(logs.producer, m.Log) or not isinstance(total := logs.producer.x.producer, m.ReduceSum):
        return None
    if total.axes != (-1,) or not isinstance(powers := total.x.producer, m.Exp):
        return None
    centred = powers.x.producer
    if not isinstance(centred, m.Sub) or _bare(centred.b) is not top:
        return None
    return centred.a


def _sinks(scale: Value, scores: Value) -> Value | None:
    """sinks [H] of sigmoid(logsumexp(scores) - sinks) for scores [B, H, T, S]."""
    inner = _bare(scale).producer
    if not isinstance(inner, m.Sigmoid) or not isinstance(apart := _bare(inner.x).producer, m.Sub):
        return None
    heads = scores.shape[-3]
    sinks = _bare(apart.b)
    along_heads = apart.b.shape[-2:] == (heads, 1) and product(sinks.shape) == heads
    summed = _summed(_bare(apart.a))
    same = summed is not None and _bare(summed) is _bare(scores)
    return sinks if same and along_heads and sinks.is_weight else None


class SinksBesideScores(Rule):
    """(softmax(scores) · v) · sigmoid(logsumexp(scores) - sinks) → slice(softmax(concat([…]))) · v"""

    pattern = P(m.Mul, Any("a"), Any("b"), name="scaled")

    def rewrite(self, found: Match, rw: Rewriter) -> Sequence[Value] | None:
        for mixed, scale in ((found["a"], found["b"]), (found["b"], found["a"])):
            last = mixed.producer
            if not isinstance(last, m.MatMul) or mixed.type.rank != 4:
                continue
            weights = _bare(last.a).producer
            if not isinstance(weights, m.Softmax) or weights.axis != -1 or scale.shape[-1] != 1:
                continue
            sinks = _sinks(scale, weights.x)
            if sinks is not None:
                return [self._column(rw, weights.x, sinks, last.b)]
        return None

    @staticmethod
    def _column(rw: Rewriter, scores: Value, sinks: Value, v: Value) -> Value:
        batch, heads, queries, keys = scores.shape
        column: Anything = rw.insert(Reshape(sinks, shape=(1, heads, 1, 1)))
        column = rw.insert(Expand(column, shape=(batch, heads, queries, 1)))
        wide = rw.insert(m.Softmax(rw.insert(Concat([scores, column], axis=-1)), axis=-1))
        return rw.insert(m.MatMul(rw.insert(Slice(wide, axis=-1, start=0, stop=keys, step=1)), v))


class FuseSinkScale(RulePass):
    """Sinks of attention that stand behind it."""

    name = "fuse-sink-scale"
    rules = (SinksBesideScores(),)


__all__ = ["FuseSinkScale"]
