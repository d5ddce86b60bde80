"""LoRA and DoRA merged into the weights, as their rows are read.

    linear(x, W)   → linear(x, W + scaling · B A)
    DoRA           → linear(x, m / ‖W + scaling · B A‖ · (W + scaling · B A)), norms of rows

On the traced graph, whose weights still have the names that adapters call them by. Arithmetic and result are
float32: most of a change is smaller than what a weight of 16 bits rounds away. A weight that its checkpoint
stores in NF4 is dequantized, merged and quantized to NF4 again, for `--quant keep`; one of another grid
becomes floats.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ...ir.adapters import Adapter, LowRank, listed
from ...ir.core import Graph, Value
from ...ir.dtypes import to_numpy
from ...ir.errors import InputError
from ...ir.weights import LazyTensor, QuantizedTensors, ShapeOnlyTensor, quantized_of
from ..base import Pass, PassContext, PassResult
from ..canonicalize.parameters import HALVES, follow_types, widened
from ..derived import CastTensor
from .tied import find_weight, own_weight

Array = np.ndarray[Any, Any]


class MergedLora:
    """A weight with a change merged in."""

    def __init__(self, base: LazyTensor, change: LowRank, scale: float) -> None:
        self._base, self._change, self._scaling = base, change, np.float32(change.scaling * scale)
        self.shape, self.dtype = base.shape, base.dtype if _nf4(base) else widened(base.dtype)
        self.source = f"{base.source} + {change.b.source}"

    @cached_property
    def quantized(self) -> QuantizedTensors | None:
        """NF4 of the merged weight where the base is stored in NF4."""
        if not _nf4(self._base):
            return None
        from ..quantize.nf4_pass import nf4_parts

        return nf4_parts(self)

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        change = self._change
        rows = self._base.read(start, stop).astype(np.float32)
        if change.transposed:  # rows of the weight are columns of A
            columns = change.a.read().astype(np.float32)[:, start:stop]
            delta = (change.b.read().astype(np.float32) @ columns).T
        else:
            delta = change.b.read(start, stop).astype(np.float32) @ change.a.read().astype(np.float32)
        merged = rows + delta * self._scaling
        if change.magnitude is not None:
            norm = np.linalg.norm(merged, axis=1)
            wanted = change.magnitude.read(start, stop).astype(np.float32).reshape(norm.shape)
            merged *= (wanted / np.where(norm == 0, np.float32(1), norm))[:, None]
        return np.ascontiguousarray(merged.astype(to_numpy(self.dtype)))


def _nf4(tensor: LazyTensor) -> bool:
    parts = quantized_of(tensor)
    return parts is not None and parts.quant.codebook == "nf4"


class _AddedBias:
    """A bias [N] and the adapter's, scaled."""

    def __init__(self, base: LazyTensor, added: LazyTensor, scaling: float) -> None:
        self._base, self._added, self._scaling = base, added, np.float32(scaling)
        self.shape, self.dtype = base.shape, widened(base.dtype)
        self.source = f"{base.source} + {added.source}"

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        added = self._added.read(start, stop).astype(np.float32) * self._scaling
        return (self._base.read(start, stop).astype(np.float32) + added).astype(to_numpy(self.dtype))


@dataclass(frozen=True)
class MergeLora(Pass):
    """Merge an adapter into the weights. `scale` multiplies its change."""

    name = "merge-lora"
    requires = "traced"
    adapter: Adapter
    scale: float = 1.0

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        floats = 0
        self._refuse_strangers(graph)
        for name, data in self.adapter.replaced.items():
            known = find_weight(graph, name)
            # The base's own, beside its change, which another adapter may have changed before.
            copied = name in self.adapter.copies and known is not None and known.shape == tuple(data.shape)
            if copied or (name in self.adapter.optional and known is None):
                continue
            own = name not in self.adapter.optional  # else of a longer vocabulary, for all that read it
            weight = self._weight(graph, name, data, own=own)
            _check(weight, data.shape, data)
            kind = data.dtype if data.dtype in HALVES else widened(weight.dtype)
            graph.set_weight(weight, data if data.dtype == kind else CastTensor(data, kind))
        for module, change in self.adapter.changes.items():
            weight = self._weight(graph, f"{module}.weight", change.b)
            assert weight.weight is not None
            stored = quantized_of(weight.weight)
            self._merge(graph, weight, change)
            floats += stored is not None and quantized_of(weight.weight) is None
            if change.bias is not None:
                bias = self._weight(graph, f"{module}.bias", change.bias)
                assert bias.weight is not None
                _check(bias, change.bias.shape, change.bias)
                graph.set_weight(bias, _AddedBias(bias.weight, change.bias, change.scaling * self.scale))
        follow_types(graph)
        notes = [f"adapter {self.adapter}: {floats} quantized weights became floats"] if floats else []
        return PassResult(graph, True, notes)

    def _refuse_strangers(self, graph: Graph) -> None:
        """Name all modules that the model does not have, or that it has in other shapes."""
        missing: list[str] = []
        wrong: list[str] = []
        for module, change in self.adapter.changes.items():
            weight = find_weight(graph, f"{module}.weight")
            n, k = change.b.shape[0], change.a.shape[1]
            shape = (k, n) if change.transposed else (n, k)
            if weight is None:
                missing.append(module)
            elif tuple(weight.shape) != shape:
                wrong.append(f"{module} {list(shape)} where the model has {list(weight.shape)}")
        # One is said with its tensor, below.
        if len(missing) + len(wrong) < 2:
            return
        said = [f"changes {listed(missing)}, which {graph.name} does not have"] if missing else []
        said += [f"is of other sizes: {listed(wrong)}"] if wrong else []
        raise InputError(
            f"adapter {self.adapter} {' and '.join(said)}", remedy="the adapter belongs to another model"
        )

    def _weight(self, graph: Graph, name: str, tensor: LazyTensor, *, own: bool = True) -> Value:
        found = own_weight(graph, name) if own else find_weight(graph, name)
        if found is None:
            raise InputError(
                f"{tensor.source} of adapter {self.adapter} changes {name}, which {graph.name} does not have",
                remedy="the adapter belongs to another model",
            )
        return found

    def _merge(self, graph: Graph, weight: Value, change: LowRank) -> None:
        n, k = change.b.shape[0], change.a.shape[1]
        _check(weight, (k, n) if change.transposed else (n, k), change.b)
        if change.magnitude is not None:
            if self.scale != 1.0:
                raise InputError(
                    f"adapter {self.adapter} is DoRA, which a scale of {self.scale:g} does not suit",
                    remedy="merge it without a scale",
                )
            if np.prod(change.magnitude.shape) != n:
                raise InputError(
                    f"{change.magnitude.source} has the shape {list(change.magnitude.shape)}, not [{n}]",
                    remedy="the adapter belongs to another model",
                )
        assert weight.weight is not None
        if not isinstance(weight.weight, ShapeOnlyTensor):
            graph.set_weight(weight, MergedLora(weight.weight, change, self.scale))


def _check(weight: Value, shape: tuple[int, ...], tensor: LazyTensor) -> None:
    if tuple(weight.shape) != tuple(shape):
        raise InputError(
            f"{tensor.source} changes a weight of {list(shape)}, {weight.name} is {weight.type}",
            remedy="the adapter belongs to another model",
        )
