"""Operations on quantized weights.

q is uint8 [N, K], one value a byte; its type's `quant` says how to read it (`types.Quantization`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..codebooks import CODEBOOKS, codebook
from ..core import Op
from ..define import Operand, OptionalOperand, op
from ..errors import VerifyError
from ..hadamard import reflections, rotation
from ..types import Quantization, TensorType
from .nn import linear

Dims = Mapping[str, int]
SCALE_DTYPES = ("float16", "float32")


def quantization(type: TensorType, name: str) -> Quantization:
    if type.quant is None:
        raise VerifyError(
            f"{name}: the weight's type {type} carries no quantization", remedy="make it with a Quantization"
        )
    return type.quant


def check_parts(opname: str, q: TensorType, scale: TensorType, zero_point: TensorType | None) -> None:
    """Shapes, dtypes and presence of scale [N, ceil(K / group)] and zero point against q [N, K]."""
    quant = quantization(q, opname)
    _check_form(opname, q, quant)
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
    if scale.dtype != quant.scale_dtype or scale.dtype not in SCALE_DTYPES:
        raise VerifyError(
            f"{opname}: scale {scale} of q {q}",
            remedy=f"scales are {' or '.join(SCALE_DTYPES)}, as the quantization says",
        )
    if zero_point is not None and zero_point.dtype not in ("uint8", *SCALE_DTYPES):
        raise VerifyError(
            f"{opname}: zero point {zero_point}",
            remedy=f"uint8, or {' or '.join(SCALE_DTYPES)} for a minimum",
        )


def _check_form(opname: str, q: TensorType, quant: Quantization) -> None:
    if q.dtype != "uint8" or not 2 <= quant.bits <= 8 or quant.group_size < 1:
        raise VerifyError(
            f"{opname}: q {q}", remedy="codes are uint8 of 2 to 8 bits, in groups of 1 and more"
        )
    if quant.super_group and (quant.scale_dtype != "float32" or quant.super_group % quant.group_size):
        raise VerifyError(
            f"{opname}: q {q}", remedy="float32 scales of whole groups can have two levels (super_group)"
        )
    if quant.codebook is None:
        return
    if quant.codebook not in CODEBOOKS or quant.bits != 4 or not quant.symmetric:
        raise VerifyError(
            f"{opname}: q {q}",
            remedy=f"a codebook ({', '.join(sorted(CODEBOOKS))}) has 4 bits and no zero point",
        )


def is_minimum(zero_point: TensorType | None) -> bool:
    """Whether a zero point is added after scaling (GGML's minimum), rather than subtracted before it."""
    return zero_point is not None and zero_point.dtype != "uint8"


def dequantized(quant: Quantization, q: Any, scale: Any, zero_point: Any) -> Any:
    """float32 [N, K] by `Quantization`'s table; rows of q, scale and zero_point (torch) correspond."""
    import torch

    k = q.shape[-1]

    def spread(groups: Any) -> Any:
        return groups.float().repeat_interleave(quant.group_size, -1)[..., :k]

    if quant.codebook is not None:
        return torch.from_numpy(codebook(quant.codebook)).to(q.device)[q.long()] * spread(scale)
    if zero_point is None:
        return (q.float() - float(1 << (quant.bits - 1))) * spread(scale)
    if zero_point.dtype == torch.uint8:
        return (q.float() - spread(zero_point)) * spread(scale)
    return q.float() * spread(scale) + spread(zero_point)


@op("dequantize")
class Dequantize(Op):
    """q [N, K], scale [N, G], zero_point [N, G] → float32 [N, K], by the table of `types.Quantization`."""

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
        x, q, scale, zero_point, bias = args
        weight = dequantized(quantization(self.q.type, self.opname), q, scale, zero_point)
        return linear(x, weight, bias)


@op("hadamard")
class Hadamard(Op):
    """x [..., K], each run of `size` columns times `rotation(size)` (`hadamard.py`) → [..., K].

    `size` divides K and is a power of two, times factors of 3, 5 and 7. Rotated twice, x is what it was.
    """

    x: Operand
    size: int

    def infer(self) -> list[TensorType]:
        return [self.x.type]

    def verify(self) -> None:
        k = self.x.shape[-1] if self.x.type.rank else 1
        if reflections(self.size) is None or not isinstance(k, int) or k % self.size:
            raise VerifyError(
                f"hadamard: {self.x.type} in runs of {self.size}",
                remedy="give a size without other factors than 2, 3, 5 and 7 that divides the last axis",
            )

    def reference(self, dims: Dims, *args: Any) -> Any:
        import torch

        (x,) = args
        matrix = torch.from_numpy(rotation(self.size).copy()).to(x.device, x.dtype)
        return (x.reshape(*x.shape[:-1], -1, self.size) @ matrix).reshape(x.shape)


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
