"""Rotates what linear layers read, and their weights, for targets that round activations to 8 bits.

    linear(x, w)        →   linear(hadamard(x), w · H)
    embedding(ids, w)   →   hadamard(embedding(ids, w · H)), where w is the output head's too

The same product: H is orthogonal, and its own inverse. What stands out of x is spread over `size` columns, so
that a scale a group loses less; weights of 8 bits lose nothing by it. Of four bits this is not said: weights
that lie on a grid already (a GGUF file's) leave it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...ir.core import Graph, Op, Value
from ...ir.errors import InputError
from ...ir.hadamard import WIDEST, reflections, rotate_columns
from ...ir.ops.nn import Embedding, GatedMlp, Linear
from ...ir.ops.quant import Hadamard
from ...ir.weights import LazyTensor
from ..base import Pass, PassContext, PassResult
from .attach import is_head, is_quantizable

Array = np.ndarray[Any, Any]
UNIT = 64
"""Columns that are rotated together, or what they are a multiple of."""
_GROUPS = 8
"""What a gated MLP makes is quantized group by group, by as many threads: it has as many groups at least, if
it has so many units.
"""


@dataclass(frozen=True)
class RotateLinears(Pass):
    """Rotate linear layers whose columns are a multiple of `size`.

    Options: `size`, an order of `ir.hadamard.rotation` up to 640: kernels rotate where they quantize if it
    divides the groups; 0: of each layer the largest multiple of 64 up to 640 that divides its columns (behind
    a gated MLP, one that leaves 8 runs), for quantizers whose groups are what is rotated together. `head`:
    whether the output head is rotated too.
    """

    name = "rotate-linears"
    requires = "fused"
    for_int8_activations = True
    size: int = UNIT
    head: bool = False

    def __post_init__(self) -> None:
        if self.size and (not 2 <= self.size <= WIDEST or reflections(self.size) is None):
            raise InputError(
                f"pass {self.name}: size={self.size}",
                remedy=f"give 0, or 2 to {WIDEST} without other factors than 2, 3, 5 and 7",
            )

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        found = {w: self._size(w) for w in graph.weights.values() if self._rotates(graph, w)}
        rotated: dict[tuple[Value, int], Value] = {}
        for op in list(graph.ops):
            if not isinstance(op, Linear | Embedding) or op.weight not in found:
                continue
            if isinstance(op, Embedding):
                _rotate_result(graph, op, found[op.weight])
                continue
            key = op.x, found[op.weight]
            if key not in rotated:
                new = Hadamard(op.x, size=key[1])
                new.loc = op.loc
                rotated[key] = graph.insert(new, before=op).result
            graph.set_operand(op, 0, rotated[key])
        for weight, size in found.items():
            assert weight.weight is not None
            graph.set_weight(weight, RotatedTensor(weight.weight, size))
        return PassResult(graph, bool(found))

    def _rotates(self, graph: Graph, weight: Value) -> bool:
        if not is_quantizable(weight):
            return False
        if is_head(graph, weight) and not (self.head and any(isinstance(u, Linear) for u in weight.users)):
            return False
        k = weight.shape[-1]
        whole = isinstance(k, int) and k % (self.size or UNIT) == 0
        return whole and all(_is_plain(u) for u in weight.users)

    def _size(self, weight: Value) -> int:
        """How many columns of a weight are rotated together."""
        if self.size:
            return self.size
        k = weight.shape[-1]
        assert isinstance(k, int)
        gated = any(isinstance(u.operands[0].producer, GatedMlp) for u in weight.users)
        most = min(WIDEST, k // _GROUPS) if gated else WIDEST
        sizes = (s for s in range(UNIT, most + 1, UNIT) if k % s == 0 and reflections(s) is not None)
        return max(sizes, default=UNIT)


def _is_plain(op: Op) -> bool:
    """Whether an op is an embedding, or a linear layer that nothing was rotated for yet, of float32."""
    if isinstance(op, Embedding):
        return op.result.dtype == "float32"
    return isinstance(op, Linear) and op.x.dtype == "float32" and not isinstance(op.x.producer, Hadamard)


def _rotate_result(graph: Graph, op: Embedding, size: int) -> None:
    """Rotate back what is taken from a rotated table."""
    new = Hadamard(op.result, size=size)
    new.loc = op.loc
    following = op.next
    graph.replace_uses(op.result, new.result)
    graph.set_operand(new, 0, op.result)
    graph.insert(new, before=following)


class RotatedTensor:
    """Rows of a float weight [N, K], rotated in runs of `size` columns; float32."""

    dtype = "float32"

    def __init__(self, base: LazyTensor, size: int) -> None:
        self.base, self.size = base, size
        self.shape: tuple[int, ...] = base.shape
        self.source = base.source

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        return rotate_columns(self.base.read(start, stop), self.size)
