"""Modules that go over a sequence in blocks of tokens, one block after the other.

A loop over T / 256 blocks is a Python loop whose number of turns torch.export would write down. A recurrence
gives the same wherever its blocks end (lightning attention, arXiv:2405.04658), and so in a single block,
however long. A module that is proven to do so is traced with blocks that no sequence fills, and what it
computes in one block is plain tensor operators, which passes know (`passes/fuse/decays.py`).

The proof is a trial: tokens that are zero are put in front of others, so that blocks end elsewhere among
those, and the rows must stay the same. The module is run in its own sizes; in place of its matrices stand
functions that pick and scale elements, as linear as those.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations, islice, product
from typing import TYPE_CHECKING

import numpy as np

from ..ir.weights import ArrayTensor, LazyTensor, LongerTensor, ShapeOnlyTensor
from .repeats import NUMBERS

if TYPE_CHECKING:
    import torch

_NAMES = ("block_size", "chunk_size")
_TOLERANCE = 1e-4
"""Largest difference of a row, in units of the largest value."""
_MOST = 1024
"""Tokens in a block that are tried: more are no blocks of a loop."""
_MOST_CHOICES = 256
"""Of axes as long as a block: which of them are of tokens."""


@dataclass(frozen=True)
class Table:
    """A buffer with an element for each token of a block along some axes."""

    name: str
    axes: tuple[int, ...]

    def longer(self, shape: Sequence[int], size: int) -> tuple[int, ...]:
        """Its shape for blocks of `size`."""
        return tuple(size if i in self.axes else n for i, n in enumerate(shape))


@dataclass(frozen=True)
class Blocks:
    """A module that gives the same wherever its blocks end; the attribute with their length, it, and the
    tables that are as long.
    """

    path: str
    module: torch.nn.Module
    name: str
    size: int
    tables: tuple[Table, ...] = ()

    def like(self) -> list[Table]:
        """Its own buffers with axes as long as a block, all of which are taken for those of tokens."""
        found: list[Table] = []
        for name, table in self.module.named_buffers(recurse=False):
            axes = tuple(i for i, n in enumerate(table.shape) if n == self.size)
            found += [Table(name, axes)] if axes else []
        return found

    def has_pairs(self) -> bool:
        """Whether one of them is of pairs of tokens: other lengths may be the same by chance."""
        own = self.module.named_buffers(recurse=False)
        return any(list(table.shape).count(self.size) > 1 for _, table in own)


def blocks_of(model: torch.nn.Module) -> list[Blocks]:
    """The modules of a model that are proven. Their buffers must have values."""
    found: list[Blocks] = []
    known: dict[str, tuple[Table, ...] | None] = {}
    for path, module in model.named_modules():
        for name in _NAMES:
            size = vars(module).get(name)
            if type(size) is not int or not 4 <= size <= _MOST:
                continue
            one = Blocks(path, module, name, size)
            if not one.has_pairs():
                continue
            plain = {n: v for n, v in vars(module).items() if isinstance(v, int | float | str)}
            key = repr((type(module), sorted((n, v) for n, v in plain.items() if n not in NUMBERS)))
            if key not in known:
                known[key] = _tables(one) if _is_free(one) else None
            tables = known[key]
            if tables is not None:
                found.append(replace(one, tables=tables))
    return found


def tables_of(
    blocks: Sequence[Blocks], weights: Mapping[str, LazyTensor], size: int
) -> tuple[list[Blocks], dict[str, LazyTensor]]:
    """The blocks whose tables a checkpoint has as the module made them, and those tables by their full names
    as ones for blocks of `size`. A checkpoint may have rounded them: what the module made is taken.
    """
    kept: list[Blocks] = []
    longer: dict[str, LazyTensor] = {}
    for one in blocks:
        names = {table: f"{one.path}.{table.name}" if one.path else table.name for table in one.tables}
        if not all(
            _holds(weights.get(full), getattr(one.module, table.name)) for table, full in names.items()
        ):
            continue
        kept.append(one)
        for table, full in names.items():
            made = ArrayTensor(getattr(one.module, table.name).float().numpy(), f"buffer:{full}")
            longer[full] = LongerTensor(made, table.longer(made.shape, size))
    return kept, longer


def _holds(stored: LazyTensor | None, made: torch.Tensor) -> bool:
    if stored is None or tuple(stored.shape) != tuple(made.shape):
        return False
    if isinstance(stored, ShapeOnlyTensor):
        return True
    return np.allclose(stored.read().astype(np.float32), made.float().numpy(), rtol=1e-2, atol=1e-3)


@contextmanager
def installed(blocks: Sequence[Blocks], size: int) -> Generator[None]:
    """Within it the modules have blocks of `size` tokens, with tables that have no values."""
    with contextlib.ExitStack() as stack:
        for one in blocks:
            stack.enter_context(_lengthened(one.module, one, size, "meta"))
        yield


@contextmanager
def _lengthened(module: torch.nn.Module, one: Blocks, size: int, device: str) -> Generator[None]:
    """Within it a module, that of `one` or one like it, has blocks of `size` and tables without values."""
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, module, one.name, getattr(module, one.name))
        setattr(module, one.name, size)
        for table in one.tables:
            held = module.get_buffer(table.name)
            stack.callback(setattr, module, table.name, held)
            setattr(module, table.name, held.new_zeros(table.longer(held.shape, size), device=device))
        yield


# -- the trial


def _is_free(one: Blocks) -> bool:
    import torch

    module, widths = _light(one.module)
    for width in widths:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, one.size + one.size // 2, width, generator=generator)
        with torch.no_grad():
            whole = _rows(module, x)
            if whole is None:
                continue
            for ahead in (one.size - 3, one.size // 2 + 1):
                begun = torch.zeros(1, ahead, width)
                moved = _rows(module, torch.cat([begun, x], 1))
                if moved is None:
                    return False
                off = float((moved[:, ahead:] - whole).abs().max())
                if not off <= _TOLERANCE * float(whole.abs().max()):  # NaN too
                    return False
            return True
    return False


def _tables(one: Blocks) -> tuple[Table, ...] | None:
    """Which axes of which buffers grow with a block; None where that is not found out.

    Others may be as long by chance, such as those of as many heads. The module is tried with longer blocks,
    and a text that shorter ones would not hold: what grows too much or too little does not fit the rest.
    """
    import torch

    module, widths = _light(one.module)
    size = one.size + 3
    choices = [
        [
            Table(table.name, some)
            for n in range(len(table.axes), -1, -1)
            for some in combinations(table.axes, n)
        ]
        for table in one.like()
    ]
    for width, some in product(widths, islice(product(*choices), _MOST_CHOICES)):
        tables = tuple(table for table in some if table.axes)
        x = torch.zeros(1, size - 1, width)
        with torch.no_grad(), _lengthened(module, replace(one, tables=tables), size, "cpu"):
            if _rows(module, x) is not None:
                return tables
    return None


def _light(module: torch.nn.Module) -> tuple[torch.nn.Module, list[int]]:
    """A copy of a module on the CPU without matrices, and the widths that its linear layers take."""
    import torch

    made = copy.deepcopy(module)
    widths: dict[int, None] = {}
    for path, layer in list(made.named_modules()):
        if isinstance(layer, torch.nn.Linear) and path:
            widths[layer.in_features] = None
            above, _, name = path.rpartition(".")
            setattr(made.get_submodule(above), name, _picking(layer.in_features, layer.out_features))
    generator = torch.Generator().manual_seed(1)
    for part in made.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            drawn = 1 + 0.2 * torch.randn(parameter.shape, generator=generator)
            setattr(part, name, torch.nn.Parameter(drawn, requires_grad=False))
    return made.eval(), list(widths)


def _picking(width: int, results: int) -> torch.nn.Module:
    """Stands for a linear layer: each result is some element of x, scaled."""
    import torch

    class Picking(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[..., places] * factors

    generator = torch.Generator().manual_seed(width + results)
    places = torch.randint(width, (results,), generator=generator)
    factors = torch.randn(results, generator=generator)
    return Picking()


def _rows(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """What the module gives for hidden states, and None for all else that it must be called with."""
    import torch

    first, *others = inspect.signature(module.forward).parameters.values()
    plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    given = {p.name: None for p in others if p.kind in plain and p.default is p.empty}
    result = None
    with contextlib.suppress(Exception):  # whatever it raises of a call that it is not made for
        result = module(**{first.name: x}, **given)
    result = result[0] if isinstance(result, tuple) and result else result
    return result if isinstance(result, torch.Tensor) and result.shape[:2] == x.shape[:2] else None
