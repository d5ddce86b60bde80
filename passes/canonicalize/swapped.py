"""Channels before tokens, as convolutions of other libraries want them, put back behind.

slice(swap(x), axis -2)         → swap(slice(x, axis -1))        swap: the last two axes exchanged
mul(swap(a), swap(b))           → swap(mul(a, b)); add and sub likewise
matmul(weight [N, K], swap(x))  → swap(linear(x, weight))
"""

from __future__ import annotations

from collections.abc import Sequence

from ...ir.core import Value
from ...ir.ops import math as m
from ...ir.ops.nn import Linear
from ...ir.ops.shape import Slice, Transpose
from ...ir.rewriter import Any, Match, P, Rewriter, Rule, Weight

_SWAP = (-1, -2)


class SliceOfSwapped(Rule):
    """slice(swap(x), axis -2) → swap(slice(x, axis -1))"""

    pattern = P(Slice, P(Transpose, Any("x"), perm=_SWAP), axis=-2)

    def rewrite(self, found: Match, rw: Rewriter) -> Sequence[Value]:
        s = rw.root
        assert isinstance(s, Slice)
        part = rw.insert(Slice(found["x"], axis=-1, start=s.start, stop=s.stop, step=s.step))
        return [rw.insert(Transpose(part, perm=_SWAP))]


class ArithmeticOfSwapped(Rule):
    """mul(swap(a), swap(b)) → swap(mul(a, b)) for operands of one shape; add and sub likewise"""

    pattern = P((m.Mul, m.Add, m.Sub), P(Transpose, Any("a"), perm=_SWAP), P(Transpose, Any("b"), perm=_SWAP))

    def rewrite(self, found: Match, rw: Rewriter) -> Sequence[Value] | None:
        a, b = found.value("a"), found.value("b")
        if a.shape != b.shape:
            return None
        old = rw.root.operands
        new = rw.root.clone({old[0]: a, old[1]: b})
        return [rw.insert(Transpose(rw.insert(new), perm=_SWAP))]


class WeightTimesSwapped(Rule):
    """matmul(weight, swap(x)) → swap(linear(x, weight))"""

    pattern = P(m.MatMul, Weight("w"), P(Transpose, Any("x"), perm=_SWAP))

    def check(self, found: Match) -> str | None:
        weight = found.value("w")
        return None if weight.type.rank == 2 else f"weight {weight.name} has rank {weight.type.rank}"

    def rewrite(self, found: Match, rw: Rewriter) -> Sequence[Value]:
        return [rw.insert(Transpose(rw.insert(Linear(found["x"], found["w"], None)), perm=_SWAP))]


RULES: tuple[Rule, ...] = (SliceOfSwapped(), ArithmeticOfSwapped(), WeightTimesSwapped())
