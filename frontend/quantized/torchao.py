"""Checkpoints of torchao in safetensors, as transformers writes them: the parts of a tensor subclass by names
of their own.

    _weight_qdata int8 [N, K]   _weight_scale [N, G]       _weight_zero_point int8 [N, G]
    _weight_qdata E4M3 [N, K]   _weight_scale float32 [N, 1], or of blocks

w[n, k] = scale · (q - zero point). Integers of fewer bits lie in bytes too; how many they have, the
configuration says (`weight_dtype`), of all modules or by their names; where it does not, or only by regular
expressions, which are a stranger's, they count as of 8. What packs two in a byte (Int4Tensor and its
relatives) is refused. https://github.com/pytorch/ao
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np

from ...ir.dtypes import FLOAT8
from ...ir.errors import InputError, UnsupportedError
from ...ir.types import Quantization
from ...ir.weights import DequantizedTensor, LazyTensor, QuantizedTensors
from .checks import Config, Module, disagree, expect_shape
from .floats import ScaledFloat8
from .packing import RowScales

Array = np.ndarray[Any, Any]
_FLOATS: Final = ("float16", "bfloat16", "float32")
_BITS: Final = {f"int{bits}": bits for bits in range(2, 9)}
_DEPTH: Final = 16
_BY_NAME: Final = ("module_fqn_to_config", "fqn_to_config")


def open_torchao(tensors: Mapping[str, LazyTensor], config: Config) -> dict[str, LazyTensor]:
    """The tensors with every quantized weight's parts replaced by it.

    Raises InputError where tensors do not fit each other, UnsupportedError for another packing.
    """
    whole = config.get("quant_type")
    by_name = next(_found(whole, _BY_NAME, _DEPTH), None)
    by_name = by_name if isinstance(by_name, Mapping) else {}
    guessed = any(str(name).startswith("re:") for name in by_name)
    found = dict(tensors)
    for name in tensors:
        if not name.endswith("._weight_qdata"):
            continue
        module = Module(name.removesuffix("qdata"), tensors)
        for part in ("qdata", "scale", "zero_point"):
            found.pop(module.prefix + part, None)
        owner = module.prefix.removesuffix("._weight_")
        own = by_name.get(owner, by_name.get("_default", whole))
        found[f"{owner}.weight"] = _weight(module, _bits(whole if guessed else own))
    return found


def _bits(config: Any) -> int:
    found = _found(config, ("weight_dtype",), _DEPTH)
    said = [one.get("_data") for one in found if isinstance(one, Mapping)]
    known = {_BITS[one] for one in said if isinstance(one, str) and one in _BITS}
    return known.pop() if len(known) == 1 else 8


def _found(value: Any, names: tuple[str, ...], depth: int) -> Iterator[Any]:
    """What a configuration has by one of these names, wherever in it."""
    if not isinstance(value, Mapping) or not depth:
        return
    for key, inner in value.items():
        if key in names:
            yield inner
        yield from _found(inner, names, depth - 1)


def _weight(module: Module, bits: int) -> LazyTensor:
    stored = module.tensors[f"{module.prefix}qdata"]
    if stored.dtype == FLOAT8:
        return ScaledFloat8(stored, module.get("scale", 2, *_FLOATS), None)
    if stored.dtype != "int8" or len(stored.shape) != 2 or not _has_scales(module, stored):
        raise UnsupportedError(
            f"{stored.source} is {stored.dtype}{list(stored.shape)}, packed as llmc does not read",
            remedy="give one with a byte a weight (Int8Tensor, IntxUnpackedToInt8Tensor, Float8Tensor)",
        )
    n, k = stored.shape
    scale = module.get("scale", 2, *_FLOATS)
    groups = scale.shape[1]
    if k % groups:
        raise disagree(scale, f"has {groups} scales a row, of {k} columns")
    points: LazyTensor | None = None
    if module.has("zero_point"):
        held = module.get("zero_point", 2, "int8", "int32", "int64")
        expect_shape(held, (n, groups), "the scales")
        points = Raised(held, bits) if held.read().any() else None
    scales = RowScales(scale)
    quant = Quantization(bits, k // groups, points is None, scales.dtype)
    parts = QuantizedTensors(quant, Raised(stored, bits), scales, points)
    return DequantizedTensor(parts, stored.source)


def _has_scales(module: Module, stored: LazyTensor) -> bool:
    scale = module.tensors.get(f"{module.prefix}scale")
    return scale is not None and len(scale.shape) == 2 and scale.shape[0] == stored.shape[0]


class Raised:
    """Codes uint8 of signed integers: 2^(bits-1) higher."""

    dtype: str = "uint8"

    def __init__(self, base: LazyTensor, bits: int) -> None:
        self._base, self._bits = base, bits
        self.shape, self.source = base.shape, base.source

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        codes = self._base.read(start, stop).astype(np.int64) + (1 << (self._bits - 1))
        if codes.size and not 0 <= codes.min() <= codes.max() < 1 << self._bits:
            raise InputError(
                f"{self.source} holds numbers of more than the {self._bits} bits that its configuration says",
                remedy="download the checkpoint again",
            )
        return codes.astype(np.uint8)
