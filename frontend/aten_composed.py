"""ATen operators that are a few others, one after the other: activations and the like (see `aten_table.py`).

Definitions: PyTorch's documentation of the function of the same name.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ..ir.core import Value
from ..ir.ops import math as m
from ..ir.ops.select import TopK
from ..ir.ops.shape import Slice
from .aten_shapes import reshaped
from .aten_table import aten

if TYPE_CHECKING:
    from .importer import Importer


def _scaled(c: Importer, x: Value, by: float, plus: float = 0.0) -> Value:
    """x · by + plus."""
    y = x if by == 1 else c.emit(m.Mul(x, c.scalar(by, x.dtype)))
    return y if not plus else c.emit(m.Add(y, c.scalar(plus, x.dtype)))


@aten("square.default")
def _square(c: Importer, x: Value) -> Value:
    return c.emit(m.Mul(x, x))


@aten("expm1.default")
def _expm1(c: Importer, x: Value) -> Value:
    return c.emit(m.Sub(c.emit(m.Exp(x)), c.scalar(1, x.dtype)))


@aten("log1p.default")
def _log1p(c: Importer, x: Value) -> Value:
    return c.emit(m.Log(_scaled(c, x, 1, 1)))


@aten("exp2.default")
def _exp2(c: Importer, x: Value) -> Value:
    return c.emit(m.Exp(_scaled(c, x, math.log(2))))


@aten("log2.default")
def _log2(c: Importer, x: Value) -> Value:
    return _scaled(c, c.emit(m.Log(x)), 1 / math.log(2))


@aten("sinh.default")
def _sinh(c: Importer, x: Value) -> Value:
    up, down = c.emit(m.Exp(x)), c.emit(m.Exp(c.emit(m.Neg(x))))
    return _scaled(c, c.emit(m.Sub(up, down)), 0.5)


@aten("cosh.default")
def _cosh(c: Importer, x: Value) -> Value:
    up, down = c.emit(m.Exp(x)), c.emit(m.Exp(c.emit(m.Neg(x))))
    return _scaled(c, c.emit(m.Add(up, down)), 0.5)


@aten("ceil.default")
def _ceil(c: Importer, x: Value) -> Value:
    if not x.dtype.startswith(("float", "bfloat")):
        return x
    return c.emit(m.Neg(c.emit(m.Floor(c.emit(m.Neg(x))))))


@aten("trunc.default", "fix.default")
def _trunc(c: Importer, x: Value) -> Value:
    below = c.emit(m.Less(x, c.scalar(0, x.dtype)))
    return c.emit(m.Where(below, _ceil(c, x), c.emit(m.Floor(x))))


@aten("sign.default", "sgn.default")
def _sign(c: Importer, x: Value) -> Value:
    zero = c.scalar(0, x.dtype)
    above, below = (c.cast(c.emit(kind(x, zero)), x.dtype) for kind in (m.Greater, m.Less))
    return c.emit(m.Sub(above, below))


@aten("softplus.default")
def _softplus(c: Importer, x: Value, beta: Any = 1, threshold: Any = 20) -> Value:
    """log(1 + exp(x)), so written that nothing overflows: max(x, 0) + log(1 + exp(-|x|))."""
    if beta != 1:
        raise c.unsupported("softplus with beta other than 1")
    small = c.emit(m.Exp(c.emit(m.Neg(c.emit(m.Abs(x))))))
    return c.emit(m.Add(c.emit(m.Relu(x)), _log1p(c, small)))


@aten("log_sigmoid.default")
def _log_sigmoid(c: Importer, x: Value) -> Value:
    return c.emit(m.Neg(_softplus(c, c.emit(m.Neg(x)))))


@aten("mish.default")
def _mish(c: Importer, x: Value) -> Value:
    return c.emit(m.Mul(x, c.emit(m.Tanh(_softplus(c, x)))))


@aten("leaky_relu.default")
def _leaky_relu(c: Importer, x: Value, negative_slope: float = 0.01) -> Value:
    below = c.emit(m.Less(x, c.scalar(0, x.dtype)))
    return c.emit(m.Where(below, _scaled(c, x, negative_slope), x))


@aten("elu.default")
def _elu(c: Importer, x: Value, alpha: Any = 1, scale: Any = 1, input_scale: Any = 1) -> Value:
    """Above zero scale · x, else scale · alpha · (exp(input_scale · x) - 1); no power overflows."""
    zero = c.scalar(0, x.dtype)
    low = c.emit(m.Minimum(x, zero))
    curve = _scaled(c, _expm1(c, _scaled(c, low, input_scale)), scale * alpha)
    return c.emit(m.Where(c.emit(m.Greater(x, zero)), _scaled(c, x, scale), curve))


@aten("selu.default")
def _selu(c: Importer, x: Value) -> Value:
    return _elu(c, x, 1.6732632423543772848170429916717, 1.0507009873554804934193349852946)


@aten("celu.default")
def _celu(c: Importer, x: Value, alpha: Any = 1.0) -> Value:
    return _elu(c, x, alpha, 1, 1 / alpha)


@aten("relu6.default")
def _relu6(c: Importer, x: Value) -> Value:
    return clamped(c, x, 0, 6)


@aten("hardtanh.default")
def _hardtanh(c: Importer, x: Value, min_val: Any = -1, max_val: Any = 1) -> Value:
    return clamped(c, x, min_val, max_val)


@aten("hardsigmoid.default")
def _hardsigmoid(c: Importer, x: Value) -> Value:
    return clamped(c, _scaled(c, x, 1 / 6, 0.5), 0, 1)


@aten("hardswish.default")
def _hardswish(c: Importer, x: Value) -> Value:
    return c.emit(m.Mul(x, _hardsigmoid(c, x)))


@aten("softsign.default")
def _softsign(c: Importer, x: Value) -> Value:
    return c.emit(m.Div(x, _scaled(c, c.emit(m.Abs(x)), 1, 1)))


@aten("tanhshrink.default")
def _tanhshrink(c: Importer, x: Value) -> Value:
    return c.emit(m.Sub(x, c.emit(m.Tanh(x))))


@aten("glu.default")
def _glu(c: Importer, x: Value, dim: int = -1) -> Value:
    axis = c.axis(dim, x)
    length = x.shape[axis]
    if not isinstance(length, int):
        raise c.unsupported("glu over tokens")
    a, b = (c.emit(Slice(x, axis=axis, start=i, stop=i + length // 2)) for i in (0, length // 2))
    return c.emit(m.Mul(a, c.emit(m.Sigmoid(b))))


@aten("clamp.default", "clamp.Tensor", "clamp_min.default", "clamp_min.Tensor")
def clamped(c: Importer, x: Value, min: Any = None, max: Any = None) -> Value:
    """x between two bounds, numbers or values; the upper one where they cross."""
    if min is not None:
        x = c.emit(m.Maximum(*c.promote(x, min)))
    return x if max is None else c.emit(m.Minimum(*c.promote(x, max)))


@aten("clamp_max.default", "clamp_max.Tensor")
def _clamp_max(c: Importer, x: Value, max: Any) -> Value:
    return clamped(c, x, None, max)


@aten("addcmul.default")
def _addcmul(c: Importer, x: Value, a: Value, b: Value, value: Any = 1) -> Value:
    return c.emit(m.Add(x, _scaled(c, c.emit(m.Mul(a, b)), value)))


@aten("addcdiv.default")
def _addcdiv(c: Importer, x: Value, a: Value, b: Value, value: Any = 1) -> Value:
    return c.emit(m.Add(x, _scaled(c, c.emit(m.Div(a, b)), value)))


@aten("lerp.Scalar", "lerp.Tensor")
def _lerp(c: Importer, x: Value, end: Value, weight: Any) -> Value:
    way = c.emit(m.Sub(end, x))
    return c.emit(m.Add(x, c.emit(m.Mul(*c.promote(way, weight)))))


@aten("argmax.default")
def _argmax(c: Importer, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
    """Of equal values the first, where torch leaves it open."""
    if dim is None or c.axis(dim, x) != -1:
        raise c.unsupported("operator aten.argmax.default along another axis than the last")
    return reshaped(c, c.emit(TopK(x, k=1)), c.result_shape())
