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
from functools import cached_property, partial
from typing import Any

import numpy as np

from ...ir.adapters import Adapter, LowRank, TokenRows, listed
from ...ir.core import Graph, Value
from ...ir.dtypes import HALVES, to_numpy
from ...ir.errors import InputError
from ...ir.weights import (
    LazyTensor,
    MadeOf,
    QuantizedTensors,
    ShapeOnlyTensor,
    made_of,
    quantized_of,
    stored_name,
    straight_of,
)
from ..base import Pass, PassContext, PassResult
from ..canonicalize.parameters import follow_types, widened
from ..derived import CastTensor
from .lora_stacked import MergedStack, parameter_changes
from .stored import OverParts, StoredNames, with_parts
from .tied import find_weight, own_weight

Array = np.ndarray[Any, Any]
_STRANGER = (
    "give an adapter of this model, or merge it with PEFT (merge_and_unload) and give the merged model"
)


class MergedLora(OverParts):
    """A weight with a change merged in."""

    def __init__(self, base: LazyTensor, change: LowRank, scale: float) -> None:
        self._base, self._change, self._scale = base, change, scale
        self._scaling = np.float32(change.scaling * scale)
        self.shape, self.dtype = base.shape, base.dtype if _nf4(base) else widened(base.dtype)
        self.source = f"{base.source} + {change.b.source}"
        self.stored_name = stored_name(base)

    def over(self, base: LazyTensor) -> MergedLora:
        return MergedLora(base, self._change, self._scale)

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


class _AddedBias(OverParts):
    """A bias [N] and the adapter's, scaled."""

    def __init__(self, base: LazyTensor, added: LazyTensor, scaling: float) -> None:
        self._base, self._added, self._scaling = base, added, np.float32(scaling)
        self.shape, self.dtype = base.shape, widened(base.dtype)
        self.source = f"{base.source} + {added.source}"
        self.stored_name = stored_name(base)

    def over(self, base: LazyTensor) -> _AddedBias:
        return _AddedBias(base, self._added, float(self._scaling))

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        added = self._added.read(start, stop).astype(np.float32) * self._scaling
        return (self._base.read(start, stop).astype(np.float32) + added).astype(to_numpy(self.dtype))


class _WithRows(OverParts):
    """A weight [V, D] some of whose rows are an adapter's."""

    def __init__(self, base: LazyTensor, tokens: TokenRows) -> None:
        self._base, self._tokens = base, tokens
        self.shape = base.shape
        self.dtype = base.dtype if tokens.rows.dtype == base.dtype else widened(base.dtype)
        self.source = f"{base.source} with rows of {tokens.rows.source}"
        self.stored_name = stored_name(base)

    def over(self, base: LazyTensor) -> _WithRows:
        return _WithRows(base, self._tokens)

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        read = self._base.read(start, stop).astype(to_numpy(self.dtype))
        at = np.asarray(self._tokens.ids) - start
        here = (at >= 0) & (at < len(read))
        if here.any():
            read[at[here]] = self._tokens.rows.read()[here].astype(read.dtype)
        return read


@dataclass(frozen=True)
class MergeLora(Pass):
    """Merge an adapter into the weights. `scale` multiplies its change."""

    name = "merge-lora"
    requires = "traced"
    adapter: Adapter
    scale: float = 1.0

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        names = StoredNames(graph)
        found = {m: parameter_changes(graph, self.adapter, m) for m in self.adapter.parameters}
        modules = {
            **self.adapter.changes,
            **{m: self.adapter.parameters[m].itself() for m, changes in found.items() if not changes},
        }
        self._refuse_strangers(graph, names, modules)
        parts = _Parts(graph, names)
        for name, data in self.adapter.replaced.items():
            self._replace(graph, names, parts, name, data)
        floats = sum(
            self._set_rows(graph, names, f"{module}.weight", tokens)
            for module, tokens in self.adapter.rows.items()
        )
        for module, change in modules.items():
            self._check_magnitude(change)
            stored = f"{module}.weight"
            if parts.has(stored):
                parts.change(
                    stored, _shape(change), change.b, partial(MergedLora, change=change, scale=self.scale)
                )
            else:
                weight = self._weight(graph, names, stored, change.b)
                floats += self._merge(graph, weight, change)
            if change.bias is not None:
                self._add_bias(graph, names, parts, f"{module}.bias", change, change.bias)
        floats += parts.merge()
        for changes in found.values():
            for one in changes:
                matrix = one.of_matrix
                if matrix is not None:
                    floats += self._merge(graph, one.weight, matrix)
                else:
                    floats += _set(
                        graph, one.weight, lambda base, one=one: MergedStack(base, one, self.scale)
                    )
        follow_types(graph)
        notes = [f"adapter {self.adapter}: {floats} quantized weights became floats"] if floats else []
        return PassResult(graph, True, notes)

    def _replace(self, graph: Graph, names: StoredNames, parts: _Parts, name: str, data: LazyTensor) -> None:
        known = _known(graph, names, name)
        held = known if known is not None else names.part(name)
        # The base's own, beside its change, which another adapter may have changed before.
        copied = name in self.adapter.copies and held is not None and tuple(held.shape) == tuple(data.shape)
        if copied or (name in self.adapter.optional and held is None):
            return
        if parts.has(name):
            assert held is not None
            kind = data.dtype if data.dtype in HALVES else widened(str(held.dtype))
            parts.change(name, data.shape, data, lambda base: _Replaced(data, kind, base))
            return
        own = name not in self.adapter.optional  # else of a longer vocabulary, for all that read it
        weight = self._weight(graph, names, name, data, own=own)
        _check(weight, data.shape, data)
        assert weight.weight is not None
        kind = data.dtype if data.dtype in HALVES else widened(weight.dtype)
        graph.set_weight(weight, _Replaced(data, kind, weight.weight))

    def _set_rows(self, graph: Graph, names: StoredNames, name: str, tokens: TokenRows) -> int:
        """How many quantized weights became floats."""
        source, merge = tokens.rows, partial(_WithRows, tokens=tokens)
        held = _known(graph, names, name) or self._weight(graph, names, name, source)  # which says it is not
        vocabulary, *columns = held.shape
        if columns != [source.shape[1]] or not (isinstance(vocabulary, int) and max(tokens.ids) < vocabulary):
            said = f"{source.source} has rows {list(source.shape)} of tokens up to {max(tokens.ids)}"
            raise InputError(f"{said}, {name} is {list(held.shape)}", remedy=_STRANGER)
        tied, known = graph.facts.get("tied", {}), _own_name(graph, names, name)
        others = [n for n in tied if n != known and n.removesuffix(".weight") in self.adapter.rows]
        if known not in tied or not tied[known]["embedding"] or others:
            return _set(graph, self._weight(graph, names, name, source), merge)
        # PEFT gives the head of a model that ties them the rows of its embeddings.
        alike = {tied[n]["of"] for n in tied if graph.weights[tied[n]["of"]].shape == held.shape}
        return sum(_set(graph, graph.weights[one], merge) for one in sorted(alike))

    def _add_bias(
        self,
        graph: Graph,
        names: StoredNames,
        parts: _Parts,
        name: str,
        change: LowRank,
        added: LazyTensor,
    ) -> None:
        scaling = change.scaling * self.scale
        if parts.has(name):
            parts.change(name, added.shape, added, lambda base: _AddedBias(base, added, scaling))
            return
        bias = self._weight(graph, names, name, added)
        assert bias.weight is not None
        _check(bias, added.shape, added)
        graph.set_weight(bias, _AddedBias(bias.weight, added, scaling))

    def _refuse_strangers(self, graph: Graph, names: StoredNames, modules: Mapping[str, LowRank]) -> None:
        """Name all modules that the model does not have, or that it has in other shapes."""
        missing: list[str] = []
        wrong: list[str] = []
        for module, change in modules.items():
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
        raise InputError(f"adapter {self.adapter} {' and '.join(said)}", remedy=_STRANGER)

    def _weight(
        self, graph: Graph, names: StoredNames, name: str, tensor: LazyTensor, *, own: bool = True
    ) -> Value:
        known = _own_name(graph, names, name)
        found = own_weight(graph, known) if own else find_weight(graph, known)
        if found is None:
            raise InputError(
                f"{tensor.source} of adapter {self.adapter} changes {name}, which {graph.name} does not have",
                remedy=_STRANGER,
            )
        return found

    def _merge(self, graph: Graph, weight: Value, change: LowRank) -> bool:
        """Whether a quantized weight became floats."""
        _check(weight, _shape(change), change.b)
        return _set(graph, weight, lambda base: MergedLora(base, change, self.scale))

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


class _Replaced(CastTensor):
    """An adapter's tensor in the place of a model's."""

    def __init__(self, data: LazyTensor, dtype: str, base: LazyTensor) -> None:
        super().__init__(data, dtype)
        self.stored_name = stored_name(base)


class _Parts:
    """Changes of tensors that weights are made of, by their names in the checkpoint; merged all at once, for
    a weight may be made of hundreds.
    """

    def __init__(self, graph: Graph, names: StoredNames) -> None:
        self._graph, self._names = graph, names
        self._changes: dict[str, dict[str, Callable[[LazyTensor], LazyTensor]]] = {}

    def has(self, name: str) -> bool:
        """Whether that is how such a tensor is changed: the model has no weight of that name itself."""
        return name in self._names.parts and _known(self._graph, self._names, name) is None

    def change(
        self,
        name: str,
        shape: tuple[int, ...],
        tensor: LazyTensor,
        merge: Callable[[LazyTensor], LazyTensor],
    ) -> None:
        """Note a change of a tensor of that shape, by an adapter's `tensor`."""
        part = self._names.part(name)
        if part is None or tuple(part.shape) != tuple(shape):
            held = "part of a weight that is replaced" if part is None else f"{list(part.shape)}"
            raise _foreign(tensor, shape, f"{name} is {held}")
        for value in self._names.parts[name]:
            changes = self._changes.setdefault(value.name, {})
            changes[name] = merge if name not in changes else partial(_one_by_one, changes[name], merge)

    def merge(self) -> int:
        """How many quantized weights became floats."""
        floats = 0
        for name, changes in self._changes.items():
            whole = made_of(self._graph.weights[name].weight)
            if whole is None:
                raise InputError(
                    f"an adapter changes {name} and {next(iter(changes))}, of which it is made",
                    remedy="merge one of them with PEFT",
                )
            floats += _set(self._graph, self._graph.weights[name], partial(_made_again, whole, changes))
        return floats


def _one_by_one(
    first: Callable[[LazyTensor], LazyTensor], then: Callable[[LazyTensor], LazyTensor], base: LazyTensor
) -> LazyTensor:
    return then(first(base))


def _made_again(
    whole: MadeOf, changes: Mapping[str, Callable[[LazyTensor], LazyTensor]], _: LazyTensor
) -> LazyTensor:
    return with_parts(whole, changes)


def _set(graph: Graph, weight: Value, merge: Callable[[LazyTensor], LazyTensor]) -> bool:
    """Merge into a weight; whether a quantized one became floats."""
    base = weight.weight
    assert base is not None
    if isinstance(base, ShapeOnlyTensor):
        return False
    graph.set_weight(weight, merge(base))
    return quantized_of(straight_of(base) or base) is not None and quantized_of(weight.weight) is None


def _own_name(graph: Graph, names: StoredNames, name: str) -> str:
    """The model's name of what the model or the checkpoint calls so."""
    return name if find_weight(graph, name) is not None else names.renamed.get(name, name)


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
