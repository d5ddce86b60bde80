"""Replaces ops that a target cannot emit by simpler ones.

    %1 = rms_norm(%0, @w) {eps}      %1 = mul(%0, %0)            %4 = rsqrt(add(%2, eps))
                                →    %2 = reduce_mean(%1, -1)    %5 = mul(mul(%0, %4), @w)

`DECOMPOSITIONS` is the table: op name → function that builds the replacement in front of the op. What it
builds may be decomposed in turn, until everything left is something that the target emits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from ..ir.codebooks import codebook
from ..ir.core import Graph, Op, Value
from ..ir.errors import CompileError, UnsupportedError
from ..ir.hadamard import rotation
from ..ir.ops import math, nn, quant, shape
from ..ir.types import Dim, divide, product
from ..ir.weights import ArrayTensor
from ..passes.canonicalize.parameters import widen_parameters
from ..passes.derived import CastTensor
from ..plugins.entries import blaming

# Constructors are made by `@op`; for classes that inherit their operands a type checker does not see them.
m: Any = math

Supports = Callable[[Op], bool]
_LOWEST = (
    -3.4028234663852886e38
)  # float32's; exp() of it less any score is 0, and unlike -inf it makes no NaN


def legalize(
    graph: Graph,
    operations: Collection[str],
    supports: Supports = lambda op: True,
    target: str = "the target",
) -> Graph:
    """A copy of `graph` that holds only ops named in `operations` for which `supports` is true; `target` is
    what errors call who asks.

    Raises UnsupportedError, naming the op and the module that it was traced from, for an op that has no
    decomposition.
    """
    legal = graph.clone()
    widen_parameters(legal, last=True)  # of what passes made
    for _ in range(16):
        changed = False
        for op in legal:
            if op.opname not in operations or not supports(op):
                _decompose(legal, op, operations, target)
                changed = True
        if not changed:
            legal.drop_dead()
            return legal
    raise CompileError(
        "legalization does not end: two ops are decomposed into each other", remedy="report this model"
    )


def _decompose(graph: Graph, op: Op, operations: Collection[str], target: str) -> None:
    build = DECOMPOSITIONS.get(op.opname)
    if build is None:
        where = op.loc or "no known module"
        raise UnsupportedError(
            f"{target} cannot emit {op.opname} (from {where}), and it has no decomposition",
            remedy="choose another target, or add the op to codegen/legalize.py",
        )
    with blaming(f"the decomposition of {op.opname}", build):
        result = build(Builder(graph, op), op)
    if result.type != op.result.type:
        raise CompileError(
            f"decomposing {op.opname} gave {result.type} instead of {op.result.type}", remedy="report it"
        )
    graph.replace(op, [result])


class Builder:
    """Inserts ops in front of the one that is decomposed; short forms of the common ones."""

    def __init__(self, graph: Graph, op: Op) -> None:
        self.graph = graph
        self.before = op

    def __call__(self, op: Op) -> Value:
        op.loc = self.before.loc
        return self.graph.insert(op, self.before).result

    def scalar(self, value: float, like: Value) -> Value:
        return self(shape.Full(value, like.dtype))

    def add(self, a: Value, b: Value | float) -> Value:
        return self(m.Add(a, self._operand(b, a)))

    def sub(self, a: Value, b: Value) -> Value:
        return self(m.Sub(a, b))

    def mul(self, a: Value, b: Value | float) -> Value:
        return self(m.Mul(a, self._operand(b, a)))

    def div(self, a: Value, b: Value | float) -> Value:
        return self(m.Div(a, self._operand(b, a)))

    def _operand(self, b: Value | float, like: Value) -> Value:
        return b if isinstance(b, Value) else self.scalar(b, like)

    def cast(self, x: Value, dtype: str) -> Value:
        return x if x.dtype == dtype else self(m.Cast(x, dtype))

    def reshape(self, x: Value, *dims: Dim) -> Value:
        return x if x.shape == dims else self(shape.Reshape(x, dims))

    def expand(self, x: Value, *dims: Dim) -> Value:
        return x if x.shape == dims else self(shape.Expand(x, dims))

    def part(self, x: Value, start: Dim, stop: Dim, step: int = 1) -> Value:
        return self(shape.Slice(x, -1, start, stop, step))

    def swap(self, x: Value) -> Value:
        """The last two axes exchanged."""
        return self(shape.Transpose(x, (-1, -2)))


Decomposition = Callable[[Builder, Any], Value]
DECOMPOSITIONS: dict[str, Decomposition] = {}


def decomposes(name: str) -> Callable[[Decomposition], Decomposition]:
    """Register the decomposition of an op."""

    def register(build: Decomposition) -> Decomposition:
        if name in DECOMPOSITIONS:
            raise CompileError(
                f"{name} has two decompositions: in {DECOMPOSITIONS[name].__module__} and {build.__module__}",
                remedy="take one of them away",
            )
        DECOMPOSITIONS[name] = build
        return build

    return register


# -- elementwise
# -----------------------------------------------------------------------------------------------------


@decomposes("neg")
def _neg(b: Builder, op: Any) -> Value:
    return b.mul(op.x, -1.0 if op.x.dtype.startswith(("float", "bfloat")) else -1)


@decomposes("abs")
def _abs(b: Builder, op: Any) -> Value:
    return b(m.Maximum(op.x, b(m.Neg(op.x))))


@decomposes("reciprocal")
def _reciprocal(b: Builder, op: Any) -> Value:
    return b.div(b.scalar(1.0, op.x), op.x)


@decomposes("rsqrt")
def _rsqrt(b: Builder, op: Any) -> Value:
    return b.div(b.scalar(1.0, op.x), b(m.Sqrt(op.x)))


@decomposes("relu")
def _relu(b: Builder, op: Any) -> Value:
    return b(m.Maximum(op.x, b.scalar(0.0, op.x)))


@decomposes("sigmoid")
def _sigmoid(b: Builder, op: Any) -> Value:
    return b.div(b.scalar(1.0, op.x), b.add(b(m.Exp(b(m.Neg(op.x)))), 1.0))


@decomposes("silu")
def _silu(b: Builder, op: Any) -> Value:
    return b.mul(op.x, b(m.Sigmoid(op.x)))


@decomposes("gelu")
def _gelu(b: Builder, op: Any) -> Value:
    """x/2 · (1 + erf(x/√2)), or with tanh: x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))."""
    x = op.x
    if op.tanh:
        cubed = b.mul(b.mul(b.mul(x, x), x), 0.044715)
        inner = b(m.Tanh(b.mul(b.add(x, cubed), 0.7978845608028654)))
    else:
        inner = b(m.Erf(b.mul(x, 0.7071067811865476)))
    return b.mul(b.mul(x, 0.5), b.add(inner, 1.0))


@decomposes("softmax")
def _softmax(b: Builder, op: Any) -> Value:
    e = b(m.Exp(b.sub(op.x, b(m.ReduceMax(op.x, (op.axis,), True)))))
    return b.div(e, b(m.ReduceSum(e, (op.axis,), True)))


@decomposes("reduce_mean")
def _mean(b: Builder, op: Any) -> Value:
    count = product(op.x.shape[a] for a in op.axes)
    total = b(m.ReduceSum(op.x, op.axes, op.keepdim))
    if isinstance(count, int):
        return b.div(total, float(count))
    return b.div(total, b.cast(b(shape.DimValue(count)), op.x.dtype))


@decomposes("diff")
def _diff(b: Builder, op: Any) -> Value:
    joined = b(shape.Concat([op.prepend, op.x], -1))
    length = joined.shape[-1]
    return b.sub(b.part(joined, 1, length), b.part(joined, 0, length - 1))


# -- layers
# ----------------------------------------------------------------------------------------------------------


@decomposes("embedding")
def _embedding(b: Builder, op: Any) -> Value:
    return b(shape.Index(op.weight, [op.ids]))


@decomposes("gather_last")
def _gather_last(b: Builder, op: Any) -> Value:
    return b(shape.Index(op.x, [op.index]))


@decomposes("linear")
def _linear(b: Builder, op: Any) -> Value:
    y = b(m.MatMul(op.x, b.swap(b.cast(op.weight, op.x.dtype))))
    return y if op.bias is None else b.add(y, b.cast(op.bias, y.dtype))


@decomposes("rms_norm")
def _rms_norm(b: Builder, op: Any) -> Value:
    x = b.cast(op.x, "float32")
    mean = b(m.ReduceMean(b.mul(x, x), (-1,), True))
    y = b.mul(x, b(m.Rsqrt(b.add(mean, op.eps))))
    if op.weight is not None:
        y = b.mul(y, b.cast(op.weight, "float32"))
    return b.cast(y, op.x.dtype)


@decomposes("layer_norm")
def _layer_norm(b: Builder, op: Any) -> Value:
    x = b.cast(op.x, "float32")
    centred = b.sub(x, b(m.ReduceMean(x, (-1,), True)))
    variance = b(m.ReduceMean(b.mul(centred, centred), (-1,), True))
    y = b.mul(centred, b(m.Rsqrt(b.add(variance, op.eps))))
    if op.weight is not None:
        y = b.mul(y, b.cast(op.weight, "float32"))
    if op.bias is not None:
        y = b.add(y, b.cast(op.bias, "float32"))
    return b.cast(y, op.x.dtype)


@decomposes("rope")
def _rope(b: Builder, op: Any) -> Value:
    """The turned part times cos plus its half-turned self times sin; the rest passes."""
    x, r = op.x, op.rotary_dim
    turned = b.part(x, 0, r) if x.shape[-1] != r else x
    if op.interleaved:
        even, odd = (b.part(turned, i, r, 2) for i in (0, 1))
        pair = [b.reshape(v, *v.shape, 1) for v in (b(m.Neg(odd)), even)]
        half = b.reshape(b(shape.Concat(pair, -1)), *turned.shape)
    else:
        half = b(shape.Concat([b(m.Neg(b.part(turned, r // 2, r))), b.part(turned, 0, r // 2)], -1))
    cos, sin = (b.reshape(t, *t.shape[:-1], 1, t.shape[-1]) for t in (op.cos, op.sin))
    out = b.add(b.mul(b.cast(turned, cos.dtype), cos), b.mul(b.cast(half, sin.dtype), sin))
    out = b.cast(out, x.dtype)
    return out if x.shape[-1] == r else b(shape.Concat([out, b.part(x, r, x.shape[-1])], -1))


@decomposes("gated_mlp")
def _gated_mlp(b: Builder, op: Any) -> Value:
    width = op.gate_up.shape[-1]
    half = divide(width, 2)
    assert half is not None
    gate, up = b.part(op.gate_up, 0, half), b.part(op.gate_up, half, width)
    return b.mul(activated(b, op.activation, gate), up)


def activated(b: Builder, activation: str, x: Value) -> Value:
    match activation:
        case "gelu_tanh":
            return b(m.Gelu(x, True))
        case "gelu":
            return b(m.Gelu(x))
        case name:
            return b({"silu": m.Silu, "relu": m.Relu, "sigmoid": m.Sigmoid}[name](x))


# -- attention
# -------------------------------------------------------------------------------------------------------


def _repeat_heads(b: Builder, x: Value, heads: Dim) -> Value:
    """Key or value heads [..., Hkv, S, D] → [..., heads, S, D], each repeated for its query heads."""
    group = divide(heads, x.shape[-3])
    if group == 1 or group is None:
        return x
    lead, (kv_heads, s, d) = x.shape[:-3], x.shape[-3:]
    wide = b.expand(b.reshape(x, *lead, kv_heads, 1, s, d), *lead, kv_heads, group, s, d)
    return b.reshape(wide, *lead, heads, s, d)


def _visible(b: Builder, t: Dim, s: Dim, causal: bool, window: int | None) -> Value | None:
    """bool [T, S]: which keys a query sees; None where it sees all."""
    if not causal and window is None:
        return None
    rows = b.reshape(b(shape.Arange(t)), t, 1)
    distance = b.sub(rows, b.reshape(b(shape.Arange(s)), 1, s))
    seen = [b(m.GreaterEqual(distance, b.scalar(0, distance)))] if causal else []
    if window is not None:
        seen.append(b(m.Less(distance, b.scalar(window, distance))))
    if window is not None and not causal:
        seen.append(b(m.Greater(distance, b.scalar(-window, distance))))
    out = seen[0]
    for other in seen[1:]:
        out = b(m.LogicalAnd(out, other))
    return out


def _mask(b: Builder, scores: Value, visible: Value | None) -> Value:
    if visible is None:
        return scores
    # Both branches in the scores' shape: not every backend broadcasts a selection.
    return b(m.Where(b.expand(visible, *scores.shape), scores, b.scalar(_LOWEST, scores)))


@decomposes("sdpa")
def _sdpa(b: Builder, op: Any) -> Value:
    heads, t, s = op.q.shape[-3], op.q.shape[-2], op.k.shape[-2]
    k, v = (_repeat_heads(b, x, heads) if op.grouped else x for x in (op.k, op.v))
    scores = b.mul(b(m.MatMul(op.q, b.swap(k))), op.scale)
    scores = _mask(b, scores, _visible(b, t, s, op.causal, None))
    if op.mask is not None and op.mask.dtype == "bool":
        scores = _mask(b, scores, op.mask)
    elif op.mask is not None:
        scores = b.add(scores, b.cast(op.mask, scores.dtype))
    return b(m.MatMul(b(m.Softmax(scores)), v))


def _by_distance(b: Builder, distances: Value, t: Dim, s: Dim) -> Value:
    """[H, t, s] of distances [H, W]."""
    heads, width = distances.shape
    assert isinstance(heads, int) and isinstance(width, int)
    rows, columns = b.reshape(b(shape.Arange(t)), t, 1), b.reshape(b(shape.Arange(s)), 1, s)
    index = b.add(b(m.Sub(columns, rows)), b.scalar(width // 2, columns))
    index = b(m.Minimum(b(m.Maximum(index, b.scalar(0, index))), b.scalar(width - 1, index)))
    table = b(shape.Transpose(distances, (-1, -2)))
    return b(shape.Transpose(b(nn.Embedding(index, table)), (-1, -3, -2)))


@decomposes("attention")
def _attention(b: Builder, op: Any) -> Value:
    """Heads before tokens, scores, mask, softmax with the sinks as one more column, values, tokens before
    heads.
    """
    heads, t, s = op.q.shape[-2], op.q.shape[-3], op.k.shape[-3]
    turn = (-2, -3, -1)
    q, k, v = (b(shape.Transpose(b.cast(x, "float32"), turn)) for x in (op.q, op.k, op.v))
    k, v = _repeat_heads(b, k, heads), _repeat_heads(b, v, heads)
    scores = b.mul(b(m.MatMul(q, b.swap(k))), op.scale)
    if op.softcap is not None:
        scores = b.mul(b(m.Tanh(b.div(scores, op.softcap))), op.softcap)
    if op.slopes is not None:
        slopes = b.reshape(op.slopes, heads, 1, 1)
        # Keys' positions alone: softmax does not see what all scores of a query have in common.
        scores = b.add(scores, b.mul(slopes, b.reshape(b.cast(b(shape.Arange(s)), "float32"), 1, 1, s)))
    if op.distances is not None:
        scores = b.add(scores, _by_distance(b, op.distances, t, s))
    scores = _mask(b, scores, _visible(b, t, s, op.causal, op.window))
    if op.sinks is not None:
        column = b.reshape(b.cast(op.sinks, "float32"), heads, 1, 1)
        scores = b(shape.Concat([scores, b.expand(column, *scores.shape[:-1], 1)], -1))
    weights = b(m.Softmax(scores))
    if op.sinks is not None:
        weights = b.part(weights, 0, s)
    return b.cast(b(shape.Transpose(b(m.MatMul(weights, v)), turn)), op.q.dtype)


# -- quantized weights
# -----------------------------------------------------------------------------------------------


@decomposes("quantized_linear")
def _quantized_linear(b: Builder, op: Any) -> Value:
    weight = b(quant.Dequantize(op.q, op.scale, op.zero_point))
    return b(nn.Linear(op.x, b.cast(weight, op.x.dtype), op.bias))


@decomposes("hadamard")
def _hadamard(b: Builder, op: Any) -> Value:
    *lead, k = op.x.shape
    key = f"hadamard.{op.size}.{op.x.dtype}"
    matrix = b.graph.weights.get(key)
    if matrix is None:
        matrix = b.graph.add_weight(key, CastTensor(ArrayTensor(rotation(op.size), key), op.x.dtype))
    runs = b.reshape(op.x, *lead, k // op.size, op.size)
    return b.reshape(b(m.MatMul(runs, matrix)), *lead, k)


@decomposes("quantized_embedding")
def _quantized_embedding(b: Builder, op: Any) -> Value:
    parts = [op.q, op.scale, op.zero_point]
    rows = [None if part is None else b(shape.Index(part, [op.ids])) for part in parts]
    return dequantized(b, quant.quantization(op.q.type, op.opname), rows[0], rows[1], rows[2])


@decomposes("dequantize")
def _dequantize(b: Builder, op: Any) -> Value:
    return dequantized(b, quant.quantization(op.q.type, op.opname), op.q, op.scale, op.zero_point)


def dequantized(
    b: Builder, quantization: Any, q: Value | None, scale: Value | None, zero: Value | None
) -> Value:
    """The table of `types.Quantization` in tensor ops."""
    assert q is not None and scale is not None
    k, groups = q.shape[-1], scale.shape[-1]

    def spread(x: Value) -> Value:
        """[..., G] → [..., K]: each entry for its group; the last group may be short."""
        x = b.cast(x, "float32")
        size = quantization.group_size
        wide = b.expand(b.reshape(x, *x.shape, 1), *x.shape, size)
        flat = b.reshape(wide, *x.shape[:-1], groups * size)
        return flat if flat.shape[-1] == k else b.part(flat, 0, k)

    if quantization.codebook is not None:
        return b.mul(b(shape.Index(_table(b, quantization.codebook), [q])), spread(scale))
    real = b.cast(q, "float32")
    if quant.is_minimum(zero.type if zero is not None else None):
        assert zero is not None
        return b.add(b.mul(real, spread(scale)), spread(zero))
    offset = b.scalar(float(1 << (quantization.bits - 1)), real) if zero is None else spread(zero)
    return b.mul(b.sub(real, offset), spread(scale))


def _table(b: Builder, name: str) -> Value:
    """A codebook as a weight of the graph, one for all that use it."""
    key = f"codebook.{name}"
    return b.graph.weights.get(key) or b.graph.add_weight(key, ArrayTensor(codebook(name), key))


from . import legalize_moe as _moe  # noqa: E402, F401  # pyright: ignore[reportUnusedImport]  (registers)
