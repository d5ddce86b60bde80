"""Round to nearest over the graph: which weights, at how many bits. Embeddings and the head that shares or
faces them have a pass of their own (`heads.py`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...ir.core import Graph, Value
from ...ir.ops.nn import Embedding, Linear
from ...ir.ops.quant import QuantizedLinear
from ...ir.types import Quantization
from ...ir.weights import LazyTensor
from ..base import Pass, PassContext, PassResult
from ..registry import Quantizer
from .attach import attach_quantized, is_quantizable
from .options import check_grid, check_group
from .rtn import Quantized, dequantize, quantize_rtn

Array = np.ndarray[Any, Any]
CHUNK_BYTES = 2 << 20  # float32 rows that are quantized at a time: rounding makes several copies of them


class QuantizedWeight:
    """A weight that is quantized as its rows are read; rows are independent in round to nearest.

    Targets read all codes, then all scales, then all zero points. The scales and zero points that came with
    the codes are kept until they were read, so that each row is quantized once: they are a small part of the
    weight.
    """

    def __init__(self, base: LazyTensor, quant: Quantization) -> None:
        self.base, self.quant = base, quant
        self.rows, self.k = base.shape
        self.groups = -(-self.k // quant.group_size)
        self._kept: dict[str, Array] = {}
        self._known = np.zeros(0, dtype=bool)

    def read(self, part: str, start: int, stop: int) -> Array:
        """Rows of "codes", "scale" or "zero_point"."""
        if part in self._kept and self._known[start:stop].all():
            rows = self._kept[part][start:stop].copy()
            if stop == self.rows:
                del self._kept[part]
            return rows
        step = max(1, CHUNK_BYTES // (4 * max(1, self.k)))
        pieces: list[Array] = []
        for first in range(start, max(stop, start + 1), step):
            parts = self._quantized(first, min(first + step, stop))
            if part == "codes":
                self._keep(first, parts)
            pieces.append(parts[part])
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def round(self, rows: Array) -> None:
        """Write over rows of the base, float32 [n, K], what their codes stand for: for those who have read
        the base anyway.
        """
        bits, size = self.quant.bits, self.quant.group_size
        step = max(1, CHUNK_BYTES // (4 * max(1, self.k)))
        for first in range(0, len(rows), step):
            few = rows[first : first + step]
            few[:] = dequantize(self._codes(few), bits=bits, group_size=size)

    def _keep(self, first: int, parts: dict[str, Array]) -> None:
        if not self._kept:
            self._known = np.zeros(self.rows, dtype=bool)
        for name in ("scale", "zero_point"):
            if name in parts:
                if name not in self._kept:
                    self._known[:] = False
                    self._kept[name] = np.empty((self.rows, self.groups), parts[name].dtype)
                self._kept[name][first : first + len(parts[name])] = parts[name]
        self._known[first : first + len(parts["codes"])] = True

    def _quantized(self, start: int, stop: int) -> dict[str, Array]:
        q = self._codes(self.base.read(start, stop))
        found: dict[str, Array] = {"codes": q.codes, "scale": q.scale}
        return found if q.zero_point is None else {**found, "zero_point": q.zero_point}

    def _codes(self, rows: Array) -> Quantized:
        return quantize_rtn(
            rows,
            bits=self.quant.bits,
            group_size=self.quant.group_size,
            symmetric=self.quant.symmetric,
            what=self.base.source,
        )


class QuantizedPart:
    """Codes, scales or zero points of a `QuantizedWeight` as a lazy tensor."""

    def __init__(self, weight: QuantizedWeight, part: str) -> None:
        self.weight, self.part = weight, part
        self.shape: tuple[int, ...] = (weight.rows, weight.k if part == "codes" else weight.groups)
        self.dtype = "float16" if part == "scale" else "uint8"
        self.source = f"{part}({weight.base.source})"

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        end = self.shape[0] if stop is None else min(stop, self.shape[0])
        return np.ascontiguousarray(self.weight.read(self.part, start, end))


@dataclass(frozen=True)
class QuantizeRtn(Pass):
    """Round-to-nearest quantization of linear layers; embeddings and the output head are `quantize-head`'s.

    Options: `bits`; `group` along K, 0 for whole rows; `symmetric`.
    """

    name = "quantize-rtn"
    requires = "fused"
    ensures = "quantized"
    bits: int = 4
    group: int = 32
    symmetric: bool = False

    def __post_init__(self) -> None:
        check_grid(self.name, self.bits, self.group)

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        weights = [w for w in graph.weights.values() if is_quantizable(w) and not is_head(graph, w)]
        for weight in weights:
            bits = context.bits.get(weight.name, self.bits)
            attach_nearest(graph, weight, bits, self.group, self.symmetric)
        graph.drop_dead()
        notes = [] if weights else ["no linear layer was found to quantize"]
        return PassResult(graph, bool(weights), notes)


def attach_nearest(graph: Graph, weight: Value, bits: int, group: int, symmetric: bool) -> None:
    """Round a weight to nearest as its rows are read, in groups along K (0: whole rows)."""
    assert weight.weight is not None
    _, k = weight.weight.shape
    quant = Quantization(bits, min(group or k, k), symmetric)
    data = QuantizedWeight(weight.weight, quant)
    zero_point = None if symmetric else QuantizedPart(data, "zero_point")
    attach_quantized(
        graph, weight, quant, QuantizedPart(data, "codes"), QuantizedPart(data, "scale"), zero_point
    )


def is_head(graph: Graph, weight: Value) -> bool:
    """Whether a weight is an embedding table or makes the logits: read by an embedding, or by the last linear
    layer before an output.
    """
    if any(isinstance(u, Embedding) for u in weight.users):
        return True
    for output in graph.outputs:
        op = output.producer
        while op is not None and not isinstance(op, (Linear, QuantizedLinear)):
            # A scalar may stand first in a product (soft-capped logits): the logits are what has axes.
            op = next((v.producer for v in op.operands if v.type.rank), None)
        if isinstance(op, Linear) and op.weight is weight and graph.facts.get("kind") == "causal_lm":
            return True
    return False


class RoundToNearest(Quantizer):
    """`int8-gN` (symmetric; `int8` is `int8-g64`), `int4-gN`, `int4-gN-sym`."""

    forms = ("int8[-gN]", "int4-gN[-sym]")

    def passes(self, scheme: str) -> list[Pass] | None:
        # Groups at 8 bits too, though rows would do for the weights: a target may quantize activations by the
        # same groups, and one scale for a whole row of activations costs more than 8 bits are worth.
        m = re.fullmatch(r"int8(?:-g(\d+))?|int4-g(\d+)(-sym)?", scheme)
        if m is None:
            return None
        bits = 8 if scheme.startswith("int8") else 4
        group = int(m.group(1) or m.group(2) or 64)
        check_group(f"--quant {scheme}", group)
        return [QuantizeRtn(bits=bits, group=group, symmetric=bits == 8 or m.group(3) is not None)]
