"""LoRA of parameters, most of them stacked matrices, as of experts: W[e] + scaling · B_e A_e for each e, as
rows are read.

    moe(x, …, W [E, N, K], …) → moe(x, …, W + change, …)

PEFT has changed parameters so, beside modules, since models hold their experts in one parameter
(`target_parameters`; tuners/lora/layer.py, ParamWrapper). Its files name the module and not the parameter:
each that the adapter targets has a change, in the module's order. Quantized stacks become floats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...ir.adapters import Adapter, LowRank, OfParameters, listed
from ...ir.core import Graph, Value
from ...ir.dtypes import to_numpy
from ...ir.errors import InputError
from ...ir.ops.moe import Moe
from ...ir.weights import LazyTensor
from ..canonicalize.parameters import widened
from .stored import OverParts

Array = np.ndarray[Any, Any]
_OTHER = "the adapter belongs to another model"


@dataclass(frozen=True, eq=False)
class ParameterChange:
    """A change of one parameter.

    Attributes:
        scaling: of the change, without the adapter's own scale.
        transposed: the weight is [E, K, N].
    """

    weight: Value
    a: LazyTensor
    b: LazyTensor
    scaling: float
    transposed: bool

    @property
    def of_matrix(self) -> LowRank | None:
        """The same of a parameter [N, K]; None where it is a stack."""
        return LowRank(self.a, self.b, self.scaling) if len(self.weight.shape) == 2 else None


class MergedStack(OverParts):
    """Stacked matrices with a change merged in; `scale` multiplies it."""

    def __init__(self, base: LazyTensor, change: ParameterChange, scale: float) -> None:
        self._base, self._change, self._scale = base, change, scale
        self.shape, self.dtype = base.shape, widened(base.dtype)
        self.source = f"{base.source} + {change.b.source}"

    def over(self, base: LazyTensor) -> MergedStack:
        return MergedStack(base, self._change, self._scale)

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        count, change = self.shape[0], self._change
        first, last, _ = slice(start, stop).indices(count)
        last = max(first, last)
        rank = change.a.shape[0] // count
        a = change.a.read(first * rank, last * rank).astype(np.float32)
        b = change.b.read().astype(np.float32).reshape(-1, rank, count)[:, :, first:last]
        delta = b.transpose(2, 0, 1) @ a.reshape(last - first, rank, a.shape[1])
        if change.transposed:
            delta = delta.swapaxes(1, 2)
        scaling = np.float32(change.scaling * self._scale)
        merged = self._base.read(first, last).astype(np.float32) + delta * scaling
        return np.ascontiguousarray(merged.astype(to_numpy(self.dtype)))


def parameter_changes(graph: Graph, adapter: Adapter, module: str) -> list[ParameterChange]:
    """What an adapter changes of a module's parameters; empty where it targets none, but the module.

    Raises InputError where their number or sizes are others.
    """
    of = adapter.parameters[module]
    held = {
        name: weight
        for name, weight in graph.weights.items()
        if name.rpartition(".")[0] == module and len(weight.shape) > 1 and of.rules(_own(name)) is not None
    }
    if not held and len(of.factors) == 1:
        return []
    if len(held) != len(of.factors):
        raise InputError(
            f"adapter {adapter} has {len(of.factors)} changes of parameters of {module} "
            f"({of.factors[0][0].source}), {graph.name} has {len(held)} that it targets"
            + (f": {listed([*held])}" if held else ""),
            remedy=_OTHER,
        )
    return [
        _change(adapter, name, weight, of, factors)
        for (name, weight), factors in zip(held.items(), of.factors, strict=True)
    ]


def _own(name: str) -> str:
    return name.rpartition(".")[2]


def _change(
    adapter: Adapter, name: str, weight: Value, of: OfParameters, factors: tuple[LazyTensor, LazyTensor]
) -> ParameterChange:
    """The change of a parameter, once its sizes are seen to fit."""
    rules, (a, b) = of.rules(_own(name)), factors
    assert rules is not None and weight.weight is not None
    shape = weight.weight.shape
    count, rows, columns = shape if len(shape) == 3 else (1, *shape) if len(shape) == 2 else (0, 0, 0)
    rank, scaling = rules
    n, k = b.shape[0], a.shape[1]
    straight, turned = (n, k) == (rows, columns), len(shape) == 3 and (n, k) == (columns, rows)
    if a.shape[0] != rank * count or not (straight or turned):
        raise InputError(
            f"{a.source} {list(a.shape)} and {b.source} {list(b.shape)} of adapter {adapter} are no change "
            f"of {name} {list(shape)} of rank {rank}",
            remedy=_OTHER,
        )
    if straight and turned:  # square: its product says
        turned = any(isinstance(op, Moe) and op.transposed for op, _ in weight.uses)
    return ParameterChange(weight, a, b, scaling, turned)
