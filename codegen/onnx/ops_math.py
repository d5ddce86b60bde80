"""Elementwise operations, comparisons, reductions and matrix products.

onnxruntime gives the operators these meanings: integer Div truncates, Mod has the sign of the divisor
(fmod=0) or of the dividend (fmod=1).
"""

from __future__ import annotations

from typing import Any

from ...ir.dtypes import is_float
from ...ir.ops import math as ir
from .context import Context, emits

_UNARY = {
    "neg": "Neg", "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "reciprocal": "Reciprocal", "tanh": "Tanh",
    "sin": "Sin", "cos": "Cos", "erf": "Erf", "sigmoid": "Sigmoid", "relu": "Relu", "abs": "Abs",
    "floor": "Floor", "logical_not": "Not",
}  # fmt: skip
_BINARY = {
    "add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "pow": "Pow", "maximum": "Max", "minimum": "Min",
    "less": "Less", "less_equal": "LessOrEqual", "greater": "Greater", "greater_equal": "GreaterOrEqual",
    "equal": "Equal",
}  # fmt: skip


@emits(*_UNARY)
def unary(c: Context, op: ir.Unary) -> str:
    x = c.name(op.x)
    if op.opname == "logical_not" and op.x.dtype != "bool":
        x = c.scope.cast(x, "bool")
    return c.scope.op(_UNARY[op.opname], x)


@emits("rsqrt")
def rsqrt(c: Context, op: ir.Rsqrt) -> str:
    return c.scope.op("Reciprocal", c.scope.op("Sqrt", c.name(op.x)))


def activate(c: Context, activation: str, x: str) -> str:
    """An activation of `ir.ops.nn.ACTIVATIONS` of a float32 value."""
    match activation:
        case "silu":
            return c.scope.op("Mul", x, c.scope.op("Sigmoid", x))
        case "gelu" | "gelu_tanh":
            return c.scope.op("Gelu", x, approximate="tanh" if activation == "gelu_tanh" else "none")
        case _:
            return c.scope.op({"relu": "Relu", "sigmoid": "Sigmoid"}[activation], x)


@emits("silu")
def silu(c: Context, op: ir.Silu) -> str:
    return activate(c, "silu", c.name(op.x))


@emits("gelu")
def gelu(c: Context, op: ir.Gelu) -> str:
    return activate(c, "gelu_tanh" if op.tanh else "gelu", c.name(op.x))


@emits(*_BINARY)
def binary(c: Context, op: ir.Binary) -> str:
    return c.scope.op(_BINARY[op.opname], c.name(op.a), c.name(op.b))


@emits("not_equal")
def not_equal(c: Context, op: ir.NotEqual) -> str:
    return c.scope.op("Not", c.scope.op("Equal", c.name(op.a), c.name(op.b)))


@emits("logical_and", "logical_or")
def logical(c: Context, op: ir.Comparison) -> str:
    a, b = (c.name(v) if v.dtype == "bool" else c.scope.cast(c.name(v), "bool") for v in (op.a, op.b))
    return c.scope.op("And" if op.opname == "logical_and" else "Or", a, b)


@emits("floor_divide")
def floor_divide(c: Context, op: ir.FloorDivide) -> str:
    """(a - r) / b with r the remainder of the divisor's sign: exact for integers, and what torch does for
    floats.
    """
    s, a, b = c.scope, c.name(op.a), c.name(op.b)
    exact = s.op("Div", s.op("Sub", a, _remainder(c, a, b, op.a.dtype)), b)
    if not is_float(op.a.dtype):
        return exact
    return s.op("Floor", s.op("Add", exact, s.scalar(0.5, "float32")))


def _remainder(c: Context, a: str, b: str, dtype: str) -> str:
    s = c.scope
    if not is_float(dtype):
        return s.op("Mod", a, b)
    r, zero = s.op("Mod", a, b, fmod=1), s.scalar(0.0, "float32")
    differs = s.op("Xor", s.op("Less", r, zero), s.op("Less", b, zero))
    wrong = s.op("And", differs, s.op("Not", s.op("Equal", r, zero)))
    return s.op("Where", wrong, s.op("Add", r, b), r)


@emits("remainder")
def remainder(c: Context, op: ir.Remainder) -> str:
    return _remainder(c, c.name(op.a), c.name(op.b), op.a.dtype)


@emits("where")
def where(c: Context, op: ir.Where) -> str:
    condition, a, b = c.name(op.condition), c.name(op.a), c.name(op.b)
    if op.a.dtype != "bool":
        return c.scope.op("Where", condition, a, b)
    # onnxruntime's Where takes no booleans on CPUs.
    s = c.scope
    return s.op("Or", s.op("And", condition, a), s.op("And", s.op("Not", condition), b))


@emits("cast")
def cast(c: Context, op: ir.Cast) -> str:
    x = c.name(op.x)
    return x if op.dtype == op.x.dtype else c.scope.cast(x, op.dtype)


@emits("matmul")
def matmul(c: Context, op: ir.MatMul) -> str:
    return c.scope.op("MatMul", c.name(op.a), c.name(op.b))


_REDUCE = {"reduce_sum": "ReduceSum", "reduce_mean": "ReduceMean", "reduce_max": "ReduceMax"}


@emits(*_REDUCE)
def reduce(c: Context, op: ir.Reduce) -> str:
    axes: dict[str, Any] = {"keepdims": int(op.keepdim)}
    if not op.axes:  # ONNX reads "no axes" as "all of them"
        return c.scope.op("Identity", c.name(op.x))
    return c.scope.op(_REDUCE[op.opname], c.name(op.x), c.scope.i64(*op.axes), **axes)


@emits("softmax")
def softmax(c: Context, op: ir.Softmax) -> str:
    return c.scope.op("Softmax", c.name(op.x), axis=op.axis)


@emits("cumsum")
def cumsum(c: Context, op: ir.CumSum) -> str:
    x = c.name(op.x)
    if not is_float(op.x.dtype) and op.x.dtype != "int64":
        x = c.scope.cast(x, "int64")
    return c.scope.op("CumSum", x, c.scope.scalar(op.axis))


@emits("diff")
def diff(c: Context, op: ir.Diff) -> str:
    s = c.scope
    y = s.op("Concat", c.name(op.prepend), c.name(op.x), axis=-1)
    return s.op("Sub", s.slice(y, -1, 1, 1 << 62), s.slice(y, -1, 0, -1))
