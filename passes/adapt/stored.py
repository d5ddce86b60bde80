"""Weights by the names that their checkpoint has for them.

A model's class may call its parameters otherwise than the files that it is published in, and make one of
several tensors there (experts that are stacked, projections that are one) or several of one. Adapters that
were trained with another version of the class, or with the publisher's own, name modules as the files do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property

from ...ir.core import Graph, Value
from ...ir.dtypes import itemsize
from ...ir.weights import LazyTensor, MadeOf, made_of, stored_name
from ..derived import CastTensor


class StoredNames:
    """Of a traced graph."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph

    @cached_property
    def renamed(self) -> Mapping[str, str]:
        """The parameter that each tensor is, by its name in the checkpoint, where that is another."""
        found = {stored_name(value.weight): name for name, value in self._graph.weights.items()}
        return {stored: name for stored, name in found.items() if stored is not None and stored != name}

    @cached_property
    def parts(self) -> Mapping[str, list[Value]]:
        """The weights that are made of each tensor and others, or of a part of it."""
        found: dict[str, list[Value]] = {}
        for value in self._graph.weights.values():
            whole = made_of(value.weight)
            for name in () if whole is None else whole.stored:
                found.setdefault(name, []).append(value)
        return found

    def part(self, name: str) -> LazyTensor | None:
        """A tensor that weights are made of."""
        whole = made_of(self.parts[name][0].weight) if name in self.parts else None
        return None if whole is None else whole.stored[name]


class OverParts(ABC):
    """A weight with something merged in, over one that may be made of a checkpoint's tensors: it stays so."""

    _base: LazyTensor

    @property
    def stored(self) -> Mapping[str, LazyTensor]:
        """See `ir.weights.MadeOf`."""
        whole = made_of(self._base)
        return {} if whole is None else whole.stored

    def with_stored(self, tensors: Mapping[str, LazyTensor]) -> LazyTensor:
        """See `ir.weights.MadeOf`."""
        whole = made_of(self._base)
        assert whole is not None
        return self.over(whole.with_stored(tensors))

    @abstractmethod
    def over(self, base: LazyTensor) -> LazyTensor:
        """The same merged into another weight."""


def with_parts(whole: MadeOf, changed: Mapping[str, Callable[[LazyTensor], LazyTensor]]) -> LazyTensor:
    """The same made of tensors that some of its own were changed into, all of the widest type."""
    parts = {name: changed.get(name, _same)(tensor) for name, tensor in whole.stored.items()}
    kind = max((one.dtype for one in parts.values()), key=itemsize)
    return whole.with_stored({n: t if t.dtype == kind else CastTensor(t, kind) for n, t in parts.items()})


def _same(tensor: LazyTensor) -> LazyTensor:
    return tensor
