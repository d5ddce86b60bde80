"""Embeddings and the output head at a precision of their own: `--quant-head SCHEME`.

    embedding(ids, w); linear(x, w)   →   quantized_embedding(ids, q, …); quantized_linear(x, q, …)

Runs after the quantizer of the linear layers, which leaves heads alone, so that no quantizer needs to know
about them. A table that embeds and makes the logits (tied) is quantized once and stays one weight. Rounding
is to nearest: at 8 bits, the default, heads lose next to nothing; at 4 bits they lose more than all other
layers of a small model together.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ...ir.core import Graph
from ...ir.errors import InputError
from ..base import Pass, PassContext, PassResult
from .attach import is_head, is_quantizable
from .options import check_grid, check_group
from .walk import attach_nearest, group_of

DEFAULT = "int8"
FORMS = "none, int8, int6-gN, int4-gN[-sym], …"


@dataclass(frozen=True)
class QuantizeHead(Pass):
    """Round-to-nearest quantization of embeddings and of the output head.

    Options: `bits`; `group` along K, 0 for whole rows; `symmetric`; `as_rotated` as of `QuantizeRtn`.
    """

    name = "quantize-head"
    ensures = "quantized"
    bits: int = 8
    group: int = 64
    symmetric: bool = True
    as_rotated: bool = False

    def __post_init__(self) -> None:
        check_grid(self.name, self.bits, self.group)

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        if graph.stage not in ("fused", "quantized"):
            raise InputError(
                f"pass {self.name} needs a graph of stage fused or quantized, not {graph.stage}",
                remedy="change the order of the passes",
            )
        heads = [w for w in graph.weights.values() if is_quantizable(w) and is_head(graph, w)]
        for weight in heads:
            bits = context.bits.get(weight.name, self.bits)
            group = group_of(weight, bits, self.group) if self.as_rotated else self.group
            attach_nearest(graph, weight, bits, group, self.symmetric)
        graph.drop_dead()
        return PassResult(graph, bool(heads))


def head_passes(scheme: str | None) -> list[Pass]:
    """The passes of `--quant-head SCHEME`. Raises InputError for an unknown scheme."""
    if scheme is None or scheme == "none":
        return []
    m = re.fullmatch(r"int([2-8])(?:-g(\d+))?(-sym)?", scheme)
    if m is None:
        raise InputError(f"--quant-head {scheme}: no such scheme", remedy=f"known: {FORMS}")
    bits, group = int(m.group(1)), int(m.group(2) or (64 if m.group(1) == "8" else 32))
    check_group(f"--quant-head {scheme}", group)
    # At 8 bits a zero point buys nothing.
    symmetric = m.group(3) is not None or bits == 8
    return [QuantizeHead(bits, group, symmetric, as_rotated=bits == 8 and m.group(2) is None)]
