"""Layers: embedding, linear, norms, rotary embedding, gated MLP."""

from __future__ import annotations

import numpy as np

from ...ir.core import Value
from ...ir.ops import cache as ir_cache
from ...ir.ops import math as ir_math
from ...ir.ops import nn as ir
from ...ir.ops import shape as ir_shape
from .builder import CONTRIB
from .context import Context, emits
from .ops_math import activate


@emits("embedding")
def embedding(c: Context, op: ir.Embedding) -> str:
    return c.scope.op("Gather", c.name(op.weight), c.name(op.ids), axis=0)


@emits("gather_last")
def gather_last(c: Context, op: ir_cache.GatherLast) -> str:
    return c.scope.op("Gather", c.name(op.x), c.name(op.index), axis=0)


def matrix(c: Context, weight: Value) -> str:
    """A [N, K] matrix in float32, as it lies in the weight file."""
    return c.weights.as_float32(weight) if weight.is_weight else c.name(weight)


@emits("linear")
def linear(c: Context, op: ir.Linear) -> str:
    """The weight stays [N, K] as checkpoints have it, so that a tied embedding gathers from the same memory.

    Gemm takes only rank 2; FusedMatMul (onnxruntime's MatMul that transposes) takes the rest.
    """
    x, weight, bias = c.name(op.x), matrix(c, op.weight), c.optional(op.bias)
    if op.x.type.rank == 2:
        return (
            c.scope.op("Gemm", x, weight, bias, transB=1) if bias else c.scope.op("Gemm", x, weight, transB=1)
        )
    y = c.scope.op("FusedMatMul", x, weight, domain=CONTRIB, transB=1)
    return c.scope.op("Add", y, bias) if bias else y


def _ones(c: Context, width: int) -> str:
    return c.scope.constant(np.ones(width, np.float32), "float32")


@emits("rms_norm")
def rms_norm(c: Context, op: ir.RmsNorm) -> str:
    """In the shape that onnxruntime fuses into one SimplifiedLayerNormalization, which is no standard
    operator.
    """
    s, x = c.scope, c.name(op.x)
    width = op.x.shape[-1]
    weight = c.optional(op.weight)
    if weight is None and isinstance(width, int):
        weight = _ones(c, width)
    square = s.op("Pow", x, s.scalar(2.0, "float32"))
    mean = s.op("ReduceMean", square, s.i64(-1), keepdims=1)
    root = s.op("Sqrt", s.op("Add", mean, s.scalar(op.eps, "float32")))
    y = s.op("Div", x, root)
    return s.op("Mul", y, weight) if weight else y


@emits("layer_norm")
def layer_norm(c: Context, op: ir.LayerNorm) -> str:
    width = op.x.shape[-1]
    assert isinstance(width, int)
    weight = c.optional(op.weight) or _ones(c, width)
    return c.scope.op(
        "LayerNormalization", c.name(op.x), weight, c.optional(op.bias), axis=-1, epsilon=op.eps
    )


def _repeated(table: Value) -> bool:
    """Whether the two halves of a table [T, R] are equal by construction: cos or sin of concat(angle, angle),
    scaled or not.
    """
    op = table.producer
    if isinstance(op, ir_shape.Concat):
        return op.axis == -1 and len(op.xs) == 2 and op.xs[0] is op.xs[1]
    if isinstance(op, ir_math.Cos | ir_math.Sin | ir_math.Cast):
        return _repeated(op.operands[0])
    if isinstance(op, ir_math.Mul):
        return any(_repeated(a) and b.type.rank == 0 for a, b in ((op.a, op.b), (op.b, op.a)))
    return False


@emits("rope")
def rope(c: Context, op: ir.Rope) -> str:
    """One node where onnxruntime's RotaryEmbedding says the same, which takes one half of each table."""
    s, x, r = c.scope, c.name(op.x), op.rotary_dim
    heads, width = op.x.shape[-2:]
    assert isinstance(width, int)
    plain = not op.interleaved and op.x.type.rank == 3 and op.cos.type.rank == 2
    if plain and isinstance(heads, int) and _repeated(op.cos) and _repeated(op.sin):
        halves = [s.slice(c.name(table), -1, 0, r // 2) for table in (op.cos, op.sin)]
        flat = s.reshape(x, 1, -1, heads * width)
        partial = {"num_heads": heads, "rotary_embedding_dim": r} if r != width else {}
        turned = s.op("RotaryEmbedding", flat, s.i64(0), *halves, domain=CONTRIB, **partial)
        return s.reshape(turned, -1, heads, width)
    cos, sin = (s.unsqueeze(c.name(table), -2) for table in (op.cos, op.sin))
    turned = x if r == width else s.slice(x, -1, 0, r)
    if op.interleaved:
        odd, even = (s.slice(turned, -1, start, r, 2) for start in (1, 0))
        pairs = [s.unsqueeze(v, -1) for v in (s.op("Neg", odd), even)]
        half = c.dims.reshape(s.op("Concat", *pairs, axis=-1), (), (*op.x.shape[:-1], r))
    else:
        low, high = s.many("Split", [turned], 2, axis=-1, num_outputs=2)
        half = s.op("Concat", s.op("Neg", high), low, axis=-1)
    out = s.op("Add", s.op("Mul", turned, cos), s.op("Mul", half, sin))
    return out if r == width else s.op("Concat", out, s.slice(x, -1, r, width), axis=-1)


@emits("gated_mlp")
def gated_mlp(c: Context, op: ir.GatedMlp) -> str:
    gate, up = c.scope.many("Split", [c.name(op.gate_up)], 2, axis=-1, num_outputs=2)
    return c.scope.op("Mul", activate(c, op.activation, gate), up)
