"""Changes of stacked experts, as adapters say them, by the matrices that kernels have places for: each
expert's gate, up and down.

    model.layers.0.mlp.experts.gate_up_proj [E, 2I, D]   →   ….gate_up_proj.gate[0], ….gate_up_proj.up[0], …
    model.layers.0.mlp.experts.down_proj    [E, D, I]    →   ….down_proj[0], ….down_proj[1], …

The parameter may have its matrices transposed; rows here are what a product has columns for.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .adapters import Adapter, LowRank, OfParameters, listed
from .errors import InputError, UnsupportedError
from .weights import ArrayTensor, LazyTensor

Array = np.ndarray[Any, Any]
_OTHER = "give an adapter of this model"
_MERGE = "merge it: llmc compile MODEL --lora FOLDER"


@dataclass(frozen=True)
class ExpertParts:
    """The places of a stack.

    Attributes:
        parameter: the stack's name in the model.
        experts: their number. k: columns of each matrix.
        parts: what an expert's matrices are called, and the rows of each, one below the other.
        interleaved: row i of the parameter's matrix is of part i % len(parts).
        unsaid: the module has its matrices transposed, and no `is_transposed`: PEFT adds to them as they are.
    """

    parameter: str
    experts: int
    k: int
    parts: tuple[tuple[str, int], ...]
    interleaved: bool = False
    unsaid: bool = False

    @property
    def rows(self) -> int:
        """Of an expert's matrix."""
        return sum(rows for _, rows in self.parts)

    def expanded(self) -> tuple[tuple[str, int], ...]:
        """(name, rows) of each part of each expert, in the order of their factors."""
        return tuple((_named(part, e), rows) for e in range(self.experts) for part, rows in self.parts)

    def rows_of_parts(self) -> list[tuple[str, Array]]:
        """What matrices are called, and which rows of the parameter's matrix are theirs, int64."""
        found: list[tuple[str, Array]] = []
        start, count = 0, len(self.parts)
        for i, (part, rows) in enumerate(self.parts):
            own = np.arange(i, self.rows, count) if self.interleaved else np.arange(start, start + rows)
            found.append((part, own))
            start += rows
        return found


def _named(part: str, expert: int) -> str:
    return f"{part}[{expert}]"


def by_experts(adapter: Adapter, stacks: Sequence[ExpertParts], known: Container[str]) -> Adapter:
    """The adapter with its changes of parameters as changes of matrices: of the stacks' parts, and of
    modules. What may be of other parameters stays.

    Raises InputError where sizes are of another model, UnsupportedError where an adapter changes parameters
    beside those that have places.
    """
    changes = dict(adapter.changes)
    left: dict[str, OfParameters] = {}
    for module, of in adapter.parameters.items():
        held = [one for one in stacks if one.parameter.rpartition(".")[0] == module and _rules(of, one)]
        if held and len(held) != len(of.factors):
            raise UnsupportedError(
                f"adapter {adapter} has {len(of.factors)} changes of parameters of {module} "
                f"({of.factors[0][0].source}); places are there for {listed([s.parameter for s in held])}",
                remedy=_MERGE,
            )
        for stack, factors in zip(held, of.factors, strict=False):
            changes |= _of_stack(adapter, stack, of, factors)
        if held:
            continue
        matrix = of.rules("weight")
        if len(of.factors) > 1:
            left[module] = of
        elif module in known and matrix is not None and of.factors[0][0].shape[0] == matrix[0]:
            changes[module] = LowRank(*of.factors[0], matrix[1])
        elif module in known or _is_one(of):
            changes[module] = of.itself()
        else:
            left[module] = of
    return replace(adapter, changes=changes, parameters=left)


def _is_one(of: OfParameters) -> bool:
    """Whether it has the rank of one matrix: of a module by the checkpoint's name, maybe, and of no stack."""
    try:
        of.itself()
    except InputError:
        return False
    return True


def _rules(of: OfParameters, stack: ExpertParts) -> tuple[int, float] | None:
    return of.rules(stack.parameter.rpartition(".")[2])


def _of_stack(
    adapter: Adapter, stack: ExpertParts, of: OfParameters, factors: tuple[LazyTensor, LazyTensor]
) -> dict[str, LowRank]:
    """Changes by parts. PEFT counts columns of B by rank first. Its factors are of the matrix as rows are
    counted here where the module says how it has them, and where it does not, of the matrix as it is stored
    (ParamWrapper); the sizes tell, if no matrix is square.
    """
    rules, (a, b) = _rules(of, stack), factors
    assert rules is not None
    rank, scaling = rules
    n, k = b.shape[0], a.shape[1]
    straight, turned = (n, k) == (stack.rows, stack.k), (n, k) == (stack.k, stack.rows)
    if a.shape[0] != rank * stack.experts or not (straight or turned):
        raise InputError(
            f"{a.source} {list(a.shape)} and {b.source} {list(b.shape)} of adapter {adapter} are no change "
            f"of {stack.parameter} of {stack.experts} × [{stack.rows}, {stack.k}] of rank {rank}",
            remedy=_OTHER,
        )
    down = a.read().reshape(stack.experts, rank, k)
    up = b.read().reshape(n, rank, stack.experts).transpose(2, 0, 1)
    if not straight or (turned and stack.unsaid):
        down, up = up.swapaxes(1, 2), down.swapaxes(1, 2)
    return {
        _named(part, e): LowRank(ArrayTensor(down[e], a.source), ArrayTensor(up[e][rows], b.source), scaling)
        for part, rows in stack.rows_of_parts()
        for e in range(stack.experts)
    }


def pieces_of_experts(
    stacks: Sequence[ExpertParts], stored: Mapping[str, Sequence[tuple[str, Array]]]
) -> dict[str, list[tuple[str, Array]]]:
    """For each part, the module of the checkpoint that has its rows, and which of them it is. `stored`: by
    the stack's name, the pieces of an expert's matrix by their names with a "*" for the expert's number: one
    for each part, or one for all. Other stacks are left out.
    """
    found: dict[str, list[tuple[str, Array]]] = {}
    for stack in stacks:
        pieces = stored.get(stack.parameter, ())
        sizes = [len(order) for _, order in pieces]
        apart = sizes == [rows for _, rows in stack.parts]
        if not apart and sizes != [stack.rows]:
            continue
        for i, (part, rows) in enumerate(stack.rows_of_parts()):
            piece, order = pieces[i if apart else 0]
            own = order if apart else order[rows]
            for e in range(stack.experts):
                found[_named(part, e)] = [(piece.replace("*", str(e)), own)]
    return found


__all__ = ["ExpertParts", "by_experts", "pieces_of_experts"]
