"""Checkpoints of torchao in safetensors, as transformers writes them: the parts of a tensor subclass by names
of their own.

    _weight_qdata int8 [N, K]   _weight_scale [N, G]       _weight_zero_point int8 [N, G]; or [1, 1] of all
    _weight_qdata E4M3 [N, K]   _weight_scale float32 [N, 1], or of blocks

w[n, k] = scale · (q - zero point). Integers of fewer bits lie in bytes too; how many they have, the
configuration says (`weight_dtype`), of all modules or by their names; where it does not, or only by regular
expressions, which are a stranger's, they count as of 8. What packs two in a byte (Int4Tensor and its
relatives) is refused. https://github.com/pytorch/ao
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import numpy as np

from ...ir.dtypes import FLOAT8
from ...ir.errors import InputError, UnsupportedError
from ...ir.types import Quantization
from ...ir.weights import DequantizedTensor, LazyTensor, QuantizedTensors
from ..text_part import text_name
from .checks import Config, Module, disagree, expect_shape
from .floats import ScaledFloat8
from .packing import RowScales, Small, scales_of

Array = np.ndarray[Any, Any]
_FLOATS: Final = ("float16", "bfloat16", "float32")
_BITS: Final = {f"int{bits}": bits for bits in range(2, 9)}
_DEPTH: Final = 16
_UNUSED: Final = ("._weight_act_quant_scale", "._weight_act_quant_zero_point")
_BY_NAME: Final = ("module_fqn_to_config", "fqn_to_config")


def open_torchao(tensors: Mapping[str, LazyTensor], config: Config) -> dict[str, LazyTensor]:
    """The tensors with every quantized weight's parts replaced by it.

    Raises InputError where tensors do not fit each other, UnsupportedError for another packing, and for
    weights whose columns are scaled too.
    """
    bits_of = _by_name(config.get("quant_type"))
    found = {name: tensor for name, tensor in tensors.items() if not name.endswith(_UNUSED)}
    for name in tensors:
        if not name.endswith("._weight_qdata"):
            continue
        module = Module(name.removesuffix("qdata"), tensors)
        for part in ("qdata", "scale", "zero_point"):
            found.pop(module.prefix + part, None)
        owner = module.prefix.removesuffix("._weight_")
        found[f"{owner}.weight"] = _weight(module, bits_of(owner))
    other = next((name for name in found if "._weight_" in name), None)
    if other is not None:
        raise UnsupportedError(
            f"{tensors[other].source} is a part of a weight that llmc does not read",
            remedy="give a checkpoint whose weights have values, scales and zero points alone",
        )
    return found


def _by_name(whole: Any) -> Callable[[str], int]:
    """How many bits a module's weight has, by what the configuration says of its weight, of it, or of all."""
    names = next(_found(whole, _BY_NAME, _DEPTH), None)
    if not isinstance(names, Mapping):
        alike = _bits(whole)
        return lambda owner: alike
    if any(str(name).startswith("re:") for name in names):
        return lambda owner: 8
    bits = {text_name(str(name)): _bits(own) for name, own in names.items()}
    usual = bits.get("_default", 8)
    return lambda owner: bits.get(f"{owner}.weight", bits.get(owner, usual))


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
    n, k = module.get("qdata", 2, "int8").shape
    scale = module.get("scale", 2, *_FLOATS)
    groups = scale.shape[1]
    if k % groups:
        raise disagree(scale, f"has {groups} scales a row, of {k} columns")
    scales = RowScales(scale) if scale.shape[0] == n else scales_of(scale, (n, 1), _of_all(n))
    points = _points(module, scale.shape, (n, groups), bits)
    quant = Quantization(bits, k // groups, points is None, scales.dtype)
    parts = QuantizedTensors(quant, Raised(stored, bits), scales, points)
    return DequantizedTensor(parts, stored.source)


def _has_scales(module: Module, stored: LazyTensor) -> bool:
    """Whether there are scales of each row, or one of all."""
    scale = module.tensors.get(f"{module.prefix}scale")
    shape = () if scale is None else scale.shape
    return shape == (1, 1) or (len(shape) == 2 and shape[0] == stored.shape[0])


def _of_all(n: int) -> Callable[[Array], Array]:
    return lambda one: np.broadcast_to(one, (n, 1))


def _points(module: Module, stored: tuple[int, ...], shape: tuple[int, int], bits: int) -> LazyTensor | None:
    """Zero points uint8 of that shape, which are stored as the scales are; None where all are the middle."""
    if not module.has("zero_point"):
        return None
    held = module.get("zero_point", 2, "int8", "int32", "int64")
    expect_shape(held, stored, "the scales")
    if not held.read().any():
        return None
    raised = Raised(held, bits)
    return (
        raised
        if stored == shape
        else Small(shape, "uint8", held.source, lambda: _of_all(shape[0])(raised.read()))
    )


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
