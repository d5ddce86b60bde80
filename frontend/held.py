"""What values hold whatever the inputs are: sizes, as far as their producers tell.

Models make tensors of a size (`torch.tensor(min(x.shape[1], 512))`), calculate with them and cut by what
comes out. torch knows such a size as what is in a tensor; for us it is a polynomial of the number of tokens
as any other.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from ..ir.core import Op, Value
from ..ir.ops import math as m
from ..ir.ops.shape import DimValue, Expand, Full, Reshape
from ..ir.types import Dim, product

_WHOLE = ("int32", "int64")
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


__all__ = ["size_in"]
