"""ATen operators that move, cut, join, index or make tensors (see `aten_table.py`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..ir.core import Op, Value
from ..ir.ops import math as m
from ..ir.ops import shape
from ..ir.types import Dim, DimExpr, Shape, divide, product
from .aten_table import TABLE, Handler, aten
from .held import numbers_in

if TYPE_CHECKING:
    from .importer import Importer


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
    "view_as.default",
    "reshape_as.default",
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


@aten("transpose.int", "swapaxes.default", "swapdims.default")
def _transpose(c: Importer, x: Value, dim0: int, dim1: int) -> Value:
    perm = list(range(-x.type.rank, 0))
    a, b = c.axis(dim0, x), c.axis(dim1, x)
    perm[a], perm[b] = b, a
    return _permuted(c, x, perm)


@aten("t.default", "numpy_T.default", "mT.default")
def _t(c: Importer, x: Value) -> Value:
    if x.type.rank > 2 and "mT" not in str(c.node.target):
        raise c.unsupported("the transpose of all axes")
    return x if x.type.rank < 2 else _transpose(c, x, -2, -1)


@aten("expand.default", "expand_as.default", "broadcast_to.default")
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
def _repeat(c: Importer, x: Value, repeats: Sequence[Dim]) -> Value:
    lead = len(repeats) - x.type.rank
    x = reshaped(c, x, (*(1,) * lead, *x.shape))
    for i, n in enumerate(repeats):
        if isinstance(n, int) and n > 0:
            x = c.emit(shape.Concat([x] * n, axis=i - len(repeats))) if n != 1 else x
        elif x.shape[i] == 1:
            x = c.emit(shape.Expand(x, shape=(*x.shape[:i], n, *x.shape[i + 1 :])))
        else:
            raise c.unsupported("repeating a tensor a symbolic number of times")
    return x


def _end(value: Any, length: Dim) -> Dim:
    """A slice end as torch understands it, for lengths that may be symbolic."""
    if value is None or (isinstance(value, int) and value >= (1 << 62)):
        return length
    if isinstance(value, int) and value < 0:
        return max(length + value, 0) if isinstance(length, int) else length + value
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
    size = c.node.meta["val"].shape[axis]
    if c.is_open(size) and step == 1 and all(map(c.never_negative, (first, last - first, length - last))):
        c.is_size(size, last - first)
    if c.result_shape()[axis] == length and step == 1:
        return x
    return c.emit(shape.Slice(x, axis=axis, start=first, stop=last, step=step))


@aten("narrow.default")
def _narrow(c: Importer, x: Value, dim: int, start: Any, length: Any) -> Value:
    axis = c.axis(dim, x)
    first = _end(start, x.shape[axis])
    return c.emit(shape.Slice(x, axis=axis, start=first, stop=first + length))


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


@aten("fill.Scalar", "fill.Tensor", "zero.default")
def _fill(c: Importer, x: Value, value: Any = 0) -> Value:
    number = c.cast(value, x.dtype) if isinstance(value, Value) else c.scalar(value, x.dtype)
    return c.emit(shape.Expand(number, shape=x.shape))


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
# Memory that nobody wrote yet: any number will do.
for _name in ("empty.memory_format", "empty_like.default", "new_empty.default"):
    TABLE.setdefault(_name, _filled(0))


def _triangle(keep: Callable[[Value, Value], Op]) -> Handler:
    def handler(c: Importer, x: Value, diagonal: int = 0) -> Value:
        rows = c.emit(shape.Arange(length=x.shape[-2]))
        columns = c.emit(shape.Arange(length=x.shape[-1]))
        edge = c.emit(m.Add(*c.promote(reshaped(c, rows, (x.shape[-2], 1)), diagonal)))
        return c.emit(m.Where(c.emit(keep(edge, columns)), x, c.scalar(0, x.dtype)))

    return handler


TABLE["tril.default"] = _triangle(m.GreaterEqual)
TABLE["triu.default"] = _triangle(m.LessEqual)


@aten("index.Tensor")
def _index(c: Importer, x: Value, indices: Sequence[Value | None]) -> Value:
    given = [i for i in indices if i is not None]
    if any(i.dtype == "bool" for i in given):
        return _masked(c, x, indices)
    if len(indices) == 1 and _is_every(given[0], x.shape[0]):
        return x
    if len(given) == 1 and indices[0] is None:
        return _picked(c, x, len(indices) - 1 - x.type.rank, given[0])
    if list(indices[: len(given)]) != given:
        raise c.unsupported("indexing by several tensors behind a full axis")
    return c.emit(shape.Index(x, list(given)))


def _masked(c: Importer, x: Value, indices: Sequence[Value | None]) -> Value:
    """x[mask] where the mask is made of numbers alone and has all or none of the rows: one axis for those
    that it has.
    """
    taken = _all_or_none(c, x, indices)
    if taken is None:
        raise c.unsupported("indexing by a mask")
    (mask,) = indices
    assert mask is not None
    rest = x.shape[mask.type.rank :]
    count = product(mask.shape) if taken else 0
    c.is_size(c.node.meta["val"].shape[0], count)
    if taken:
        return reshaped(c, x, (count, *rest))
    return c.emit(shape.Expand(c.scalar(0, x.dtype), shape=(0, *rest)))


def _all_or_none(c: Importer, x: Value, indices: Sequence[Value | None]) -> bool | None:
    """Whether one mask over the leading axes of x is true everywhere, or false everywhere; None where it is
    neither, or depends on an input.
    """
    (mask, *others) = indices
    if mask is None or others or mask.dtype != "bool" or mask.shape != x.shape[: mask.type.rank]:
        return None
    found = numbers_in(mask, c.look)
    return bool(found.all()) if found is not None and found.all() == found.any() else None


@aten("index_put.default")
def _index_put(
    c: Importer, x: Value, indices: Sequence[Value | None], values: Value, accumulate: bool = False
) -> Value:
    """x with values at the places of a mask that is made of numbers alone, and has all or none of them."""
    taken = _all_or_none(c, x, indices) if not accumulate else None
    if taken is None:
        raise c.unsupported("writing to some places of a tensor")
    if not taken:
        return x
    (mask,) = indices
    assert mask is not None
    wide = c.emit(shape.Expand(values, shape=(product(mask.shape), *x.shape[mask.type.rank :])))
    return c.cast(reshaped(c, wide, x.shape), x.dtype)


def _is_every(index: Value, length: Dim) -> bool:
    """Whether an index counts all places of an axis, in order."""
    made = index.producer
    return isinstance(made, shape.Arange) and (made.start, made.step, made.length) == (0, 1, length)


def _picked(c: Importer, x: Value, axis: int, index: Value) -> Value:
    """x with places picked along one axis, by rows of the axis brought to the front and back."""
    rank, depth, at = x.type.rank, index.type.rank, x.type.rank + axis
    first = _permuted(c, x, [at, *(i for i in range(rank) if i != at)])
    rows = c.emit(shape.Index(first, [index]))
    return _permuted(
        c, rows, [*range(depth, depth + at), *range(depth), *range(depth + at, depth + rank - 1)]
    )


@aten("gather.default")
def _gather(c: Importer, x: Value, dim: int, index: Value, sparse_grad: bool = False) -> Value:
    if c.axis(dim, x) != -1:
        raise c.unsupported("gather along another axis than the last")
    return c.emit(shape.Gather(x, index))


@aten("index_select.default")
def _index_select(c: Importer, x: Value, dim: int, index: Value) -> Value:
    return _picked(c, x, c.axis(dim, x), index)
