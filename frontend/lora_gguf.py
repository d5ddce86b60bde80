"""LoRA adapters in GGUF files, as llama.cpp's convert_lora_to_gguf writes them, with llama.cpp's names and
order of rows: merged into a GGUF model's tensors as they are, or by `GGUFRows` as changes of modules, for
requests to choose among.

    general.type = "adapter", adapter.type = "lora", adapter.lora.alpha
    blk.0.attn_q.weight.lora_a           [r, K]        .lora_b  [N, r]
    blk.0.ffn_up_exps.weight.lora_a      [E, r, K]     .lora_b  [E, N, r]
    token_embd.weight.lora_a             [V, r]        .lora_b  [D, r]     its change is A Bᵀ

Shapes in torch's order. https://github.com/ggml-org/llama.cpp (convert_lora_to_gguf.py)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from ..ir.adapters import MOST, Adapter, LowRank, listed
from ..ir.errors import InputError, UnsupportedError
from ..ir.gguf_rows import GGUFRows
from ..ir.weights import ArrayTensor, LazyTensor
from .gguf import GGUFFile, read_gguf
from .gguf_experts import matrix_of
from .weights import GGUFTensor, ReorderedTensor, open_gguf_tensors

_A, _B = ".lora_a", ".lora_b"
_ROWS_BY_ID: Final = ("token_embd.weight",)
_NORM: Final = "_norm.weight"
_EXPERTS: Final = "_exps."
_OTHER: Final = "the adapter belongs to another model"
_AGAIN: Final = "download the adapter again"


class ChangedTensor:
    """A tensor of a GGUF file plus scaling · B A: float32, without the blocks that it is stored in."""

    dtype: str = "float32"

    def __init__(self, base: LazyTensor, a: GGUFTensor, b: GGUFTensor, scaling: float, by_id: bool) -> None:
        self.base, self._a, self._b = base, a, b
        self._scaling, self._by_id = np.float32(scaling), by_id
        self.shape, self.source = base.shape, f"{base.source} + {b.source}"

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray[Any, Any]:
        rows = self.base.read(start, stop).astype(np.float32)
        if self._by_id:
            change = self._a.read(start, stop) @ self._b.read().T
        elif len(self.shape) == 3:
            change = self._b.read(start, stop) @ self._a.read(start, stop)
        else:
            change = self._b.read(start, stop) @ self._a.read()
        return rows + change * self._scaling


@dataclass(frozen=True, eq=False)
class GGUFAdapter:
    """An adapter's tensors by name.

    Attributes:
        alpha: 0 where changes are not scaled.
        norms: names of whole norms beside the factors, which llama.cpp leaves out too.
    """

    name: str
    model: str
    alpha: float
    factors: Mapping[str, GGUFTensor]
    norms: Sequence[str]

    def merged(self, tensors: Mapping[str, LazyTensor], scale: float, *, tied: bool) -> dict[str, LazyTensor]:
        """A model's tensors by name, those that the adapter changes with its change, times `scale`. `tied`:
        its output head is the table of its embeddings.

        Raises InputError where the adapter is another model's, UnsupportedError for a change of a tied table.
        """
        names = list(dict.fromkeys(name.removesuffix(_A).removesuffix(_B) for name in self.factors))
        strangers = [name for name in names if name not in tensors]
        if strangers:
            raise InputError(
                f"adapter {self.name} changes {listed(strangers)}, which {self.model} does not have",
                remedy=_OTHER,
            )
        return {**tensors, **{name: self._changed(name, tensors[name], scale, tied) for name in names}}

    def _changed(self, name: str, base: LazyTensor, scale: float, tied: bool) -> ChangedTensor:
        a, b = self._pair(name)
        by_id = name in _ROWS_BY_ID
        if by_id and tied:
            raise UnsupportedError(
                f"adapter {self.name} changes {name}, which {self.model} has for its output head too",
                remedy="give the adapter as PEFT's folder",
            )
        rank = _rank(base, a, b, by_id)
        return ChangedTensor(base, a, b, scale * self._scaling(rank), by_id)

    def of_modules(self, rows: GGUFRows) -> Adapter:
        """The adapter as changes of modules, as PEFT has them; of stacked experts, those of each matrix
        (`gguf_experts.matrix_of`).

        Raises UnsupportedError where it changes what is no matrix of a module, InputError where factors are
        damaged.
        """
        every = dict.fromkeys(name.removesuffix(_A).removesuffix(_B) for name in self.factors)
        stacks = [name for name in every if _EXPERTS in name]
        names = [name for name in every if _EXPERTS not in name]
        used = {name for name, _ in rows.modules.values()}
        if others := [name for name in names if name not in used]:
            raise UnsupportedError(
                f"adapter {self.name} changes {listed(others)}, which requests cannot choose in {self.model}",
                remedy="if it is this model's, merge it: llmc compile MODEL.gguf --lora ADAPTER.gguf",
            )
        changes: dict[str, LowRank] = {}
        for name in stacks:
            changes |= self._of_experts(name)
        for name in names:
            a, b = self._pair(name)
            orders = {module: order for module, (of, order) in rows.modules.items() if of == name}
            parts = [order for order in orders.values() if order is not None]
            fits = len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1] > 0
            # Rows that no module has would be lost without a word.
            if not fits or (
                parts and not np.array_equal(np.unique(np.concatenate(parts)), range(b.shape[0]))
            ):
                raise InputError(
                    f"{a.source} {list(a.shape)} and {b.source} {list(b.shape)} are no factors of {name}",
                    remedy=_OTHER,
                )
            for module, order in orders.items():
                ours = b if order is None else ArrayTensor(b.read()[order], b.source)
                changes[module] = LowRank(a, ours, self._scaling(a.shape[0]))
        return Adapter(self.name, changes, {})

    def _of_experts(self, name: str) -> dict[str, LowRank]:
        a, b = self._pair(name)
        if not len(a.shape) == len(b.shape) == 3 or a.shape[:2] != (b.shape[0], b.shape[2]) or not a.shape[1]:
            raise InputError(
                f"{a.source} {list(a.shape)} and {b.source} {list(b.shape)} are no factors of experts",
                remedy=_OTHER,
            )
        return {
            matrix_of(name, e, a.shape[0]): LowRank(
                ArrayTensor(down, a.source), ArrayTensor(up, b.source), self._scaling(a.shape[1])
            )
            for e, (down, up) in enumerate(zip(a.read(), b.read(), strict=True))
        }

    def _pair(self, name: str) -> tuple[GGUFTensor, GGUFTensor]:
        """A tensor's factors, both there and finite."""
        a, b = self.factors.get(name + _A), self.factors.get(name + _B)
        if a is None or b is None:
            raise InputError(f"{self.name} has no {name}{_A if a is None else _B}", remedy=_AGAIN)
        for one in (a, b):
            if not (np.abs(one.read()) <= MOST).all():
                raise InputError(f"{one.source} holds NaN or numbers beyond {MOST:g}", remedy=_AGAIN)
        return a, b

    def _scaling(self, rank: int) -> float:
        return self.alpha / rank if self.alpha else 1.0


def read_gguf_adapter(path: Path, model: str, architecture: str) -> GGUFAdapter:
    """Open an adapter for a model of that name and llama.cpp's name of its architecture.

    Raises InputError where the file is damaged or the adapter another model's, UnsupportedError for an
    adapter of another kind.
    """
    file = read_gguf(path)
    alpha = _alpha(file, model, architecture)
    tensors = open_gguf_tensors(file)
    factors = {name: one for name, one in tensors.items() if name.endswith((_A, _B))}
    norms = [name for name in tensors if name.endswith(_NORM)]
    strange = [name for name in tensors if name not in factors and name not in norms]
    if strange:
        raise UnsupportedError(
            f"{path.name}:{strange[0]} is no tensor of a LoRA adapter", remedy="give a LoRA adapter"
        )
    if not factors:
        raise InputError(f"adapter {path.name} holds no factors", remedy=_AGAIN)
    return GGUFAdapter(path.name, model, alpha, factors, norms)


def rows_of_modules(
    architecture: str, weights: Mapping[str, LazyTensor], stored: Mapping[str, LazyTensor]
) -> GGUFRows:
    """Those matrices of a model (`weights`, by parameter) that are rows of a file's tensors (`stored`)."""
    names = {id(tensor): name for name, tensor in stored.items() if name not in _ROWS_BY_ID}
    modules: dict[str, tuple[str, np.ndarray[Any, Any] | None]] = {}
    for parameter, tensor in weights.items():
        base, order = tensor, None
        while isinstance(base, ReorderedTensor):
            order = base.order if order is None else base.order[order]
            base = base.base
        name = names.get(id(base))
        if name is not None and len(base.shape) == 2 and parameter.endswith(".weight"):
            modules[parameter.removesuffix(".weight")] = (name, order)
    return GGUFRows(architecture, modules)


def _alpha(file: GGUFFile, model: str, architecture: str) -> float:
    """What the file says of itself, checked; 0 where changes are not scaled."""
    name = file.path.name
    if file.metadata.get("general.type") != "adapter":
        raise InputError(f"{name} is no adapter by its general.type", remedy="give an adapter")
    kind = file.metadata.get("adapter.type")
    if kind != "lora" or "adapter.alora.invocation_tokens" in file.metadata:
        raise UnsupportedError(
            f"adapter {name} is an adapter of kind {kind if kind != 'lora' else 'alora'!r}",
            remedy="give a LoRA adapter",
        )
    if file.architecture != architecture:
        raise InputError(
            f"adapter {name} is of a model of architecture {file.architecture!r}, {model} is "
            f"{architecture!r}",
            remedy=_OTHER,
        )
    alpha = file.metadata.get("adapter.lora.alpha", 0.0)
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not -MOST <= alpha <= MOST:
        raise InputError(f"{name}: adapter.lora.alpha is {alpha!r}, no number for it", remedy=_AGAIN)
    return float(alpha)


def _rank(base: LazyTensor, a: GGUFTensor, b: GGUFTensor, by_id: bool) -> int:
    """The rank of a change whose shapes fit."""
    rank = a.shape[-1] if by_id else a.shape[-2] if len(a.shape) > 1 else 0
    *stack, n, k = base.shape if len(base.shape) > 1 else (0, 0)
    wanted = ((n, rank), (k, rank)) if by_id else ((*stack, rank, k), (*stack, n, rank))
    if (a.shape, b.shape) != wanted or not rank:
        raise InputError(
            f"{a.source} {list(a.shape)} and {b.source} {list(b.shape)} are no factors of a change of "
            f"{base.source} {list(base.shape)}",
            remedy=_OTHER,
        )
    return rank
