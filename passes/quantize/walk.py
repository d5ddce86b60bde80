"""Which weights are quantized, and how the graph changes.

    linear(x, w)        → quantized_linear(x, q, scale, zero_point)
    embedding(ids, w)   → quantized_embedding(ids, q, scale, zero_point)

A weight that several ops read (tied embeddings) is quantized once. Embeddings and the head that shares or
faces them are kept at 8 bits: at 4 they lose more than all other layers of a small model together.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...ir.core import Graph, Op, Value
from ...ir.errors import InputError
from ...ir.ops.nn import Embedding, Linear
from ...ir.ops.quant import QuantizedEmbedding, QuantizedLinear
from ...ir.types import Quantization, TensorType
from ...ir.weights import LazyTensor
from ..base import Pass, PassContext, PassResult
from ..registry import Quantizer
from .rtn import Quantized, quantize_rtn

Array = np.ndarray[Any, Any]


class _LastChunk:
    """The most recently quantized rows of any weight: targets read codes, scales and zero points of the same
    rows one after the other.
    """

    def __init__(self) -> None:
        self.key: tuple[int, int, int] | None = None
        self.value: Quantized | None = None

    def get(self, key: tuple[int, int, int], make: Callable[[], Quantized]) -> Quantized:
        if self.key != key or self.value is None:
            self.value = None  # freed before the new one is made
            self.value = make()
            self.key = key
        return self.value


class QuantizedPart:
    """Codes, scales or zero points of a weight, quantized as its rows are read.

    Rows are independent in round to nearest.
    """

    def __init__(self, base: LazyTensor, part: str, quant: Quantization, cache: _LastChunk) -> None:
        n, k = base.shape
        groups = -(-k // quant.group_size)
        self.base, self.part, self.quant, self.cache = base, part, quant, cache
        self.shape: tuple[int, ...] = (n, k) if part == "codes" else (n, groups)
        self.dtype = "float16" if part == "scale" else "uint8"
        self.source = f"{part}({base.source})"

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        end = self.shape[0] if stop is None else min(stop, self.shape[0])
        q = self.cache.get(
            (id(self.base), start, end),
            lambda: quantize_rtn(
                self.base.read(start, end),
                bits=self.quant.bits,
                group_size=self.quant.group_size,
                symmetric=self.quant.symmetric,
                what=self.base.source,
            ),
        )
        value = getattr(q, self.part)
        assert value is not None
        return value


@dataclass(frozen=True)
class QuantizeRtn(Pass):
    """Round-to-nearest quantization of linear layers and embeddings.

    Options: `bits` of linear layers; `group` along K, 0 for whole rows; `symmetric`; `head_bits` of
    embeddings and of the head (symmetric).
    """

    name = "quantize-rtn"
    requires = "fused"
    ensures = "quantized"
    bits: int = 4
    group: int = 32
    symmetric: bool = False
    head_bits: int = 8

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        cache = _LastChunk()
        notes: list[str] = []
        count = 0
        for weight in list(graph.weights.values()):
            users = weight.users
            if not users or not all(isinstance(u, (Linear, Embedding)) and u.weight is weight for u in users):
                continue
            parts = self._quantize(graph, weight, is_head(graph, weight), cache)
            for user in users:
                replacement = self._replacement(user, parts)
                replacement.loc = user.loc
                graph.insert(replacement, before=user)
                graph.replace(user, [replacement.result])
            count += 1
        graph.drop_dead()
        if not count:
            notes.append("no linear layer or embedding was found to quantize")
        return PassResult(graph, count > 0, notes)

    def _quantize(
        self, graph: Graph, weight: Value, head: bool, cache: _LastChunk
    ) -> tuple[Value, Value, Value | None]:
        assert weight.weight is not None
        _, k = weight.weight.shape
        bits, symmetric = (self.head_bits, True) if head else (self.bits, self.symmetric)
        group = min(self.group or k, k)
        quant = Quantization(bits, group, symmetric)
        data = weight.weight

        def part(name: str, suffix: str, type: TensorType | None = None) -> Value:
            return graph.add_weight(f"{weight.name}.{suffix}", QuantizedPart(data, name, quant, cache), type)

        codes = part("codes", "q", TensorType("uint8", tuple(data.shape), quant))
        return codes, part("scale", "scale"), None if symmetric else part("zero_point", "zero_point")

    @staticmethod
    def _replacement(user: Op, parts: tuple[Value, Value, Value | None]) -> Op:
        codes, scale, zero = parts
        if isinstance(user, Linear):
            return QuantizedLinear(user.x, codes, scale, zero, user.bias)
        assert isinstance(user, Embedding)
        return QuantizedEmbedding(user.ids, codes, scale, zero)


def is_head(graph: Graph, weight: Value) -> bool:
    """Whether a weight is an embedding table or makes the logits: read by an embedding, or by the last linear
    layer before an output.
    """
    if any(isinstance(u, Embedding) for u in weight.users):
        return True
    for output in graph.outputs:
        op = output.producer
        while op is not None and not isinstance(op, Linear):
            op = op.operands[0].producer if op.operands else None
        if op is not None and op.weight is weight and graph.facts.get("kind") == "causal_lm":
            return True
    return False


class RoundToNearest(Quantizer):
    """`int8` (symmetric, a scale a row), `int4-gN`, `int4-gN-sym`; `int4` is `int4-g32`."""

    forms = ("int8", "int4", "int4-gN[-sym]")

    def passes(self, scheme: str) -> list[Pass] | None:
        if scheme == "int8":
            return [QuantizeRtn(bits=8, group=0, symmetric=True)]
        m = re.fullmatch(r"int4(?:-g(\d+))?(-sym)?", scheme)
        if m is None:
            return None
        group = int(m.group(1) or 32)
        if group < 8 or group % 8 or group > 1024:
            raise InputError(
                f"--quant {scheme}: group size {group}",
                remedy="use a multiple of 8 from 8 to 1024, such as 32, 64 or 128",
            )
        return [QuantizeRtn(bits=4, group=group, symmetric=m.group(2) is not None)]
