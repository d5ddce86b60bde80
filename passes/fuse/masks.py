"""What an attention mask means, found by analysis instead of by matching one way of building it.

Every integer tensor in a mask is an affine function of its own indices (arange, offsets, unsqueeze, indexing
by arange …), every boolean one a conjunction of comparisons of such functions, and every float one takes one
number where such a conjunction holds and another elsewhere. `MaskAnalysis` computes that; a mask over queries
i (axis -2) and keys j (axis -1) then reads off as

    i - j >= 0                     causal
    j - i + (W - 1) >= 0           sliding window of W
    i - j + (W - 1) >= 0           the other side of a two-sided window

for every length at once. What is outside of this language is "not understood", never guessed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ...ir.core import Op, Value
from ...ir.ops import math as m
from ...ir.ops.shape import Arange, Expand, Full, Index, Reshape, Slice, Transpose
from ...ir.types import Shape
from ...ir.weights import LazyTensor
from .mask_terms import (
    COMPARE,
    EXACT,
    Affine,
    Choice,
    Meaning,
    Predicate,
    as_choice,
    bias,
    combined,
    compared,
    map_affine,
    not_negative,
    where_true,
    without,
)

TABLE_LIMIT = 1 << 26  # elements of a stored triangle that is read to see what it is


def kept_axes(before: Shape, after: Shape) -> dict[int, int] | None:
    """Old axis → new axis for a reshape that only adds or drops axes of length one; None for any other."""
    old = [i - len(before) for i, d in enumerate(before) if d != 1]
    new = [i - len(after) for i, d in enumerate(after) if d != 1]
    if [before[i] for i in old] != [after[i] for i in new]:
        return None
    return dict(zip(old, new, strict=True))


def stored_triangle(data: LazyTensor) -> Predicate | None:
    """What a stored table [..., n, n] of truth values is (buffers of older models): everything, the lower
    triangle, or a band of it. Floats stand for truth values where they are 0 and 1, and have axes in front.
    """
    shape = data.shape
    floats = data.dtype == "float32" and len(shape) > 2
    if (
        not (floats or data.dtype in ("bool", "uint8"))
        or len(shape) < 2
        or math.prod(shape) != shape[-1] * shape[-2]
    ):
        return None
    rows, columns = shape[-2:]
    if rows != columns or rows * columns > TABLE_LIMIT:
        return None
    stored = data.read().reshape(rows, columns)
    table = stored != 0
    if data.dtype != "bool" and not np.isin(stored, (0, 1)).all():
        return None
    if table.all():
        return Predicate()
    causal = not_negative(Affine.of(0, {-2: 1, -1: -1}))
    if np.array_equal(table, np.tri(rows, dtype=bool)):
        return causal
    width = int(table[-1].sum())
    band = np.tri(rows, dtype=bool) & ~np.tri(rows, k=-width, dtype=bool)
    if not width or not np.array_equal(table, band):
        return None
    return causal.both(not_negative(Affine.of(width - 1, {-2: -1, -1: 1})))


class MaskAnalysis:
    """Meanings of values, memoised; `meaning(v)` is None for whatever is not understood."""

    def __init__(self) -> None:
        self._known: dict[Value, Meaning] = {}

    def meaning(self, v: Value) -> Meaning:
        if v not in self._known:
            found = self._of_op(v.producer) if v.producer is not None else self._of_weight(v)
            # Along an axis of length one the index is 0: what depends on it depends on nothing.
            unit = {a for a in range(-v.type.rank, 0) if v.shape[a] == 1}
            self._known[v] = map_affine(found, lambda e: without(e, unit))
        return self._known[v]

    @staticmethod
    def _of_weight(v: Value) -> Meaning:
        found = None if v.weight is None else stored_triangle(v.weight)
        return Choice(found, 1.0, 0.0) if found is not None and v.dtype == "float32" else found

    def opposite(self, v: Value) -> Predicate | None:
        """Where a boolean value is false; that may be a conjunction, where the value itself is none."""
        inner, op = self.meaning(v), v.producer
        if isinstance(inner, Predicate):
            return inner.negated()
        found: Meaning = None
        if isinstance(op, m.LogicalNot):
            found = self.meaning(op.x)
        elif isinstance(op, m.Equal | m.NotEqual):
            other = m.NotEqual if isinstance(op, m.Equal) else m.Equal
            found = self._of_numbers(self.meaning(op.a), self.meaning(op.b), COMPARE[other])
        return found if isinstance(found, Predicate) else None

    def _of_op(self, op: Op) -> Meaning:
        match op:
            case Full():
                return self._full(op)
            case Arange():
                return Affine.of(op.start, {-1: op.step}) if op.dtype in ("int32", "int64") else None
            case Reshape() | Expand() | Transpose():
                return self._moved(op)
            case Slice():
                return self._sliced(op)
            case m.Cast():
                return self._cast(op)
            case m.Where():
                return self._where(op)
            case Index():
                return self._index(op)
            case m.Diff():
                return self._diff(op)
            case m.CumSum():
                return self._cumsum(op)
            case m.LogicalNot():
                inner = self.meaning(op.x)
                return inner.negated() if isinstance(inner, Predicate) else None
            case m.Binary():
                return self._of_binary(op)
            case _:
                return None

    def _of_binary(self, op: m.Binary) -> Meaning:
        match op:
            case m.Add() | m.Sub() | m.Mul():
                return self._arithmetic(op)
            case m.LogicalAnd():
                a, b = self.meaning(op.a), self.meaning(op.b)
                return a.both(b) if isinstance(a, Predicate) and isinstance(b, Predicate) else None
            case m.LogicalOr():
                return self._either(op)
            case m.Comparison():
                return self._comparison(op)
            case _:
                return None

    @staticmethod
    def _full(op: Full) -> Meaning:
        if op.dtype == "bool":
            return Predicate(never=not op.value)
        if op.dtype in ("int32", "int64"):
            return Affine(int(op.value))
        return Choice(Predicate(), float(op.value), float(op.value))

    def _moved(self, op: Reshape | Expand | Transpose) -> Meaning:
        rank = op.x.type.rank
        if isinstance(op, Reshape):
            axes = kept_axes(op.x.shape, op.shape)
        elif isinstance(op, Expand):
            axes = {i - rank: i - rank for i in range(rank)}
        else:
            axes = {old - rank: new - rank for new, old in enumerate(op.full_perm())}
        if axes is None:
            return None
        inner = self.meaning(op.x)
        if isinstance(inner, Choice):
            when = inner.when.moved(axes)
            return None if when is None else Choice(when, inner.yes, inner.no)
        return None if inner is None else inner.moved(axes)

    def _sliced(self, op: Slice) -> Meaning:
        def shift(e: Affine) -> Affine:
            c = e.coefficient(op.axis)
            return Affine.of(e.constant + c * op.start, {**dict(e.coefficients), op.axis: c * op.step})

        return map_affine(self.meaning(op.x), shift)

    def _cast(self, op: m.Cast) -> Meaning:
        inner = self.meaning(op.x)
        match inner:
            case Predicate():
                if op.dtype == "bool":
                    return inner
                if op.dtype in ("int32", "int64") and (inner.never or inner.always):
                    return Affine(0 if inner.never else 1)
                return Choice(inner, 1.0, 0.0)
            case Affine() if op.dtype == "bool":
                number = inner.constant if not inner.coefficients else None
                return Predicate(never=number == 0) if isinstance(number, int) else None
            case Affine():
                return inner if op.dtype in ("int32", "int64") else None
            case Choice() if op.dtype == "bool":
                return where_true(inner.when, bool(inner.yes), bool(inner.no))
            case Choice():
                small = inner.yes in (0.0, 1.0) and inner.no in (0.0, 1.0)
                return inner if op.dtype.startswith(("float", "bfloat")) or small else None
            case None:
                return None

    def _arithmetic(self, op: m.Binary) -> Meaning:
        a, b = self.meaning(op.a), self.meaning(op.b)
        if isinstance(a, Affine) and isinstance(b, Affine):
            if isinstance(op, m.Mul):
                factor, other = (b, a) if not b.coefficients else (a, b)
                return None if factor.coefficients else other.times(factor.constant)
            return a.plus(b, 1 if isinstance(op, m.Add) else -1)
        if op.result.dtype not in EXACT:
            return None
        left, right = as_choice(a), as_choice(b)
        if left is None or right is None:
            return None
        if left.when.always or right.when.always:
            return combined(op, left, right)
        shown = (left.visible(), right.visible()) if isinstance(op, m.Add) else (None, None)
        return None if shown[0] is None or shown[1] is None else bias(shown[0].both(shown[1]))

    def _comparison(self, op: m.Binary) -> Meaning:
        a, b = self.meaning(op.a), self.meaning(op.b)
        if isinstance(a, Affine) and isinstance(b, Affine):
            return compared(op, a.plus(b, -1))
        if isinstance(b, Affine) and isinstance(op, m.Less | m.LessEqual):
            return self._within(op, b)
        return self._of_numbers(a, b, COMPARE[type(op)])

    @staticmethod
    def _of_numbers(a: Meaning, b: Meaning, function: Callable[[float, float], bool]) -> Predicate | None:
        """Where a function of two numbers is true, of which at least one is the same everywhere."""
        left, right = as_choice(a), as_choice(b)
        if left is None or right is None:
            return None
        if right.when.always:
            return where_true(left.when, function(left.yes, right.yes), function(left.no, right.yes))
        if left.when.always:
            return where_true(right.when, function(left.yes, right.yes), function(left.yes, right.no))
        return None

    def _within(self, op: m.Less | m.LessEqual, limit: Affine) -> Meaning:
        """|e| <= limit as two comparisons."""
        absolute = op.a.producer
        inner = self.meaning(absolute.x) if isinstance(absolute, m.Abs) else None
        if not isinstance(inner, Affine):
            return None
        above, below = (compared(op, inner.times(sign).plus(limit, -1)) for sign in (1, -1))
        return above.both(below) if above is not None and below is not None else None

    def _either(self, op: m.LogicalOr) -> Meaning:
        a, b = self.meaning(op.a), self.meaning(op.b)
        if not isinstance(a, Predicate) or not isinstance(b, Predicate):
            return None
        if a.implies(b):
            return b
        return a if b.implies(a) else None

    def _where(self, op: m.Where) -> Meaning:
        condition, a, b = self.meaning(op.condition), self.meaning(op.a), self.meaning(op.b)
        if not isinstance(condition, Predicate) or a is None or b is None:
            return None
        if condition.always or condition.never:
            return a if condition.always else b
        opposite = condition.negated()
        if isinstance(a, Predicate) and isinstance(b, Predicate):
            if b.never:
                return condition.both(a)
            return opposite.both(b) if a.never and opposite is not None else None
        yes, no = as_choice(a), as_choice(b)
        if yes is None or no is None:
            return None
        if yes.when.always and no.when.always:
            return Choice(condition, yes.yes, no.yes)
        shown, other = yes.visible(), no.visible()
        if shown is None or other is None:
            return None
        if other.never:  # visible where the condition holds, and where `a` says so
            return bias(condition.both(shown))
        return bias(opposite.both(other)) if shown.never and opposite is not None else None

    def _index(self, op: Index) -> Meaning:
        indices = [self.meaning(i) for i in op.indices]
        if len(indices) != op.x.type.rank:
            return None
        known = [i for i in indices if isinstance(i, Affine) and i.never_negative]
        if len(known) != len(indices):
            return None  # a negative index would count from the end

        def put(e: Affine) -> Affine:
            total = Affine(e.constant)
            for position, i in enumerate(known):
                total = total.plus(i.times(e.coefficient(position - len(known))))
            return total

        return map_affine(self.meaning(op.x), put)

    def _diff(self, op: m.Diff) -> Meaning:
        x, before = self.meaning(op.x), self.meaning(op.prepend)
        if not isinstance(x, Affine) or not isinstance(before, Affine):
            return None
        step = x.coefficient(-1)
        return Affine(step) if without(x, {-1}).plus(before, -1) == Affine(step) else None

    def _cumsum(self, op: m.CumSum) -> Meaning:
        inner = self.meaning(op.x)
        if isinstance(inner, Predicate) and (inner.never or inner.always):
            inner = Affine(0 if inner.never else 1)
        if isinstance(inner, Affine) and not inner.coefficients:
            return Affine.of(inner.constant, {op.axis: inner.constant})
        return None


@dataclass(frozen=True)
class MaskFacts:
    causal: bool
    window: int | None


def classify(meaning: Meaning) -> MaskFacts | str:
    """Causal and window of a mask [..., T, T], or the sentence why it is neither."""
    visible = meaning.visible() if isinstance(meaning, Choice) else meaning
    if not isinstance(visible, Predicate):
        return "the mask is not understood: it is no comparison of query and key positions"
    if visible.never:
        return "the mask hides everything"
    causal = False
    behind: int | None = None
    ahead: int | None = None
    for atom in visible.atoms:
        slope, c = dict(atom.coefficients), atom.constant
        if atom.never_negative:
            continue
        if not isinstance(c, int) or slope not in ({-2: 1, -1: -1}, {-2: -1, -1: 1}) or c < 0:
            return "the mask is neither causal nor a sliding window"
        if slope == {-2: -1, -1: 1}:
            behind = c + 1 if behind is None else min(c + 1, behind)
        elif c == 0:
            causal = True
        else:
            ahead = c + 1 if ahead is None else min(c + 1, ahead)
    if causal:
        return MaskFacts(True, behind)
    if ahead != behind:
        return f"the mask sees {ahead or 'all'} keys ahead and {behind or 'all'} behind"
    return MaskFacts(False, behind)
