"""Layers of language models, made by fusion (and `linear`, `embedding`, `layer_norm` by tracing)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..core import Op
from ..define import Operand, OptionalOperand, op
from ..errors import CompileError, VerifyError
from ..types import TensorType, divide

Dims = Mapping[str, int]

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "sigmoid")


def _functional() -> Any:
    import torch

    return torch.nn.functional


def linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """x [..., K] · weight [N, K]ᵀ + bias [N] in torch, in the dtype of x.

    Calibration is made of this product: in float32 it goes through oneDNN, which was faster than the MKL that
    torch would take on an AMD processor (benchmarks/README.md). Gradients need torch's own.
    """
    import torch

    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    fast = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    graded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    plain = x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() > 0
    if fast is not None and torch.backends.mkldnn.is_available() and plain and not graded:
        return fast(x.contiguous(), weight.contiguous(), bias, "none", [], "")
    return torch.nn.functional.linear(x, weight, bias)


def activate(name: str, x: Any) -> Any:
    """The activation function `name` of `ACTIVATIONS` in torch."""
    f = _functional()
    match name:
        case "gelu_tanh":
            return f.gelu(x, approximate="tanh")
        case "silu" | "gelu" | "relu" | "sigmoid":
            return getattr(f, name)(x)
        case _:
            raise VerifyError(f"no activation is named {name}", remedy=f"one of {', '.join(ACTIVATIONS)}")


@op("embedding")
class Embedding(Op):
    """Rows of `weight` [V, D] by `ids` [...] → [..., D]."""

    ids: Operand
    weight: Operand

    def infer(self) -> list[TensorType]:
        return [TensorType(self.weight.dtype, (*self.ids.shape, self.weight.shape[-1]))]

    def reference(self, dims: Dims, *args: Any) -> Any:
        return args[1][args[0].long()]


@op("linear")
class Linear(Op):
    """x [..., K] · weight [N, K]ᵀ + bias [N] → [..., N]."""

    x: Operand
    weight: Operand
    bias: OptionalOperand = None

    def infer(self) -> list[TensorType]:
        if self.weight.type.rank != 2 or self.x.shape[-1] != self.weight.shape[1]:
            raise CompileError(
                f"linear: {self.x.type} by weight {self.weight.name} {self.weight.type} ({self.loc})",
                remedy="K must agree",
            )
        return [TensorType(self.x.dtype, (*self.x.shape[:-1], self.weight.shape[0]))]

    def reference(self, dims: Dims, *args: Any) -> Any:
        x, weight, bias = args
        return linear(x, weight, bias)


@op("rms_norm")
class RmsNorm(Op):
    """x / sqrt(mean(x²) + eps) · weight over the last axis (Zhang & Sennrich 2019).

    "weight + 1" (Gemma) is folded into the weight by canonicalisation. Computed in float32.
    """

    x: Operand
    weight: OptionalOperand
    eps: float

    def infer(self) -> list[TensorType]:
        return [self.x.type]

    def reference(self, dims: Dims, *args: Any) -> Any:
        x = args[0].float()
        y = x * (x.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt()
        return (y if args[1] is None else y * args[1].float()).to(args[0].dtype)


@op("layer_norm")
class LayerNorm(Op):
    """(x - mean) / sqrt(var + eps) · weight + bias over the last axis (Ba et al. 2016)."""

    x: Operand
    weight: OptionalOperand
    bias: OptionalOperand
    eps: float

    def infer(self) -> list[TensorType]:
        return [self.x.type]

    def reference(self, dims: Dims, *args: Any) -> Any:
        return _functional().layer_norm(args[0], args[0].shape[-1:], args[1], args[2], self.eps)


@op("rope")
class Rope(Op):
    """Rotary position embedding (Su et al. 2021) of x [..., T, H, D] by cos and sin [..., T, R], R ≤ D even.

    The first R of each head's D elements turn, the rest passes. `interleaved` pairs elements (2i, 2i+1),
    otherwise (i, i + R/2). cos and sin hold the angle of every element (both of a pair), attention scaling
    included.
    """

    x: Operand
    cos: Operand
    sin: Operand
    interleaved: bool = False

    def infer(self) -> list[TensorType]:
        if self.cos.shape[-2:] != self.sin.shape[-2:] or self.cos.shape[-2] not in (self.x.shape[-3], 1):
            raise CompileError(
                f"rope: {self.x.type} with tables {self.cos.type}, {self.sin.type}",
                remedy="tables are [T, R]",
            )
        return [self.x.type]

    @property
    def rotary_dim(self) -> int:
        r = self.cos.shape[-1]
        assert isinstance(r, int)
        return r

    def reference(self, dims: Dims, *args: Any) -> Any:
        import torch

        x, cos, sin = args
        r = self.rotary_dim
        turned, rest = x[..., :r], x[..., r:]
        if self.interleaved:
            half = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
        else:
            half = torch.cat((-turned[..., r // 2 :], turned[..., : r // 2]), -1)
        out = turned * cos.unsqueeze(-2) + half * sin.unsqueeze(-2)
        return torch.cat((out.to(x.dtype), rest), -1)


@op("gated_mlp")
class GatedMlp(Op):
    """The gate of a gated MLP (Shazeer 2020): gate_up [..., 2I] = [gate, up] → activation(gate) · up, [...,
    I].

    The projections around it stay `linear`, so that quantizers see them.
    """

    gate_up: Operand
    activation: str

    def infer(self) -> list[TensorType]:
        half = divide(self.gate_up.shape[-1], 2)
        if half is None:
            raise CompileError(
                f"gated_mlp: odd width of {self.gate_up.type}", remedy="gate and up must be equally wide"
            )
        return [self.gate_up.type.with_shape((*self.gate_up.shape[:-1], half))]

    def verify(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise VerifyError(
                f"gated_mlp: no activation {self.activation}", remedy=f"one of {', '.join(ACTIVATIONS)}"
            )

    def reference(self, dims: Dims, *args: Any) -> Any:
        gate, up = args[0].chunk(2, -1)
        return activate(self.activation, gate) * up
