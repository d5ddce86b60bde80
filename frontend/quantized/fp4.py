"""Checkpoints in floats of four bits (E2M1).

mxfp4      NAME_blocks uint8 [E, N, K / 32, 16] and NAME_scales E8M0 [E, N, K / 32]: stacked experts NAME,
           which the model has transposed, [E, K, N]
modelopt   weight uint8 [N, K / 2], weight_scale E4M3 [N, K / 16] and weight_scale_2, a number: NVFP4; or
           float8 weights as `fp8.py` reads them, whose scales of blocks may have axes of length 1 between,
           and those of rows none behind. By its tensors: one checkpoint may have both.
           https://github.com/NVIDIA/TensorRT-Model-Optimizer
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from ...ir.errors import UnsupportedError
from ...ir.weights import LazyTensor
from ..weights import TurnedTensor, transformed
from .checks import Config, Module, disagree
from .floats import float4
from .fp8 import open_fp8

_BLOCK: Final = 32
_ALGORITHMS: Final = ("FP8", "FP8_PB_WO", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4", "W4A16_NVFP4")


class _Joined:
    """[E, N, G, B] as [E, N, G · B]."""

    def __init__(self, base: LazyTensor) -> None:
        self._base = base
        self.shape: tuple[int, ...] = (*base.shape[:2], base.shape[2] * base.shape[3])
        self.dtype, self.source = base.dtype, base.source

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray[Any, Any]:
        rows = self._base.read(start, stop)
        return rows.reshape(len(rows), *self.shape[1:])


def open_mxfp4(tensors: Mapping[str, LazyTensor], config: Config) -> dict[str, LazyTensor]:
    """The tensors with blocks and scales of each stack of experts replaced by its weights, transposed."""
    found = dict(tensors)
    for name in tensors:
        if not name.endswith("_blocks"):
            continue
        prefix = name.removesuffix("_blocks")
        module = Module(f"{prefix}_", tensors)
        blocks, scales = module.get("blocks", 4, "uint8"), module.get("scales", 3, "uint8")
        if 2 * blocks.shape[3] != _BLOCK:
            raise disagree(blocks, f"has blocks of {2 * blocks.shape[3]} values, not {_BLOCK}")
        del found[name], found[f"{prefix}_scales"]
        found[prefix] = TurnedTensor(float4(_Joined(blocks), scales, _BLOCK))
    return found


def open_modelopt(tensors: Mapping[str, LazyTensor], config: Config) -> dict[str, LazyTensor]:
    """The tensors with every quantized module's parts replaced by its `weight`.

    Raises UnsupportedError for weights that are scaled by their columns too, InputError for parts that do not
    fit each other.
    """
    scaled = next((name for name in tensors if name.endswith(".pre_quant_scale")), None)
    algorithm = config.get("quant_algo")
    if scaled is not None or (isinstance(algorithm, str) and "INT4" in algorithm.upper()):
        what = f"{algorithm}" if scaled is None else f"{tensors[scaled].source}, a scale of each column"
        raise UnsupportedError(
            f"the ModelOpt checkpoint has {what}, which llmc does not read",
            remedy=f"give one of {', '.join(_ALGORITHMS)}, or the unquantized model",
        )
    found = dict(tensors)
    for name in tensors:
        if not name.endswith(".weight_scale_2"):
            continue
        module = Module(name.removesuffix("weight_scale_2"), tensors)
        factor = tensors[name].read()
        if factor.size != 1:
            raise disagree(tensors[name], f"has the shape {list(factor.shape)}, not one number")
        for part in ("weight_scale", "weight_scale_2"):
            found.pop(module.prefix + part, None)
        pairs, scale = module.get("weight", 2, "uint8"), module.get("weight_scale", 2, "float8_e4m3fn")
        found[f"{module.prefix}weight"] = float4(pairs, scale, 16, factor=float(factor.reshape(())))
    for name in found:
        if name.endswith(".weight_scale"):
            found[name] = _matrix(found[name])
    return open_fp8(found, config)


def _matrix(scale: LazyTensor) -> LazyTensor:
    """Scales [A, 1, B, 1] and [N] as [A, B] and [N, 1]."""
    shape = scale.shape
    if len(shape) == 4 and shape[1] == shape[3] == 1:
        return transformed(scale, lambda x: x.reshape(len(x), -1))
    return transformed(scale, lambda x: x[:, None]) if len(shape) == 1 else scale
