"""The table ATen operator → IR ops. A model family works because its operators stand here; nothing knows a
family.

Each entry takes the `Importer` and the node's arguments (IR values, numbers, dimensions, lists) and returns
an IR value, a tuple of them for operators with several results, or None for operators that only assert. To
add an operator, add a function with `@aten("name.overload")`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..ir.core import Op, Value
from ..ir.errors import UnsupportedError
from ..ir.ops import attention, nn, shape
from ..ir.ops import math as m
from ..ir.types import Dim, DimExpr, Shape, divide, product

if TYPE_CHECKING:
    from .trace import Importer

Handler = Callable[..., Any]
TABLE: dict[str, Handler] = {}


def aten(*names: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        for name in names:
            TABLE[name] = handler
        return handler

    return register


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
}


def _register_elementwise() -> None:
    def unary(kind: type[Op]) -> Handler:
        return lambda c, x: c.emit(kind(x))

    def binary(kind: type[Op]) -> Handler:
        def handler(c: Importer, a: Any, b: Any, alpha: Any = 1) -> Value:
            if alpha != 1:
                b = b * alpha if not isinstance(b, Value) else c.emit(m.Mul(*c.promote(b, alpha)))
            return c.emit(kind(*c.promote(a, b)))

        return handler

    for name, kind in _UNARY.items():
        TABLE[f"{name}.default"] = unary(kind)
    for name, kind in _BINARY.items():
        for overload in ("Tensor", "Scalar", "default", "Tensor_Scalar", "Tensor_Tensor"):
            TABLE[f"{name}.{overload}"] = binary(kind)


_register_elementwise()


@aten("div.Tensor", "div.Scalar", "true_divide.Tensor")
def _div(c: Importer, a: Any, b: Any) -> Value:
    left, right = c.promote(a, b)
    if not left.dtype.startswith("float"):
        left, right = c.cast(left, "float32"), c.cast(right, "float32")
    return c.emit(m.Div(left, right))


@aten("div.Tensor_mode")
def _div_mode(c: Importer, a: Any, b: Any, rounding_mode: str | None = None) -> Value:
    if rounding_mode != "floor":
        raise c.unsupported(f"div with rounding_mode={rounding_mode}")
    return c.emit(m.FloorDivide(*c.promote(a, b)))


@aten("rsub.Scalar", "rsub.Tensor")
def _rsub(c: Importer, a: Any, b: Any) -> Value:
    left, right = c.promote(b, a)
    return c.emit(m.Sub(left, right))


@aten("square.default")
def _square(c: Importer, x: Value) -> Value:
    return c.emit(m.Mul(x, x))


@aten("gelu.default")
def _gelu(c: Importer, x: Value, approximate: str = "none") -> Value:
    return c.emit(m.Gelu(x, tanh=approximate == "tanh"))


@aten("clamp.default", "clamp_min.default", "clamp_max.default")
def _clamp(c: Importer, x: Value, min: Any = None, max: Any = None) -> Value:
    if min is not None:
        x = c.emit(m.Maximum(*c.promote(x, min)))
    return x if max is None else c.emit(m.Minimum(*c.promote(x, max)))


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


@aten("dropout.default", "native_dropout.default", "feature_dropout.default")
def _dropout(c: Importer, x: Value, p: float = 0.0, train: bool = False) -> Value:
    if train and p > 0:
        raise c.unsupported("dropout in training mode")
    return x


@aten(
    "_assert_tensor_metadata.default",
    "_assert_scalar.default",
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
    return c.emit(m.Add(c.emit(m.MatMul(a, b)), bias))


@aten("linear.default")
def _linear(c: Importer, x: Value, weight: Value, bias: Value | None = None) -> Value:
    return c.emit(nn.Linear(x, weight, bias))


def _reduction(kind: type[Op]) -> Handler:
    def handler(c: Importer, x: Value, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Value:
        axes = [dim] if isinstance(dim, int) else list(dim) if dim else list(range(-x.type.rank, 0))
        if dtype is not None or c.result_dtype() != x.dtype:
            x = c.cast(x, c.result_dtype())
        return c.emit(kind(x, axes=tuple(sorted(c.axis(a, x) for a in axes)), keepdim=keepdim))

    return handler


for _name, _kind in (("mean", m.ReduceMean), ("sum", m.ReduceSum), ("amax", m.ReduceMax)):
    for _overload in ("dim", "dim_IntList", "default"):
        TABLE[f"{_name}.{_overload}"] = _reduction(_kind)


@aten("softmax.int", "_softmax.default", "_safe_softmax.default")
def _softmax(c: Importer, x: Value, dim: int, dtype: Any = None) -> Value:
    if dtype is not None and not isinstance(dtype, bool):
        x = c.cast(x, c.result_dtype())
    return c.emit(m.Softmax(x, axis=c.axis(dim, x)))


@aten("cumsum.default")
def _cumsum(c: Importer, x: Value, dim: int, dtype: Any = None) -> Value:
    return c.emit(m.CumSum(x, axis=c.axis(dim, x)))


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
    return c.emit(nn.Embedding(ids, weight))


@aten("layer_norm.default", "native_layer_norm.default")
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
    if len(normalized_shape) != 1 or eps is None:
        raise c.unsupported("rms_norm over several axes or without eps")
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


# -- shapes
def _resolve(c: Importer, x: Value, sizes: Sequence[Dim]) -> Shape:
    """Replace one -1 by what the other sizes leave."""
    unknown = [i for i, s in enumerate(sizes) if s == -1]
    if not unknown:
        return tuple(sizes)
    rest = product(s for s in sizes if s != -1)
    missing = divide(product(x.shape), rest)
    if missing is None:
        return c.result_shape()
    return tuple(missing if s == -1 else s for s in sizes)


def reshaped(c: Importer, x: Value, sizes: Sequence[Dim]) -> Value:
    target = tuple(sizes)
    return x if target == x.shape else c.emit(shape.Reshape(x, shape=target))


@aten("view.default", "reshape.default", "_unsafe_view.default")
def _view(c: Importer, x: Value, sizes: Sequence[Dim]) -> Value:
    return reshaped(c, x, _resolve(c, x, sizes))


@aten(
    "unsqueeze.default",
    "squeeze.dim",
    "squeeze.dims",
    "squeeze.default",
    "flatten.using_ints",
    "unflatten.int",
)
def _by_result_shape(c: Importer, x: Value, *_: Any, **__: Any) -> Value:
    return reshaped(c, x, c.result_shape())


def _permuted(c: Importer, x: Value, perm: Sequence[int]) -> Value:
    """Leading axes that stay are left out of the attribute: it survives a change of rank in front."""
    rank = x.type.rank
    axes = [c.axis(p, x) for p in perm]
    while axes and axes[0] == -len(axes) and len(axes) > 0:
        axes = axes[1:]
    return x if not axes or rank == 0 else c.emit(shape.Transpose(x, perm=tuple(axes)))


@aten("permute.default")
def _permute(c: Importer, x: Value, dims: Sequence[int]) -> Value:
    return _permuted(c, x, dims)


@aten("transpose.int")
def _transpose(c: Importer, x: Value, dim0: int, dim1: int) -> Value:
    perm = list(range(-x.type.rank, 0))
    a, b = c.axis(dim0, x), c.axis(dim1, x)
    perm[a], perm[b] = b, a
    return _permuted(c, x, perm)


@aten("t.default", "numpy_T.default", "mT.default")
def _t(c: Importer, x: Value) -> Value:
    return x if x.type.rank < 2 else _transpose(c, x, -2, -1)


@aten("expand.default", "expand_as.default")
def _expand(c: Importer, x: Value, *_: Any, **__: Any) -> Value:
    target = c.result_shape()
    return x if target == x.shape else c.emit(shape.Expand(x, shape=target))


@aten("repeat_interleave.self_int")
def _repeat_interleave(
    c: Importer, x: Value, repeats: int, dim: int | None = None, output_size: Any = None
) -> Value:
    if dim is None:
        raise c.unsupported("repeat_interleave without an axis")
    at = x.type.rank + c.axis(dim, x)
    wide = reshaped(c, x, (*x.shape[: at + 1], 1, *x.shape[at + 1 :]))
    wide = c.emit(shape.Expand(wide, shape=(*x.shape[: at + 1], repeats, *x.shape[at + 1 :])))
    return reshaped(c, wide, (*x.shape[:at], x.shape[at] * repeats, *x.shape[at + 1 :]))


@aten("repeat.default")
def _repeat(c: Importer, x: Value, repeats: Sequence[int]) -> Value:
    lead = len(repeats) - x.type.rank
    x = reshaped(c, x, (*(1,) * lead, *x.shape))
    for i, n in enumerate(repeats):
        if n != 1:
            x = c.emit(shape.Concat([x] * n, axis=i - len(repeats)))
    return x


def _end(value: Any, length: Dim) -> Dim:
    """A slice end as torch understands it, for lengths that may be symbolic."""
    if value is None or (isinstance(value, int) and value >= (1 << 62)):
        return length
    if isinstance(value, int) and value < 0:
        return length + value
    if isinstance(value, int) and isinstance(length, int):
        return min(value, length)
    return value


@aten("slice.Tensor")
def _slice(c: Importer, x: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Value:
    axis = c.axis(dim, x)
    length = x.shape[axis]
    first, last = _end(0 if start is None else start, length), _end(end, length)
    if isinstance(first, int) and isinstance(last, int):
        last = max(first, last)
    if c.result_shape()[axis] == length and step == 1:
        return x
    return c.emit(shape.Slice(x, axis=axis, start=first, stop=last, step=step))


@aten("narrow.default")
def _narrow(c: Importer, x: Value, dim: int, start: Any, length: Any) -> Value:
    return c.emit(shape.Slice(x, axis=c.axis(dim, x), start=start, stop=start + length))


@aten("select.int")
def _select(c: Importer, x: Value, dim: int, index: Any) -> Value:
    axis = c.axis(dim, x)
    start = _end(index, x.shape[axis])
    return reshaped(c, c.emit(shape.Slice(x, axis=axis, start=start, stop=start + 1)), c.result_shape())


@aten("split.Tensor", "chunk.default", "split_with_sizes.default", "split.sizes")
def _split(c: Importer, x: Value, how: Any, dim: int = 0) -> tuple[Value, ...]:
    axis = c.axis(dim, x)
    out: list[Value] = []
    start: Dim = 0
    for part in c.result_shapes():
        out.append(c.emit(shape.Slice(x, axis=axis, start=start, stop=start + part[axis])))
        start = start + part[axis]
    return tuple(out)


@aten("unbind.int")
def _unbind(c: Importer, x: Value, dim: int = 0) -> tuple[Value, ...]:
    axis = c.axis(dim, x)
    return tuple(
        reshaped(c, c.emit(shape.Slice(x, axis=axis, start=i, stop=i + 1)), s)
        for i, s in enumerate(c.result_shapes())
    )


@aten("cat.default", "concat.default")
def _cat(c: Importer, xs: Sequence[Value], dim: int = 0) -> Value:
    dtype = c.result_dtype()
    return c.emit(shape.Concat([c.cast(x, dtype) for x in xs], axis=c.axis(dim, xs[0])))


@aten("stack.default")
def _stack(c: Importer, xs: Sequence[Value], dim: int = 0) -> Value:
    target = c.result_shape()
    axis = dim % len(target)
    one = (*target[:axis], 1, *target[axis + 1 :])
    return c.emit(shape.Concat([reshaped(c, x, one) for x in xs], axis=axis - len(target)))


# -- making tensors
@aten("arange.default", "arange.start", "arange.start_step")
def _arange(c: Importer, *args: Any, **__: Any) -> Value:
    start, _, step = (
        (0, args[0], 1) if len(args) == 1 else (args[0], args[1], args[2] if len(args) > 2 else 1)
    )
    if not isinstance(start, int) or not isinstance(step, int):
        raise c.unsupported("arange with a symbolic or fractional start or step")
    (length,) = c.result_shape()
    return c.emit(shape.Arange(length=length, start=start, step=step, dtype=c.result_dtype()))


@aten("full.default", "full_like.default", "new_full.default", "scalar_tensor.default")
def _full(c: Importer, *args: Any, fill_value: Any = None, **_: Any) -> Value:
    value = fill_value if fill_value is not None else args[-1]
    if isinstance(value, DimExpr):
        return c.emit(
            shape.Expand(c.emit(shape.DimValue(dim=value, dtype=c.result_dtype())), shape=c.result_shape())
        )
    return c.emit(shape.Full(value=value, dtype=c.result_dtype(), shape=c.result_shape()))


def _filled(value: int) -> Handler:
    def handler(c: Importer, *_: Any, **__: Any) -> Value:
        dtype = c.result_dtype()
        number: float | int | bool = (
            bool(value) if dtype == "bool" else float(value) if dtype.startswith("float") else value
        )
        return c.emit(shape.Full(value=number, dtype=dtype, shape=c.result_shape()))

    return handler


for _name, _value in (("zeros", 0), ("ones", 1)):
    for _form in (f"{_name}.default", f"{_name}_like.default", f"new_{_name}.default"):
        TABLE[_form] = _filled(_value)


@aten("index.Tensor")
def _index(c: Importer, x: Value, indices: Sequence[Value | None]) -> Value:
    given = [i for i in indices if i is not None]
    if list(indices[: len(given)]) != given or any(i.dtype == "bool" for i in given):
        raise c.unsupported("indexing by a mask or behind a full axis")
    return c.emit(shape.Index(x, list(given)))


@aten("gather.default")
def _gather(c: Importer, x: Value, dim: int, index: Value, sparse_grad: bool = False) -> Value:
    if c.axis(dim, x) != -1:
        raise c.unsupported("gather along another axis than the last")
    return c.emit(shape.Gather(x, index))


@aten("index_select.default")
def _index_select(c: Importer, x: Value, dim: int, index: Value) -> Value:
    if c.axis(dim, x) != -x.type.rank:
        raise c.unsupported("index_select behind the first axis")
    return c.emit(shape.Index(x, [index]))


def lookup(name: str, where: str) -> Handler:
    """The handler of "add.Tensor"; UnsupportedError names the operator and the module that calls it."""
    if name not in TABLE:
        raise UnsupportedError(
            f"operator aten.{name} in {where or 'the model'} is not supported",
            remedy="add it to frontend/aten.py, or report the model",
        )
    return TABLE[name]
