"""Checkpoints of AMD's Quark, module by module by the type of `weight`, beside it `weight_scale`.

    weight                     weight_scale                  further
    E4M3 [N, K]                one number, [N] or of blocks
    E4M3 [N, K]                E8M0 [N, K / 32]              (MXFP8)
    uint8 [N, K / 2], E2M1     E8M0 [N, K / 32]              (MXFP4)
    uint8 [N, K / 2], E2M1     E4M3 [N, K / 16]              weight_scale_2, a number (NVFP4)
    int8 [N, K]                one number or [N]
    int32 [K, N / 8], 4 bits   floats [K / g, N]             weight_zero_point int32 [K / g, N / 8]

Codes of 4 bits, and their zero points, stand in a word as AWQ's do ("reorder") or in order ("order",
`export.pack_method`); of dtype int4 they are two's complement. https://quark.docs.amd.com
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, Final

import numpy as np

from ...ir.dtypes import FLOAT8
from ...ir.errors import UnsupportedError
from ...ir.types import Quantization
from ...ir.weights import DequantizedTensor, LazyTensor, QuantizedTensors, num_elements
from .awq import AWQ_ORDER, GemmCodes, columns_of
from .checks import Config, Module, disagree, expect_shape
from .floats import float4
from .fp8 import UNUSED, open_fp8
from .packing import SignedBytes, Small, scales_of

Array = np.ndarray[Any, Any]
_FLOATS: Final = ("float16", "bfloat16", "float32")
_ORDERS: Final = {"reorder": AWQ_ORDER, "order": tuple(range(8))}
_UNUSED: Final = (
    *UNUSED, ".input_scale_2", ".output_scale_2", ".input_zero_point", ".output_zero_point",
)  # fmt: skip


def open_quark(tensors: Mapping[str, LazyTensor], config: Config) -> dict[str, LazyTensor]:
    """The tensors with every quantized module's parts replaced by its `weight`.

    Scales of activations and of the cache stay unused: activations are not quantized so here.

    Raises InputError where tensors do not fit each other, UnsupportedError for another packing.
    """
    export = config.get("export")
    packing = export.get("pack_method", "reorder") if isinstance(export, Mapping) else "reorder"
    if not isinstance(packing, str) or packing not in _ORDERS:
        raise UnsupportedError(
            f"the Quark checkpoint is packed as {str(packing)[:40]!r}",
            remedy=f"give one of {', '.join(_ORDERS)}",
        )
    found = {name: tensor for name, tensor in tensors.items() if not name.endswith(_UNUSED)}
    for name in tensors:
        if not name.endswith(".weight_scale"):
            continue
        module = Module(name.removesuffix("weight_scale"), tensors)
        label = f"{module.prefix}weight"
        stored = module.get("weight", 2, FLOAT8, "uint8", "int8", "int32")
        if stored.dtype == FLOAT8:
            found[name] = _as_rows(found[name], stored)
            continue
        for part in ("weight_scale", "weight_scale_2", "weight_zero_point"):
            found.pop(module.prefix + part, None)
        if stored.dtype == "uint8":
            found[label] = _floats_of_4_bits(module, stored)
        elif stored.dtype == "int8":
            found[label] = _bytes(module, stored)
        else:
            found[label] = _nibbles(module, stored, _ORDERS[packing], _said(config, module))
    return open_fp8(found, {})


def _as_rows(scale: LazyTensor, weight: LazyTensor) -> LazyTensor:
    """Scales [N] as [N, 1]."""
    if len(scale.shape) != 1 or scale.shape != weight.shape[:1]:
        return scale
    return Small((scale.shape[0], 1), scale.dtype, scale.source, lambda: scale.read()[:, None])


def _floats_of_4_bits(module: Module, pairs: LazyTensor) -> DequantizedTensor:
    if not module.has("weight_scale_2"):
        return float4(pairs, module.get("weight_scale", 2, "uint8"), 32)
    factor = module.tensors[f"{module.prefix}weight_scale_2"]
    if num_elements(factor) != 1:
        raise disagree(factor, f"has the shape {list(factor.shape)}, not one number")
    scale = module.get("weight_scale", 2, FLOAT8)
    return float4(pairs, scale, 16, factor=float(factor.read().reshape(())))


def _said(config: Config, module: Module) -> Config:
    """What the configuration says of a module's weight: by a pattern of its name (of files, not a regular
    expression), or of all.
    """
    name, by_name = module.prefix[:-1], config.get("layer_quant_config")
    patterns = by_name.items() if isinstance(by_name, Mapping) else ()
    own = next((one for pattern, one in patterns if fnmatchcase(name, str(pattern))), None)
    found = own if isinstance(own, Mapping) else config.get("global_quant_config")
    weight = found.get("weight") if isinstance(found, Mapping) else None
    return weight if isinstance(weight, Mapping) else {}


def _bytes(module: Module, stored: LazyTensor) -> DequantizedTensor:
    n, k = stored.shape
    held = module.tensors[f"{module.prefix}weight_scale"]
    scale = module.get("weight_scale", len(held.shape), *_FLOATS)
    if num_elements(scale) not in (1, n):
        raise _other(scale, f"of int8{list(stored.shape)}")
    zeros = module.tensors.get(f"{module.prefix}weight_zero_point")
    if zeros is not None and zeros.read().any():
        raise _other(zeros, "that moves weights of 8 bits")
    spread = scales_of(scale, (n, 1), lambda one: np.broadcast_to(one.reshape(-1, 1), (n, 1)))
    parts = QuantizedTensors(Quantization(8, k, True, spread.dtype), SignedBytes(stored), spread)
    return DequantizedTensor(parts, stored.source)


def _other(tensor: LazyTensor, what: str) -> UnsupportedError:
    return UnsupportedError(
        f"{tensor.source} has the shape {list(tensor.shape)}, {what}, which llmc does not read",
        remedy="give weights of 8 bits with a scale a row or one of all, or of 4 bits with scales of groups",
    )


def _nibbles(module: Module, words: LazyTensor, order: tuple[int, ...], said: Config) -> DequantizedTensor:
    held = module.tensors[f"{module.prefix}weight_scale"]
    if len(held.shape) != 2:
        raise _other(held, f"of int32{list(words.shape)}")
    scale = module.get("weight_scale", 2, *_FLOATS)
    (groups, n), k = scale.shape, words.shape[0]
    expect_shape(words, (k, -(-n // 8)), f"{n} rows")
    if k % groups:
        raise disagree(scale, f"has {groups} scales a row, of {k} columns")
    scales = scales_of(scale, (n, groups), lambda stored: stored.T)
    points = module.get("weight_zero_point", 2, "int32") if module.has("weight_zero_point") else None
    if points is not None:
        expect_shape(points, (groups, -(-n // 8)), f"{groups} groups")
    zeros = points is not None and bool(points.read().any())
    signed = said.get("dtype") == "int4" or (said.get("dtype") != "uint4" and not zeros)
    if not signed and points is None:
        module.get("weight_zero_point", 2, "int32")  # which is missing
    codes: LazyTensor = GemmCodes(words, order, n)
    codes = Flipped(codes) if signed else codes
    if points is None or (signed and not zeros):
        quant = Quantization(4, k // groups, True, scales.dtype)
        return DequantizedTensor(QuantizedTensors(quant, codes, scales), words.source)
    held_points, flip = points, np.uint8(8 if signed else 0)

    def read() -> Array:
        return columns_of(held_points.read(), order)[:, :n].T ^ flip

    quant = Quantization(4, k // groups, False, scales.dtype)
    parts = QuantizedTensors(quant, codes, scales, Small((n, groups), "uint8", points.source, read))
    return DequantizedTensor(parts, words.source)


class Flipped:
    """Codes of 4 bits in two's complement, moved up by 8."""

    dtype: str = "uint8"

    def __init__(self, base: LazyTensor) -> None:
        self._base = base
        self.shape, self.source = base.shape, base.source

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        return self._base.read(start, stop) ^ np.uint8(8)
