"""GPTQ checkpoints, as AutoGPTQ and GPTQModel write them.

For a linear layer [N, K] in groups of g columns:

    qweight  int32 [K · bits / 32, N]   codes, a stream of bits down each column
    qzeros   int32 [K / g, N · bits / 32]   zero points, a stream along each row
    scales   float [K / g, N]
    g_idx    int32 [K]   the group of each column; not ascending with desc_act ("act-order")

and w[n, k] = scales[g_idx[k], n] · (code - zero). `checkpoint_format` "gptq" (the first version) stores
zero - 1, "gptq_v2" the zero point itself. https://github.com/ModelCloud/GPTQModel
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from ...ir.errors import UnsupportedError
from ...ir.types import Quantization
from ...ir.weights import DequantizedTensor, LazyTensor, QuantizedTensors
from .checks import Config, Module, column_order, disagree, expect_shape, groups_of, integer
from .packing import PackedAlongColumns, PermutedColumns, Small, scales_of, unpack_stream, words_for

Array = np.ndarray[Any, Any]
PARTS: Final = ("qweight", "qzeros", "scales", "g_idx")
BITS: Final = (2, 3, 4, 8)
# What GPTQModel subtracts from each word of v2 zeros when it writes v1, and adds when it reads, carries
# included (utils/model.py, convert_gptq_v1_to_v2_format_module). At 3 bits these are no ones in every field;
# its files are nevertheless read back by exactly this.
_GPTQMODEL_STEP: Final[dict[int, tuple[int, ...]]] = {
    2: (0x55555555,),
    3: (0x24924924, 0x92492492, 0x49249249),
    4: (0x11111111,),
    8: (0x01010101,),
}


def open_gptq(tensors: Mapping[str, LazyTensor], config: Config) -> dict[str, LazyTensor]:
    """The tensors with every quantized module's parts replaced by its `weight`.

    Raises InputError where configuration and tensors disagree, UnsupportedError for another packing.
    """
    layout = config.get("checkpoint_format", "gptq")
    if layout not in ("gptq", "gptq_v2") or config.get("is_marlin_format"):
        raise UnsupportedError(
            f"the GPTQ checkpoint is packed as {layout!r} for one kind of kernel",
            remedy='give a checkpoint of format "gptq" or "gptq_v2"',
        )
    if config.get("pack_dtype", "int32") not in ("int32", "torch.int32"):
        raise UnsupportedError(
            f"the GPTQ checkpoint is packed in {config['pack_dtype']}", remedy="give one packed in int32"
        )
    prefixes = [name.removesuffix("qweight") for name in tensors if name.endswith(".qweight")]
    used = {prefix + part for prefix in prefixes for part in PARTS}
    found = {name: tensor for name, tensor in tensors.items() if name not in used}
    for prefix in prefixes:
        found[f"{prefix}weight"] = _weight(Module(prefix, tensors), config, layout)
    return found


def _weight(module: Module, config: Config, layout: str) -> DequantizedTensor:
    words = module.get("qweight", 2, "int32")
    scales = module.get("scales", 2, "float16", "bfloat16", "float32")
    zeros = module.get("qzeros", 2, "int32")
    order = module.get("g_idx", 1, "int32", "int64") if module.has("g_idx") else None
    n = words.shape[1]
    bits, k = _bits(words, order, config)
    size = integer(config, "group_size")
    if config.get("dynamic"):  # rules by module, as regular expressions; the tensors say what came of them
        size = -1 if scales.shape[0] == 1 else -(-k // max(1, scales.shape[0]))
    groups = groups_of(k, size, scales)
    size = k if size == -1 else min(size, k)
    expect_shape(scales, (groups, n), f"groups of {size}")
    expect_shape(zeros, (groups, words_for(n, bits)), f"{bits} bits and groups of {size}")
    columns = None if order is None else column_order(order, k, size)
    codes: LazyTensor = PackedAlongColumns(words, bits, k)
    if columns is not None:
        codes = PermutedColumns(codes, columns)
    scale = scales_of(scales, (n, groups), lambda stored: stored.T)
    symmetric, points = _zero_points(zeros, bits, n, config, layout)
    quant = Quantization(bits, size, symmetric, scale.dtype)
    return DequantizedTensor(QuantizedTensors(quant, codes, scale, points, columns), words.source)


def _bits(words: LazyTensor, order: LazyTensor | None, config: Config) -> tuple[int, int]:
    """Bits of a code, and K. The configuration decides, unless it has rules by module (`dynamic`)."""
    bits = integer(config, "bits")
    if order is not None and config.get("dynamic"):
        bits = next((b for b in BITS if words_for(order.shape[0], b) == words.shape[0]), bits)
    if bits not in BITS:
        raise disagree(words, f"has codes of {bits} bits by quantization_config; GPTQ has 2, 3, 4 or 8")
    k = order.shape[0] if order is not None else words.shape[0] * 32 // bits
    expect_shape(words, (words_for(k, bits), words.shape[1]), f"{bits} bits and {k} columns")
    return bits, k


def _zero_points(
    stored: LazyTensor, bits: int, n: int, config: Config, layout: str
) -> tuple[bool, LazyTensor | None]:
    """Whether all zero points are the middle, and otherwise the tensor of them, uint8 [N, G]."""
    symmetric = config.get("sym") is True and not config.get("dynamic")
    decodings = _decodings(bits, config, layout)
    middle = 1 << (bits - 1)
    for decode in decodings:
        if (decode(stored.read(), bits, n) == middle).all():
            return True, None
    if symmetric:
        raise disagree(stored, "has zero points beside the middle, though quantization_config says sym")
    chosen = decodings[0]
    shape = (n, stored.shape[0])
    return False, Small(shape, "uint8", stored.source, lambda: chosen(stored.read(), bits, n).T)


def _decodings(bits: int, config: Config, layout: str) -> list[Any]:
    """Ways to read `qzeros`, likeliest first; the two of v1 differ at 3 bits and where a zero point was 0."""
    if layout == "gptq_v2":
        return [unpack_stream]
    meta = config.get("meta")
    quantizer = str(meta.get("quantizer", "")) if isinstance(meta, Mapping) else ""
    by_word = "gptqmodel" in quantizer.lower()
    return [_plus_one_by_word, _plus_one] if by_word else [_plus_one, _plus_one_by_word]


def _plus_one(words: Array, bits: int, n: int) -> Array:
    """AutoGPTQ: one is added to each field, and what leaves the field is lost."""
    return (unpack_stream(words, bits, n) + np.uint8(1)) & np.uint8((1 << bits) - 1)


def _plus_one_by_word(words: Array, bits: int, n: int) -> Array:
    """GPTQModel: ones are added to each word, with carries from field to field."""
    step = np.array(_GPTQMODEL_STEP[bits], np.uint32)
    steps = np.resize(step, words.shape[1])
    return unpack_stream((words.view(np.uint32) + steps).view(np.int32), bits, n)
