"""Emitters of routers and experts: `top_k`, and a mixture of experts in steps (`kernels/moe.py`), with
what adapters add to it (`kernels/lora.py`).
"""

from __future__ import annotations

from typing import Any

from ...ir.core import Value
from ...ir.ops.lora_experts import LoraMoe, QuantizedLoraMoe
from ...ir.ops.moe import Moe, QuantizedMoe
from ...ir.types import Dim
from . import kernels
from .emit_activations import form_of, kept_apart, quantized_activation
from .lower import Lowering, emits
from .untyped import relax
from .weights import expert_layouts, length


def _count(value: Value) -> Dim:
    """Rows of a value [..., width]."""
    total: Dim = 1
    for d in value.shape[:-1]:
        total = d * total
    return total


@emits("top_k")
def top_k(low: Lowering, op: Any) -> Any:
    width, rows = op.x.shape[-1], low.dim(_count(op.x))
    x = low.rows(op.x, width)
    if op.x.dtype != "float32":  # integers and booleans of a mask: exact as floats
        x = low.emit(relax.op.astype(x, "float32"))
    static = {"width": width, "k": op.k}
    out = low.kernel("top_k", kernels.make_top_k, static, [x], low.tensor([rows, op.k], "int64"))
    return out if op.x.type.rank == 2 else low.reshape(out, low.shape(op.result.shape))


def _floats(low: Lowering, value: Value) -> Any:
    """A bias as float32."""
    x = low.get(value)
    return x if value.dtype == "float32" else low.emit(relax.op.astype(x, "float32"))


class Pairs:
    """The pairs of one mixture: indices and what `moe_rows` makes of them."""

    def __init__(self, low: Lowering, op: Moe | QuantizedMoe, experts: int) -> None:
        self.low, self.experts = low, experts
        self.k = length(op.indices.shape[-1])
        self.tokens = low.dim(_count(op.x))
        self.count = low.dim(_count(op.indices) * self.k)
        indices = low.get(op.indices)
        if op.indices.dtype != "int32":
            indices = low.emit(relax.op.astype(indices, "int32"))
        self.indices = low.reshape(indices, [self.count])
        key = ("moe_rows", op.indices)
        if key not in low.shared:
            out = [low.tensor([self.count], "int32")] * 2 + [low.tensor([experts + 1], "int32")] * 2
            static = {"experts": experts}
            parts = low.kernel("moe_rows", kernels.make_moe_rows, static, [self.indices], out)
            low.shared[key] = [low.emit(relax.TupleGetItem(parts, i)) for i in range(4)]
        self.place, self.source, self.offsets, self.active = low.shared[key]

    def rows(self, width: int, dtype: str = "float32") -> Any:
        """The type of an array with a row a pair."""
        return self.low.tensor([self.count, width], dtype)

    def finish(self, op: Moe | QuantizedMoe, y: Any) -> Any:
        """The results y [S, D] of all pairs → those of the tokens."""
        low, width = self.low, length(op.x.shape[-1])
        static = {"width": width, "experts": self.experts, "top_k": self.k, "bias": op.down_bias is not None}
        args = [y, self.place, low.rows(op.weights, self.k)]
        if op.down_bias is not None:
            args += [self.indices, _floats(low, op.down_bias)]
        out = low.tensor([self.tokens, width], "float32")
        out = low.kernel("moe_combine", kernels.make_moe_combine, static, args, out)
        return out if op.x.type.rank == 2 else low.reshape(out, low.shape(op.result.shape))

    def gate(self, op: Moe | QuantizedMoe, products: Any, width: int) -> Any:
        """Products [S, 2 · width] (without a gate [S, width]) → [S, width]."""
        gate = op.gate
        static = {
            "width": width,
            "experts": self.experts,
            "activation": gate.activation,
            "alpha": gate.alpha,
            "limit": gate.limit,
            "offset": gate.offset,
            "bias": op.up_bias is not None,
            "gated": gate.gated,
            "limits_active": gate.limits_active,
        }
        args = [products]
        if op.up_bias is not None:
            args += [self.source, self.indices, _floats(self.low, op.up_bias)]
        return self.low.kernel("moe_gate", kernels.make_moe_gate, static, args, self.rows(width))

    def adapted(self, op: Moe | QuantizedMoe, y: Any, held: Any = None) -> Any:
        """Products y of all pairs → with what the tokens' adapters add, written in place: gates and ups, or,
        of what the pairs `held`, downs.
        """
        if not isinstance(op, LoraMoe | QuantizedLoraMoe):
            return y
        low, by_token = self.low, held is None
        if by_token:
            stack, parts, x = op.stacks[0], op.gate.products, low.rows(op.x, length(op.x.shape[-1]))
            factors = [op.lora_up_rank, op.lora_up_scale, op.lora_up_a, op.lora_up_b]
        else:
            stack, parts, x = op.stacks[1], 1, held
            factors = [op.lora_down_rank, op.lora_down_scale, op.lora_down_a, op.lora_down_b]
        n, k = (length(d) for d in stack.shape[1:])
        static = {"rows": n // parts, "parts": parts, "k": k, "experts": self.experts, "top_k": self.k}
        static |= {"by_token": by_token, "dtype": factors[2].dtype}
        args = [y, x, self.source, self.indices, low.get(op.adapter), *map(low.get, factors)]
        return low.kernel_inplace("moe_lora", kernels.make_moe_lora, static, args, 0, self.rows(n))


@emits("moe", "lora_moe")
def moe(low: Lowering, op: Any) -> Any:
    experts, wide, width = op.gate_up.shape
    pairs = Pairs(low, op, experts)

    def product(x: Any, weight: Value, top_k: int) -> Any:
        _, n, k = weight.shape
        static = {"n": n, "k": k, "experts": experts, "top_k": top_k, "weight_dtype": weight.dtype}
        args = [x, pairs.source, pairs.offsets, pairs.active, low.get(weight)]
        return low.kernel("moe_linear", kernels.make_moe_linear, static, args, pairs.rows(length(n)))

    products = pairs.adapted(op, product(low.rows(op.x, width), op.gate_up, pairs.k))
    held = pairs.gate(op, products, wide // op.gate.products)
    return pairs.finish(op, pairs.adapted(op, product(held, op.down, 0), held))


@emits("quantized_moe", "quantized_lora_moe")
def quantized_moe(low: Lowering, op: Any) -> Any:
    up, down = expert_layouts(op)
    pairs = Pairs(low, op, op.up_q.shape[0])

    def product(activation: list[Any], layout: Any, parts: list[Value | None], apart: int) -> Any:
        static = {"n": layout.n, "k": layout.k, "experts": pairs.experts, **form_of(layout), "apart": apart}
        weights = [low.get(part) for part in parts if part is not None]
        args = [*activation, pairs.offsets, pairs.active, *weights]
        return low.kernel(
            "moe_quantized_linear", kernels.make_moe_quantized_linear, static, args, pairs.rows(layout.n)
        )

    def types(layout: Any, apart: int) -> list[Any]:
        return [pairs.rows(layout.k_padded, "int8"), *([pairs.rows(layout.groups + apart)] * 2)]

    apart = kept_apart(op.x, up)
    static = {"k": up.k, "bits": 8 if up.align == 8 else 2, "group_size": up.group_size, "top_k": pairs.k}
    static["apart"] = apart
    args = [*quantized_activation(low, op.x, up), pairs.source]
    parts = low.kernel("moe_gather", kernels.make_moe_gather, static, args, types(up, apart))
    given = [low.emit(relax.TupleGetItem(parts, i)) for i in range(3)]
    products = product(given, up, [op.up_q, op.up_scale, op.up_zero_point], apart)
    products = pairs.adapted(op, products)

    held = pairs.gate(op, products, up.n // op.gate.products)
    static = {"k": down.k, "group_size": down.group_size, "align": down.align, "apart": 0}
    parts = low.kernel(
        "quantize_activation", kernels.make_quantize_activation, static, [held], types(down, 0)
    )
    given = [low.emit(relax.TupleGetItem(parts, i)) for i in range(3)]
    y = product(given, down, [op.down_q, op.down_scale, op.down_zero_point], 0)
    return pairs.finish(op, pairs.adapted(op, y, held))
