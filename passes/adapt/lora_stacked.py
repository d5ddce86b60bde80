"""LoRA of stacked matrices, as of experts: W[e] + scaling · B_e A_e for each e, as rows are read.

    moe(x, …, W [E, N, K], …) → moe(x, …, W + change, …)

PEFT has changed parameters so, beside modules, since models hold their experts in one parameter
(`target_parameters`; tuners/lora/layer.py, ParamWrapper). Its files name the module and not the parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import numpy as np

from ...ir.adapters import Adapter, Stacked, listed
from ...ir.core import Graph, Value
from ...ir.dtypes import to_numpy
from ...ir.errors import InputError
from ...ir.ops.moe import Moe
from ...ir.weights import LazyTensor
from ..canonicalize.parameters import widened

Array = np.ndarray[Any, Any]
_MOST = 8
"""Parameters of a module that an adapter changes: none has so many, and there would be many ways."""


@dataclass(frozen=True, eq=False)
class StackedPlace:
    """Which weight a change is of.

    Attributes:
        scaling: of the change, without the adapter's own scale.
        transposed: the weight is [E, K, N].
    """

    weight: Value
    change: Stacked
    scaling: float
    transposed: bool


class MergedStack:
    """Stacked matrices with a change merged in; `scale` multiplies it."""

    def __init__(self, base: LazyTensor, place: StackedPlace, scale: float) -> None:
        self._base, self._change, self._transposed = base, place.change, place.transposed
        self._scaling = np.float32(place.scaling * scale)
        self.shape, self.dtype = base.shape, widened(base.dtype)
        self.source = f"{base.source} + {place.change.b.source}"

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        count = self.shape[0]
        first, last, _ = slice(start, stop).indices(count)
        last = max(first, last)
        rank = self._change.a.shape[0] // count
        a = self._change.a.read(first * rank, last * rank).astype(np.float32)
        b = self._change.b.read().astype(np.float32).reshape(-1, rank, count)[:, :, first:last]
        delta = b.transpose(2, 0, 1) @ a.reshape(last - first, rank, a.shape[1])
        if self._transposed:
            delta = delta.swapaxes(1, 2)
        merged = self._base.read(first, last).astype(np.float32) + delta * self._scaling
        return np.ascontiguousarray(merged.astype(to_numpy(self.dtype)))


def stacked_places(graph: Graph, adapter: Adapter, module: str) -> list[StackedPlace]:
    """The weights of a module whose sizes its changes have; of several such, in the model's order.

    Raises InputError where there are none.
    """
    held = {n: w for n, w in graph.weights.items() if n.rpartition(".")[0] == module and len(w.shape) == 3}
    changes = adapter.stacked[module]
    found = [
        [place for name, weight in held.items() if (place := _fits(name, weight, change)) is not None]
        for change in changes
    ]
    for change, places in zip(changes, found, strict=True):
        if not places:
            sizes = ", ".join(f"{name} {list(weight.shape)}" for name, weight in held.items())
            raise InputError(
                f"{change.a.source} {list(change.a.shape)} and {change.b.source} {list(change.b.shape)} of "
                f"adapter {adapter} fit no stacked matrices of {module}; {graph.name} has {sizes or 'none'}",
                remedy="the adapter belongs to another model",
            )
    chosen = _distinct(found, list(held.values()))
    if chosen is None:
        raise InputError(
            f"adapter {adapter} has {len(changes)} changes of {module}, in no order of its parameters "
            f"({listed([*held])})",
            remedy="the adapter belongs to another model",
        )
    return chosen


def _fits(name: str, weight: Value, change: Stacked) -> StackedPlace | None:
    assert weight.weight is not None
    count, rows, columns = weight.weight.shape
    rules = change.rules(name)
    if rules is None:
        return None
    rank, scaling = rules
    n, k = change.b.shape[0], change.a.shape[1]
    if change.a.shape[0] != rank * count or {(n, k)}.isdisjoint({(rows, columns), (columns, rows)}):
        return None
    transposed = (n, k) != (rows, columns)
    if rows == columns:
        transposed = any(isinstance(op, Moe) and op.transposed for op, _ in weight.uses)
    return StackedPlace(weight, change, scaling, transposed)


def _distinct(found: Sequence[Sequence[StackedPlace]], weights: Sequence[Value]) -> list[StackedPlace] | None:
    """One place for each change, no weight twice, in the order of the weights; None where there is none."""
    if len(found) > len(weights) or len(found) > _MOST:
        return None
    order = {id(weight): i for i, weight in enumerate(weights)}
    for way in product(*found):
        places = [order[id(place.weight)] for place in way]
        if all(one < other for one, other in pairwise(places)):
            return list(way)
    return None
