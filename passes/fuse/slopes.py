"""Scores with a bias that grows along the keys, a slope for each head (ALiBi, Press et al. 2022).

    scores [B, H, T, T] + slopes [H, 1, 1] · arange(T)      → slopes of `attention`

A bias is read as a product of numbers a head and a position: whatever the position of the query adds is the
same for all keys, and softmax does not see it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...ir.core import Value
from ...ir.ops import math as m
from ...ir.ops.shape import Expand, Reshape, Slice
from ...ir.rewriter import Rewriter, constant
from ...ir.types import Shape
from .mask_terms import Affine
from .masks import MaskAnalysis, kept_axes


@dataclass(frozen=True)
class Slopes:
    """`heads` times `factor`: the slopes, seen under a shape whose one axis longer than 1 is the heads'."""

    heads: Value
    factor: float

    def times(self, factor: float) -> Slopes:
        return Slopes(self.heads, self.factor * factor)

    def emit(self, rw: Rewriter, count: int) -> Value:
        """float32 [count]."""
        x = self.heads
        x = x if x.dtype == "float32" else rw.insert(m.Cast(x, dtype="float32"))
        x = x if x.shape == (count,) else rw.insert(Reshape(x, shape=(count,)))
        return x if self.factor == 1.0 else rw.insert(m.Mul(x, rw.scalar(self.factor)))


@dataclass(frozen=True)
class _Product:
    """heads · position · factor. `axis` is the heads' (None where there is one), in the product's axes."""

    heads: Value
    axis: int | None
    position: Affine
    factor: float

    def moved(self, axes: Mapping[int, int] | None) -> _Product | None:
        if axes is None or (self.axis is not None and self.axis not in axes):
            return None
        position = self.position.moved(axes)
        axis = None if self.axis is None else axes[self.axis]
        return None if position is None else _Product(self.heads, axis, position, self.factor)

    def sliced(self, op: Slice) -> _Product:
        slope = self.position.coefficient(op.axis)
        axes = {**dict(self.position.coefficients), op.axis: slope * op.step}
        shifted = Affine.of(self.position.constant + slope * op.start, axes)
        return _Product(self.heads, self.axis, shifted, self.factor)

    def times(self, factor: float) -> _Product:
        return _Product(self.heads, self.axis, self.position, self.factor * factor)


def _head_axis(shape: Shape) -> tuple[bool, int | None]:
    """Whether a shape has at most one axis longer than 1, of known length; and that axis."""
    long = [i - len(shape) for i, d in enumerate(shape) if d != 1]
    if not long:
        return True, None
    return len(long) == 1 and isinstance(shape[long[0]], int), long[0]


def _position(known: MaskAnalysis, v: Value) -> Affine | None:
    """An integer function of positions, perhaps cast to floats, which hold it exactly up to 2^24."""
    while isinstance(v.producer, m.Cast):
        v = v.producer.x
    found = known.meaning(v)
    return found if isinstance(found, Affine) and found.coefficients else None


def _product(known: MaskAnalysis, v: Value) -> _Product | None:
    op = v.producer
    match op:
        case m.Cast() if op.dtype.startswith(("float", "bfloat")):
            return _product(known, op.x)
        case Reshape():
            inner = _product(known, op.x)
            return None if inner is None else inner.moved(kept_axes(op.x.shape, op.shape))
        case Expand():
            return _product(known, op.x)
        case Slice():
            inner = _product(known, op.x)
            return None if inner is None or inner.axis == op.axis else inner.sliced(op)
        case m.Mul() | m.Div():
            return _of_factors(known, op)
        case _:
            return None


def _of_factors(known: MaskAnalysis, op: m.Mul | m.Div) -> _Product | None:
    for a, b in ((op.a, op.b), (op.b, op.a)):
        number = constant(b)
        if number is not None and (inner := _product(known, a)) is not None:
            if isinstance(op, m.Mul):
                return inner.times(number)
            return inner.times(1.0 / number) if number else None
        if isinstance(op, m.Div):
            return None
        fits, axis = _head_axis(b.shape)
        position = _position(known, a)
        if fits and position is not None and (axis is None or position.coefficient(axis) == 0):
            return _Product(b, axis, position, 1.0)
    return None


def read_slopes(known: MaskAnalysis, bias: Value, heads: object) -> Slopes | None:
    """What a bias added to scores [..., heads, T, T] is; None where it is no slope a head."""
    found = _product(known, bias)
    if found is None or not isinstance(heads, int):
        return None
    step = found.position.coefficient(-1)
    along = {axis for axis, _ in found.position.coefficients} <= {-1, -2}
    if not along or not isinstance(step, int) or step == 0:
        return None
    if found.axis is None:
        return Slopes(found.heads, found.factor * step) if heads == 1 else None
    own = found.heads.shape[[d != 1 for d in found.heads.shape].index(True)] == heads
    return Slopes(found.heads, found.factor * step) if own and found.axis == -3 else None
