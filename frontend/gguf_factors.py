"""Numbers that GGUF files hold beside weights in NVFP4: `blk.0.attn_q.scale` beside `blk.0.attn_q.weight`.

NVFP4's scales are floats of 8 bits, so a matrix has a factor of its own, float32 [1], or [E] of stacked
experts (what llama.cpp multiplies a product by). `input_scale` is what activations would be divided by where
they are rounded to NVFP4 as well; ours are quantized by their own largest number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from ..ir.errors import InputError
from ..ir.weights import LazyTensor
from .lora_gguf import ChangedTensor
from .weights import GGUFTensor

_KINDS: Final = ("scale", "input_scale")


def beside_blocks(unused: Sequence[str], tensors: Mapping[str, LazyTensor]) -> list[str]:
    """Give weights the factors among tensors that no parameter took; the names of the others.

    Raises InputError for a factor of another shape, or one that is no finite number.
    """
    left: list[str] = []
    for name in unused:
        stem, _, kind = name.rpartition(".")
        weight = tensors.get(f"{stem}.weight")
        while isinstance(weight, ChangedTensor):
            weight = weight.base
        if kind not in _KINDS or not isinstance(weight, GGUFTensor) or weight.ggml_type != "NVFP4":
            left.append(name)
        elif kind == "scale":
            weight.factor = _factor(tensors[name], weight)
    return left


def _factor(tensor: LazyTensor, weight: GGUFTensor) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    values = np.asarray(tensor.read(), np.float32).reshape(-1)
    stacked = weight.shape[0] if len(weight.shape) > 2 else 1
    if len(weight.shape) < 2 or len(values) not in {1, stacked} or not np.isfinite(values).all():
        raise InputError(
            f"{tensor.source} has shape {list(tensor.shape)}, or values that are no numbers; it scales "
            f"{weight.name} of shape {list(weight.shape)}",
            remedy="the file is damaged: get it again",
        )
    return values
