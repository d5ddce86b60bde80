"""Mixture of experts: MLPs, gated or not, of which a router chooses a few for each token.

Which experts (`indices`) and with which weights is computed by tensor ops before: softmax or sigmoid, groups,
biases, `top_k` and normalisation differ from model to model, what experts do with it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core import Op, Value
from ..define import Operand, OptionalOperand, op
from ..errors import CompileError, VerifyError
from ..types import TensorType
from .nn import ACTIVATIONS, activate, linear
from .quant import (
    Dequantize,
    QuantizedEmbedding,
    QuantizedLinear,
    check_parts,
    dequantized,
    quantization,
)

Dims = Mapping[str, int]
GATES = (*ACTIVATIONS, "swish", "relu2")


@dataclass(frozen=True)
class Gate:
    """activation(min(gate, limit)) · (clamp(up, ±limit) + offset) of products [gate, up]; without a gate
    (`gated` False) activation(products).

    activation: one of `ACTIVATIONS`, "swish": x · sigmoid(alpha · x), or "relu2": max(x, 0)². limit 0: none.
    interleaved: products are [gate0, up0, gate1, up1, …]. limits_active: min(activation(gate), limit) in
    place of activation(min(gate, limit)).
    """

    activation: str = "silu"
    alpha: float = 1.0
    limit: float = 0.0
    offset: float = 0.0
    interleaved: bool = False
    gated: bool = True
    limits_active: bool = False

    @property
    def products(self) -> int:
        """Products for each result: 2 with a gate, else 1."""
        return 2 if self.gated else 1

    def __call__(self, products: Any) -> Any:
        """In torch: [..., 2I] (without a gate [..., I]) → [..., I]."""
        if not self.gated:
            return self._active(products)
        if self.interleaved:
            gate, up = products[..., ::2], products[..., 1::2]
        else:
            gate, up = products.chunk(2, -1)
        if not self.limit:
            return self._active(gate) * (up + self.offset)
        if self.limits_active:
            active = self._active(gate).clamp(max=self.limit)
        else:
            active = self._active(gate.clamp(max=self.limit))
        return active * (up.clamp(-self.limit, self.limit) + self.offset)

    def _active(self, x: Any) -> Any:
        import torch

        if self.activation == "swish":
            return x * torch.sigmoid(self.alpha * x)
        if self.activation == "relu2":
            return torch.relu(x).square()
        return activate(self.activation, x)


Weights = Callable[[int], tuple[Any, Any]]
"""An expert → its matrices gate_up [2I, D] (without a gate [I, D]) and down [D, I]."""

Change = Callable[[int, Any, Any], Any]
"""(expert, tokens [n], their x [n, K]) → what is added to the products of a matrix of that expert [n, N]."""


def mix(
    x: Any,
    indices: Any,
    weights: Any,
    experts: Weights,
    gate: Gate,
    biases: tuple[Any, Any] = (None, None),
    changes: tuple[Change, Change] | None = None,
) -> Any:
    """Σ_j weights[t, j] · expert(indices[t, j])(x[t]), the chosen experts' results added in the order of j.

    Args:
        x: [..., D]; indices, weights: [..., k].
        biases: [E, 2I] and [E, D], or None.
        changes: of gate_up and of down.
    """
    import torch

    rows, chosen = x.reshape(-1, x.shape[-1]), indices.reshape(-1, indices.shape[-1])
    parts = torch.zeros(*chosen.shape, x.shape[-1], dtype=x.dtype, device=x.device)
    for e in chosen.unique().tolist():
        token, place = (chosen == e).nonzero(as_tuple=True)
        up, down = experts(e)
        first, last = (None if b is None else b[e] for b in biases)
        products = linear(rows[token], up, first)
        if changes is not None:
            products = products + changes[0](e, token, rows[token])
        held = gate(products)
        parts[token, place] = linear(held, down, last)
        if changes is not None:
            parts[token, place] += changes[1](e, token, held)
    out = torch.zeros_like(rows)
    for j in range(chosen.shape[1]):
        out = out + parts[:, j] * weights.reshape(chosen.shape)[:, j, None].to(x.dtype)
    return out.reshape(x.shape)


def _check(one: Moe | QuantizedMoe, up: TensorType, down: TensorType) -> list[TensorType]:
    """Shapes of x [..., D], indices and weights [..., k], gate_up [E, 2I, D] (without a gate [E, I, D]), down
    [E, D, I].
    """
    x, indices, weights = one.x.type, one.indices.type, one.weights.type
    d = x.shape[-1]
    transposed = isinstance(one, Moe) and one.transposed
    if up.rank != 3 or down.rank != 3:
        raise CompileError(f"{one.opname}: experts {up}, {down}", remedy="they are stacked: three axes")
    (e, wide, k), (e2, n, i) = up.shape, down.shape
    if transposed:
        wide, k, n, i = k, wide, i, n
    fits = e == e2 and k == d and n == d and isinstance(i, int) and wide == one.gate.products * i
    if not fits or indices.shape != weights.shape or indices.shape[:-1] != x.shape[:-1]:
        raise CompileError(
            f"{one.opname}: {x} by {up} and {down}, indices {indices}, weights {weights} ({one.loc})",
            remedy="gate_up is [E, 2I, D], without a gate [E, I, D], down [E, D, I], indices and weights are "
            "[..., k]",
        )
    for bias, width in ((one.up_bias, wide), (one.down_bias, d)):
        if bias is not None and bias.shape != (e, width):
            raise CompileError(f"{one.opname}: bias {bias.type}", remedy=f"[{e}, {width}] is due")
    return [x]


def _verify(one: Moe | QuantizedMoe) -> None:
    if one.activation not in GATES:
        raise VerifyError(
            f"{one.opname}: no activation {one.activation}", remedy=f"one of {', '.join(GATES)}"
        )
    gate = one.gate
    if not gate.gated and (gate.limit or gate.offset or gate.interleaved or gate.limits_active):
        raise VerifyError(f"{one.opname}: {gate} has no gate to limit", remedy="leave the constants away")
    if one.indices.dtype not in ("int32", "int64"):
        raise VerifyError(f"{one.opname}: indices {one.indices.type}", remedy="indices are integers")
    k, e = one.indices.shape[-1], one.operands[3].shape[0]
    if isinstance(k, int) and isinstance(e, int) and k > e:
        raise VerifyError(f"{one.opname}: {k} experts a token of {e}", remedy="k is at most their number")


@op("moe")
class Moe(Op):
    """Σ_j weights[t, j] · (gate(x[t] · gate_up[e]ᵀ + up_bias[e]) · down[e]ᵀ + down_bias[e]) of the experts
    e = indices[t, j].

    x [..., D], indices and weights [..., k], gate_up [E, 2I, D], down [E, D, I] → [..., D]; the gate is a
    `Gate` of the attributes' values, without which gate_up is [E, I, D]. As traced, experts may stand
    `transposed` ([E, D, 2I] and [E, I, D]) and their products be interleaved; canonicalisation turns both.
    """

    x: Operand
    indices: Operand
    weights: Operand
    gate_up: Operand
    down: Operand
    up_bias: OptionalOperand
    down_bias: OptionalOperand
    activation: str = "silu"
    alpha: float = 1.0
    limit: float = 0.0
    offset: float = 0.0
    interleaved: bool = False
    transposed: bool = False
    gated: bool = True
    limits_active: bool = False

    @property
    def gate(self) -> Gate:
        form = (self.activation, self.alpha, self.limit, self.offset, self.interleaved, self.gated)
        return Gate(*form, self.limits_active)

    @property
    def stacks(self) -> tuple[Value, Value]:
        """The matrices of all experts."""
        return self.gate_up, self.down

    def infer(self) -> list[TensorType]:
        return _check(self, self.gate_up.type, self.down.type)

    def verify(self) -> None:
        _verify(self)

    def reference(self, dims: Dims, *args: Any) -> Any:
        return self.mixed(args)

    def mixed(self, args: Sequence[Any], changes: tuple[Change, Change] | None = None) -> Any:
        """What operands give, in torch."""
        x, indices, weights, up, down, up_bias, down_bias = args

        def experts(e: int) -> tuple[Any, Any]:
            return (up[e].T, down[e].T) if self.transposed else (up[e], down[e])

        return mix(x, indices, weights, experts, self.gate, (up_bias, down_bias), changes)


@op("quantized_moe")
class QuantizedMoe(Op):
    """`moe` by quantized experts: up_q [E, 2I, D], up_scale [E, 2I, G], … (`types.Quantization`).

    The meaning here takes activations in float; a target may quantize them per token to int8.
    """

    x: Operand
    indices: Operand
    weights: Operand
    up_q: Operand
    up_scale: Operand
    up_zero_point: OptionalOperand
    down_q: Operand
    down_scale: Operand
    down_zero_point: OptionalOperand
    up_bias: OptionalOperand
    down_bias: OptionalOperand
    activation: str = "silu"
    alpha: float = 1.0
    limit: float = 0.0
    offset: float = 0.0
    gated: bool = True
    limits_active: bool = False

    @property
    def gate(self) -> Gate:
        form = {"gated": self.gated, "limits_active": self.limits_active}
        return Gate(self.activation, self.alpha, self.limit, self.offset, **form)

    @property
    def stacks(self) -> tuple[Value, Value]:
        """The codes of all experts' matrices."""
        return self.up_q, self.down_q

    def infer(self) -> list[TensorType]:
        return _check(self, self.up_q.type, self.down_q.type)

    def verify(self) -> None:
        _verify(self)
        for q, scale, zero in (
            (self.up_q, self.up_scale, self.up_zero_point),
            (self.down_q, self.down_scale, self.down_zero_point),
        ):
            check_parts(self.opname, q.type, scale.type, None if zero is None else zero.type)

    def reference(self, dims: Dims, *args: Any) -> Any:
        return self.mixed(args)

    def mixed(self, args: Sequence[Any], changes: tuple[Change, Change] | None = None) -> Any:
        """What operands give, in torch."""
        x, indices, weights, *parts, up_bias, down_bias = args
        forms = [quantization(q.type, self.opname) for q in (self.up_q, self.down_q)]

        def experts(e: int) -> tuple[Any, Any]:
            up, down = (
                dequantized(form, *(None if p is None else p[e] for p in three))
                for form, three in zip(forms, (parts[:3], parts[3:]), strict=True)
            )
            return up, down

        return mix(x, indices, weights, experts, self.gate, (up_bias, down_bias), changes)


def quantized_parts(op: Op) -> list[tuple[Value, Value, Value | None]]:
    """(codes, scales, zero points) of every quantized weight that an op reads."""
    match op:
        case Dequantize() | QuantizedLinear() | QuantizedEmbedding():
            return [(op.q, op.scale, op.zero_point)]
        case QuantizedMoe():
            return [
                (op.up_q, op.up_scale, op.up_zero_point),
                (op.down_q, op.down_scale, op.down_zero_point),
            ]
        case _:
            return []
