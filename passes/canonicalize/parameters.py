"""Parameters that are computed with, in float32.

    linear(x, w: bfloat16, bias: bfloat16)     →  linear(x, w: bfloat16, bias: float32)
    layer_norm(x, w: bfloat16, bias: bfloat16) →  layer_norm(x, w: float32, bias: float32)
    exp(a: bfloat16)                           →  exp(a: float32)

Most models are published in 16 bits, and computed in float32 here. Matrices stay as they are stored, which
kernels take, and whoever quantizes reads. Biases, weights of norms, sinks and the like are small;
kernels take them as float32, and what is computed of them beforehand is not to be rounded.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...ir.core import Graph, Op
from ...ir.dtypes import HALVES
from ...ir.ops.math import Binary, Cast, MatMul, Where
from ...ir.ops.moe import Moe, QuantizedMoe
from ...ir.ops.nn import Embedding, Linear
from ...ir.ops.quant import QuantizedEmbedding, QuantizedLinear
from ...ir.ops.shape import Concat, Expand, Gather, Index, Reshape, Slice, Transpose
from ...ir.weights import num_elements
from ..base import Pass, PassContext, PassResult
from ..derived import CastTensor

_MOST = 1 << 22
"""Elements of what is computed of weights beforehand (`fold.py`)."""
_FEW = 1 << 13
"""Elements of a table that is not one of words or positions."""


def widened(dtype: str) -> str:
    """float32 for floats of 16 bits; others as they are."""
    return "float32" if dtype in HALVES else dtype


def _is_read_as_stored(op: Op, index: int, last: bool) -> bool:
    """Whether a weight of 16 bits may stay one there: it is a matrix, or is only moved and may become one
    unless this is the `last` time.
    """
    v = op.operands[index]
    assert v.weight is not None
    match op:
        case Linear():
            return v is op.weight
        case Moe():
            return v in (op.gate_up, op.down)
        case QuantizedLinear():
            return v is not op.bias
        case QuantizedMoe():
            return v not in (op.up_bias, op.down_bias)
        case Cast() | QuantizedEmbedding():
            return True
        case Embedding():  # a table of biases by distance, of kinds of tokens: attention looks for its values
            return num_elements(v.weight) > _FEW
        case MatMul():
            return not last and (v.type.rank == 2 or num_elements(v.weight) > _MOST)
        case Concat() | Expand() | Gather() | Index() | Reshape() | Slice() | Transpose():
            return v.type.rank > 1
        case _:
            return op.operands[0].dtype != "float32" and num_elements(v.weight) > _MOST


def widen_parameters(graph: Graph, last: bool = False) -> int:
    """Make it so. Returns how many weights became float32, or where they are matrices too have a copy.

    `last`: nothing that comes makes matrices of what is left.
    """
    count = 0
    for name, v in list(graph.weights.items()):
        if v.dtype not in HALVES or v.weight is None:
            continue
        uses = [(op, i) for op, i in v.uses if not _is_read_as_stored(op, i, last)]
        if not uses:
            continue
        data = CastTensor(v.weight, "float32")
        count += 1
        if len(uses) == len(v.uses) and not graph.output_uses(v):
            graph.set_weight(v, data)
            continue
        copy = graph.add_weight(f"{name}.float32", data)
        for op, i in uses:
            graph.set_operand(op, i, copy)
    if count or last:
        follow_types(graph, last)
    return count


def follow_types(graph: Graph, last: bool = False) -> None:
    """Types of what is computed with weights that became float32, and constants beside them as float32; the
    `last` time also matrices that were moved and did not become a layer's.
    """
    mixed = Binary | Where | Concat | MatMul if last else Binary | Where | Concat
    for op in graph:
        if isinstance(op, mixed) and any(v.dtype == "float32" for v in op.operands):
            for i, v in enumerate(op.operands):
                if v.dtype in HALVES:
                    graph.set_operand(op, i, graph.insert(Cast(v, dtype="float32"), op).result)
        graph.retype(op)


@dataclass(frozen=True)
class WidenParameters(Pass):
    """Parameters that are computed with, in float32."""

    name = "widen-parameters"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        return PassResult(graph, widen_parameters(graph) > 0)
