"""LoRA and DoRA merged into the weights, as their rows are read.

    linear(x, W)   → linear(x, W + scaling · B A)
    DoRA           → linear(x, m / ‖W + scaling · B A‖ · (W + scaling · B A)), norms of rows

On the traced graph, whose weights still have the names that adapters call them by. Arithmetic and result are
float32: most of a change is smaller than what a weight of 16 bits rounds away. A weight that its checkpoint
stores in NF4 is dequantized, merged and quantized to NF4 again, for `--quant keep`; one of another grid
becomes floats. What the graph does not know by name its checkpoint may (stored.py): the change is then of
the tensor there, before a weight is made of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ...ir.adapters import Adapter, LowRank, listed
from ...ir.core import Graph, Value
from ...ir.dtypes import HALVES, to_numpy
from ...ir.errors import InputError
from ...ir.weights import LazyTensor, QuantizedTensors, ShapeOnlyTensor, made_of, quantized_of, stored_name
from ..base import Pass, PassContext, PassResult
from ..canonicalize.parameters import follow_types, widened
from ..derived import CastTensor
from .lora_stacked import MergedStack, stacked_places
from .stored import StoredNames, with_parts
from .tied import find_weight, own_weight

Array = np.ndarray[Any, Any]


class MergedLora:
    """A weight with a change merged in."""

    def __init__(self, base: LazyTensor, change: LowRank, scale: float) -> None:
        self._base, self._change, self._scaling = base, change, np.float32(change.scaling * scale)
        self.shape, self.dtype = base.shape, base.dtype if _nf4(base) else widened(base.dtype)
        self.source = f"{base.source} + {change.b.source}"
        self.stored_name = stored_name(base)

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
        names = StoredNames(graph)
        self._refuse_strangers(graph, names)
        for name, data in self.adapter.replaced.items():
            known = _known(graph, names, name)
            # The base's own, beside its change, which another adapter may have changed before.
            copied = name in self.adapter.copies and known is not None and known.shape == tuple(data.shape)
            if copied or (name in self.adapter.optional and known is None):
                continue
            own = name not in self.adapter.optional  # else of a longer vocabulary, for all that read it
            weight = self._weight(graph, names, name, data, own=own)
            _check(weight, data.shape, data)
            kind = data.dtype if data.dtype in HALVES else widened(weight.dtype)
            graph.set_weight(weight, data if data.dtype == kind else CastTensor(data, kind))
        parts: dict[str, dict[str, LowRank]] = {}
        for module, change in self.adapter.changes.items():
            stored = f"{module}.weight"
            if _known(graph, names, stored) is None and stored in names.parts:
                for value in names.parts[stored]:
                    parts.setdefault(value.name, {})[stored] = change
            else:
                weight = self._weight(graph, names, stored, change.b)
                floats += self._merge(graph, weight, change)
            if change.bias is not None:
                bias = self._weight(graph, names, f"{module}.bias", change.bias)
                assert bias.weight is not None
                _check(bias, change.bias.shape, change.bias)
                graph.set_weight(bias, _AddedBias(bias.weight, change.bias, change.scaling * self.scale))
        for name, changes in parts.items():
            floats += self._merge_parts(graph, graph.weights[name], changes)
        for module in self.adapter.stacked:
            floats += self._merge_stacked(graph, module)
        follow_types(graph)
        notes = [f"adapter {self.adapter}: {floats} quantized weights became floats"] if floats else []
        return PassResult(graph, True, notes)

    def _refuse_strangers(self, graph: Graph, names: StoredNames) -> None:
        """Name all modules that the model does not have, or that it has in other shapes."""
        missing: list[str] = []
        wrong: list[str] = []
        for module, change in self.adapter.changes.items():
            weight = _known(graph, names, f"{module}.weight") or names.part(f"{module}.weight")
            shape = _shape(change)
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

    def _weight(
        self, graph: Graph, names: StoredNames, name: str, tensor: LazyTensor, *, own: bool = True
    ) -> Value:
        known = name if find_weight(graph, name) is not None else names.renamed.get(name, name)
        found = own_weight(graph, known) if own else find_weight(graph, known)
        if found is None:
            raise InputError(
                f"{tensor.source} of adapter {self.adapter} changes {name}, which {graph.name} does not have",
                remedy="the adapter belongs to another model",
            )
        return found

    def _merge(self, graph: Graph, weight: Value, change: LowRank) -> bool:
        """Whether a quantized weight became floats."""
        _check(weight, _shape(change), change.b)
        self._check_magnitude(change)
        return self._set(graph, weight, lambda base: MergedLora(base, change, self.scale))

    def _merge_parts(self, graph: Graph, weight: Value, changes: Mapping[str, LowRank]) -> bool:
        """Changes of tensors that the weight is made of, by their names in the checkpoint."""
        whole = made_of(weight.weight)
        assert whole is not None
        stored, changed = whole.stored, dict[str, LazyTensor]()
        for name, change in changes.items():
            if tuple(stored[name].shape) != _shape(change):
                raise _foreign(change.b, _shape(change), f"{name} is {list(stored[name].shape)}")
            self._check_magnitude(change)
            changed[name] = MergedLora(stored[name], change, self.scale)
        return self._set(graph, weight, lambda _: with_parts(whole, changed))

    def _merge_stacked(self, graph: Graph, module: str) -> int:
        """How many quantized weights became floats."""
        floats = 0
        for place in stacked_places(graph, self.adapter, module):
            floats += self._set(graph, place.weight, lambda base, p=place: MergedStack(base, p, self.scale))
        return floats

    @staticmethod
    def _set(graph: Graph, weight: Value, merge: Callable[[LazyTensor], LazyTensor]) -> bool:
        base = weight.weight
        assert base is not None
        if isinstance(base, ShapeOnlyTensor):
            return False
        graph.set_weight(weight, merge(base))
        return quantized_of(base) is not None and quantized_of(weight.weight) is None

    def _check_magnitude(self, change: LowRank) -> None:
        if change.magnitude is None:
            return
        if self.scale != 1.0:
            raise InputError(
                f"adapter {self.adapter} is DoRA, which a scale of {self.scale:g} does not suit",
                remedy="merge it without a scale",
            )
        n = change.b.shape[0]
        if np.prod(change.magnitude.shape) != n:
            raise InputError(
                f"{change.magnitude.source} has the shape {list(change.magnitude.shape)}, not [{n}]",
                remedy="the adapter belongs to another model",
            )


def _known(graph: Graph, names: StoredNames, name: str) -> Value | None:
    """The weight of a name, the model's or the checkpoint's."""
    found = find_weight(graph, name)
    return found if found is not None or name not in names.renamed else graph.weights[names.renamed[name]]


def _shape(change: LowRank) -> tuple[int, int]:
    n, k = change.b.shape[0], change.a.shape[1]
    return (k, n) if change.transposed else (n, k)


def _check(weight: Value, shape: tuple[int, ...], tensor: LazyTensor) -> None:
    if tuple(weight.shape) != tuple(shape):
        raise _foreign(tensor, shape, f"{weight.name} is {weight.type}")


def _foreign(tensor: LazyTensor, shape: tuple[int, ...], held: str) -> InputError:
    return InputError(
        f"{tensor.source} changes a weight of {list(shape)}, {held}",
        remedy="the adapter belongs to another model",
    )
