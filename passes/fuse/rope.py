"""Rotary embedding.

    add(mul(x, cos), mul(concat([neg(slice(x, h:)), slice(x, :h)]), sin))   → rope(x, cos, sin)
    concat([rope(slice(x, :r)), slice(x, r:)])                              → rope(x, cos[:r], sin[:r])
    (partial rotary) mul(rope(x, cos, sin), 1.0 …) stays: scaling of attention is part of the tables

x is head-major [1, H, T, D] here; rope is token-major, so a transpose goes in and one comes out, and they
cancel with their neighbours. The tables stay what the model computes from its positions: every RoPE scaling
works without being known here.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...ir.core import Value
from ...ir.ops import math as m
from ...ir.ops.nn import Rope
from ...ir.ops.shape import Concat, Reshape, Slice, Transpose
from ...ir.rewriter import Any, Match, Or, P, Rewriter, Rule
from ..base import RulePass

SWAP_HEADS = (-2, -3, -1)  # [.., H, T, D] ↔ [.., T, H, D]


def token_major(rw: Rewriter, x: Value) -> Value:
    """x [.., H, T, D] → [.., T, H, D]; cancels a transpose that is there already."""
    op = x.producer
    if isinstance(op, Transpose) and op.perm == SWAP_HEADS:
        return op.x
    return rw.insert(Transpose(x, perm=SWAP_HEADS))


def _table(rw: Rewriter, table: Value, tokens: object) -> Value | None:
    """cos or sin as [.., T, R] from [1, 1, T, R] (or [1, T, R]); None when its axes mean something else."""
    if table.type.rank < 2 or table.shape[-2] != tokens or any(d != 1 for d in table.shape[:-2]):
        return None
    target = (1, *table.shape[-2:])
    return table if table.shape == target else rw.insert(Reshape(table, shape=target))


class FuseRope(Rule):
    """x · cos + rotate_half(x) · sin → rope(x, cos, sin)"""

    pattern = P(
        m.Add,
        P(m.Mul, Any("x"), Any("cos")),
        P(
            m.Mul,
            Or(
                P(Concat, axis=-1, name="half"),
                P(Transpose, P(Concat, axis=-1, name="half"), perm=SWAP_HEADS, name="swap"),
            ),
            Any("sin"),
        ),
    )

    def _halves(self, found: Match) -> tuple[Slice, Slice] | None:
        half, x = found.op("half"), found.value("x")
        if (
            "swap" in found
        ):  # canonicalisation moved the transpose behind the slices: they cut the token-major tensor
            if not isinstance(x.producer, Transpose) or x.producer.perm != SWAP_HEADS:
                return None
            x = x.producer.x
        width = x.shape[-1]
        if len(half.operands) != 2 or not isinstance(width, int) or width % 2:
            return None
        neg, low = half.operands[0].producer, half.operands[1].producer
        if not isinstance(neg, m.Neg) or not isinstance(low, Slice):
            return None
        high = neg.x.producer
        if (
            not isinstance(high, Slice)
            or high.x is not x
            or low.x is not x
            or high.axis != -1
            or low.axis != -1
        ):
            return None
        if (low.start, low.stop, high.start, high.stop, low.step, high.step) != (
            0,
            width // 2,
            width // 2,
            width,
            1,
            1,
        ):
            return None
        return low, high

    def check(self, found: Match) -> str | None:
        if self._halves(found) is None:
            found["x"], found["cos"] = found["cos"], found["x"]  # a product has no order
        if self._halves(found) is None:
            return "the second product does not rotate the two halves of the same tensor"
        return (
            None
            if found.value("x").type.rank == 4
            else "rotary embedding of a tensor that is not [1, H, T, D]"
        )

    def rewrite(self, found: Match, rw: Rewriter) -> Sequence[Value] | None:
        x = found.value("x")
        tokens = x.shape[-2]
        cos, sin = _table(rw, found["cos"], tokens), _table(rw, found["sin"], tokens)
        if cos is None or sin is None:
            return None
        y = rw.insert(Rope(token_major(rw, x), cos, sin))
        return [rw.insert(Transpose(y, perm=SWAP_HEADS))]


class WidenRope(Rule):
    """concat([rope(slice(x, :r), cos, sin), slice(x, r:)]) → rope(x, cos, sin) of partial width"""

    pattern = P(Concat, axis=-1)

    def rewrite(self, found: Match, rw: Rewriter) -> Sequence[Value] | None:
        operands = rw.root.operands
        if len(operands) != 2:
            return None
        rope, rest = operands[0].producer, operands[1].producer
        if not isinstance(rope, Rope) or not isinstance(rest, Slice):
            return None
        turned = rope.x.producer
        if (
            not isinstance(turned, Slice)
            or turned.x is not rest.x
            or (turned.start, turned.axis, rest.axis) != (0, -1, -1)
        ):
            return None
        if turned.stop != rest.start or rest.stop != rest.x.shape[-1] or turned.stop != rope.rotary_dim:
            return None
        return [rw.insert(Rope(rest.x, rope.cos, rope.sin, interleaved=rope.interleaved))]


class FuseRotary(RulePass):
    """Rotary position embedding (see the module's text)."""

    name = "fuse-rope"
    rules = (FuseRope(), WidenRope())
