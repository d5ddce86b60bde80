"""What values hold whatever the inputs are: sizes and numbers, as far as their producers tell.

Models make tensors of a size (`torch.tensor(min(x.shape[1], 512))`), calculate with them and cut by what
comes out; and they pick rows by a mask that is made of numbers alone. torch knows such a size as what is in a
tensor; for us it is a polynomial of the number of tokens as any other.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..ir.core import Op, Value
from ..ir.ops import math as m
from ..ir.ops.shape import Arange, DimValue, Expand, Full, Reshape
from ..ir.types import Dim, product

if TYPE_CHECKING:
    import torch

_WHOLE = ("int32", "int64")
_LARGEST = 1024
"""Elements of anything on the way to numbers."""
_OPS = 64
"""Operations on the way to numbers."""
_ARITHMETIC: dict[type[Op], Callable[[Any, Any], Any]] = {
    m.Add: operator.add,
    m.Sub: operator.sub,
    m.Mul: operator.mul,
}


def size_in(v: Value, look: Callable[[Value], None]) -> Dim | None:
    """The size that a value of one whole number is; None where it is none that is known. `look` is called
    with each value on the way.
    """
    look(v)
    op = v.producer
    if op is None or v.dtype not in _WHOLE or product(v.shape) != 1:
        return None
    match op:
        case DimValue():
            return op.dim
        case Full():
            return int(op.value)
        case Reshape() | Expand() | m.Cast():
            return size_in(op.x, look)
        case m.Add() | m.Sub() | m.Mul():
            a, b = size_in(op.a, look), size_in(op.b, look)
            return None if a is None or b is None else _ARITHMETIC[type(op)](a, b)
        case m.Neg():
            x = size_in(op.x, look)
            return None if x is None else -x
        case _:
            return None


def numbers_in(v: Value, look: Callable[[Value], None]) -> torch.Tensor | None:
    """What a value holds that is made of few numbers alone; None for any other. `look` as for `size_in`."""
    import torch

    ops: dict[Op, None] = {}

    def visit(one: Value) -> bool:
        look(one)
        op, count = one.producer, product(one.shape)
        if op is not None and op in ops:
            return True
        if op is None or not isinstance(count, int) or count > _LARGEST or len(ops) >= _OPS:
            return False
        if not isinstance(op, _PLAIN) or not all(visit(operand) for operand in op.operands):
            return False
        ops[op] = None
        return True

    if not visit(v):
        return None
    made: dict[Value, torch.Tensor] = {}
    with torch.no_grad():
        for op in ops:
            made[op.results[0]] = op.reference({}, *op.grouped([made[operand] for operand in op.operands]))
    return made[v]


_PLAIN = (Full, Arange, Reshape, Expand, m.Cast, m.Unary, m.Binary)

__all__ = ["numbers_in", "size_in"]
