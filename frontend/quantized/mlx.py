"""Checkpoints of MLX, whose configuration names no method: `{"group_size": 64, "bits": 4}`, and modules by
their names that have others; or names it "metal", as transformers writes them.

    affine   weight uint32 [N, ceil(K · bits / 32)], a stream of bits along each row; scales and biases (or
             qbiases) floats [N, K / g]: w[n, k] = scales · code + biases
    mxfp4    weight of pairs of E2M1 floats, scales E8M0 [N, K / 32]
    nvfp4    the same with scales E4M3 [N, K / 16], as bytes
    mxfp8    weight of E4M3 floats, scales E8M0 [N, K / 32]

Experts are stacked, [E, N, …], and called `switch_mlp`: each becomes one of `experts`, as in the checkpoints
that they were made of. https://ml-explore.github.io/mlx (mlx.core.quantize)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from ...ir.dtypes import FLOAT8, to_numpy
from ...ir.errors import UnsupportedError
from ...ir.types import Quantization
from ...ir.weights import DequantizedTensor, LazyTensor, QuantizedTensors
from .checks import Config, Module, disagree, expect_shape, integer
from .floats import ScaledFloat8, float4
from .packing import PackedAlongRows, RowScales, words_for

Array = np.ndarray[Any, Any]
_WORDS: Final = ("uint32", "int32")
_FLOATS: Final = ("float16", "bfloat16", "float32")
_BIASES: Final = ("biases", "qbiases")
_STACKED, _EXPERTS = ".switch_mlp.", ".experts."
_MODES: Final = {"affine": (64, 4), "mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}
"""Modes, and the group and bits of each where nothing says others."""


def open_mlx(tensors: Mapping[str, LazyTensor], config: Config) -> dict[str, LazyTensor]:
    """The tensors with every quantized module's parts replaced by its `weight`.

    Raises InputError where configuration and tensors disagree, UnsupportedError for another mode.
    """
    found = dict(tensors)
    for name in tensors:
        if not name.endswith(".scales"):
            continue
        prefix = name.removesuffix("scales")
        if f"{prefix}qweight" in tensors:
            raise disagree(
                tensors[f"{prefix}qweight"], "is not MLX's, and quantization_config names no method"
            )
        for part in ("weight", "scales", *_BIASES):
            found.pop(prefix + part, None)
        found |= _unstacked(prefix, tensors, _settings(config, prefix[:-1]))
    return found


def _settings(config: Config, module: str) -> Config:
    """What the configuration says of a module: of it alone, or of all."""
    own = config.get(module)
    return {**config, **own} if isinstance(own, Mapping) else config


def _unstacked(prefix: str, tensors: Mapping[str, LazyTensor], config: Config) -> dict[str, LazyTensor]:
    """The weights of a module by their names: one, or one for each expert."""
    module = Module(prefix, tensors)
    if _STACKED not in f".{prefix}":
        return {f"{prefix}weight": _weight(module, config)}
    stack = module.get("weight", 3, *_WORDS)
    parts = {name: tensors[prefix + name] for name in ("weight", "scales", *_BIASES) if module.has(name)}
    odd = next((t for t in parts.values() if len(t.shape) != 3 or t.shape[0] != stack.shape[0]), None)
    if odd is not None:
        raise disagree(odd, f"has the shape {list(odd.shape)}, of {stack.shape[0]} experts")
    made: dict[str, LazyTensor] = {}
    for expert in range(stack.shape[0]):
        own = f".{prefix}".replace(_STACKED, f"{_EXPERTS}{expert}.")[1:]
        of_expert = {own + name: MatrixOf(stacked, expert) for name, stacked in parts.items()}
        made[f"{own}weight"] = _weight(Module(own, of_expert), config)
    return made


def _weight(module: Module, config: Config) -> LazyTensor:
    mode = config.get("mode", "affine")
    if not isinstance(mode, str) or mode not in _MODES:
        raise UnsupportedError(
            f"{module.prefix}weight is quantized by MLX's mode {str(mode)[:40]!r}",
            remedy=f"give one of {', '.join(_MODES)}",
        )
    words = module.get("weight", 2, *_WORDS)
    usual = zip(("group_size", "bits"), _MODES[mode], strict=True)
    group, bits = (integer(config, name, default=default) for name, default in usual)
    if mode == "affine":
        return _affine(module, words, group, bits)
    if (group, bits) != _MODES[mode]:
        raise disagree(words, f"is of {bits} bits in groups of {group}, which {mode} is not")
    scales = module.get("scales", 2, "uint8")
    if mode == "mxfp8":
        return ScaledFloat8(BytesOf(words, FLOAT8), scales, (1, group))
    return float4(BytesOf(words, "uint8"), scales if mode == "mxfp4" else BytesOf(scales, FLOAT8), group)


def _affine(module: Module, words: LazyTensor, group: int, bits: int) -> DequantizedTensor:
    if not 2 <= bits <= 8 or group < 1:
        raise UnsupportedError(
            f"{words.source} has codes of {bits} bits in groups of {group}", remedy="give one of 2 to 8 bits"
        )
    scales = module.get("scales", 2, *_FLOATS)
    biases = module.get("qbiases" if module.has("qbiases") else "biases", 2, *_FLOATS)
    n, groups = scales.shape
    expect_shape(biases, (n, groups), "scales")
    expect_shape(words, (n, words_for(groups * group, bits)), f"{groups} groups of {group} of {bits} bits")
    scale, zero = RowScales(scales), RowScales(biases)
    quant = Quantization(bits, group, False, scale.dtype)
    codes = PackedAlongRows(words, bits, groups * group)
    return DequantizedTensor(QuantizedTensors(quant, codes, scale, zero), words.source)


class BytesOf:
    """The bytes of a tensor's rows, as elements of one byte."""

    def __init__(self, base: LazyTensor, dtype: str) -> None:
        self._base, self.dtype = base, dtype
        width = base.shape[1] * to_numpy(base.dtype).itemsize
        self.shape: tuple[int, ...] = (base.shape[0], width)
        self.source = base.source

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        return np.ascontiguousarray(self._base.read(start, stop)).view(to_numpy(self.dtype))


class MatrixOf:
    """One matrix of a stack [E, N, K]."""

    def __init__(self, stack: LazyTensor, which: int) -> None:
        self._stack, self._which = stack, which
        self.shape, self.dtype = stack.shape[1:], stack.dtype
        self.source = f"{stack.source}[{which}]"

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        return np.ascontiguousarray(self._stack.read(self._which, self._which + 1)[0, start:stop])
