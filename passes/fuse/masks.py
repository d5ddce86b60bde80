"""What an attention mask means, found by analysis instead of by matching one way of building it.

Every integer tensor in a mask is an affine function of its own indices (arange, offsets, unsqueeze, indexing
by arange …), and every boolean one a conjunction of comparisons of such functions. `MaskAnalysis` computes
that; a mask over queries i (axis -2) and keys j (axis -1) then reads off as

    i - j >= 0                     causal
    j - i + (W - 1) >= 0           sliding window of W
    i - j + (W - 1) >= 0           the other side of a two-sided window

for every length at once. What is outside of this language is "not understood", never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...ir.core import Op, Value
from ...ir.ops import math as m
from ...ir.ops.shape import Arange, Expand, Full, Index, Reshape, Slice, Transpose
from ...ir.types import Dim, Shape

NEGATIVE = (
    -1e4
)  # an additive mask at or below this hides a key (published masks use -1e4, float32's minimum or -inf)


@dataclass(frozen=True)
class Affine:
    """constant + sum of coefficients[axis] · index along axis; axes are negative.

    Axes absent have coefficient 0.
    """

    constant: Dim
    coefficients: tuple[tuple[int, Dim], ...] = ()

    @staticmethod
    def of(constant: Dim, coefficients: Mapping[int, Dim]) -> Affine:
        return Affine(constant, tuple(sorted((a, c) for a, c in coefficients.items() if c != 0)))

    def coefficient(self, axis: int) -> Dim:
        return dict(self.coefficients).get(axis, 0)

    def plus(self, other: Affine, sign: int = 1) -> Affine:
        total = dict(self.coefficients)
        for a, c in other.coefficients:
            total[a] = total.get(a, 0) + c * sign
        return Affine.of(self.constant + other.constant * sign, total)

    def times(self, factor: Dim) -> Affine:
        return Affine.of(self.constant * factor, {a: c * factor for a, c in self.coefficients})

    def moved(self, axes: Mapping[int, int]) -> Affine | None:
        """The same function with axes renamed; None when an axis that matters has no new name."""
        if any(a not in axes for a, _ in self.coefficients):
            return None
        return Affine.of(self.constant, {axes[a]: c for a, c in self.coefficients})


@dataclass(frozen=True)
class Predicate:
    """A conjunction: every `atom` is >= 0. No atoms: always true. `never`: always false."""

    atoms: frozenset[Affine] = field(default_factory=frozenset[Affine])
    never: bool = False

    def both(self, other: Predicate) -> Predicate:
        return Predicate(self.atoms | other.atoms, self.never or other.never)

    def moved(self, axes: Mapping[int, int]) -> Predicate | None:
        atoms = [a.moved(axes) for a in self.atoms]
        return (
            None
            if any(a is None for a in atoms)
            else Predicate(frozenset(a for a in atoms if a is not None), self.never)
        )


@dataclass(frozen=True)
class Bias:
    """0 where the predicate holds, very negative elsewhere: an additive mask."""

    visible: Predicate


Meaning = Affine | Predicate | Bias | None


def _atom(e: Affine) -> Predicate:
    """e >= 0, simplified where e is a number."""
    if not e.coefficients and isinstance(e.constant, int):
        return Predicate(never=e.constant < 0)
    return Predicate(frozenset({e}))


def _kept_axes(before: Shape, after: Shape) -> dict[int, int] | None:
    """Old axis → new axis for a reshape that only adds or drops axes of length one; None for any other."""
    old = [i - len(before) for i, d in enumerate(before) if d != 1]
    new = [i - len(after) for i, d in enumerate(after) if d != 1]
    if [before[i] for i in old] != [after[i] for i in new]:
        return None
    return dict(zip(old, new, strict=True))


class MaskAnalysis:
    """Meanings of values, memoised; `meaning(v)` is None for whatever is not understood."""

    def __init__(self) -> None:
        self._known: dict[Value, Meaning] = {}

    def meaning(self, v: Value) -> Meaning:
        if v not in self._known:
            self._known[v] = None  # also what a cycle would see; there is none in SSA
            self._known[v] = self._of_op(v.producer) if v.producer is not None else None
        return self._known[v]

    def _of_op(self, op: Op) -> Meaning:
        match op:
            case Full():
                return self._full(op)
            case Arange():
                return Affine.of(op.start, {} if op.length == 1 else {-1: op.step})
            case Reshape() | Expand() | Transpose() | Slice():
                return self._moved(op)
            case m.Cast():
                return self._cast(op)
            case m.Add() | m.Sub() | m.Mul():
                return self._arithmetic(op)
            case m.Less() | m.LessEqual() | m.Greater() | m.GreaterEqual() | m.Equal() | m.NotEqual():
                return self._comparison(op)
            case m.LogicalAnd():
                a, b = self.meaning(op.a), self.meaning(op.b)
                return a.both(b) if isinstance(a, Predicate) and isinstance(b, Predicate) else None
            case m.LogicalNot():
                return self._negated(op)
            case m.LogicalOr():
                return self._either(op)
            case m.Where():
                return self._where(op)
            case Index():
                return self._index(op)
            case m.Diff():
                return self._diff(op)
            case m.CumSum():
                return self._cumsum(op)
            case _:
                return None

    def _full(self, op: Full) -> Meaning:
        if op.dtype == "bool":
            return Predicate(never=not op.value)
        if op.dtype.startswith("int"):
            return Affine(int(op.value))
        if op.value == 0:
            return Bias(Predicate())
        return Bias(Predicate(never=True)) if op.value <= NEGATIVE else None

    def _moved(self, op: Reshape | Expand | Transpose | Slice) -> Meaning:
        inner = self.meaning(op.x)
        rank = op.x.type.rank
        if isinstance(op, Slice):
            return self._sliced(op, inner)
        if isinstance(op, Reshape):
            axes = _kept_axes(op.x.shape, op.shape)
        elif isinstance(op, Expand):
            axes = {i - rank: i - rank for i in range(rank)}
        else:
            axes = {old - rank: new - rank for new, old in enumerate(op.full_perm())}
        return None if axes is None else self._rename(inner, axes)

    @staticmethod
    def _rename(inner: Meaning, axes: Mapping[int, int]) -> Meaning:
        if isinstance(inner, Bias):
            visible = inner.visible.moved(axes)
            return None if visible is None else Bias(visible)
        return None if inner is None else inner.moved(axes)

    def _sliced(self, op: Slice, inner: Meaning) -> Meaning:
        def shift(e: Affine) -> Affine:
            c = e.coefficient(op.axis)
            moved = dict(e.coefficients)
            moved[op.axis] = 0 if op.result.shape[op.axis] == 1 else c * op.step
            return Affine.of(e.constant + c * op.start, moved)

        match inner:
            case Affine():
                return shift(inner)
            case Predicate():
                return Predicate(frozenset(shift(a) for a in inner.atoms), inner.never)
            case Bias():
                return Bias(Predicate(frozenset(shift(a) for a in inner.visible.atoms), inner.visible.never))
            case None:
                return None

    def _cast(self, op: m.Cast) -> Meaning:
        inner = self.meaning(op.x)
        if op.x.dtype == "bool" and op.dtype.startswith("int"):
            return (
                Affine(0 if inner.never else 1)
                if isinstance(inner, Predicate) and (inner.never or not inner.atoms)
                else None
            )
        if op.dtype == "bool":
            if isinstance(inner, Affine) and not inner.coefficients and isinstance(inner.constant, int):
                return Predicate(never=inner.constant == 0)
            return inner if isinstance(inner, Predicate) else None
        same_kind = op.dtype.startswith("int") == op.x.dtype.startswith("int")
        return inner if same_kind and op.x.dtype != "bool" else None

    def _arithmetic(self, op: m.Binary) -> Meaning:
        a, b = self.meaning(op.a), self.meaning(op.b)
        if isinstance(a, Bias) and isinstance(b, Bias) and isinstance(op, m.Add):
            return Bias(a.visible.both(b.visible))
        if not isinstance(a, Affine) or not isinstance(b, Affine):
            return None
        if isinstance(op, m.Mul):
            return (
                a.times(b.constant)
                if not b.coefficients
                else b.times(a.constant)
                if not a.coefficients
                else None
            )
        return a.plus(b, 1 if isinstance(op, m.Add) else -1)

    def _comparison(self, op: m.Binary) -> Meaning:
        a, b = self.meaning(op.a), self.meaning(op.b)
        if isinstance(a, Predicate) and isinstance(b, Predicate) and isinstance(op, (m.Equal, m.NotEqual)):
            if (a.atoms and not a.never) or (b.atoms and not b.never):
                return None
            return Predicate(never=(a.never == b.never) is isinstance(op, m.NotEqual))
        if not isinstance(a, Affine) or not isinstance(b, Affine):
            return None
        difference = a.plus(b, -1)
        one = Affine(1)
        match op:
            case m.GreaterEqual():
                return _atom(difference)
            case m.Greater():
                return _atom(difference.plus(one, -1))
            case m.LessEqual():
                return _atom(difference.times(-1))
            case m.Less():
                return _atom(difference.times(-1).plus(one, -1))
            case _:
                if difference.coefficients or not isinstance(difference.constant, int):
                    return (
                        _atom(difference).both(_atom(difference.times(-1)))
                        if isinstance(op, m.Equal)
                        else None
                    )
                return Predicate(never=(difference.constant == 0) is isinstance(op, m.NotEqual))

    def _negated(self, op: m.LogicalNot) -> Meaning:
        inner = self.meaning(op.x)
        if not isinstance(inner, Predicate):
            return None
        if inner.never:
            return Predicate()
        if len(inner.atoms) != 1:
            return None if inner.atoms else Predicate(never=True)
        return _atom(next(iter(inner.atoms)).times(-1).plus(Affine(1), -1))

    def _either(self, op: m.LogicalOr) -> Meaning:
        a, b = self.meaning(op.a), self.meaning(op.b)
        if not isinstance(a, Predicate) or not isinstance(b, Predicate):
            return None
        if a.never or a == b:
            return b
        if b.never:
            return a
        return Predicate() if not a.atoms or not b.atoms else None

    def _where(self, op: m.Where) -> Meaning:
        condition, a, b = self.meaning(op.condition), self.meaning(op.a), self.meaning(op.b)
        if not isinstance(condition, Predicate) or not isinstance(a, Bias) or not isinstance(b, Bias):
            return None
        if b.visible.never:  # visible where the condition holds, and where `a` says so
            return Bias(condition.both(a.visible))
        if a.visible.never:
            if condition.never or not condition.atoms:
                return Bias(Predicate(never=not condition.never)) if not condition.never else b
            if len(condition.atoms) == 1:
                return Bias(_atom(next(iter(condition.atoms)).times(-1).plus(Affine(1), -1)).both(b.visible))
        return None

    def _index(self, op: Index) -> Meaning:
        inner = self.meaning(op.x)
        indices = [self.meaning(i) for i in op.indices]
        if len(indices) != op.x.type.rank or not all(isinstance(i, Affine) for i in indices):
            return None

        def put(e: Affine) -> Affine:
            total = Affine(e.constant)
            for position, i in enumerate(indices):
                assert isinstance(i, Affine)
                total = total.plus(i.times(e.coefficient(position - len(indices))))
            return total

        match inner:
            case Affine():
                return put(inner)
            case Predicate():
                return Predicate(frozenset(put(a) for a in inner.atoms), inner.never)
            case _:
                return None

    def _diff(self, op: m.Diff) -> Meaning:
        x, before = self.meaning(op.x), self.meaning(op.prepend)
        if not isinstance(x, Affine) or not isinstance(before, Affine):
            return None
        step = x.coefficient(-1)
        first = Affine.of(x.constant, {a: c for a, c in x.coefficients if a != -1})
        return Affine(step) if first.plus(before, -1) == Affine(step) else None

    def _cumsum(self, op: m.CumSum) -> Meaning:
        inner = self.meaning(op.x)
        if isinstance(inner, Predicate) and inner.never:
            return Affine(0)
        if isinstance(inner, Affine) and not inner.coefficients:
            return Affine.of(inner.constant, {op.axis: inner.constant})
        return None


@dataclass(frozen=True)
class MaskFacts:
    causal: bool
    window: int | None


def classify(meaning: Meaning) -> MaskFacts | str:
    """Causal and window of a mask [..., T, T], or the sentence why it is neither."""
    visible = meaning.visible if isinstance(meaning, Bias) else meaning
    if not isinstance(visible, Predicate):
        return "the mask is not understood: it is no comparison of query and key positions"
    if visible.never:
        return "the mask hides everything"
    causal, behind, ahead = False, None, None
    for atom in visible.atoms:
        slope = dict(atom.coefficients)
        c = atom.constant
        if isinstance(c, int) and c >= 0 and all(isinstance(v, int) and v >= 0 for v in slope.values()):
            continue  # indices are not negative: always true
        if slope == {-2: 1, -1: -1} and c == 0:
            causal = True
        elif slope == {-2: 1, -1: -1} and isinstance(c, int) and c > 0:
            ahead = min(c + 1, ahead or c + 1)
        elif slope == {-2: -1, -1: 1} and isinstance(c, int) and c >= 0:
            behind = min(c + 1, behind or c + 1)
        else:
            return "the mask is neither causal nor a sliding window"
    if ahead is not None and not causal and ahead != behind:
        return f"the mask sees {ahead} keys ahead and {behind} behind"
    if behind is not None and not causal and ahead is None:
        return "the mask has a window behind but sees everything ahead"
    return MaskFacts(causal, behind)
