"""Checkpoints of integers of 2, 4 or 8 bits with a scale for each row, of linear layers and of embeddings.

    weight                uint8 [N, ceil(K · bits / 8)], or int8 [N, K] of 8 bits
    weight_scale          float32 [N, 1]
    embedding_quantized   the same of a table [V, D]
    embedding_scale       float32 [V, G], for each run of D / G columns

Bytes hold 4 or 2 weights of neighbouring columns, the first in the lowest bits, each 2^(bits-1) higher than
it is. How many bits a module has, the configuration says by patterns of its name; they are regular
expressions from a stranger, and are not evaluated: the model says how many columns a row of bytes has.

Scales of activations and of the cache stay unused: activations are what kernels here make of them. Of a table
the rows are stored, not what a model multiplies them by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from ...ir.types import Quantization
from ...ir.weights import DequantizedTensor, LazyTensor, QuantizedTensors
from .checks import Config, Module, disagree, expect_shape
from .packing import PackedAlongRows, RowScales, SignedBytes

Columns = Callable[[str], int | None]
"""How many columns the model's weight of a name has; None where it has none of that name."""
_UNUSED: Final = (
    ".input_activation_scale",
    ".output_activation_scale",
    ".k_cache_scale",
    ".v_cache_scale",
)
_KINDS: Final = {"weight": "weight_scale", "embedding_quantized": "embedding_scale"}
_IN_BYTES: Final = (2, 4)


def open_rows(tensors: Mapping[str, LazyTensor], config: Config, columns: Columns) -> dict[str, LazyTensor]:
    """The tensors with the parts of every quantized module replaced by its `weight`. Bytes of modules that
    the model has not, as of layers that take keys and values from others, stay what they are.

    Raises InputError where tensors and the model's shapes disagree.
    """
    found = {name: tensor for name, tensor in tensors.items() if not name.endswith(_UNUSED)}
    foreign = set[str]()
    for name in tensors:
        for codes, scale in _KINDS.items():
            if name.endswith(f".{scale}"):
                module = Module(name.removesuffix(scale), tensors)
                label = f"{module.prefix}weight"
                wide = columns(label)
                if wide is None:
                    foreign.add(module.prefix + codes)
                    continue
                made = _weight(module, codes, scale, wide)
                del found[name], found[module.prefix + codes]
                found[label] = made
    bare = (tensor for name, tensor in found.items() if name not in foreign)
    alone = next((tensor for tensor in bare if tensor.dtype in ("uint8", "int8")), None)
    if alone is not None:
        raise disagree(alone, f"is {alone.dtype} and has no scales beside it")
    return found


def _weight(module: Module, codes: str, scale: str, columns: int) -> DequantizedTensor:
    stored = module.get(codes, 2, "uint8", "int8")
    n, width = stored.shape
    bits, k = 8, width
    values: LazyTensor
    if stored.dtype == "int8":
        values = SignedBytes(stored)
    else:
        fitting = [b for b in _IN_BYTES if -(-columns * b // 8) == width]
        if len(fitting) != 1:
            raise disagree(stored, f"has {width} bytes a row, the model's weight has {columns} columns")
        bits, k = fitting[0], columns
        values = PackedAlongRows(stored, bits, k)
    scales = module.get(scale, 2, "float32", "bfloat16", "float16")
    groups = scales.shape[1]
    expect_shape(scales, (n, groups), f"{n} rows")
    if k % groups:
        raise disagree(scales, f"has {groups} scales a row, of {k} columns")
    scaled = RowScales(scales)
    quant = Quantization(bits, k // groups, True, scaled.dtype)
    return DequantizedTensor(QuantizedTensors(quant, values, scaled), stored.source)
