"""Checkpoints of compressed-tensors with weights in floats, a module at a time.

    float-quantized        weight E4M3 [N, K]; weight_scale [1] (the whole tensor), [N, 1] (a row),
                           [N, K / g] (groups) or [ceil(N / r), ceil(K / c)] (blocks)
    mxfp8-quantized        the same in groups of 32, weight_scale E8M0
    nvfp4-pack-quantized   weight_packed uint8 [N, K / 2], weight_scale E4M3 [N, K / 16] and
                           weight_global_scale [1], by which scales are divided
    mxfp4-pack-quantized   weight_packed uint8 [N, K / 2], weight_scale E8M0 [N, K / 32]

https://github.com/neuralmagic/compressed-tensors (compressors/)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from ...ir.dtypes import FLOAT8
from ...ir.weights import LazyTensor
from .checks import Module, disagree
from .floats import SCALES, Block, ScaledFloat8, float4

LAYOUTS: Final = {
    "float-quantized": 8,
    "naive-quantized": 8,
    "mxfp8-quantized": 8,
    "nvfp4-pack-quantized": 4,
    "mxfp4-pack-quantized": 4,
    "mixed-precision": 0,
}
"""Formats of float weights, and their bits; 0: of any."""
BITS: Final = (4, 8)
_GROUPS: Final = (16, 32)


def is_float(module: Module) -> bool:
    """Whether the module's weight is in floats: float8, or bytes with two float4 each."""
    stored = module.tensors.get(f"{module.prefix}weight_packed", module.tensors.get(f"{module.prefix}weight"))
    return stored is not None and stored.dtype in (FLOAT8, "uint8")


def float_weight(module: Module, schemes: list[Mapping[str, Any]]) -> LazyTensor:
    """The weight of a module in floats.

    Args:
        schemes: the arguments of the configuration's groups of float weights.
    Raises:
        InputError: no group describes the tensors, or they do not fit each other.
    """
    packed = module.has("weight_packed")
    bits = 4 if packed else 8
    weight = module.get("weight_packed", 2, "uint8") if packed else module.get("weight", 2, FLOAT8)
    fitting = [scheme for scheme in schemes if scheme.get("num_bits") == bits]
    if not fitting:
        raise disagree(weight, f"holds floats of {bits} bits, of which quantization_config has no group")
    _refuse_zero_points(module)
    stored = module.tensors[f"{module.prefix}weight_scale"]
    scale = module.get("weight_scale", min(len(stored.shape), 2), *SCALES)
    return _float4(module, weight, scale) if packed else ScaledFloat8(weight, scale, _block(fitting, scale))


def _float4(module: Module, pairs: LazyTensor, scale: LazyTensor) -> LazyTensor:
    k = 2 * pairs.shape[1]
    count = scale.shape[-1] if len(scale.shape) == 2 else 0
    group = k // max(1, count)
    if group not in _GROUPS:
        raise disagree(scale, f"has {count} scales a row of {k}; float4 has groups of 16 or 32")
    if not module.has("weight_global_scale"):
        if scale.dtype == FLOAT8:
            raise disagree(scale, f"is {FLOAT8} without a weight_global_scale beside it")
        return float4(pairs, scale, group)
    stored = module.get("weight_global_scale", 1, "float32", "bfloat16", "float16")
    if stored.shape != (1,):
        raise disagree(stored, f"has the shape {list(stored.shape)}, not one number")
    return float4(pairs, scale, group, divisor=float(stored.read()[0]))


def _block(schemes: list[Mapping[str, Any]], scale: LazyTensor) -> Block | None:
    """The rows and columns that share a scale, where a group of the configuration says so."""
    for scheme in schemes:
        size = scheme.get("block_structure")
        if isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size):
            return size[0], size[1]
        group = scheme.get("group_size")
        if type(group) is int and group > 0 and scale.shape[-1:] > (1,):
            return 1, group
    return None


def _refuse_zero_points(module: Module) -> None:
    name = f"{module.prefix}weight_zero_point"
    stored = module.tensors.get(name)
    if stored is not None and (stored.read().astype(np.float32) != 0).any():
        raise disagree(stored, "is not zero, and floats have none")
