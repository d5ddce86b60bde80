"""ATen operators that make one number of many along axes (see `aten_table.py`)."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..ir.core import Op, Value
from ..ir.ops import math as m
from ..ir.ops.select import TopK
from ..ir.types import product
from .aten_shapes import reshaped
from .aten_table import TABLE, Handler, aten

if TYPE_CHECKING:
    from .importer import Importer


def _reduction(kind: Callable[..., Op]) -> Handler:
    def handler(c: Importer, x: Value, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Value:
        axes = [dim] if isinstance(dim, int) else list(dim) if dim else list(range(-x.type.rank, 0))
        if dtype is not None or c.result_dtype() != x.dtype:
            x = c.cast(x, c.result_dtype())
        return c.emit(kind(x, axes=tuple(sorted(c.axis(a, x) for a in axes)), keepdim=keepdim))

    return handler


for _name, _kind in (("mean", m.ReduceMean), ("sum", m.ReduceSum), ("amax", m.ReduceMax)):
    for _overload in ("dim", "dim_IntList", "default"):
        TABLE[f"{_name}.{_overload}"] = _reduction(_kind)
TABLE["max.default"] = _reduction(m.ReduceMax)


@aten("logsumexp.default")
def _logsumexp(c: Importer, x: Value, dim: Any, keepdim: bool = False) -> Value:
    chosen = [dim] if isinstance(dim, int) else list(dim)
    axes = tuple(sorted(c.axis(a, x) for a in chosen))
    # A maximum of -inf would make NaN of what is -inf.
    lowest = c.scalar(-3e38, x.dtype)
    top = c.emit(m.Maximum(c.emit(m.ReduceMax(x, axes=axes, keepdim=True)), lowest))
    powers = c.emit(m.Exp(c.emit(m.Sub(x, top))))
    whole = c.emit(m.Log(c.emit(m.ReduceSum(powers, axes=axes, keepdim=True))))
    found = c.emit(m.Add(whole, top))
    if keepdim:
        return found
    kept = tuple(d for i, d in enumerate(found.shape) if i - x.type.rank not in axes)
    return reshaped(c, found, kept)


@aten("var.dim")
def _var_dim(c: Importer, x: Value, dim: Any, unbiased: bool = True, keepdim: bool = False) -> Value:
    return _var(c, x, dim, correction=int(unbiased), keepdim=keepdim)


@aten("var.correction")
def _var(c: Importer, x: Value, dim: Any = None, correction: Any = None, keepdim: bool = False) -> Value:
    chosen = [dim] if isinstance(dim, int) else dim or range(-x.type.rank, 0)
    axes = tuple(sorted(c.axis(a, x) for a in chosen))
    centred = c.emit(m.Sub(x, c.emit(m.ReduceMean(x, axes=axes, keepdim=True))))
    mean = c.emit(m.ReduceMean(c.emit(m.Mul(centred, centred)), axes=axes, keepdim=keepdim))
    less, count = 1 if correction is None else correction, product(x.shape[a] for a in axes)
    if not less:
        return mean
    if not isinstance(count, int) or count <= less:
        raise c.unsupported("variance with Bessel's correction over tokens, or over a single number")
    return c.emit(m.Mul(mean, c.scalar(count / (count - less), x.dtype)))


@aten("std.dim")
def _std_dim(c: Importer, x: Value, dim: Any, unbiased: bool = True, keepdim: bool = False) -> Value:
    return c.emit(m.Sqrt(_var_dim(c, x, dim, unbiased, keepdim)))


@aten("std.correction")
def _std(c: Importer, x: Value, dim: Any = None, correction: Any = None, keepdim: bool = False) -> Value:
    return c.emit(m.Sqrt(_var(c, x, dim, correction, keepdim)))


@aten("max.dim")
def _max_dim(c: Importer, x: Value, dim: int, keepdim: bool = False) -> tuple[Value, Value | None]:
    """The largest values, and where they stand: of equal ones the first, where torch leaves it open. Along
    another axis than the last, asking for the places is refused.
    """
    largest = c.emit(m.ReduceMax(x, axes=(c.axis(dim, x),), keepdim=keepdim))
    asked = any(user.target is operator.getitem and user.args[1] == 1 and user.users for user in c.node.users)
    if not asked or c.axis(dim, x) != -1:
        return largest, None
    return largest, reshaped(c, c.emit(TopK(x, k=1)), largest.shape)


@aten("linalg_vector_norm.default")
def _vector_norm(
    c: Importer, x: Value, order: float = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> Value:
    """(Σ |x|^order)^(1 / order), and what that comes to for an order without end."""
    if order <= 0 or dim is None:
        raise c.unsupported("a norm of an order that is not positive, or along no given axes")
    x = c.cast(x, c.result_dtype())
    axes = tuple(sorted(c.axis(a, x) for a in ([dim] if isinstance(dim, int) else dim)))
    if order == 2:
        return c.emit(m.Sqrt(c.emit(m.ReduceSum(c.emit(m.Mul(x, x)), axes=axes, keepdim=keepdim))))
    size = c.emit(m.Abs(x))
    if order == math.inf:
        return c.emit(m.ReduceMax(size, axes=axes, keepdim=keepdim))
    if order == 1:
        return c.emit(m.ReduceSum(size, axes=axes, keepdim=keepdim))
    powers = c.emit(m.Pow(size, c.scalar(order, x.dtype)))
    total = c.emit(m.ReduceSum(powers, axes=axes, keepdim=keepdim))
    return c.emit(m.Pow(total, c.scalar(1 / order, x.dtype)))
