"""Round to nearest over the graph: which weights, at how many bits. Embeddings and the head that shares or
faces them have a pass of their own (`heads.py`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ...ir.core import Graph, Value
from ...ir.ops.nn import Linear
from ...ir.ops.quant import Hadamard
from ...ir.types import Quantization
from ..base import Pass, PassContext, PassResult
from ..registry import Quantizer
from .attach import attach_quantized, is_head, is_quantizable
from .moe import round_experts
from .nearest import QuantizedPart, QuantizedWeight
from .options import check_grid, check_group
from .rotate import UNIT, RotateLinears


@dataclass(frozen=True)
class QuantizeRtn(Pass):
    """Round-to-nearest quantization of linear layers; embeddings and the output head are `quantize-head`'s.

    Options: `bits`; `group` along K, 0 for whole rows; `symmetric`; `as_rotated`: of layers of 8 bits
    whose operand is rotated, what is rotated together is a group.
    """

    name = "quantize-rtn"
    requires = "fused"
    ensures = "quantized"
    bits: int = 4
    group: int = 32
    symmetric: bool = False
    as_rotated: bool = False

    def __post_init__(self) -> None:
        check_grid(self.name, self.bits, self.group)

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        weights = [w for w in graph.weights.values() if is_quantizable(w) and not is_head(graph, w)]
        for weight in weights:
            bits = context.bits.get(weight.name, self.bits)
            group = group_of(weight, bits, self.group) if self.as_rotated else self.group
            attach_nearest(graph, weight, bits, group, self.symmetric)
        experts = round_experts(graph, context.bits, self.bits, self.group, self.symmetric)
        graph.drop_dead()
        found = bool(weights) or experts > 0
        return PassResult(graph, found, [] if found else ["no linear layer was found to quantize"])


def group_of(weight: Value, bits: int, group: int) -> int:
    """The columns that are rotated together, of a weight of 8 bits (fewer may have been chosen for it) whose
    layers all read what is rotated; else `group`.
    """
    if bits != 8:
        return group
    layers = [user for user in weight.users if isinstance(user, Linear)]
    producers = [layer.x.producer for layer in layers]
    rotated = {op.size if isinstance(op, Hadamard) else 0 for op in producers}
    return max(group, *rotated) if rotated and 0 not in rotated else group


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


class RoundToNearest(Quantizer):
    """`int8` (symmetric, in groups of 64, or of what is rotated together), `int8-gN`, `int4-gN`,
    `int4-gN-sym`.
    """

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
        if bits == 4:
            return [QuantizeRtn(bits=bits, group=group, symmetric=m.group(3) is not None)]
        given = m.group(1) is not None
        rotate = [] if group % UNIT else [RotateLinears() if given else RotateLinears(0)]
        return [*rotate, QuantizeRtn(8, group, True, as_rotated=not given)]
