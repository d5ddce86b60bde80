"""Checkpoints that bitsandbytes quantized while transformers loaded them, as `save_pretrained` writes them.

NF4 (`load_in_4bit`), for a linear layer [N, K], over the flattened weight in blocks of 64:

    weight             uint8 [ceil(N · K / 2), 1]   two codes a byte, the first in the high half
    weight.absmax      float32 [blocks], or uint8 with double quantization:
                       absmax = nested_quant_map[absmax] · nested_absmax[block // 256] + nested_offset
    weight.quant_map   float32 [16], the values of the codes
    weight.quant_state.bitsandbytes__nf4   uint8, JSON: shape, blocksize, nested_offset, …

LLM.int8 (`load_in_8bit`): weight int8 [N, K], SCB float32 [N], w = weight · SCB / 127.

Dettmers et al. 2023 (QLoRA), section 3; 2022 (LLM.int8), section 3.
https://github.com/bitsandbytes-foundation/bitsandbytes (functional.py, QuantState)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from ...ir.codebooks import codebook
from ...ir.dtypes import itemsize
from ...ir.errors import InputError, UnsupportedError
from ...ir.types import Quantization
from ...ir.weights import DequantizedTensor, LazyTensor, QuantizedTensors, num_bytes
from .checks import Config, Module, disagree, expect_shape, integer
from .packing import SignedBytes, Small, scales_of

Array = np.ndarray[Any, Any]
STATE: Final = "quant_state.bitsandbytes__"
PARTS: Final = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", f"{STATE}nf4")
SMALLEST_GROUP: Final = 8
_MOST_STATE_BYTES: Final = 1 << 16


def open_bitsandbytes(tensors: Mapping[str, LazyTensor], config: Config) -> dict[str, LazyTensor]:
    """The tensors with every quantized module's parts replaced by its `weight`.

    Raises InputError where configuration and tensors disagree, UnsupportedError for FP4.
    """
    fp4 = next((name for name in tensors if name.endswith(f".{STATE}fp4")), None)
    if fp4 is not None:
        raise UnsupportedError(
            f"{tensors[fp4].source}: FP4 codes of bitsandbytes are not read",
            remedy="give the unquantized model, or one quantized to NF4",
        )
    found = dict(tensors)
    ending = f".{STATE}nf4"
    for name in [name for name in tensors if name.endswith(ending)]:
        module = Module(name.removesuffix(ending) + ".", tensors)
        for part in PARTS:
            found.pop(module.prefix + part, None)
        found[module.prefix[:-1]] = _nf4(module, tensors.get(module.prefix[:-1]))
    for name in [name for name in tensors if name.endswith(".SCB")]:
        module = Module(name.removesuffix("SCB"), tensors)
        found.pop(name)
        found.pop(f"{module.prefix}weight_format", None)
        found[f"{module.prefix}weight"] = _int8(module)
    return found


def _state(module: Module) -> dict[str, Any]:
    """The JSON that stands in a tensor of bytes, and what must be in it."""
    stored = module.get(f"{STATE}nf4", 1, "uint8")
    if num_bytes(stored) > _MOST_STATE_BYTES:
        raise disagree(stored, f"has {num_bytes(stored)} bytes, more than a description needs")
    try:
        state = json.loads(stored.read().tobytes().decode("utf-8"))
    except (ValueError, RecursionError):
        raise InputError(f"{stored.source} is no JSON", remedy="download the file again") from None
    shape = state.get("shape") if isinstance(state, dict) else None
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(i) is int and i > 0 for i in shape):
        raise disagree(stored, f"describes a weight of shape {shape!r}")
    if state.get("quant_type") != "nf4":
        raise disagree(stored, f"says {state.get('quant_type')!r} and is named nf4")
    return state


def _nf4(module: Module, words: LazyTensor | None) -> DequantizedTensor:
    state = _state(module)
    if words is None:
        raise disagree(f"tensor {module.prefix[:-1]}", "is missing")
    n, k = state["shape"]
    block = integer(state, "blocksize")
    if num_bytes(words) < -(-n * k // 2) or num_bytes(words) - -(-n * k // 2) >= itemsize(words.dtype):
        raise disagree(words, f"has {num_bytes(words)} bytes, [{n}, {k}] of 4 bits takes {-(-n * k // 2)}")
    if block < 1 or block & (block - 1):
        raise disagree(words, f"has blocks of {block}")
    table = module.get("quant_map", 1, "float32")
    if not np.array_equal(table.read(), codebook("nf4")):
        raise disagree(table, "holds other values than NF4 has")
    blocks = -(-n * k // block)
    absmax = _absmax(module, state, blocks)
    # Blocks run over the end of rows where K is no multiple of them. A smaller group, which divides both,
    # always lies in one block.
    size = math.gcd(k, block)
    if size < SMALLEST_GROUP:
        raise UnsupportedError(
            f"{words.source}: rows of {k} and blocks of {block} have no group of {SMALLEST_GROUP} in common",
            remedy="give the unquantized model",
        )

    def scales() -> Array:
        return absmax()[np.arange(n * k // size) * size // block].reshape(n, k // size)

    quant = Quantization(4, size, True, "float32", codebook="nf4")
    scale = Small((n, k // size), "float32", f"{words.source}.absmax", scales)
    return DequantizedTensor(QuantizedTensors(quant, _Nibbles(words, n, k), scale), words.source)


def _absmax(module: Module, state: Mapping[str, Any], blocks: int) -> Any:
    """A function that gives float32 [blocks]; every tensor that it reads was checked."""
    stored = module.get("absmax", 1, "uint8", "float32")
    expect_shape(stored, (blocks,), f"{state['shape']} in blocks of {state['blocksize']}")
    if stored.dtype == "float32":
        return lambda: _finite(stored, stored.read())
    size = integer(state, "nested_blocksize")
    offset = state.get("nested_offset")
    if size < 1 or not isinstance(offset, float | int) or not math.isfinite(offset):
        raise disagree(stored, f"has nested blocks of {size} and the offset {offset!r}")
    nested, table = module.get("nested_absmax", 1, "float32"), module.get("nested_quant_map", 1, "float32")
    expect_shape(nested, (-(-blocks // size),), f"{blocks} blocks in blocks of {size}")
    expect_shape(table, (256,), "a table of bytes")

    def read() -> Array:
        outer = np.repeat(nested.read(), size)[:blocks]
        return _finite(stored, table.read()[stored.read()] * outer + np.float32(offset))

    return read


def _finite(stored: LazyTensor, values: Array) -> Array:
    if not np.isfinite(values).all():
        raise InputError(f"{stored.source} holds NaN or infinite scales", remedy="the checkpoint is damaged")
    return values


class _Nibbles:
    """Codes uint8 [N, K] of the flattened weight, two a byte, whatever type the bytes are stored as."""

    dtype: str = "uint8"

    def __init__(self, words: LazyTensor, n: int, k: int) -> None:
        self._words = words
        self._item = num_bytes(words) // words.shape[0]
        self.shape: tuple[int, ...] = (n, k)
        self.source = words.source

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        first, last, _ = slice(start, stop).indices(self.shape[0])
        k = self.shape[1]
        begin, end = first * k, max(first, last) * k
        row = begin // 2 // self._item
        stored = self._words.read(row, (end + 1) // 2 // self._item + 1)
        data = np.ascontiguousarray(stored).reshape(-1).view(np.uint8)
        codes = np.stack([data >> 4, data & 15], axis=1).reshape(-1)
        skip = begin - row * self._item * 2
        return np.ascontiguousarray(codes[skip : skip + end - begin].reshape(-1, k))


def _int8(module: Module) -> DequantizedTensor:
    stored, scb = module.get("weight", 2, "int8"), module.get("SCB", 1, "float32", "float16")
    n, k = stored.shape
    expect_shape(scb, (n,), f"{n} rows")
    scale = scales_of(scb, (n, 1), lambda rows: (rows.astype(np.float32) / np.float32(127)).reshape(n, 1))
    quant = Quantization(8, k, True, scale.dtype)
    return DequantizedTensor(QuantizedTensors(quant, SignedBytes(stored), scale), stored.source)
