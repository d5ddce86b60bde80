"""Quantized weights: MatMulNBits, and rows of the same packed table for embeddings.

The IR's q [N, K] holds one value a byte, with one scale and zero point a group. MatMulNBits
(https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits) takes
B uint8 [N, blocks, block_size · bits / 8] with the first value in the low bits, scales [N, blocks], and zero
points packed in the same way along blocks; bits 4 or 8, block_size a power of two from 16 to 256, K padded to
whole blocks.

    group 64             → block 64
    group 576 (whole K)  → block 64, each scale 9 times: the same numbers
    group 24             → no block fits: dequantized in the graph
    a minimum            → the product with zero points of 0, plus Σ_g minimum[n, g] · Σ_{k in g} x[k]
    a codebook           → looked up in the graph

The kernel takes float zero points too, but -minimum / scale is rounded, and is none where the scale is 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...ir.codebooks import codebook
from ...ir.core import Value
from ...ir.ops import quant as ir
from ...ir.ops.quant import quantization
from ...ir.types import Quantization, TensorType
from .builder import CONTRIB
from .context import Context, emits

_BLOCKS = (256, 128, 64, 32, 16)


@dataclass(frozen=True)
class Layout:
    """How a weight [N, K] lies in blocks. A group covers `repeat` blocks, or all of them."""

    k: int
    bits: int  # 4 or 8: what the kernel takes; narrower values are stored in it
    block: int
    repeat: int
    zero_point: (
        int | None
    )  # symmetric weights and minima: their common zero point, None where the kernel's default is it
    packed_zero_points: bool

    @property
    def blocks(self) -> int:
        return -(-self.k // self.block)

    def pack(self, q: np.ndarray) -> np.ndarray:
        """Rows uint8 [n, K] → uint8 [n, blocks, block · bits / 8]; the padding of the last block is 0."""
        padded = np.zeros((len(q), self.blocks * self.block), np.uint8)
        padded[:, : self.k] = q
        return pack_values(padded, self.bits).reshape(len(q), self.blocks, -1)

    def spread(self, per_group: np.ndarray) -> np.ndarray:
        """Rows [n, G] → [n, blocks]."""
        return np.repeat(per_group, self.repeat, axis=1)[:, : self.blocks]

    def pack_zero_points(self, per_group: np.ndarray) -> np.ndarray:
        """Rows uint8 [n, G] → uint8 [n, ceil(blocks · bits / 8)]."""
        return pack_values(self.spread(per_group), self.bits)


def pack_values(values: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [n, m] → two values a byte for 4 bits (the first in the low half, an odd m padded), else
    unchanged.
    """
    if bits == 8:
        return values
    if values.shape[1] % 2:
        values = np.pad(values, ((0, 0), (0, 1)))
    return values[:, ::2] | (values[:, 1::2] << 4)


def layout_of(quant: Quantization, k: int, minimum: bool = False) -> Layout | None:
    """The blocks for a quantized weight, None where its groups are no whole number of blocks or its codes no
    grid.
    """
    if quant.codebook is not None:
        return None
    bits = 4 if quant.bits <= 4 else 8
    whole = quant.group_size >= k
    # The largest block is the fastest; one that divides K wastes nothing.
    fitting = [b for b in _BLOCKS if (k if whole else quant.group_size) % b == 0] or ([32] if whole else [])
    if quant.bits > 8 or not fitting:
        return None
    block = fitting[0]
    repeat = -(-k // block) if whole else quant.group_size // block
    common = 0 if minimum else 1 << (quant.bits - 1)
    explicit = minimum or (quant.symmetric and quant.bits != bits)
    return Layout(k, bits, block, repeat, common if explicit else None, explicit or not quant.symmetric)


@dataclass(frozen=True)
class Packed:
    """Names of the packed parts of one weight."""

    layout: Layout
    q: str
    scale: str
    zero_point: str | None
    minimum: bool
    """Whether the weight's zero point is a minimum, which is apart from this."""


def packed(c: Context, q: Value, scale: Value, zero_point: Value | None, name: str) -> Packed | None:
    """Put the packed form of a weight into the weight file (once), None where the kernel cannot take it."""
    n, k = q.shape
    assert isinstance(n, int) and isinstance(k, int)
    minimum = zero_point is not None and ir.is_minimum(zero_point.type)
    layout = layout_of(quantization(q.type, name), k, minimum)
    parts = [v for v in (q, scale, zero_point) if v is not None]
    if layout is None or not all(v.is_weight for v in parts):
        return None
    width = layout.block * layout.bits // 8
    tag = f"{layout.bits}x{layout.block}"
    cost = 4 * k  # codes, scales and zero points may all be computed from the same float32 row
    table = c.weights.add(q, tag, (n, layout.blocks, width), "uint8", layout.pack, cost)
    scales = c.weights.add(
        scale, tag, (n, layout.blocks), "float32", lambda s: layout.spread(s).astype(np.float32), cost
    )
    zeros = None
    if layout.packed_zero_points:
        shape = (n, -(-layout.blocks * layout.bits // 8))
        if zero_point is not None and not minimum:
            zeros = c.weights.add(zero_point, tag, shape, "uint8", layout.pack_zero_points, cost)
        else:
            common = layout.zero_point
            zeros = c.weights.add(
                scale, f"{tag}:zero_point", shape, "uint8",
                lambda s: layout.pack_zero_points(np.full(s.shape, common, np.uint8)), cost,
            )  # fmt: skip
    return Packed(layout, table, scales, zeros, minimum)


@emits("quantized_linear")
def quantized_linear(c: Context, op: ir.QuantizedLinear) -> str:
    s, x, bias = c.scope, c.name(op.x), c.optional(op.bias)
    parts = packed(c, op.q, op.scale, op.zero_point, op.opname)
    if parts is None:
        weight = _dequantized(c, op.q, op.scale, op.zero_point)
        y = s.op("MatMul", x, s.transpose(weight, 1, 0))
    else:
        c.needs_packing = True
        n = op.q.shape[0]
        layout = parts.layout
        y = s.op(
            "MatMulNBits", x, parts.q, parts.scale, *([parts.zero_point] if parts.zero_point else []),
            domain=CONTRIB, K=layout.k, N=n, bits=layout.bits, block_size=layout.block,
            accuracy_level=c.accuracy_level,
        )  # fmt: skip
        if parts.minimum:
            y = s.op("Add", y, _minima(c, op))
    return s.op("Add", y, bias) if bias else y


def _minima(c: Context, op: ir.QuantizedLinear) -> str:
    """Σ_g minimum[n, g] · Σ_{k in g} x[..., k] → [..., N]."""
    s, x = c.scope, c.name(op.x)
    k, groups = op.q.shape[-1], op.scale.shape[-1]
    assert op.zero_point is not None and isinstance(k, int) and isinstance(groups, int)
    size = min(quantization(op.q.type, op.opname).group_size, k)
    if groups * size != k:
        pads = [0] * (2 * op.x.type.rank - 1) + [groups * size - k]
        x = s.op("Pad", x, s.i64(*pads))
    lead = s.op("Shape", c.name(op.x), start=0, end=-1)
    grouped = s.op("Reshape", x, s.op("Concat", lead, s.i64(groups, size), axis=0))
    sums = s.op("ReduceSum", grouped, s.i64(-1), keepdims=0)
    return s.op("MatMul", sums, s.transpose(s.cast(c.name(op.zero_point), "float32"), 1, 0))


def _dequantized(c: Context, q: Value, scale: Value, zero_point: Value | None) -> str:
    """float32 [N, K] from unpacked parts, in graph ops."""
    minimum = zero_point is not None and ir.is_minimum(zero_point.type)
    return _real(c, q.type, c.name(q), c.name(scale), c.optional(zero_point), minimum)


def _real(c: Context, type_: TensorType, q: str, scale: str, zero_point: str | None, minimum: bool) -> str:
    """float32 [..., K] of codes [..., K] of type `type_` [N, K], scales and zero points [..., G], by the
    table of `types.Quantization`.
    """
    s, quant = c.scope, quantization(type_, "dequantize")
    if quant.codebook is not None:
        values = s.op("Gather", s.constant(codebook(quant.codebook), "float32"), s.cast(q, "int32"), axis=0)
        return s.op("Mul", values, _spread(c, type_, scale))
    values = s.cast(q, "float32")
    if zero_point is None:
        offset = s.scalar(float(1 << (quant.bits - 1)), "float32")
    elif minimum:
        return s.op("Add", s.op("Mul", values, _spread(c, type_, scale)), _spread(c, type_, zero_point))
    else:
        offset = _spread(c, type_, zero_point)
    return s.op("Mul", s.op("Sub", values, offset), _spread(c, type_, scale))


def _spread(c: Context, type_: TensorType, groups: str) -> str:
    """Per group [..., G] → float32 [..., K] for codes of type `type_`."""
    quant, k = quantization(type_, "dequantize"), type_.shape[-1]
    assert isinstance(k, int)
    group_of = c.scope.constant(np.arange(k) // quant.group_size, "int64")
    return c.scope.op("Gather", c.scope.cast(groups, "float32"), group_of, axis=-1)


@emits("dequantize")
def dequantize(c: Context, op: ir.Dequantize) -> str:
    return _dequantized(c, op.q, op.scale, op.zero_point)


def _unpack(c: Context, x: str, bits: int, width: int) -> str:
    """uint8 [..., m] → float32 [..., width], width = m · 8 / bits."""
    s = c.scope
    if bits == 8:
        return s.cast(x, "float32")
    low = s.op("BitwiseAnd", x, s.scalar(15, "uint8"))
    high = s.op("BitShift", x, s.scalar(4, "uint8"), direction="RIGHT")
    pairs = s.op("Concat", s.unsqueeze(low, -1), s.unsqueeze(high, -1), axis=-1)
    lead = s.op("Shape", x, start=0, end=-1)
    return s.cast(s.op("Reshape", pairs, s.op("Concat", lead, s.i64(width), axis=0)), "float32")


@emits("quantized_embedding")
def quantized_embedding(c: Context, op: ir.QuantizedEmbedding) -> str:
    """Gather the packed rows, then unpack: a table tied to the output matrix is held once, in its packed
    form.

    GatherBlockQuantized does the same in one node, but wants another shape of the same bytes, and onnxruntime
    would fold the reshape of the table into a copy of it.
    """
    s, ids = c.scope, c.name(op.ids)
    parts = packed(c, op.q, op.scale, op.zero_point, op.opname)
    if parts is None:
        q, scale = (s.op("Gather", c.name(v), ids, axis=0) for v in (op.q, op.scale))
        zero = None if op.zero_point is None else s.op("Gather", c.name(op.zero_point), ids, axis=0)
        minimum = op.zero_point is not None and ir.is_minimum(op.zero_point.type)
        return _real(c, op.q.type, q, scale, zero, minimum)
    layout = parts.layout
    values = _unpack(c, s.op("Gather", parts.q, ids, axis=0), layout.bits, layout.block)
    scales = s.unsqueeze(s.op("Gather", parts.scale, ids, axis=0), -1)
    if not parts.minimum:
        values = s.op("Sub", values, _offset(c, parts, ids))
    real = s.op("Mul", values, scales)
    flat = s.op(
        "Reshape", real, s.op("Concat", s.op("Shape", ids), s.i64(layout.blocks * layout.block), axis=0)
    )
    if layout.blocks * layout.block != layout.k:
        flat = s.slice(flat, -1, 0, layout.k)
    if not parts.minimum:
        return flat
    assert op.zero_point is not None
    minima = s.op("Gather", c.name(op.zero_point), ids, axis=0)
    return s.op("Add", flat, _spread(c, op.q.type, minima))


def _offset(c: Context, parts: Packed, ids: str) -> str:
    """The zero points of some rows, float32 [..., blocks, 1] or a scalar."""
    s, layout = c.scope, parts.layout
    if parts.zero_point is None:
        return s.scalar(float(1 << (layout.bits - 1)), "float32")
    width = layout.blocks + layout.blocks % 2 * (layout.bits == 4)
    zeros = _unpack(c, s.op("Gather", parts.zero_point, ids, axis=0), layout.bits, width)
    return s.unsqueeze(s.slice(zeros, -1, 0, layout.blocks), -1)
