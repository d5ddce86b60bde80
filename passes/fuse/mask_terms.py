"""The terms that `masks.py` computes with: affine functions of indices, conjunctions of their comparisons,
and numbers chosen by such a conjunction.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from ...ir.core import Op
from ...ir.ops import math as m
from ...ir.types import Dim

# An additive mask at or below this hides a key: published masks use -1e4, float32's minimum or -inf.
NEGATIVE = -1e4


@dataclass(frozen=True)
class Affine:
    """constant + sum of coefficients[axis] · index along axis; axes are negative. Axes absent have
    coefficient 0.
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

    @property
    def never_negative(self) -> bool:
        """Provably at least 0 everywhere: indices are."""
        numbers = (self.constant, *(c for _, c in self.coefficients))
        return all(isinstance(n, int) and n >= 0 for n in numbers)


@dataclass(frozen=True)
class Predicate:
    """A conjunction: every `atom` is >= 0. No atoms: always true. `never`: always false."""

    atoms: frozenset[Affine] = field(default_factory=frozenset[Affine])
    never: bool = False

    @property
    def always(self) -> bool:
        return not self.never and not self.atoms

    def both(self, other: Predicate) -> Predicate:
        return Predicate(self.atoms | other.atoms, self.never or other.never)

    def implies(self, other: Predicate) -> bool:
        """Whether the other is known to hold wherever this one does: each of its functions is one of this
        one's, or larger.
        """
        if self.never or other.never:
            return self.never
        return all(
            any(wanted.plus(given, -1).never_negative for given in self.atoms) for wanted in other.atoms
        )

    def negated(self) -> Predicate | None:
        """None for a conjunction of several: its negation is none."""
        if self.never or not self.atoms:
            return Predicate(never=not self.never)
        return (
            not_negative(next(iter(self.atoms)).times(-1).plus(Affine(1), -1))
            if len(self.atoms) == 1
            else None
        )

    def moved(self, axes: Mapping[int, int]) -> Predicate | None:
        atoms = [a.moved(axes) for a in self.atoms]
        if any(a is None for a in atoms):
            return None
        return Predicate(frozenset(a for a in atoms if a is not None), self.never)


@dataclass(frozen=True)
class Choice:
    """`yes` where the predicate holds, `no` elsewhere. A number everywhere has `when` always true."""

    when: Predicate
    yes: float
    no: float

    def visible(self) -> Predicate | None:
        """Read as an additive mask: where it adds nothing, if it hides everything else."""
        if self.when.always:
            return _shown(self.yes)
        if self.when.never:
            return _shown(self.no)
        if self.yes == 0 and self.no <= NEGATIVE:
            return self.when
        return self.when.negated() if self.no == 0 and self.yes <= NEGATIVE else None


def _shown(bias: float) -> Predicate | None:
    return Predicate() if bias == 0 else Predicate(never=True) if bias <= NEGATIVE else None


Meaning = Affine | Predicate | Choice | None


def not_negative(e: Affine) -> Predicate:
    """e >= 0, simplified where it holds everywhere or nowhere."""
    if e.never_negative:
        return Predicate()
    if e.times(-1).plus(Affine(1), -1).never_negative:
        return Predicate(never=True)
    return Predicate(frozenset({e}))


EXACT = ("float32", "float16", "bfloat16", "int32", "int64")  # dtypes in which small numbers do not wrap
ARITHMETIC: dict[type[Op], Callable[[float, float], float]] = {
    m.Add: operator.add,
    m.Sub: operator.sub,
    m.Mul: operator.mul,
}
COMPARE: dict[type[Op], Callable[[float, float], bool]] = {
    m.Less: operator.lt,
    m.LessEqual: operator.le,
    m.Greater: operator.gt,
    m.GreaterEqual: operator.ge,
    m.Equal: operator.eq,
    m.NotEqual: operator.ne,
}


def without(e: Affine, axes: Collection[int]) -> Affine:
    return Affine(e.constant, tuple((a, c) for a, c in e.coefficients if a not in axes))


def map_affine(meaning: Meaning, f: Callable[[Affine], Affine]) -> Meaning:
    """The meaning with every affine function in it changed."""

    def predicate(p: Predicate) -> Predicate:
        total = Predicate(never=p.never)
        for atom in p.atoms:
            total = total.both(not_negative(f(atom)))
        return total

    match meaning:
        case Affine():
            return f(meaning)
        case Predicate():
            return predicate(meaning)
        case Choice():
            return Choice(predicate(meaning.when), meaning.yes, meaning.no)
        case None:
            return None


def as_choice(meaning: Meaning) -> Choice | None:
    """A number, a truth value as 1 and 0, or a choice, as a choice."""
    match meaning:
        case Choice():
            return meaning
        case Predicate():
            return Choice(meaning, 1.0, 0.0)
        case Affine() if not meaning.coefficients and isinstance(meaning.constant, int):
            return Choice(Predicate(), float(meaning.constant), float(meaning.constant))
        case _:
            return None


def bias(visible: Predicate) -> Choice:
    """An additive mask whose hidden values are not known but far below zero."""
    return Choice(visible, 0.0, float("-inf"))


def combined(op: m.Binary, left: Choice, right: Choice) -> Meaning:
    """Arithmetic of two choices, one of which is a number everywhere. Infinite values do not take part: they
    may stand for any large one.
    """
    function = ARITHMETIC[type(op)]
    if right.when.always:
        found = Choice(left.when, function(left.yes, right.yes), function(left.no, right.yes))
    else:
        found = Choice(right.when, function(left.yes, right.yes), function(left.yes, right.no))
    number = right if right.when.always else left
    if isinstance(op, m.Add) and number.yes == 0:
        return found
    return found if all(math.isfinite(n) for n in (left.yes, left.no, right.yes, right.no)) else None


def compared(op: m.Binary, difference: Affine) -> Predicate | None:
    """difference (op) 0 in integers."""
    less_one = Affine(1)
    negative = difference.times(-1)
    match op:
        case m.GreaterEqual():
            return not_negative(difference)
        case m.Greater():
            return not_negative(difference.plus(less_one, -1))
        case m.LessEqual():
            return not_negative(negative)
        case m.Less():
            return not_negative(negative.plus(less_one, -1))
        case m.Equal():
            return not_negative(difference).both(not_negative(negative))
        case _:
            if difference.coefficients or not isinstance(difference.constant, int):
                return None
            return Predicate(never=difference.constant == 0)


def where_true(when: Predicate, yes: bool, no: bool) -> Predicate | None:
    """True where the predicate holds, if `yes`, and where it does not, if `no`."""
    if yes == no:
        return Predicate(never=not yes)
    return when if yes else when.negated()
