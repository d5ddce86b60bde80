"""Emitters of generic tensor operations: Relax operators where there is one, tensor expressions elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script.ir_builder import tirx as T

from ...ir.codebooks import codebook
from ...ir.ops.quant import is_minimum
from ...ir.types import product
from .kernels.builder import Kernel
from .lower import Lowering, emits
from .untyped import relax, te, tirx, tvm

_UNARY: dict[str, Callable[..., Any]] = {
    "neg": relax.op.negative,
    "exp": relax.op.exp,
    "log": relax.op.log,
    "sqrt": relax.op.sqrt,
    "rsqrt": relax.op.rsqrt,
    "tanh": relax.op.tanh,
    "sin": relax.op.sin,
    "cos": relax.op.cos,
    "erf": relax.op.erf,
    "abs": relax.op.abs,
    "floor": relax.op.floor,
    "logical_not": relax.op.logical_not,
}
_BINARY: dict[str, Callable[..., Any]] = {
    "add": relax.op.add,
    "sub": relax.op.subtract,
    "mul": relax.op.multiply,
    "div": relax.op.divide,
    "floor_divide": relax.op.floor_divide,
    "remainder": relax.op.floor_mod,
    "pow": relax.op.power,
    "maximum": relax.op.maximum,
    "minimum": relax.op.minimum,
    "less": relax.op.less,
    "less_equal": relax.op.less_equal,
    "greater": relax.op.greater,
    "greater_equal": relax.op.greater_equal,
    "equal": relax.op.equal,
    "not_equal": relax.op.not_equal,
    "logical_and": relax.op.logical_and,
    "logical_or": relax.op.logical_or,
}
_REDUCE: dict[str, Callable[..., Any]] = {
    "reduce_sum": relax.op.sum,
    "reduce_mean": relax.op.mean,
    "reduce_max": relax.op.max,
}


@emits(*_UNARY)
def unary(low: Lowering, op: Any) -> Any:
    return low.emit(_UNARY[op.opname](low.get(op.x)))


@emits(*(name for name in _BINARY if name != "add"))
def binary(low: Lowering, op: Any) -> Any:
    return low.emit(_BINARY[op.opname](*low.operands(op.a, op.b)))


@emits("reciprocal")
def reciprocal(low: Lowering, op: Any) -> Any:
    return low.emit(relax.op.divide(relax.const(1.0, op.x.dtype), low.get(op.x)))


@emits("where")
def where(low: Lowering, op: Any) -> Any:
    return low.emit(relax.op.where(low.get(op.condition), low.get(op.a), low.get(op.b)))


@emits("cast")
def cast(low: Lowering, op: Any) -> Any:
    x = low.get(op.x)
    if op.x.dtype == op.dtype:
        return x
    if op.dtype == "bool":
        return low.emit(relax.op.not_equal(x, relax.const(0, op.x.dtype)))
    return low.emit(relax.op.astype(x, op.dtype))


@emits("matmul")
def matmul(low: Lowering, op: Any) -> Any:
    return low.emit(relax.op.matmul(low.get(op.a), low.get(op.b)))


@emits(*_REDUCE)
def reduce(low: Lowering, op: Any) -> Any:
    return low.emit(_REDUCE[op.opname](low.get(op.x), axis=list(op.axes), keepdims=op.keepdim))


@emits("softmax")
def softmax(low: Lowering, op: Any) -> Any:
    return low.emit(relax.op.nn.softmax(low.get(op.x), axis=op.axis))


@emits("cumsum")
def cumsum(low: Lowering, op: Any) -> Any:
    """A loop in TIR: Relax has no running sum over symbolic shapes."""
    axis = op.x.type.rank + op.axis
    dims = [product(op.x.shape[:axis]), op.x.shape[axis], product(op.x.shape[axis + 1 :])]
    out = low.tensor(low.shape(tuple(dims)), op.result.dtype)
    static = {"dtype": op.x.dtype, "out_dtype": op.result.dtype}
    x = low.reshape(low.get(op.x), low.shape(tuple(dims)))
    return low.reshape(low.kernel("cumsum", _make_cumsum, static, [x], out), low.shape(op.result.shape))


def _make_cumsum(*, dtype: str, out_dtype: str, isa: str) -> Any:
    """x [A, N, C] → running sums along N."""
    kernel = Kernel("cumsum", isa)
    with kernel:
        dims = tuple(kernel.symbol(name) for name in ("A", "N", "C"))
        x, out = kernel.argument("x", dims, dtype), kernel.argument("out", dims, out_dtype)
        with T.grid(*dims) as (a, n, c):
            value = tirx.Cast(out_dtype, x[a, n, c])
            before = tirx.if_then_else(n > 0, out[a, tirx.max(n - 1, 0), c], tirx.const(0, out_dtype))
            T.buffer_store(out, before + value, [a, n, c])
    return kernel.function


@emits("diff")
def diff(low: Lowering, op: Any) -> Any:
    def difference(dims: list[Any], x: Any, before: Any) -> Any:
        *shape, width = dims

        def joined(i: tuple[Any, ...], j: Any) -> Any:
            inside = tirx.max(j - width, 0)
            return tirx.if_then_else(j < width, before(*i, tirx.min(j, width - 1)), x(*i, inside))

        return te.compute(shape, lambda *i: joined(i[:-1], i[-1] + 1) - joined(i[:-1], i[-1]), name="diff")

    dims = (*op.result.shape, op.prepend.shape[-1])
    return low.te("diff", difference, low.get(op.x), low.get(op.prepend), dims=dims)


@emits("full")
def full(low: Lowering, op: Any) -> Any:
    """By a tensor expression: TVM 0.27 cannot legalize its own operator (a dtype is no string there)."""

    def same(dims: list[Any]) -> Any:
        return te.compute(dims, lambda *_: tirx.const(op.value, op.dtype), name="full")

    return low.te("full", same, dims=op.shape)


@emits("dim_value")
def dim_value(low: Lowering, op: Any) -> Any:
    def value(dims: list[Any]) -> Any:
        return te.compute((), lambda: tirx.Cast(op.dtype, _prim(dims[0])), name="dim_value")

    return low.te("dim_value", value, dims=(op.dim,))


@emits("arange")
def arange(low: Lowering, op: Any) -> Any:
    def steps(dims: list[Any]) -> Any:
        return te.compute(
            dims, lambda i: tirx.Cast(op.dtype, i.astype("int64") * op.step + op.start), name="arange"
        )

    return low.te("arange", steps, dims=(op.length,))


def _prim(value: Any) -> Any:
    return tirx.IntImm("int64", value) if isinstance(value, int) else value


@emits("reshape")
def reshape(low: Lowering, op: Any) -> Any:
    return low.reshape(low.get(op.x), low.shape(op.shape))


@emits("transpose")
def transpose(low: Lowering, op: Any) -> Any:
    return low.emit(relax.op.permute_dims(low.get(op.x), op.full_perm()))


@emits("expand")
def expand(low: Lowering, op: Any) -> Any:
    return low.emit(relax.op.broadcast_to(low.get(op.x), low.shape(op.shape)))


@emits("slice")
def slice_(low: Lowering, op: Any) -> Any:
    axis = op.x.type.rank + op.axis

    def part(dims: list[Any], x: Any) -> Any:
        start, *shape = dims
        return te.compute(
            shape, lambda *i: x(*i[:axis], i[axis] * op.step + start, *i[axis + 1 :]), name="slice"
        )

    return low.te("slice", part, low.get(op.x), dims=(op.start, *op.result.shape))


@emits("concat")
def concat(low: Lowering, op: Any) -> Any:
    axis, length = op.result.type.rank + op.axis, op.result.shape[op.axis]
    if isinstance(length, int) or len(op.xs) == 2:
        return low.emit(relax.op.concat([low.get(x) for x in op.xs], axis=op.axis))

    # Of several pieces TVM writes the length as a sum of sums, and does not see that it is this one.
    def join(shape: list[Any], *pieces: Any) -> Any:
        def at(*i: Any) -> Any:
            end, value = shape[axis], None
            for piece in reversed(pieces):
                end = end - piece.shape[axis]
                own = piece(*i[:axis], i[axis] - end, *i[axis + 1 :])
                value = (
                    own
                    if value is None
                    else tirx.if_then_else(i[axis] >= end + piece.shape[axis], value, own)
                )
            return value

        return te.compute(shape, at, name="concat")

    return low.te("concat", join, *(low.get(x) for x in op.xs), dims=op.result.shape)


@emits("index")
def index(low: Lowering, op: Any) -> Any:
    lead = op.result.type.rank - (op.x.type.rank - len(op.indices))

    def pick(shape: list[Any], x: Any, *indices: Any) -> Any:
        def at(*i: Any) -> Any:
            picked: list[Any] = []
            for axis, source in enumerate(indices):
                own = i[lead - len(source.shape) : lead]
                where = [_prim(0) if _is_one(n) else j for n, j in zip(source.shape, own, strict=True)]
                value = source(*where).astype("int64")
                picked.append(tirx.Select(value < 0, value + x.shape[axis], value))
            return x(*picked, *i[lead:])

        return te.compute(shape, at, name="index")

    return low.te("index", pick, low.get(op.x), *(low.get(i) for i in op.indices), dims=op.result.shape)


@emits("gather")
def gather(low: Lowering, op: Any) -> Any:
    def pick(shape: list[Any], x: Any, indices: Any) -> Any:
        def at(*i: Any) -> Any:
            return x(*i[:-1], indices(*i[-len(indices.shape) :]).astype("int64"))

        return te.compute(shape, at, name="gather")

    return low.te("gather", pick, low.get(op.x), low.get(op.index), dims=op.result.shape)


def _is_one(n: Any) -> bool:
    return isinstance(n, int | tvm.tirx.IntImm) and int(n) == 1


@emits("dequantize")
def dequantize(low: Lowering, op: Any) -> Any:
    quant = op.q.type.quant
    minimum = is_minimum(op.zero_point.type if op.zero_point is not None else None)

    def real(_: list[Any], q: Any, scale: Any, *zero: Any) -> Any:
        def at(n: Any, k: Any) -> Any:
            group = k // quant.group_size
            factor = scale(n, group).astype("float32")
            if minimum:
                return q(n, k).astype("float32") * factor + zero[0](n, group).astype("float32")
            if quant.codebook is not None:
                return _chosen(q(n, k), codebook(quant.codebook)) * factor
            offset = zero[0](n, group).astype("float32") if zero else float(1 << (quant.bits - 1))
            return (q(n, k).astype("float32") - offset) * factor

        return te.compute(q.shape, at, name="dequantize")

    parts = [op.q, op.scale] + ([op.zero_point] if op.zero_point is not None else [])
    return low.te("dequantize", real, *(low.get(part) for part in parts))


def _chosen(code: Any, table: Any) -> Any:
    """table[code] by a tree of selections over the code's bits: a constant table needs no memory."""
    values = [tirx.const(float(v), "float32") for v in table]
    for bit in range(len(values).bit_length() - 1):
        one = (code >> tirx.const(bit, "uint8")) & tirx.const(1, "uint8")
        is_one = one == tirx.const(1, "uint8")
        values = [tirx.Select(is_one, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    return values[0]
