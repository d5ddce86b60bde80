"""GPTQ over the graph: `gptq-int4-g32` and its relatives."""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...ir.core import Graph, Value
from ...ir.errors import InputError
from ..base import Pass, PassContext, PassResult
from ..registry import Quantizer
from .calibrated import Inputs, attach_walked, need_calibration, open_work, walk
from .gptq import DAMPING, PROPAGATION, Coded, corrected_target, gptq
from .grid import Grid

if TYPE_CHECKING:
    import torch


def grid_for(weight: Value, context: PassContext, bits: int, group: int, symmetric: bool) -> Grid:
    """The grid of one weight: the scheme's, with the bits that mixed precision gave it, and a group no longer
    than its rows.
    """
    k = weight.shape[-1]
    assert isinstance(k, int)
    return Grid(context.bits.get(weight.name, bits), min(group or k, k), symmetric)


def quantize_layer(
    w: torch.Tensor, inputs: Inputs, grid: Grid, name: str, *, sweeps: int
) -> tuple[Coded, list[str]]:
    """GPTQ of one layer, with its target corrected for the error of the layers before it."""
    target = corrected_target(w, inputs.cross, inputs.hessian, PROPAGATION)
    coded, damping = gptq(target, inputs.hessian, grid, sweeps=sweeps)
    notes: list[str] = []
    if damping > DAMPING:
        notes.append(f"{name}: its inputs span too few directions; damped by {damping:g} of the mean")
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
        if not 2 <= self.bits <= 8:
            raise InputError(f"pass {self.name}: bits={self.bits}", remedy="use 2 to 8 bits")
        if self.group < 0:
            raise InputError(f"pass {self.name}: group={self.group}", remedy="use 0 (whole rows) or more")

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        def grid_of(weight: Value) -> Grid:
            return grid_for(weight, context, self.bits, self.group, self.symmetric)

        def method(w: torch.Tensor, inputs: Inputs, grid: Grid, name: str) -> tuple[Coded, list[str]]:
            return quantize_layer(w, inputs, grid, name, sweeps=self.sweeps)

        with ExitStack() as stack:
            work = open_work(context, stack)
            sequences = need_calibration(context, self.name).sequences
            found = walk(graph, context, work, grid_of, method, sequences=sequences)
        attach_walked(graph, found)
        return PassResult(graph, bool(found.coded), found.notes)


def parse_scheme(scheme: str, method: str, bits: str) -> tuple[int, int, bool] | None:
    """(bits, group, symmetric) of `METHOD-intB-gN[-sym]`, None for other schemes; the group defaults to 32.

    Raises InputError for a group size that no kernel takes.
    """
    m = re.fullmatch(rf"{method}-int([{bits}])(?:-g(\d+))?(-sym)?", scheme)
    if m is None:
        return None
    group = int(m.group(2) or 32)
    if group < 8 or group % 8 or group > 1024:
        raise InputError(
            f"--quant {scheme}: group size {group}",
            remedy="use a multiple of 8 from 8 to 1024, such as 32, 64 or 128",
        )
    return int(m.group(1)), group, m.group(3) is not None


class Gptq(Quantizer):
    """`gptq-int4-gN[-sym]`, and 2, 3 and 8 bits likewise."""

    forms = ("gptq-int{2,3,4,8}-gN[-sym]",)

    def passes(self, scheme: str) -> list[Pass] | None:
        found = parse_scheme(scheme, "gptq", "2348")
        if found is None:
            return None
        bits, group, symmetric = found
        return [QuantizeGptq(bits=bits, group=group, symmetric=symmetric)]
