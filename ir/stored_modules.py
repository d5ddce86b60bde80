"""What a model's checkpoint calls its matrices, where the model's class has others: what an adapter in the
checkpoint's names needs to change that model per request.

    {"orders": [[[64, 1, 32]], …],                       see row_orders.py
     "modules": {"model.layers.0.mlp.down_proj": [["transformer.h.0.mlp.c_proj", null]],
                 "model.layers.0.self_attn.k_proj": [["model.layers.0.attention.query_key_value", 0]], …},
     "stacks": {"model.layers.0.mlp.experts.gate_up_proj":
                [["model.layers.0.block_sparse_moe.experts.*.w1", 1], ["….experts.*.w3", 1]], …}}

A module's rows are those of its pieces, one below the other; a piece is rows of a matrix of the checkpoint,
null where it is all of it, as it stands (and the module nothing else). An expert's matrix in a stack has a
piece for its gate and one for its up, or one for all of it; the "*" is the expert's number. Of a GGUF model's
stacks that is the number of a matrix in the tensor: "blk.0.ffn_gate_exps.*/128". An artifact of a version
before has no stacks.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .adapters import Adapter, LowRank
from .errors import InputError
from .expert_parts import ExpertParts, pieces_of_experts
from .row_orders import Orders, Rows, order_at, read_orders
from .weights import ArrayTensor, LazyTensor

FILE = "stored_modules.json"
"""Its name in an artifact."""

_OTHER = "give an adapter of this model"

Piece = tuple[str, Rows | None]
"""A matrix of the checkpoint, by its module's name there, and which of its rows."""


@dataclass(frozen=True, eq=False)
class StoredModules:
    """The pieces of each module that the checkpoint calls otherwise, and of stacked experts."""

    modules: Mapping[str, Sequence[Piece]]
    stacks: Mapping[str, Sequence[tuple[str, Rows]]] = field(default_factory=dict[str, Any])

    def __bool__(self) -> bool:
        return bool(self.modules or self.stacks)

    def to_json(self) -> dict[str, Any]:
        orders = Orders()
        modules, stacks = (
            {module: [[name, orders.place(rows)] for name, rows in pieces] for module, pieces in one.items()}
            for one in (self.modules, self.stacks)
        )
        return {"orders": orders.runs, "modules": modules, "stacks": stacks}

    @staticmethod
    def from_json(found: Any) -> StoredModules:
        """Raises ValueError where it is not as `to_json` writes it."""
        try:
            orders = read_orders(found["orders"])
            modules, stacks = (
                {
                    str(module): [(str(name), order_at(orders, place)) for name, place in pieces]
                    for module, pieces in one.items()
                }
                for one in (found["modules"], found.get("stacks", {}))
            )
        except (AttributeError, IndexError, KeyError, TypeError, OverflowError) as error:
            raise ValueError(str(error)) from error
        whole = (rows is None for pieces in modules.values() if len(pieces) != 1 for _, rows in pieces)
        if any(whole) or not all(modules.values()):
            raise ValueError("a module of no pieces, or of one whole matrix and others")
        of_experts: dict[str, list[tuple[str, Rows]]] = {}
        for name, pieces in stacks.items():
            of_experts[name] = [(piece, rows) for piece, rows in pieces if rows is not None and "*" in piece]
            if len(of_experts[name]) < len(pieces):
                raise ValueError("a stack of what is no expert's")
        return StoredModules(modules, of_experts)

    def of_modules(
        self, adapter: Adapter, known: Container[str], stacks: Sequence[ExpertParts] = ()
    ) -> Adapter:
        """The adapter by the model's names: what it changes that is not `known` there is looked for here, and
        stays as it is where it is not found. Experts become parts of `stacks`.

        Raises InputError where rows do not fit.
        """
        if all(module in known for module in adapter.changes):
            return adapter
        modules = {**self.modules, **pieces_of_experts(stacks, self.stacks)}
        used: dict[str, list[Rows | None]] = {}
        for pieces in modules.values():
            for name, rows in pieces:
                used.setdefault(name, []).append(rows)
        stored = {m: change for m, change in adapter.changes.items() if m in used and m not in known}
        if not stored:
            return adapter
        for name, change in stored.items():
            _check_rows(adapter, name, change, used[name])
        changes = {module: change for module, change in adapter.changes.items() if module not in stored}
        for module, pieces in modules.items():
            found = [(stored.get(name), rows) for name, rows in pieces]
            if not any(change is not None for change, _ in found):
                continue
            if module in changes:
                raise InputError(
                    f"adapter {adapter} changes {module} and {pieces[0][0]}, which are one matrix here",
                    remedy="merge one of them with PEFT (merge_and_unload) and give the merged model",
                )
            columns = sorted({change.a.shape[1] for change, _ in found if change is not None})
            if len(columns) != 1:
                said = ", ".join(map(str, columns))
                raise InputError(
                    f"adapter {adapter} changes parts of {module} of {said} columns",
                    remedy=_OTHER,
                )
            changes[module] = _joined(found)
        return replace(adapter, changes=changes)


def _check_rows(adapter: Adapter, name: str, change: LowRank, parts: Sequence[Rows | None]) -> None:
    """Rows that no module has would be lost without a word; `parts`: those that modules have."""
    orders = [rows for rows in parts if rows is not None]
    rows = change.b.shape[0]
    known = np.unique(np.concatenate(orders)) if orders else np.arange(rows)
    if known[-1] == rows - 1 and len(known) < rows:
        raise InputError(
            f"adapter {adapter} changes rows of {name} that no module here has",
            remedy="merge it: llmc compile MODEL --lora FOLDER",
        )
    of_rows = [one for one in (change.magnitude, change.bias) if one is not None]
    if known[-1] != rows - 1 or any(np.prod(one.shape) != rows for one in of_rows):
        raise InputError(
            f"adapter {adapter} is of a model of other sizes: {name} "
            f"{[change.b.shape[0], change.a.shape[1]]}",
            remedy=_OTHER,
        )


def _joined(pieces: Sequence[tuple[LowRank | None, Rows | None]]) -> LowRank:
    """The change of a module: each piece changes its own rows, by factors of its own."""
    first, rows = pieces[0]
    if len(pieces) == 1 and first is not None:
        return first if rows is None else _rows_of(first, rows)
    changed = [change for change, _ in pieces if change is not None]
    total = sum(0 if rows is None else len(rows) for _, rows in pieces)
    a = np.concatenate([change.a.read().astype(np.float32) for change in changed])
    b, bias = np.zeros((total, len(a)), np.float32), np.zeros(total, np.float32)
    row = column = 0
    for change, order in pieces:
        assert order is not None
        if change is not None:
            rank = change.a.shape[0]
            own = change.b.read().astype(np.float32)[order] * np.float32(change.scaling)
            b[row : row + len(order), column : column + rank] = own
            column += rank
            if change.bias is not None:
                bias[row : row + len(order)] = _flat(change.bias)[order] * np.float32(change.scaling)
        row += len(order)
    joined = LowRank(ArrayTensor(a, changed[0].a.source), ArrayTensor(b, changed[0].b.source), 1.0)
    added = next((change.bias for change in changed if change.bias is not None), None)
    if added is not None:
        joined = replace(joined, bias=ArrayTensor(bias, added.source))
    scaled = next((change.magnitude for change in changed if change.magnitude is not None), None)
    if scaled is None:
        return joined
    return replace(joined, magnitude=ArrayTensor(_magnitudes(pieces), scaled.source))


def _magnitudes(pieces: Sequence[tuple[LowRank | None, Rows | None]]) -> Rows:
    """Of rows that have none NaN."""
    found: list[Rows] = []
    for change, order in pieces:
        assert order is not None
        whole = None if change is None else change.magnitude
        found.append(np.full(len(order), np.nan, np.float32) if whole is None else _flat(whole)[order])
    return np.concatenate(found)


def _flat(tensor: LazyTensor) -> Rows:
    return tensor.read().astype(np.float32).reshape(-1)


def _rows_of(change: LowRank, rows: Rows) -> LowRank:
    magnitude, bias = (
        None if one is None else ArrayTensor(_flat(one)[rows], one.source)
        for one in (change.magnitude, change.bias)
    )
    b = ArrayTensor(change.b.read()[rows], change.b.source)
    return replace(change, b=b, magnitude=magnitude, bias=bias)


__all__ = ["FILE", "Piece", "StoredModules"]
