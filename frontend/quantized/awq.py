"""AWQ checkpoints, as AutoAWQ writes them, 4 bits: w[n, k] = scales · (code - zero).

    version   qweight                qzeros                    scales
    gemm      int32 [K, N / 8]       int32 [K / g, N / 8]      float16 [K / g, N]
    gemv      int32 [N, K / 8]       int32 [N, Z]              float16 [N, 8 · Z]

The eight codes of a GEMM word are those of columns 0, 2, 4, 6, 1, 3, 5, 7 of eight, lowest bits first; GEMV's
are in order, and its Z is ceil(K / g / 8) rounded up to a multiple of 2 (g = 64) or 4 (g = 32), the rest
unused. https://github.com/casper-hansen/AutoAWQ (awq/modules/linear/gemm.py, gemv.py)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from ...ir.errors import UnsupportedError
from ...ir.types import Quantization
from ...ir.weights import DequantizedTensor, LazyTensor, QuantizedTensors
from .checks import Config, Module, disagree, expect_shape, groups_of, integer
from .packing import PackedAlongRows, Small, scales_of, unpack_stream

Array = np.ndarray[Any, Any]
PARTS: Final = ("qweight", "qzeros", "scales")
AWQ_ORDER: Final = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where each of eight columns stands in its word."""


def open_awq(tensors: Mapping[str, LazyTensor], config: Config) -> dict[str, LazyTensor]:
    """The tensors with every quantized module's parts replaced by its `weight`.

    Raises InputError where configuration and tensors disagree, UnsupportedError for another packing.
    """
    version = str(config.get("version", config.get("checkpoint_format", "gemm"))).lower()
    if version not in ("gemm", "gemv"):
        raise UnsupportedError(
            f"the AWQ checkpoint is packed as {version!r}", remedy='give one of version "gemm" or "gemv"'
        )
    prefixes = [name.removesuffix("qweight") for name in tensors if name.endswith(".qweight")]
    used = {prefix + part for prefix in prefixes for part in PARTS}
    found = {name: tensor for name, tensor in tensors.items() if name not in used}
    read = _gemm if version == "gemm" else _gemv
    for prefix in prefixes:
        module = Module(prefix, tensors)
        words = module.get("qweight", 2, "int32")
        bits = integer(config, "bits", "w_bit", default=4)
        if bits != 4:
            raise disagree(words, f"has codes of {bits} bits by quantization_config; AWQ has 4")
        found[f"{prefix}weight"] = read(module, words, integer(config, "group_size", "q_group_size"))
    return found


def _gemm(module: Module, words: LazyTensor, size: int) -> DequantizedTensor:
    zeros = module.get("qzeros", 2, "int32")
    scales = module.get("scales", 2, "float16", "bfloat16", "float32")
    k, n = words.shape[0], words.shape[1] * 8
    groups = groups_of(k, size, scales)
    expect_shape(scales, (groups, n), f"groups of {size}")
    expect_shape(zeros, (groups, n // 8), f"groups of {size}")
    scale = scales_of(scales, (n, groups), lambda stored: stored.T)
    points = Small((n, groups), "uint8", zeros.source, lambda: columns_of(zeros.read()).T)
    quant = Quantization(4, k if size == -1 else min(size, k), False, scale.dtype)
    return DequantizedTensor(QuantizedTensors(quant, GemmCodes(words), scale, points), words.source)


def columns_of(words: Array, order: tuple[int, ...] = AWQ_ORDER) -> Array:
    """int32 [rows, N / 8] → uint8 [rows, N]. `order`: where each of eight columns stands in its word."""
    nibbles = unpack_stream(words, 4, words.shape[1] * 8)
    return nibbles.reshape(len(words), words.shape[1], 8)[:, :, order].reshape(nibbles.shape)


class GemmCodes:
    """Codes uint8 [N, K] of GEMM words int32 [K, N / 8]: eight rows of codes stand in one column of words.

    A read of some rows needs all words; they are kept until the last row was read.
    """

    dtype: str = "uint8"

    def __init__(
        self, words: LazyTensor, order: tuple[int, ...] = AWQ_ORDER, rows: int | None = None
    ) -> None:
        """`rows`: N, where the last words are not full."""
        self._words, self._order = words, order
        self.shape: tuple[int, ...] = (words.shape[1] * 8 if rows is None else rows, words.shape[0])
        self.source = words.source
        self._kept: Array | None = None

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        first, last, _ = slice(start, stop).indices(self.shape[0])
        last = max(first, last)
        kept = self._kept  # once: another thread may be at the last row
        words = self._words.read() if kept is None else kept
        self._kept = None if last >= self.shape[0] else words
        base = first // 8
        codes = columns_of(words[:, base : -(-last // 8)], self._order)
        return np.ascontiguousarray(codes[:, first - 8 * base : last - 8 * base].T)


def _gemv(module: Module, words: LazyTensor, size: int) -> DequantizedTensor:
    zeros = module.get("qzeros", 2, "int32")
    scales = module.get("scales", 2, "float16", "bfloat16", "float32")
    n, k = words.shape[0], words.shape[1] * 8
    groups = groups_of(k, size, scales)
    multiple = 8 * {64: 2, 32: 4}.get(size, 1)
    width = -(-groups // multiple) * multiple // 8
    expect_shape(zeros, (n, width), f"groups of {size}")
    expect_shape(scales, (n, width * 8), f"groups of {size}")
    scale = scales_of(scales, (n, groups), lambda stored: stored[:, :groups])
    points = PackedAlongRows(zeros, 4, groups)
    quant = Quantization(4, k if size == -1 else min(size, k), False, scale.dtype)
    codes = PackedAlongRows(words, 4, k)
    return DequantizedTensor(QuantizedTensors(quant, codes, scale, points), words.source)
