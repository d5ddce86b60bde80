"""What a model's checkpoint calls its matrices, for adapters in those names that requests choose.

A module's matrix is one of the checkpoint's tensors under another name, or rows of some (a projection that
the class splits, two that it joins). Which rows, the conversions say by what they make of a probe.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..ir.row_orders import Rows
from ..ir.stored_modules import Piece, StoredModules
from ..ir.weights import stored_name
from .gguf_experts import stacks_of_file
from .skeleton import instantiate
from .source import ModelSource
from .weights import MergedTensor

_WEIGHT = ".weight"
_MOST_ROWS = 1 << 22
"""Of a probe: its numbers are whole ones in float32, twice as many as rows."""


def stored_modules(source: ModelSource) -> StoredModules:
    """Of a folder's model; of a GGUF file's its experts, for `rows_of_modules` has the rest. A tensor that
    several parameters share is no single module's: it is left out.
    """
    if source.gguf is not None:
        return StoredModules({}, stacks_of_file(source.weights, source.stored))
    if source.kind != "hf":
        return StoredModules({})
    shared = Counter(id(tensor) for tensor in source.weights.values())
    matrices = {
        parameter.removesuffix(_WEIGHT): tensor
        for parameter, tensor in source.weights.items()
        if parameter.endswith(_WEIGHT) and len(tensor.shape) == 2 and shared[id(tensor)] == 1
    }
    found: dict[str, Sequence[Piece]] = {}
    made: dict[str, MergedTensor] = {}
    for module, tensor in matrices.items():
        name = stored_name(tensor)
        if isinstance(tensor, MergedTensor):
            made[module] = tensor
        elif name is not None and name.endswith(_WEIGHT):
            found[module] = [(name.removesuffix(_WEIGHT), None)]
    linear = _linear(source, made)
    for module in linear:
        pieces = _pieces(made[module])
        if pieces is not None:
            found[module] = pieces
    stacks = {
        parameter: pieces
        for parameter, tensor in source.weights.items()
        if isinstance(tensor, MergedTensor) and (pieces := _pieces_of_experts(tensor))
    }
    return StoredModules(found, stacks)


def _pieces_of_experts(tensor: MergedTensor) -> list[tuple[str, Rows]] | None:
    """The rows of the checkpoint's tensors that make each of some stacked matrices, names with a "*" for its
    number; None where it is anything else of them, or names do not count.
    """
    one = tensor.first_matrix()
    pieces = None if one is None else _pieces(one)
    if pieces is None:
        return None
    found: list[tuple[str, Rows]] = []
    for name, rows in pieces:
        # A layer's number may be 0 too: what counts is that every expert's name is one of these.
        places = [match.span() for match in re.finditer(r"(?<=\.)0(?=\.)", name)]
        texts = [f"{name[:start]}*{name[stop:]}" for start, stop in places]
        known, experts = tensor.stored, range(tensor.shape[0])
        numbered = [
            text for text in texts if all(text.replace("*", str(e)) + _WEIGHT in known for e in experts)
        ]
        if rows is None or len(numbered) != 1:
            return None
        found.append((numbered[0], rows))
    return found


def _linear(source: ModelSource, modules: Sequence[str] | dict[str, Any]) -> list[str]:
    """Those whose weight's rows are what the layer gives: others (`[K, N]`) are told apart by no shape."""
    import torch

    if not modules:
        return []
    model: torch.nn.Module = instantiate(source.config)
    return [module for module in modules if isinstance(model.get_submodule(module), torch.nn.Linear)]


def _pieces(tensor: MergedTensor) -> list[Piece] | None:
    """The rows of the checkpoint's tensors that make a matrix; None where it is anything else of them."""
    order = tensor.row_order(_MOST_ROWS)
    if order is None:
        return None
    pieces: list[Piece] = []
    ends: dict[str, tuple[int, int]] = {}
    start = 0
    for name, one in tensor.stored.items():
        ends[name] = (start, start + one.shape[0])
        start += one.shape[0]
    start = 0
    while start < len(order):
        name, (low, high) = next((n, e) for n, e in ends.items() if e[0] <= order[start] < e[1])
        outside = np.flatnonzero((order[start:] < low) | (order[start:] >= high))
        stop = start + int(outside[0]) if len(outside) else len(order)
        pieces.append((name.removesuffix(_WEIGHT), order[start:stop] - low))
        start = stop
    names = [name for name, _ in pieces]
    whole = all(name.endswith(_WEIGHT) for name in ends)
    # Rows that alternate between tensors would be a piece each.
    return pieces if whole and len(set(names)) == len(names) else None


__all__ = ["stored_modules"]
