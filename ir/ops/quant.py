"""Operations on quantized weights.

q is uint8 [N, K], one value a byte; its type's `quant` says how to read it (`types.Quantization`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..core import Op
from ..define import Operand, OptionalOperand, op
from ..errors import VerifyError
from ..types import Quantization, TensorType

Dims = Mapping[str, int]


def quantization(type: TensorType, name: str) -> Quantization:
    if type.quant is None:
        raise VerifyError(
            f"{name}: the weight's type {type} carries no quantization", remedy="make it with a Quantization"
        )
    return type.quant


def check_parts(opname: str, q: TensorType, scale: TensorType, zero_point: TensorType | None) -> None:
    """Shapes and presence of scale [N, ceil(K / group)] and zero point against q [N, K]."""
    quant = quantization(q, opname)
    k = q.shape[-1]
    assert isinstance(k, int)
    groups = -(-k // quant.group_size)
    if (
        scale.shape != (*q.shape[:-1], groups)
        or (zero_point is None) != quant.symmetric
        or (zero_point is not None and zero_point.shape != scale.shape)
    ):
        raise VerifyError(
            f"{opname}: q {q}, scale {scale}, zero point {zero_point}",
            remedy=f"{groups} groups a row are expected",
        )


def dequantized(quant: Quantization, q: Any, scale: Any, zero_point: Any) -> Any:
    """float32 [N, K]; rows of q, scale and zero_point correspond."""
    k = q.shape[-1]
    offset = (
        float(1 << (quant.bits - 1))
        if zero_point is None
        else zero_point.float().repeat_interleave(quant.group_size, -1)[..., :k]
    )
    return (q.float() - offset) * scale.float().repeat_interleave(quant.group_size, -1)[..., :k]


@op("dequantize")
class Dequantize(Op):
    """q [N, K], scale [N, G], zero_point [N, G] → float32 [N, K]."""

    q: Operand
    scale: Operand
    zero_point: OptionalOperand

    def infer(self) -> list[TensorType]:
        return [TensorType("float32", self.q.shape)]

    def verify(self) -> None:
        check_parts(
            self.opname,
            self.q.type,
            self.scale.type,
            self.zero_point.type if self.zero_point is not None else None,
        )

    def reference(self, dims: Dims, *args: Any) -> Any:
        return dequantized(quantization(self.q.type, self.opname), *args)


@op("quantized_linear")
class QuantizedLinear(Op):
    """`linear` by a quantized weight: x [..., K] → [..., N].

    The meaning here takes x in float; a target may quantize x per token to int8.
    """

    x: Operand
    q: Operand
    scale: Operand
    zero_point: OptionalOperand
    bias: OptionalOperand

    def infer(self) -> list[TensorType]:
        return [TensorType(self.x.dtype, (*self.x.shape[:-1], self.q.shape[0]))]

    def verify(self) -> None:
        check_parts(
            self.opname,
            self.q.type,
            self.scale.type,
            self.zero_point.type if self.zero_point is not None else None,
        )
        if self.x.shape[-1] != self.q.shape[-1]:
            raise VerifyError(f"quantized_linear: {self.x.type} by {self.q.type}", remedy="K must agree")

    def reference(self, dims: Dims, *args: Any) -> Any:
        import torch

        x, q, scale, zero_point, bias = args
        weight = dequantized(quantization(self.q.type, self.opname), q, scale, zero_point)
        return torch.nn.functional.linear(x, weight.to(x.dtype), bias)


@op("quantized_embedding")
class QuantizedEmbedding(Op):
    """`embedding` from a quantized table: ids [...] → float32 [..., D]."""

    ids: Operand
    q: Operand
    scale: Operand
    zero_point: OptionalOperand

    def infer(self) -> list[TensorType]:
        return [TensorType("float32", (*self.ids.shape, self.q.shape[-1]))]

    def verify(self) -> None:
        check_parts(
            self.opname,
            self.q.type,
            self.scale.type,
            self.zero_point.type if self.zero_point is not None else None,
        )

    def reference(self, dims: Dims, *args: Any) -> Any:
        ids, q, scale, zero_point = args
        rows = ids.long()
        return dequantized(
            quantization(self.q.type, self.opname),
            q[rows],
            scale[rows],
            None if zero_point is None else zero_point[rows],
        )
