"""Checkpoints of 1.58 bits: weights of −1, 0 and 1, and one scale for each matrix.

    weight         uint8 [N / 4, K], or as many floats as the matrix has, [N, K]
    weight_scale   one number

Byte [i, k] holds four weights of column k, the one of row i in its lowest two bits, then those of the rows
i + N / 4, i + N / 2 and i + 3 N / 4; each is stored one higher than it is. By `linear_class`, weights are
divided by the scale ("bitlinear") or multiplied by it ("autobitlinear").

The layers of such a model round what comes in to 8 bits, with a token's largest magnitude as 127. So do the
kernels of `--quant keep`, for which a row is one group, where they do not keep the largest apart; other
schemes do as they do with any model. Ma et al., "The Era of 1-bit LLMs: All Large Language Models are in 1.58
Bits", 2024, section 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from ...ir.errors import InputError, UnsupportedError
from ...ir.types import Quantization
from ...ir.weights import DequantizedTensor, LazyTensor, QuantizedTensors, num_elements
from .checks import Config, Module, disagree
from .packing import Small, scales_of

Array = np.ndarray[Any, Any]
_FLOATS: Final = ("float16", "bfloat16", "float32")
_ACROSS: Final = 4  # rows in a byte
_BITS: Final = 2
_ZERO: Final = np.uint8(1 << (_BITS - 1))  # the code of 0 in symmetric grids
_CLASSES: Final = ("bitlinear", "autobitlinear")


def open_ternary(tensors: Mapping[str, LazyTensor], config: Config) -> dict[str, LazyTensor]:
    """The tensors with every ternary weight and its scale replaced by the product.

    Raises InputError where configuration and tensors disagree, UnsupportedError for weights that layers round
    whenever they run (what training keeps), and for layers with norms inside.
    """
    kind = config.get("linear_class", _CLASSES[0])
    if kind not in _CLASSES:
        raise UnsupportedError(
            f"the ternary checkpoint has layers of class {str(kind)[:40]!r}",
            remedy=f"give one of {' or '.join(_CLASSES)}",
        )
    if kind == "autobitlinear" and config.get("quantization_mode") == "online":
        raise UnsupportedError(
            "the ternary checkpoint holds the weights that training keeps (quantization_mode is 'online')",
            remedy="give the packed one, made for inference",
        )
    normed = next((name for name in tensors if name.endswith(".rms_norm.weight")), None)
    if normed is not None or config.get("use_rms_norm"):
        raise UnsupportedError(
            f"the ternary checkpoint has norms inside of its layers ({normed or 'use_rms_norm'})",
            remedy="give one whose norms are the model's own",
        )
    found = dict(tensors)
    for name in tensors:
        if name.endswith(".weight_scale"):
            module = Module(name.removesuffix("weight_scale"), tensors)
            del found[name]
            found[f"{module.prefix}weight"] = _weight(module, divided=kind == "bitlinear")
    alone = next((tensor for tensor in found.values() if tensor.dtype == "uint8"), None)
    if alone is not None:
        raise disagree(alone, "is uint8 and has no weight_scale beside it")
    return found


def _weight(module: Module, *, divided: bool) -> DequantizedTensor:
    stored = module.get("weight", 2, "uint8", *_FLOATS)
    codes: LazyTensor = PackedAcrossRows(stored) if stored.dtype == "uint8" else TernaryFloats(stored)
    n, k = codes.shape
    scale = _scale(module, n, divided)
    return DequantizedTensor(
        QuantizedTensors(Quantization(_BITS, k, True, scale.dtype), codes, scale), stored.source
    )


def _scale(module: Module, n: int, divided: bool) -> Small:
    """[N, 1], by which weights are multiplied."""
    name = f"{module.prefix}weight_scale"
    stored = module.get("weight_scale", len(module.tensors[name].shape), *_FLOATS)
    if num_elements(stored) != 1:
        raise disagree(stored, f"has the shape {list(stored.shape)}, a matrix has one scale")
    number = stored.read().astype(np.float32).reshape(1, 1)
    if divided:
        with np.errstate(divide="ignore", over="ignore"):
            number = np.where(np.isfinite(number), np.float32(1) / number, number)
    one = Small((1, 1), "float32", stored.source, lambda: number)
    return scales_of(one, (n, 1), lambda value: np.broadcast_to(value, (n, 1)))


class PackedAcrossRows:
    """Codes uint8 [N, K] of bytes [N / 4, K], each of which holds rows that are N / 4 apart."""

    dtype: str = "uint8"

    def __init__(self, packed: LazyTensor) -> None:
        self._packed = packed
        self.shape: tuple[int, ...] = (_ACROSS * packed.shape[0], packed.shape[1])
        self.source = packed.source

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        first, last, _ = slice(start, stop).indices(self.shape[0])
        codes = np.empty((max(0, last - first), self.shape[1]), np.uint8)
        height = self._packed.shape[0]
        for quarter in range(_ACROSS):
            begin, end = max(first, quarter * height), min(last, (quarter + 1) * height)
            if begin >= end:
                continue
            rows = self._packed.read(begin - quarter * height, end - quarter * height)
            codes[begin - first : end - first] = (rows >> np.uint8(_BITS * quarter)) & np.uint8(3)
        if codes.size and codes.max() > 2:
            raise InputError(
                f"{self.source} holds the code 3, which stands for none of -1, 0 and 1",
                remedy="the checkpoint is damaged: download it again",
            )
        return codes + (_ZERO - np.uint8(1))


class TernaryFloats:
    """Codes uint8 [N, K] of floats that are −1, 0 or 1."""

    dtype: str = "uint8"

    def __init__(self, values: LazyTensor) -> None:
        self._values = values
        self.shape, self.source = values.shape, values.source

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        values = self._values.read(start, stop).astype(np.float32)
        if not np.isin(values, (-1, 0, 1)).all():
            raise InputError(
                f"{self.source} holds other numbers than -1, 0 and 1, and has a weight_scale beside it",
                remedy="give the checkpoint as it was published",
            )
        return (values + np.float32(_ZERO)).astype(np.uint8)
