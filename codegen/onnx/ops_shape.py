"""Operations that move or make data without arithmetic."""

from __future__ import annotations

from ...ir.dtypes import to_numpy
from ...ir.ops import shape as ir
from ...ir.ops.select import TopK
from .context import Context, emits


@emits("full")
def full(c: Context, op: ir.Full) -> str:
    value = c.scope.constant(to_numpy(op.dtype).type(op.value), op.dtype)
    return c.scope.op("Expand", value, c.dims.shape(op.shape)) if op.shape else value


@emits("dim_value")
def dim_value(c: Context, op: ir.DimValue) -> str:
    value = c.scope.op("Squeeze", c.dims.value(op.dim), c.scope.i64(0))
    return value if op.dtype == "int64" else c.scope.cast(value, op.dtype)


@emits("arange")
def arange(c: Context, op: ir.Arange) -> str:
    s = c.scope
    steps = s.arange(s.op("Squeeze", c.dims.value(op.length), s.i64(0)))
    if op.step != 1:
        steps = s.op("Mul", steps, s.scalar(op.step))
    if op.start:
        steps = s.op("Add", steps, s.scalar(op.start))
    return steps if op.dtype == "int64" else s.cast(steps, op.dtype)


@emits("reshape")
def reshape(c: Context, op: ir.Reshape) -> str:
    return c.dims.reshape(c.name(op.x), op.x.shape, op.shape)


@emits("transpose")
def transpose(c: Context, op: ir.Transpose) -> str:
    return c.scope.transpose(c.name(op.x), *op.full_perm())


@emits("expand")
def expand(c: Context, op: ir.Expand) -> str:
    lead = len(op.shape) - op.x.type.rank
    same = [i >= lead and op.x.shape[i - lead] == d for i, d in enumerate(op.shape)]
    # ONNX broadcasts both ways: 1 keeps an axis, which spares computing its length.
    return c.scope.op(
        "Expand",
        c.name(op.x),
        c.dims.shape(tuple(1 if k else d for k, d in zip(same, op.shape, strict=True))),
    )


@emits("slice")
def slice_(c: Context, op: ir.Slice) -> str:
    s = c.scope
    start, stop = c.dims.value(op.start), c.dims.value(op.stop)
    return s.op("Slice", c.name(op.x), start, stop, s.i64(op.axis), s.i64(op.step))


@emits("concat")
def concat(c: Context, op: ir.Concat) -> str:
    names = [c.name(x) for x in op.xs]
    return names[0] if len(names) == 1 else c.scope.op("Concat", *names, axis=op.axis)


@emits("index")
def index(c: Context, op: ir.Index) -> str:
    s, x = c.scope, c.name(op.x)
    indices = [c.name(i) if i.dtype in ("int64", "int32") else s.cast(c.name(i), "int64") for i in op.indices]
    if len(indices) == 1:
        return s.op("Gather", x, indices[0], axis=0)
    wide = [n if i.dtype == "int64" else s.cast(n, "int64") for n, i in zip(indices, op.indices, strict=True)]
    shape = c.dims.shape(op.result.shape[: op.result.type.rank - op.x.type.rank + len(indices)])
    together = [s.unsqueeze(s.op("Expand", i, shape), -1) for i in wide]
    return s.op("GatherND", x, s.op("Concat", *together, axis=-1))


@emits("gather")
def gather(c: Context, op: ir.Gather) -> str:
    if op.index.type.rank == 1:  # GatherElements takes an index of x's rank only
        return c.scope.op("Gather", c.name(op.x), c.name(op.index), axis=-1)
    return c.scope.op("GatherElements", c.name(op.x), c.name(op.index), axis=-1)


@emits("top_k")
def top_k(c: Context, op: TopK) -> str:
    """ONNX breaks ties as the op does: the lower index first."""
    return c.scope.many("TopK", [c.name(op.x), c.dims.shape((op.k,))], 2, axis=-1, largest=1, sorted=1)[1]
