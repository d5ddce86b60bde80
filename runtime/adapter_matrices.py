"""Matrices and rows of tokens that an adapter has in the place of the model's (PEFT's `modules_to_save`,
`trainable_token_indices`), as changes of low rank: what requests can choose.

    W' in the place of W [N, K]   →   W + B A, of rank min(N, K): A = I and B = W' - W, or the other way round
    rows e' of n tokens           →   of rank n; of the embedding A = one row a token, 1 at its id,
                                      B = (e' - e)ᵀ; of a head with the same table A = e' - e, B = one column
                                      a token, 1 at its id

W and e are what the artifact has, quantized as it is: read out of it as an adapter is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ..ir.adapters import LowRank
from ..ir.errors import InputError, UnsupportedError
from ..ir.weights import ArrayTensor

if TYPE_CHECKING:
    from ..ir.adapters import Adapter, TokenRows
    from ..ir.weights import LazyTensor
    from .adapter_places import BaseWeights, Place

_OTHER = "give an adapter of this model"
_MERGE = "merge it: llmc compile MODEL --lora FOLDER"
_ROWS = 4096
"""Of a matrix of the model that are in memory at a time."""
_END = ".weight"


def with_changes(
    adapter: Adapter, places: Mapping[str, tuple[Place, int]], base: BaseWeights | None
) -> Adapter:
    """The adapter with changes of low rank in the place of matrices and rows; what has no place among
    `places` (by module: its first place, and the part there) stays as it is.

    Raises InputError where it was made for another model, UnsupportedError where `base` is missing or
    something is changed twice.
    """
    found = _Changes(adapter, places, base)
    replaced = {name: data for name, data in adapter.replaced.items() if not found.replace(name, data)}
    rows = {module: tokens for module, tokens in adapter.rows.items() if not found.set_rows(module, tokens)}
    return replace(adapter, changes={**adapter.changes, **found.changes}, replaced=replaced, rows=rows)


class _Changes:
    def __init__(
        self, adapter: Adapter, places: Mapping[str, tuple[Place, int]], base: BaseWeights | None
    ) -> None:
        self._adapter, self._places, self._base = adapter, places, base
        self.changes: dict[str, LowRank] = {}

    def replace(self, name: str, data: LazyTensor) -> bool:
        """Whether a parameter's matrix has become a change of its module."""
        module = name.removesuffix(_END)
        if module == name or name in self._adapter.copies or not self._has(module):
            return False
        # Those saved unasked are for all that read them (`Adapter.optional`).
        others = self._tied(module) if name in self._adapter.optional else ()
        for one in (module, *others):
            if not self._has(one):
                return False
        for one in (module, *others):
            self._add(one, self._whole(one, data))
        return True

    def set_rows(self, module: str, tokens: TokenRows) -> bool:
        """Whether rows of tokens have become changes of their module, and of those with the same table."""
        if not self._has(module):
            return False
        tied = self._tied(module)
        # PEFT trains rows of both unless it is asked for rows of each.
        others = () if any(one in self._adapter.rows for one in tied) else tied
        if not all(self._has(one) for one in others):
            return False
        for one in (module, *others):
            self._add(one, self._of_tokens(one, tokens))
        return True

    def _has(self, module: str) -> bool:
        """Whether a module has a place whose kernels and weights are such as this needs."""
        if module not in self._places:
            return False
        place, _ = self._places[module]
        return place.stack is None and (place.gains or place.embedding)

    def _tied(self, module: str) -> tuple[str, ...]:
        place, _ = self._places[module]
        if not place.embedding:
            # A head's own: the embedding keeps its table.
            return ()
        if place.tied is None:
            raise UnsupportedError(
                f"adapter {self._adapter} has rows of {module}, and this artifact, of a version before, does "
                "not say what else has its table",
                remedy=f"compile the model again, or {_MERGE}",
            )
        return place.tied

    def _add(self, module: str, change: LowRank) -> None:
        other = self.changes.get(module, self._adapter.changes.get(module))
        self.changes[module] = change if other is None else self._both(module, change, other)

    def _both(self, module: str, change: LowRank, other: LowRank) -> LowRank:
        """What takes a place, and what changes that: a head with factors, and rows of tokens in its table."""
        fits = change.a.shape[1] == other.a.shape[1] and change.b.shape[0] == other.b.shape[0]
        if other.magnitude is not None or other.bias is not None or not fits:
            raise UnsupportedError(
                f"adapter {self._adapter} changes {module}, and has {change.b.source} in its place",
                remedy=_MERGE,
            )
        a = np.concatenate([one.a.read().astype(np.float32) for one in (change, other)])
        b = [one.b.read().astype(np.float32) * np.float32(one.scaling) for one in (change, other)]
        return _change(a, np.concatenate(b, 1), change.b, embedding=change.embedding)

    def _sizes(self, module: str) -> tuple[int, int]:
        """Rows and columns of the module's matrix, of an embedding [V, D]."""
        place, part = self._places[module]
        rows = place.parts[part][1]
        return (place.k, rows) if place.embedding else (rows, place.k)

    def _needed(self) -> BaseWeights:
        if self._base is None:
            raise UnsupportedError(
                f"adapter {self._adapter} has matrices or rows in the place of the model's, which needs what "
                "compiles models",
                remedy=f"pip install 'llmc[compile]', or {_MERGE}",
            )
        return self._base

    def _whole(self, module: str, data: LazyTensor) -> LowRank:
        n, k = self._sizes(module)
        turned = self._needed().is_transposed(module)
        wanted = (k, n) if turned else (n, k)
        if tuple(data.shape) != wanted:
            raise InputError(
                f"{data.source} of adapter {self._adapter} has the shape {list(data.shape)}, where {module} "
                f"has {list(wanted)}",
                remedy=_OTHER,
            )
        new = data.read().astype(np.float32)
        more = np.ascontiguousarray(new.T) if turned else new
        for start in range(0, n, _ROWS):
            stop = min(start + _ROWS, n)
            more[start:stop] -= self._needed().rows(module, start, stop)
        place, _ = self._places[module]
        if place.embedding:
            return _change(more.T, np.eye(k, dtype=np.float32), data, embedding=True)
        if k <= n:
            return _change(np.eye(k, dtype=np.float32), more, data)
        return _change(more, np.eye(n, dtype=np.float32), data)

    def _of_tokens(self, module: str, tokens: TokenRows) -> LowRank:
        vocabulary, width = self._sizes(module)
        base, source = self._needed(), tokens.rows.source
        if base.is_transposed(module) or tokens.rows.shape[1] != width or max(tokens.ids) >= vocabulary:
            raise InputError(
                f"{source} of adapter {self._adapter} has rows {list(tokens.rows.shape)} of tokens up to "
                f"{max(tokens.ids)}, where {module} has {[vocabulary, width]}",
                remedy=_OTHER,
            )
        more = tokens.rows.read().astype(np.float32)
        more = more - np.concatenate([base.rows(module, one, one + 1) for one in tokens.ids])
        places = np.zeros((len(tokens.ids), vocabulary), np.float32)
        places[np.arange(len(tokens.ids)), tokens.ids] = 1
        place, _ = self._places[module]
        if place.embedding:
            return _change(places, more.T, tokens.rows, embedding=True)
        return _change(more, places.T, tokens.rows)


def _change(a: np.ndarray, b: np.ndarray, of: LazyTensor, *, embedding: bool = False) -> LowRank:
    down, up = (ArrayTensor(np.ascontiguousarray(one), of.source) for one in (a, b))
    return LowRank(down, up, 1.0, transposed=embedding, embedding=embedding)


__all__ = ["with_changes"]
