"""Orders of a matrix's rows in an artifact's JSON: each that many modules share stands there once, as runs of
rows that are equally far apart, [first, step, number].
"""

from __future__ import annotations

from typing import Any

import numpy as np

Rows = np.ndarray[Any, Any]
_MOST = 1 << 24
"""Of rows of all orders, and of a tensor."""


class Orders:
    """Orders that are being written; `runs` is their JSON."""

    def __init__(self) -> None:
        self.runs: list[list[list[int]]] = []
        self._places: dict[bytes, int] = {}

    def place(self, rows: Rows | None) -> int | None:
        """The number of an order, which is added where it is new; None for rows as they stand."""
        if rows is None:
            return None
        place = self._places.setdefault(rows.tobytes(), len(self.runs))
        if place == len(self.runs):
            self.runs.append(_runs(rows))
        return place


def read_orders(found: Any) -> list[Rows]:
    """Those of `Orders.runs`. Raises ValueError where numbers are no rows, IndexError or TypeError where it
    is no list of runs.
    """
    if sum(run[2] for runs in found for run in runs) > _MOST:
        raise ValueError("more rows than a model has")
    return [np.concatenate([_run(*run) for run in runs]) for runs in found]


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


__all__ = ["Orders", "Rows", "read_orders"]
