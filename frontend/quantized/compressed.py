"""Checkpoints of compressed-tensors, as llm-compressor writes them: integer weights, packed or plain; floats
are in `compressed_floats.py`.

    pack-quantized    weight_packed int32 [N, ceil(K · bits / 32)], a stream of bits along each row, codes
                      shifted up by 2^(bits-1); weight_shape int64 [2]
    int-quantized     weight int8 [N, K]
    both              weight_scale [N, G], [N, 1] (a row) or [1] (the whole tensor); weight_zero_point int8
                      [N, G], or packed int32 [ceil(N · bits / 32), G] along rows; weight_g_idx int32 [K]

w[n, k] = weight_scale · (code - zero point), both signed. Which tensors are quantized is told by the tensors;
the configuration's groups must have one that describes each. Patterns of module names in the configuration
are not evaluated: they are regular expressions from a stranger.
https://github.com/neuralmagic/compressed-tensors
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from ...ir.errors import InputError, UnsupportedError
from ...ir.types import Quantization
from ...ir.weights import DequantizedTensor, LazyTensor, QuantizedTensors
from . import compressed_floats as floating
from .checks import Config, Module, column_order, disagree, expect_shape
from .packing import (
    PackedAlongRows,
    PermutedColumns,
    RowScales,
    SignedBytes,
    Small,
    scales_of,
    unpack_stream,
    words_for,
)

Array = np.ndarray[Any, Any]
PARTS: Final = (
    "weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx",
    "weight_global_scale", "input_scale", "input_zero_point", "input_global_scale",
)  # fmt: skip
FLOATS: Final = ("float16", "bfloat16", "float32")
FORMATS: Final = ("pack-quantized", "int-quantized", "naive-quantized", "dense", "mixed-precision")


def open_compressed(tensors: Mapping[str, LazyTensor], config: Config) -> dict[str, LazyTensor]:
    """The tensors with every quantized module's parts replaced by its `weight`.

    Scales of activations and of the cache stay unused: activations are not quantized here.

    Raises InputError where configuration and tensors disagree, UnsupportedError for a format of another kind
    (floats of 6 bits, sparsity, rotations at run time).
    """
    integers, floats = _schemes(config)
    ignored = config.get("ignore")
    ignored = (
        set(ignored) if isinstance(ignored, list) and all(isinstance(i, str) for i in ignored) else set()
    )
    prefixes = [name.removesuffix("weight_scale") for name in tensors if name.endswith(".weight_scale")]
    packed = [name for name in tensors if name.endswith(".weight_packed")]
    for name in packed:
        if name.removesuffix("weight_packed") not in prefixes:
            raise disagree(tensors[name], "has no weight_scale beside it")
    found = dict(tensors)
    for prefix in prefixes:
        module = Module(prefix, tensors)
        if prefix[:-1] in ignored:
            raise disagree(
                tensors[f"{prefix}weight_scale"], "is of a module that quantization_config ignores"
            )
        for part in PARTS:
            found.pop(prefix + part, None)
        is_float = floating.is_float(module)
        found[f"{prefix}weight"] = (
            floating.float_weight(module, floats) if is_float else _weight(module, integers)
        )
    return found


def _schemes(config: Config) -> tuple[list[tuple[str | None, Mapping[str, Any]]], list[Mapping[str, Any]]]:
    """Of each group of the configuration: (format, arguments of the weights) of integers, arguments of
    floats.
    """
    for key in ("transform_config", "sparsity_config"):
        held = config.get(key)
        if held and not (isinstance(held, Mapping) and held.get("format") == "dense"):
            raise UnsupportedError(
                f"the compressed-tensors checkpoint has a {key}", remedy="give one that is quantized only"
            )
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise InputError("quantization_config has no config_groups", remedy="download config.json again")
    integers: list[tuple[str | None, Mapping[str, Any]]] = []
    floats: list[Mapping[str, Any]] = []
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if weights is None:
            continue
        layout = group.get("format") or config.get("format")
        kind = weights.get("type", "int") if isinstance(weights, Mapping) else "?"
        bits = weights.get("num_bits") if isinstance(weights, Mapping) else None
        if kind == "float" and floating.LAYOUTS.get(str(layout or "mixed-precision")) in (0, bits):
            floats.append(weights)
        elif kind == "int" and layout in (None, *FORMATS):
            integers.append((layout, weights))
        else:
            raise UnsupportedError(
                f"group {name!r} of the compressed-tensors checkpoint has {kind} weights of {bits} bits in "
                f"the format {layout!r}",
                remedy=f"give one of the formats {', '.join((*FORMATS[:2], *floating.LAYOUTS))}",
            )
    return integers, floats


def _weight(module: Module, schemes: list[tuple[str | None, Mapping[str, Any]]]) -> DequantizedTensor:
    packed = module.has("weight_packed")
    if packed:
        words = module.get("weight_packed", 2, "int32")
        shape = module.get("weight_shape", 1, "int64", "int32")
        expect_shape(shape, (2,), "a matrix")
        n, k = (int(i) for i in shape.read())
        if n != words.shape[0] or not 0 < k <= words.shape[1] * 16:
            raise disagree(shape, f"says [{n}, {k}], weight_packed has the shape {list(words.shape)}")
    else:
        words = module.get("weight", 2, "int8")
        n, k = words.shape
    scheme = _scheme(module, words, k, packed, schemes)
    bits = int(scheme["num_bits"])
    codes: LazyTensor = PackedAlongRows(words, bits, k) if packed else SignedBytes(words)
    scale, size = _scale(module, n, k, scheme)
    columns = None
    if module.has("weight_g_idx"):
        columns = column_order(module.get("weight_g_idx", 1, "int32", "int64"), k, size)
        codes = PermutedColumns(codes, columns) if columns is not None else codes
    points = _zero_points(module, n, scale.shape[1], bits, scheme, packed)
    quant = Quantization(bits if packed else 8, size, points is None, scale.dtype)
    return DequantizedTensor(QuantizedTensors(quant, codes, scale, points, columns), words.source)


def _scheme(
    module: Module,
    words: LazyTensor,
    k: int,
    packed: bool,
    schemes: list[tuple[str | None, Mapping[str, Any]]],
) -> Mapping[str, Any]:
    """The group's arguments that describe these tensors."""
    wanted = "pack-quantized" if packed else "int-quantized"
    reasons: list[str] = []
    for layout, weights in schemes:
        bits, symmetric = weights.get("num_bits"), weights.get("symmetric", True)
        if not isinstance(bits, int) or not 2 <= bits <= 8:
            reasons.append(f"{bits} bits")
        elif layout not in (None, "mixed-precision", wanted) and not (
            not packed and layout == "naive-quantized"
        ):
            reasons.append(f"the format {layout}")
        elif packed and words.shape[1] != words_for(k, bits):
            reasons.append(f"{bits} bits, hence {words_for(k, bits)} words a row")
        elif symmetric is not True and not module.has("weight_zero_point"):
            reasons.append("zero points, and there are none")
        elif _groups(weights, k) not in (None, module.get("weight_scale", *_scale_rank(module)).shape[-1]):
            reasons.append(f"{_groups(weights, k)} groups a row")
        else:
            return weights
    raise disagree(words, f"({wanted}) fits no group of quantization_config: {'; '.join(reasons) or 'none'}")


def _scale_rank(module: Module) -> tuple[Any, ...]:
    stored = module.tensors[module.prefix + "weight_scale"]
    return (min(max(len(stored.shape), 1), 2), *FLOATS)


def _groups(weights: Mapping[str, Any], k: int) -> int | None:
    """Scales a row, by the strategy; None where it does not say."""
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if strategy in ("tensor", "channel") or size == -1:
        return 1
    return -(-k // size) if isinstance(size, int) and size > 0 else None


def _scale(module: Module, n: int, k: int, scheme: Mapping[str, Any]) -> tuple[LazyTensor, int]:
    """Scales [N, G], and the columns of a group."""
    stored = module.get("weight_scale", *_scale_rank(module))
    groups = stored.shape[-1] if len(stored.shape) == 2 else 1
    size = scheme.get("group_size")
    size = (
        size
        if isinstance(size, int) and size > 0 and scheme.get("strategy") not in ("tensor", "channel")
        else k
    )
    size = min(size, k)
    if -(-k // size) != groups:
        raise disagree(stored, f"has {groups} scales a row, groups of {size} ask for {-(-k // size)}")
    if len(stored.shape) == 1 or stored.shape[0] == 1:
        if stored.shape[0] != 1:
            raise disagree(stored, f"has the shape {list(stored.shape)}, {n} rows ask for [{n}, {groups}]")
        return scales_of(
            stored, (n, groups), lambda one: np.broadcast_to(one.reshape(1, groups), (n, groups))
        ), size
    expect_shape(stored, (n, groups), f"{n} rows")
    return RowScales(stored), size


def _zero_points(
    module: Module, n: int, groups: int, bits: int, scheme: Mapping[str, Any], packed: bool
) -> LazyTensor | None:
    """uint8 [N, G], shifted as the codes are; None where all are the middle."""
    if not module.has("weight_zero_point"):
        return None
    name = module.prefix + "weight_zero_point"
    stored = module.tensors[name]
    shift = 1 << (bits - 1 if packed else 7)
    if stored.dtype == "int32" and packed and len(stored.shape) == 2:
        expect_shape(stored, (words_for(n, bits), groups), f"{bits} bits and {n} rows")

        def points() -> Array:
            return unpack_stream(stored.read().T, bits, n).T

    else:
        stored = module.get("weight_zero_point", min(max(len(stored.shape), 1), 2), "int8")
        if stored.shape not in ((n, groups), (1,), (1, 1)):
            raise disagree(stored, f"has the shape {list(stored.shape)}, the scales ask for [{n}, {groups}]")

        def points() -> Array:
            shifted = (stored.read().astype(np.int16) + shift).astype(np.uint8)
            return np.broadcast_to(shifted, (n, groups))

    if (points() == shift).all():
        return None
    if scheme.get("symmetric", True) is True:
        raise disagree(stored, "is not zero, though quantization_config says symmetric")
    return Small((n, groups), "uint8", stored.source, points)
