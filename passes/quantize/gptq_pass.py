"""GPTQ over the graph: `gptq-int4-g32` and its relatives."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from ...ir.core import Graph, Value
from ..base import Pass, PassContext, PassResult
from ..registry import Quantizer
from ..work import WorkFolder
from .calibrated import Array, Inputs, Walked, attach_walked, need_calibration, open_work, walk
from .gptq import DAMPING, Coded, corrected_target, damped, gptq, refine
from .grid import Grid
from .options import check_grid, parse_scheme


def grid_for(weight: Value, context: PassContext, bits: int, group: int, symmetric: bool) -> Grid:
    """The grid of one weight: the scheme's, with the bits that mixed precision gave it, and a group no longer
    than its rows.
    """
    k = weight.shape[-1]
    assert isinstance(k, int)
    return Grid(context.bits.get(weight.name, bits), min(group or k, k), symmetric)


def quantize_layer(inputs: Inputs, grid: Grid, name: str, *, sweeps: int) -> tuple[Coded, list[str]]:
    """GPTQ of one layer, with its target corrected for the error of the layers before it."""
    h = damped(inputs.hessian)
    notes: list[str] = []
    if h.damping > DAMPING:
        notes.append(f"{name}: its inputs span too few directions; damped by {h.damping:g} of the mean")
    target = corrected_target(inputs.weight, inputs.missing, h)
    coded, lost = gptq(target, h, grid)
    hessian = h.hessian
    del h  # its factor is as large
    for _ in range(sweeps):
        coded, lost = refine(target, coded, lost, hessian, grid)
    return coded, notes


@dataclass(frozen=True)
class QuantizeGptq(Pass):
    """GPTQ of linear layers on calibration text, through the quantized prefix.

    Options: `bits`; `group` along K, 0 for whole rows; `symmetric`; `sweeps` of scale refits and coordinate
    descent after the paper's algorithm.
    """

    name = "quantize-gptq"
    requires = "fused"
    ensures = "quantized"
    needs_calibration = True
    bits: int = 4
    group: int = 32
    symmetric: bool = False
    sweeps: int = 1

    def __post_init__(self) -> None:
        check_grid(self.name, self.bits, self.group)

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        with ExitStack() as stack:
            work = open_work(context, stack)
            found = self.walk(graph, context, work, need_calibration(context, self.name).sequences)
        attach_walked(graph, found)
        return PassResult(graph, bool(found.coded), found.notes)

    def walk(
        self,
        graph: Graph,
        context: PassContext,
        work: WorkFolder,
        sequences: Sequence[Array],
        others: Sequence[Array] = (),
        share: float = 1.0,
    ) -> Walked:
        """The codes of every layer; arguments as `calibrated.walk` takes them."""

        def grid_of(weight: Value) -> Grid:
            return grid_for(weight, context, self.bits, self.group, self.symmetric)

        def method(inputs: Inputs, grid: Grid, name: str) -> tuple[Coded, list[str]]:
            return quantize_layer(inputs, grid, name, sweeps=self.sweeps)

        return walk(graph, context, work, grid_of, method, sequences=sequences, others=others, share=share)


class Gptq(Quantizer):
    """`gptq-int4-gN[-sym]`, and 2, 3 and 8 bits likewise."""

    forms = ("gptq-int{2,3,4,8}-gN[-sym]",)

    def passes(self, scheme: str) -> list[Pass] | None:
        found = parse_scheme(scheme, "gptq", "2348")
        if found is None:
            return None
        bits, group, symmetric = found
        return [QuantizeGptq(bits=bits, group=group, symmetric=symmetric)]
