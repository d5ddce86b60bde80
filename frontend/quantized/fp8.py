"""Checkpoints in floats of eight bits (E4M3) with scales of blocks, rows or whole matrices.

    fp8          weight [N, K] and what it is multiplied by, weight_scale_inv: [ceil(N / r), ceil(K / c)]
                 where `weight_block_size` is [r, c], else [N, 1] or one number
    fbgemm_fp8   weight [N, K] and weight_scale [N, 1]

Stacked experts have the same with their parameter's name: experts.gate_up_proj and
experts.gate_up_proj_scale_inv. Scales of activations and of the cache stay unused: activations are not in
such floats here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from ...ir.dtypes import FLOAT8
from ...ir.weights import LazyTensor
from .checks import Config, disagree
from .floats import Block, ScaledFloat8

_SUFFIXES: Final = ("_scale_inv", "_scale")
UNUSED: Final = (".activation_scale", ".input_scale", ".output_scale", ".k_scale", ".v_scale", ".q_scale")
"""Ends of names of scales of activations and of the cache."""


def open_fp8(tensors: Mapping[str, LazyTensor], config: Config) -> dict[str, LazyTensor]:
    """The tensors with every float8 weight and its scales replaced by the product.

    Raises InputError for a weight without scales, or scales that do not fit it.
    """
    block = _block(config)
    found = {name: tensor for name, tensor in tensors.items() if not name.endswith(UNUSED)}
    for name, tensor in tensors.items():
        if tensor.dtype != FLOAT8 or name not in found:
            continue
        beside = [name + suffix for suffix in _SUFFIXES if name + suffix in found]
        if len(beside) != 1:
            raise disagree(tensor, f"is {FLOAT8} and has {len(beside) or 'no'} scales beside it")
        found[name] = ScaledFloat8(tensor, found.pop(beside[0]), block)
    return found


def _block(config: Config) -> Block | None:
    size = config.get("weight_block_size")
    if not isinstance(size, list) or len(size) != 2:
        return None
    rows, columns = size
    sound = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in size)
    return (rows, columns) if sound else None
