"""NF4 over the graph.

    linear(x, w)        → quantized_linear(x, q, scale)       NF4's values, blocks of 64
    embedding, head     → 8 bits, round to nearest, as every other scheme has them

Parts of a merged layer (Q, K, V) are quantized each on its own, as bitsandbytes quantizes them: the mean that
double quantization takes off is of one weight. The artifact holds what double quantization gives as float32
scales, one a block: the values are those of bitsandbytes, at 4.5 bits a weight where its file takes 4.127.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...ir.core import Graph, Value
from ...ir.errors import InputError
from ...ir.types import Quantization
from ...ir.weights import LazyTensor, QuantizedTensors, read_chunks
from ..base import Pass, PassContext, PassResult
from ..derived import ConcatRows
from ..registry import Quantizer
from .attach import attach_quantized, is_head, is_quantizable
from .moe import fall_back
from .nearest import QuantizedPart, QuantizedWeight
from .nf4 import BLOCK, block_absmax, dequantize_absmax, quantize_absmax, quantize_rows, row_scales

Array = np.ndarray[Any, Any]
SMALLEST_GROUP = 8
_CHUNK_BYTES = 8 << 20
_HEAD = Quantization(8, 64, True)
_EXPERTS = Quantization(4, 64, False)


class Nf4Weight:
    """A weight [N, K] that becomes codes as its rows are read.

    The absmax of all blocks are needed before the first row; they are found in one run over the weight and
    kept until the last scale was read.
    """

    def __init__(self, base: LazyTensor) -> None:
        self.base = base
        self.n, self.k = base.shape
        self.group_size = math.gcd(self.k, BLOCK)
        if self.group_size < SMALLEST_GROUP:
            raise InputError(
                f"{base.source}: rows of {self.k} have no group of {SMALLEST_GROUP} in common with NF4's "
                f"blocks of {BLOCK}",
                remedy="choose another scheme, such as --quant int4",
            )
        self._absmax: Array | None = None

    def absmax(self) -> Array:
        """Before the second quantization: what codes are made with."""
        absmax = self._absmax  # once: another thread may have it forgotten
        if absmax is None:
            pieces = read_chunks(self.base, _CHUNK_BYTES)
            absmax = self._absmax = block_absmax(pieces, self.n * self.k, self.base.source)
        return absmax

    def forget(self) -> None:
        self._absmax = None


class Nf4Codes:
    """uint8 [N, K]."""

    dtype: str = "uint8"

    def __init__(self, weight: Nf4Weight) -> None:
        self.weight = weight
        self.shape: tuple[int, ...] = (weight.n, weight.k)
        self.source = f"codes({weight.base.source})"

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        w = self.weight
        first, last, _ = slice(start, stop).indices(w.n)
        step = max(1, _CHUNK_BYTES // (4 * w.k))
        out = np.empty((max(0, last - first), w.k), np.uint8)
        for row in range(first, last, step):
            end = min(row + step, last)
            rows = w.base.read(row, end)
            out[row - first : end - first] = quantize_rows(rows, w.absmax(), row * w.k, w.n * w.k)
        return out


class Nf4Scales:
    """float32 [N, K / group]: absmax, quantized and dequantized again."""

    dtype: str = "float32"

    def __init__(self, weight: Nf4Weight) -> None:
        self.weight = weight
        self.shape: tuple[int, ...] = (weight.n, weight.k // weight.group_size)
        self.source = f"scale({weight.base.source})"

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        w = self.weight
        absmax = dequantize_absmax(quantize_absmax(w.absmax()))
        if slice(start, stop).indices(w.n)[1] >= w.n:
            w.forget()
        return np.ascontiguousarray(row_scales(absmax, w.n, w.k, w.group_size)[start:stop])


def nf4_parts(data: LazyTensor) -> QuantizedTensors:
    """The parts of a float weight [N, K] in NF4, each of merged weights on its own.

    Raises InputError where K is a multiple of none of 8, 16, 32, 64.
    """
    weights = [Nf4Weight(part) for part in flat_parts(data)]
    codes: list[LazyTensor] = [Nf4Codes(w) for w in weights]
    scales: list[LazyTensor] = [Nf4Scales(w) for w in weights]
    quant = Quantization(4, weights[0].group_size, True, "float32", codebook="nf4")
    if len(weights) == 1:
        return QuantizedTensors(quant, codes[0], scales[0])
    return QuantizedTensors(quant, ConcatRows(codes), ConcatRows(scales))


def flat_parts(data: LazyTensor) -> list[LazyTensor]:
    """The weights that a merged weight consists of, from top to bottom."""
    return [one for p in data.parts for one in flat_parts(p)] if isinstance(data, ConcatRows) else [data]


@dataclass(frozen=True)
class QuantizeNf4(Pass):
    """NF4 for linear layers, 8 bits for embeddings and the head."""

    name = "quantize-nf4"
    requires = "fused"
    ensures = "quantized"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        heads = {weight for weight in graph.weights.values() if is_head(graph, weight)}
        count = 0
        for weight in list(graph.weights.values()):
            if not is_quantizable(weight) or weight.weight is None:
                continue
            if weight in heads:
                _quantize_head(graph, weight, weight.weight)
            else:
                parts = nf4_parts(weight.weight)
                attach_quantized(graph, weight, parts.quant, parts.codes, parts.scale, None)
                count += 1
        said = fall_back(graph, "nf4", _EXPERTS.bits, _EXPERTS.group_size, _EXPERTS.symmetric)
        graph.drop_dead()
        if not count:
            return PassResult(graph, bool(said), said or ["no linear layer was found to quantize"])
        note = "nf4: scales are stored as float32, the values of double quantization at 4.5 bits a weight"
        return PassResult(graph, True, [note, *said])


def _quantize_head(graph: Graph, weight: Value, data: LazyTensor) -> None:
    quant = Quantization(_HEAD.bits, min(_HEAD.group_size, data.shape[1]), True)
    rows = QuantizedWeight(data, quant)
    attach_quantized(graph, weight, quant, QuantizedPart(rows, "codes"), QuantizedPart(rows, "scale"), None)


class Nf4(Quantizer):
    """`nf4`: blocks of 64, double quantization."""

    forms = ("nf4",)
    head = None

    def passes(self, scheme: str) -> list[Pass] | None:
        return [QuantizeNf4()] if scheme == "nf4" else None
