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
    total = 0
    for runs in found:
        for run in runs:
            _check_run(*run)
            total += run[2]
    if total > _MOST:
        raise ValueError("more rows than a model has")
    return [
        np.concatenate([first + step * np.arange(count) for first, step, count in runs]) for runs in found
    ]


def order_at(orders: list[Rows], place: Any) -> Rows | None:
    """The order that a module names; None for rows as they stand. Raises ValueError for what is no number of
    an order.
    """
    if place is None:
        return None
    if type(place) is not int or not 0 <= place < len(orders):
        raise ValueError(f"{place!r} is the number of no order")
    return orders[place]


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


def _check_run(first: int, step: int, count: int) -> None:
    whole = all(type(number) is int for number in (first, step, count))
    if whole and 1 <= count <= _MOST:
        last = first + step * (count - 1)
        if 0 <= min(first, last) <= max(first, last) < _MOST:
            return
    raise ValueError(f"a run of {count} rows from {first} on")


__all__ = ["Orders", "Rows", "order_at", "read_orders"]
