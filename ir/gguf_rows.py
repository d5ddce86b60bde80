"""Where the rows of a model's matrices stand in the GGUF file that it was compiled from: what an adapter in
llama.cpp's names and order of rows needs to change that model per request.

    {"architecture": "llama",
     "orders": [[[0, 2, 32], [1, 2, 32], …], …]          runs of rows: first, step, number
     "modules": {"model.layers.0.self_attn.q_proj": ["blk.0.attn_q.weight", 0], …}}

The order is null where rows are as the file has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

FILE = "gguf_rows.json"
"""Its name in an artifact."""

Rows = np.ndarray[Any, Any]
_MOST = 1 << 24
"""Of rows of all orders, and of a tensor."""


@dataclass(frozen=True, eq=False)
class GGUFRows:
    """A model's matrices in its GGUF file.

    Attributes:
        architecture: llama.cpp's name for it.
        modules: the tensor of each module, and its rows in the module's order (int64), or None where they are
            all of them, as they stand.
    """

    architecture: str
    modules: Mapping[str, tuple[str, Rows | None]]

    def to_json(self) -> dict[str, Any]:
        orders: list[list[list[int]]] = []
        places: dict[bytes, int] = {}
        modules: dict[str, list[Any]] = {}
        for module, (tensor, rows) in self.modules.items():
            place = None
            if rows is not None:
                place = places.setdefault(rows.tobytes(), len(orders))
                if place == len(orders):
                    orders.append(_runs(rows))
            modules[module] = [tensor, place]
        return {"architecture": self.architecture, "orders": orders, "modules": modules}

    @staticmethod
    def from_json(found: Any) -> GGUFRows:
        """Raises ValueError where it is not as `to_json` writes it."""
        try:
            if sum(run[2] for runs in found["orders"] for run in runs) > _MOST:
                raise ValueError("more rows than a model has")
            orders = [np.concatenate([_run(*run) for run in runs]) for runs in found["orders"]]
            modules = {
                str(module): (str(tensor), None if place is None else orders[place])
                for module, (tensor, place) in found["modules"].items()
            }
            return GGUFRows(str(found["architecture"]), modules)
        except (AttributeError, IndexError, KeyError, TypeError, OverflowError) as error:
            raise ValueError(str(error)) from error


def _runs(rows: Rows) -> list[list[int]]:
    """The rows as runs that are equally far apart."""
    steps, runs, first = np.diff(rows), list[list[int]](), 0
    while first < len(rows):
        step = int(steps[first]) if first < len(steps) else 1
        others = np.flatnonzero(steps[first:] != step)
        count = (int(others[0]) if len(others) else len(steps) - first) + 1
        runs.append([int(rows[first]), step, count])
        first += count
    return runs


def _run(first: int, step: int, count: int) -> Rows:
    last = first + step * (count - 1)
    whole = all(type(number) is int for number in (first, step, count))
    if not whole or count < 1 or not 0 <= min(first, last) <= max(first, last) < _MOST:
        raise ValueError(f"a run of {count} rows from {first} on")
    return first + step * np.arange(count)
