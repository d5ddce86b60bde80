"""`--quant hqq-int4-g64`, `hqq-int3-g64`, …: half-quadratic quantization (`maths.py`), and `minmax-…`,
round to nearest on the same grid, to measure it against.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial

from llmc.plugins import Graph, InputError, Pass, PassContext, PassResult, Quantizer, quantize_by_rows

from .maths import half_quadratic

__all__ = ["HalfQuadratic", "QuantizeHalfQuadratic", "half_quadratic"]
STEPS = 12


@dataclass(frozen=True)
class QuantizeHalfQuadratic(Pass):
    """Half-quadratic quantization of linear layers, a scale and a minimum for each group.

    Options: `bits`; `group` along K; `steps` of the fit, 0 for round to nearest.
    """

    name = "quantize-half-quadratic"
    requires = "fused"
    ensures = "quantized"
    bits: int = 4
    group: int = 64
    steps: int = STEPS

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8 or self.group < 8 or self.group % 8 or self.steps < 0:
            raise InputError(
                f"pass {self.name}: bits={self.bits}, group={self.group}, steps={self.steps}",
                remedy="use 2 to 8 bits, groups of a multiple of 8, and 0 steps or more",
            )

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        function = partial(half_quadratic, bits=self.bits, group=self.group, steps=self.steps)
        count = quantize_by_rows(graph, function, bits=self.bits, group=self.group, zero_point="float16")
        return PassResult(graph, count > 0, [] if count else ["no linear layer was found to quantize"])


class HalfQuadratic(Quantizer):
    """`hqq-intB-gN` (B 2 to 8; `hqq-int4` is `hqq-int4-g64`), and `minmax-intB-gN` without the fit."""

    forms = ("hqq-intB[-gN]", "minmax-intB[-gN]")

    def passes(self, scheme: str) -> list[Pass] | None:
        found = re.fullmatch(r"(hqq|minmax)-int([2-8])(?:-g(\d+))?", scheme)
        if found is None:
            return None
        steps = STEPS if found[1] == "hqq" else 0
        return [QuantizeHalfQuadratic(bits=int(found[2]), group=int(found[3] or 64), steps=steps)]
