"""Mixtures of experts in tensor ops, for targets that have no kernels for them (see `legalize.py`)."""

from __future__ import annotations

from typing import Any

from ..ir.core import Value
from ..ir.ops import math, quant, shape
from ..ir.ops.moe import Gate
from ..ir.types import Dim, divide, product
from .legalize import Builder, activated, decomposes, dequantized

m: Any = math  # as in `legalize.py`


@decomposes("moe")
def _moe(b: Builder, op: Any) -> Value:
    return _experts(b, op, op.gate_up, op.down)


@decomposes("quantized_moe")
def _quantized_moe(b: Builder, op: Any) -> Value:
    parts = ((op.up_q, op.up_scale, op.up_zero_point), (op.down_q, op.down_scale, op.down_zero_point))
    up, down = (
        dequantized(b, quant.quantization(q.type, op.opname), q, scale, zero) for q, scale, zero in parts
    )
    return _experts(b, op, up, down)


def _experts(b: Builder, op: Any, up: Value, down: Value) -> Value:
    """Every expert for every token, [E, T, …], and of the results those that were chosen: right everywhere,
    and E / k times the work. What was not chosen is left out by a selection, since it may be infinite.
    """
    e, wide, d = up.shape
    rows, k = product(op.x.shape[:-1]), op.indices.shape[-1]
    x = b.reshape(b.cast(op.x, "float32"), 1, rows, d)
    products = b(m.MatMul(x, b.swap(b.cast(up, "float32"))))
    if op.up_bias is not None:
        products = b.add(products, b.reshape(b.cast(op.up_bias, "float32"), e, 1, wide))
    y = b(m.MatMul(_gated(b, op.gate, products, wide), b.swap(b.cast(down, "float32"))))
    if op.down_bias is not None:
        y = b.add(y, b.reshape(b.cast(op.down_bias, "float32"), e, 1, d))

    places = b.reshape(b.cast(op.indices, "int64"), 1, rows, k)
    weights = b.reshape(b.cast(op.weights, "float32"), 1, rows, k)
    chosen = b(m.Equal(places, b.reshape(b(shape.Arange(e)), e, 1, 1)))
    shares = b(m.Where(chosen, b.expand(weights, e, rows, k), b.scalar(0.0, weights)))
    share = b(m.ReduceSum(shares, (-1,), True))
    hit = b(m.NotEqual(share, b.scalar(0.0, share)))
    kept = b(m.Where(b.expand(hit, e, rows, d), b.mul(y, share), b.scalar(0.0, y)))
    return b.cast(b.reshape(b(m.ReduceSum(kept, (-3,), False)), *op.result.shape), op.x.dtype)


def _gated(b: Builder, form: Gate, products: Value, wide: Dim) -> Value:
    """`ir.ops.moe.Gate` of products [..., wide]."""
    if not form.gated:
        return _active(b, form, products)
    half = divide(wide, 2)
    assert half is not None
    gate, up = b.part(products, 0, half), b.part(products, half, wide)
    if form.limit:
        if not form.limits_active:
            gate = b(m.Minimum(gate, b.scalar(form.limit, gate)))
        up = b(m.Minimum(up, b.scalar(form.limit, up)))
        up = b(m.Maximum(up, b.scalar(-form.limit, up)))
    active = _active(b, form, gate)
    if form.limit and form.limits_active:
        active = b(m.Minimum(active, b.scalar(form.limit, active)))
    return b.mul(active, b.add(up, form.offset) if form.offset else up)


def _active(b: Builder, form: Gate, x: Value) -> Value:
    if form.activation == "swish":
        return b.mul(x, b(m.Sigmoid(b.mul(x, form.alpha))))
    if form.activation == "relu2":
        positive = activated(b, "relu", x)
        return b.mul(positive, positive)
    return activated(b, form.activation, x)
