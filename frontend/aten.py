"""ATen operators of arithmetic, reductions and layers (see `aten_table.py`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..ir.core import Op, Value
from ..ir.ops import attention, nn
from ..ir.ops import math as m
from ..ir.ops.select import TopK
from ..ir.ops.shape import Arange, Expand, Gather
from ..ir.types import Dim
from . import aten_composed as _aten_composed  # noqa: F401  # pyright: ignore[reportUnusedImport]  (registers)
from . import aten_conv as _aten_conv  # noqa: F401  # pyright: ignore[reportUnusedImport]  (registers)
from . import aten_reduce as _aten_reduce  # noqa: F401  # pyright: ignore[reportUnusedImport]  (registers)
from . import aten_shapes as _aten_shapes  # noqa: F401  # pyright: ignore[reportUnusedImport]  (registers)
from .aten_shapes import reshaped
from .aten_table import TABLE, Handler, aten, lookup

__all__ = ["TABLE", "lookup"]

if TYPE_CHECKING:
    from .importer import Importer

# -- elementwise
_UNARY: dict[str, type[Op]] = {
    "neg": m.Neg,
    "exp": m.Exp,
    "log": m.Log,
    "sqrt": m.Sqrt,
    "rsqrt": m.Rsqrt,
    "reciprocal": m.Reciprocal,
    "tanh": m.Tanh,
    "sin": m.Sin,
    "cos": m.Cos,
    "erf": m.Erf,
    "sigmoid": m.Sigmoid,
    "relu": m.Relu,
    "abs": m.Abs,
    "floor": m.Floor,
    "silu": m.Silu,
    "logical_not": m.LogicalNot,
    "bitwise_not": m.LogicalNot,
}
_BINARY: dict[str, type[Op]] = {
    "add": m.Add,
    "sub": m.Sub,
    "mul": m.Mul,
    "pow": m.Pow,
    "maximum": m.Maximum,
    "minimum": m.Minimum,
    "max": m.Maximum,
    "min": m.Minimum,
    "remainder": m.Remainder,
    "floor_divide": m.FloorDivide,
    "lt": m.Less,
    "le": m.LessEqual,
    "gt": m.Greater,
    "ge": m.GreaterEqual,
    "eq": m.Equal,
    "ne": m.NotEqual,
    "__and__": m.LogicalAnd,
    "__or__": m.LogicalOr,
    "bitwise_and": m.LogicalAnd,
    "bitwise_or": m.LogicalOr,
    "logical_and": m.LogicalAnd,
    "logical_or": m.LogicalOr,
    "bitwise_xor": m.NotEqual,
    "__xor__": m.NotEqual,
    "logical_xor": m.NotEqual,
}


_OVERLOADS = ("Tensor", "Scalar", "default", "Tensor_Scalar", "Tensor_Tensor")
_LOGICAL = ("logical_and", "logical_or", "logical_xor", "logical_not")
_BITWISE = ("bitwise_not", "__and__", "__or__", "bitwise_and", "bitwise_or", "bitwise_xor", "__xor__")


def _truth(c: Importer, name: str, *operands: Any) -> list[Value]:
    """Operands of a logical operator as booleans. Bitwise ones mean the same on booleans only."""
    values = [x if isinstance(x, Value) else c.scalar(x, "bool") for x in operands]
    if name in _BITWISE and any(v.dtype != "bool" for v in values):
        raise c.unsupported(f"operator aten.{name} on integers")
    return [c.cast(v, "bool") for v in values]


def _register_elementwise() -> None:
    def unary(name: str, kind: Callable[..., Op]) -> Handler:
        def handler(c: Importer, x: Value) -> Value:
            if kind is m.LogicalNot:
                return c.emit(m.LogicalNot(*_truth(c, name, x)))
            return c.emit(kind(c.cast(x, c.result_dtype())))

        return handler

    def binary(name: str, kind: Callable[..., Op]) -> Handler:
        def handler(c: Importer, a: Any, b: Any, alpha: Any = 1) -> Value:
            if name in _LOGICAL or name in _BITWISE:
                return c.emit(kind(*_truth(c, name, a, b)))
            if alpha != 1:
                b = b * alpha if not isinstance(b, Value) else c.emit(m.Mul(*c.promote(b, alpha)))
            return c.emit(kind(*c.promote(a, b)))

        return handler

    for name, kind in _UNARY.items():
        TABLE[f"{name}.default"] = unary(name, kind)
    for name, kind in _BINARY.items():
        overloads = ("other",) if name in ("max", "min") else _OVERLOADS
        for overload in overloads:
            TABLE[f"{name}.{overload}"] = binary(name, kind)


_register_elementwise()


@aten("div.Tensor", "div.Scalar", "true_divide.Tensor")
def _div(c: Importer, a: Any, b: Any) -> Value:
    left, right = c.promote(a, b)
    if not left.dtype.startswith("float"):
        left, right = c.cast(left, "float32"), c.cast(right, "float32")
    return c.emit(m.Div(left, right))


@aten("div.Tensor_mode")
def _div_mode(c: Importer, a: Any, b: Any, rounding_mode: str | None = None) -> Value:
    if rounding_mode is None:
        return _div(c, a, b)
    if rounding_mode != "floor":
        raise c.unsupported(f"div with rounding_mode={rounding_mode}")
    return c.emit(m.FloorDivide(*c.promote(a, b)))


@aten("rsub.Scalar", "rsub.Tensor")
def _rsub(c: Importer, a: Any, b: Any, alpha: Any = 1) -> Value:
    if alpha != 1:
        raise c.unsupported("rsub with a factor")
    left, right = c.promote(b, a)
    return c.emit(m.Sub(left, right))


@aten("outer.default", "ger.default")
def _outer(c: Importer, a: Value, b: Value) -> Value:
    return c.emit(m.Mul(*c.promote(reshaped(c, a, (*a.shape, 1)), b)))


@aten("gelu.default")
def _gelu(c: Importer, x: Value, approximate: str = "none") -> Value:
    return c.emit(m.Gelu(x, tanh=approximate == "tanh"))


@aten("where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar")
def _where(c: Importer, condition: Value, a: Any, b: Any) -> Value:
    return c.emit(m.Where(condition, *c.promote(a, b)))


@aten("masked_fill.Scalar", "masked_fill.Tensor")
def _masked_fill(c: Importer, x: Value, mask: Value, value: Any) -> Value:
    fill = c.cast(value, x.dtype) if isinstance(value, Value) else c.scalar(value, x.dtype)
    return c.emit(m.Where(mask, fill, x))


@aten("to.dtype", "to.dtype_layout", "to.device", "_to_copy.default", "type_as.default", "to.other")
def _to(c: Importer, x: Value, *_: Any, **__: Any) -> Value:
    return c.cast(x, c.result_dtype())


@aten(
    "contiguous.default",
    "clone.default",
    "alias.default",
    "detach.default",
    "detach_.default",
    "lift_fresh_copy.default",
    "positive.default",
)
def _same(c: Importer, x: Value, **_: Any) -> Value:
    return x


@aten("dropout.default", "feature_dropout.default")
def _dropout(c: Importer, x: Value, p: float = 0.0, train: bool = False) -> Value:
    if train and p > 0:
        raise c.unsupported("dropout in training mode")
    return x


@aten(
    "_assert_tensor_metadata.default",
    "_assert_async.msg",
    "sym_constrain_range.default",
    "sym_constrain_range_for_size.default",
    "_assert_async.default",
)
def _nothing(c: Importer, *_: Any, **__: Any) -> None:
    return None


# -- matrices and reductions
@aten("matmul.default", "bmm.default", "mm.default")
def _matmul(c: Importer, a: Value, b: Value) -> Value:
    if a.type.rank == 1 or b.type.rank == 1:
        raise c.unsupported("matmul with a vector")
    return c.emit(m.MatMul(a, b))


@aten("addmm.default")
def _addmm(c: Importer, bias: Value, a: Value, b: Value, beta: Any = 1, alpha: Any = 1) -> Value:
    if beta != 1 or alpha != 1:
        raise c.unsupported("addmm with beta or alpha other than 1")
    return c.emit(m.Add(*c.promote(c.emit(m.MatMul(a, b)), bias)))


@aten("baddbmm.default")
def _baddbmm(c: Importer, added: Value, a: Value, b: Value, beta: Any = 1, alpha: Any = 1) -> Value:
    y = c.emit(m.MatMul(a, b))
    y = y if alpha == 1 else c.emit(m.Mul(*c.promote(y, alpha)))
    if beta == 0:
        return y
    added = added if beta == 1 else c.emit(m.Mul(*c.promote(added, beta)))
    return c.emit(m.Add(*c.promote(y, added)))


@aten("linear.default")
def _linear(c: Importer, x: Value, weight: Value, bias: Value | None = None) -> Value:
    return c.emit(nn.Linear(x, weight, bias))


@aten("topk.default")
def _topk(
    c: Importer, x: Value, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[Value, Value]:
    """Values and places. Where torch leaves open which of equal values come first, it is the first ones."""
    if c.axis(dim, x) != -1 or not largest:
        raise c.unsupported("topk of the smallest, or along another axis than the last")
    places = c.emit(TopK(x, k=k))
    return c.emit(Gather(x, places)), places


@aten("one_hot.default")
def _one_hot(c: Importer, x: Value, classes: int = -1) -> Value:
    length = c.result_shape()[-1]
    return c.cast(_hits(c, x, length), c.result_dtype())


def _hits(c: Importer, x: Value, length: Dim) -> Value:
    """x [...] → bool [..., length]: true where the last axis' place is x's value."""
    column = reshaped(c, x, (*x.shape, 1))
    return c.emit(m.Equal(*c.promote(column, c.emit(Arange(length=length, dtype=x.dtype)))))


def _names_all(index: Value, length: Dim) -> bool:
    """Whether the last axis names each place once: the places of as many of the largest as there are."""
    made = index.producer
    while isinstance(made, m.Cast) and made.dtype in ("int32", "int64"):
        made = made.x.producer
    return isinstance(made, TopK) and made.k == length == made.x.shape[-1]


@aten("scatter.src")
def _scatter(c: Importer, x: Value, dim: int, index: Value, src: Value) -> Value:
    """Numbers at the places of the last axis that `index` names, each place at most once: of a place that is
    named twice, torch leaves open which number it gets.
    """
    if c.axis(dim, x) != -1 or index.shape[:-1] != x.shape[:-1] or src.shape != index.shape:
        raise c.unsupported("scatter along another axis than the last, or to some of the rows")
    hits = _hits(c, index, x.shape[-1])
    each = c.emit(m.Where(hits, reshaped(c, src, (*src.shape, 1)), c.scalar(0, src.dtype)))
    put = c.emit(m.ReduceSum(each, axes=(-2,), keepdim=False))
    hit = c.cast(c.emit(m.ReduceMax(c.cast(hits, "int32"), axes=(-2,), keepdim=False)), "bool")
    return c.emit(m.Where(hit, put, x))


@aten("scatter.value")
def _scatter_value(c: Importer, x: Value, dim: int, index: Value, value: Any) -> Value:
    """One number at the places of the last axis that `index` names."""
    if _names_all(index, x.shape[-1]) and c.axis(dim, x) == -1 and index.shape == x.shape:
        return c.emit(Expand(c.scalar(value, x.dtype), shape=x.shape))
    if c.axis(dim, x) != -1 or index.shape[:-1] != x.shape[:-1]:
        raise c.unsupported("scatter along another axis than the last, or to some of the rows")
    hits = c.cast(_hits(c, index, x.shape[-1]), "int32")
    hit = c.cast(c.emit(m.ReduceMax(hits, axes=(-2,), keepdim=False)), "bool")
    return c.emit(m.Where(hit, c.scalar(value, x.dtype), x))


@aten("softmax.int", "_softmax.default", "_safe_softmax.default")
def _softmax(c: Importer, x: Value, dim: int, dtype: Any = None) -> Value:
    if dtype is not None and not isinstance(dtype, bool):
        x = c.cast(x, c.result_dtype())
    return c.emit(m.Softmax(x, axis=c.axis(dim, x)))


@aten("cumsum.default")
def _cumsum(c: Importer, x: Value, dim: int, dtype: Any = None) -> Value:
    wanted = c.result_dtype()
    x = c.cast(x, wanted) if wanted.startswith("float") else x
    return c.cast(c.emit(m.CumSum(x, axis=c.axis(dim, x))), wanted)


@aten("diff.default")
def _diff(
    c: Importer,
    x: Value,
    n: int = 1,
    dim: int = -1,
    prepend: Value | None = None,
    append: Value | None = None,
) -> Value:
    if n != 1 or c.axis(dim, x) != -1 or prepend is None or append is not None:
        raise c.unsupported("diff other than first order along the last axis with a value before")
    return c.emit(m.Diff(x, prepend))


# -- layers
@aten("embedding.default")
def _embedding(c: Importer, weight: Value, ids: Value, *_: Any) -> Value:
    # A row is as the table is stored; the model goes on in float32.
    return c.cast(c.emit(nn.Embedding(ids, weight)), c.result_dtype())


@aten("layer_norm.default")
def _layer_norm(
    c: Importer,
    x: Value,
    normalized_shape: Sequence[int],
    weight: Value | None = None,
    bias: Value | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Value:
    if len(normalized_shape) != 1:
        raise c.unsupported("layer_norm over several axes")
    return c.emit(nn.LayerNorm(x, weight, bias, eps=eps))


@aten("rms_norm.default")
def _rms_norm(
    c: Importer,
    x: Value,
    normalized_shape: Sequence[int],
    weight: Value | None = None,
    eps: float | None = None,
) -> Value:
    if len(normalized_shape) != 1 or x.dtype != "float32":
        raise c.unsupported("rms_norm over several axes or in another type than float32")
    eps = float(np.finfo(np.float32).eps) if eps is None else eps  # torch's default
    mean = c.emit(m.ReduceMean(c.emit(m.Mul(x, x)), axes=(-1,), keepdim=True))
    y = c.emit(m.Mul(x, c.emit(m.Rsqrt(c.emit(m.Add(mean, c.scalar(eps, x.dtype)))))))
    return y if weight is None else c.emit(m.Mul(y, weight))


@aten("scaled_dot_product_attention.default")
def _sdpa(
    c: Importer,
    q: Value,
    k: Value,
    v: Value,
    attn_mask: Value | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Value:
    head_dim = q.shape[-1]
    if dropout_p:
        raise c.unsupported("attention dropout")
    if scale is None:
        if not isinstance(head_dim, int):
            raise c.unsupported("attention over a symbolic head size")
        scale = 1.0 / math.sqrt(head_dim)
    return c.emit(
        attention.Sdpa(q, k, v, attn_mask, scale=float(scale), causal=is_causal, enable_gqa=enable_gqa)
    )
