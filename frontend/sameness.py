"""Values that are the same numbers by how they were made, before any pass has looked at the graph.

Models whose positions have three coordinates (time, height, width: MRoPE, Wang et al. 2024, arXiv:2409.12191,
section 2.1) put the tables of one together from parts of all three, by writing into a part of a tensor. For
text the three are one position, expanded: what is written stands there already.
"""

from __future__ import annotations

from ..ir.core import Value
from ..ir.ops import math as m
from ..ir.ops.shape import Expand, Reshape, Slice, Transpose

_DEEP = 64
"""Operations that are looked through."""


def same(a: Value, b: Value, deep: int = _DEEP) -> bool:
    """Whether two values hold the same numbers, as far as their producers tell."""
    if a is b:
        return True
    one, other = a.producer, b.producer
    if one is None or other is None or type(one) is not type(other) or not deep or a.type != b.type:
        return False
    if one.results.index(a) != other.results.index(b) or len(one.operands) != len(other.operands):
        return False
    if isinstance(one, Slice) and isinstance(other, Slice):
        where = (one.axis, one.start, one.stop, one.step) == (other.axis, other.start, other.stop, other.step)
        anywhere = one.axis == other.axis and is_uniform(one.x, one.axis, deep - 1)
        return (where or anywhere) and same(one.x, other.x, deep - 1)
    if any(getattr(one, name) != getattr(other, name) for name in one.attribute_fields):
        return False
    return all(same(x, y, deep - 1) for x, y in zip(one.operands, other.operands, strict=True))


def is_uniform(v: Value, axis: int, deep: int = _DEEP) -> bool:
    """Whether all that stands along an axis (negative) is the same."""
    rank = v.type.rank
    if -axis > rank or v.shape[axis] == 1:
        return True
    op = v.producer
    if op is None or not deep:
        return False
    match op:
        case Expand():
            return is_uniform(op.x, axis, deep - 1)
        case m.Unary() | m.Cast():
            return is_uniform(op.x, axis, deep - 1)
        case m.Binary():
            return is_uniform(op.a, axis, deep - 1) and is_uniform(op.b, axis, deep - 1)
        case m.MatMul() if axis < -2:
            return is_uniform(op.a, axis, deep - 1) and is_uniform(op.b, axis, deep - 1)
        case Transpose():
            return is_uniform(op.x, op.perm[axis] if -axis <= len(op.perm) else axis, deep - 1)
        case Slice():
            return is_uniform(op.x, axis, deep - 1)
        case Reshape():
            before = _kept(op, axis)
            return before is not None and is_uniform(op.x, before, deep - 1)
        case _:
            return False


def _kept(op: Reshape, axis: int) -> int | None:
    """The axis of the operand that an axis of the result is, where only axes of length one come and go."""
    old = [i - op.x.type.rank for i, d in enumerate(op.x.shape) if d != 1]
    new = [i - len(op.shape) for i, d in enumerate(op.shape) if d != 1]
    if [op.x.shape[i] for i in old] != [op.shape[i] for i in new]:
        return None
    return old[new.index(axis)]


__all__ = ["is_uniform", "same"]
