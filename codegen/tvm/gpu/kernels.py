"""The kernels of the `*.cuh` files by name. Names and static parameters are those of tvm-cpu's, so that its
emitters serve both; what their arrays hold is said there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ....ir.errors import CompileError
from .attention import paged_attention
from .lora import lora
from .products import (
    embedding,
    linear,
    moe_combine,
    moe_gate,
    moe_product,
    moe_rows,
    quantized_embedding,
    quantized_linear,
)
from .rows import activation, append_kv, gated_mlp, gather_last, layer_norm, rms_norm, rope, top_k
from .source import Code
from .states import causal_conv1d, gated_delta_rule, linear_recurrence, selective_scan, ssd_scan, wkv

Maker = Callable[..., Code]
MAKERS: dict[str, Maker] = {
    "activation": activation,
    "append_kv": append_kv,
    "causal_conv1d": causal_conv1d,
    "embedding": embedding,
    "gated_delta_rule": gated_delta_rule,
    "gated_mlp": gated_mlp,
    "gather_last": gather_last,
    "layer_norm": layer_norm,
    "linear": linear,
    "linear_recurrence": linear_recurrence,
    "lora": lora,
    "moe_combine": moe_combine,
    "moe_gate": moe_gate,
    "moe_product": moe_product,
    "moe_rows": moe_rows,
    "paged_attention": paged_attention,
    "quantized_embedding": quantized_embedding,
    "quantized_linear": quantized_linear,
    "rms_norm": rms_norm,
    "rope": rope,
    "selective_scan": selective_scan,
    "wkv": wkv,
    "ssd_scan": ssd_scan,
    "top_k": top_k,
}
"""Kernel name → what makes its code from static parameters."""


def make(name: str, static: Mapping[str, Any]) -> Code:
    """The code of a kernel. Raises CompileError for one that there is not."""
    if name not in MAKERS:
        raise CompileError(f"tvm-cuda has no kernel {name}", remedy="compile for tvm-cpu or onnx-cuda")
    return MAKERS[name](**static)
