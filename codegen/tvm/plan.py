"""Where intermediate results live: slots of one workspace, shared by values whose lives do not overlap.

Sizes are symbolic, so a slot's size is the maximum over its values and offsets are computed when a step
begins. Which values share a slot is decided here, by their sizes at a typical step. (Greedy by size over
intervals, as for registers; optimal sharing is NP-hard: Sethi 1975.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ALIGNMENT = 64


@dataclass
class Interval:
    """One value: when its memory is written first and read last (numbers of calls), and how large it is."""

    key: int
    first: int
    last: int
    size: Any
    """Bytes: an int or a TIR expression."""
    nominal: int
    """Bytes at a typical step."""


@dataclass
class Slot:
    """Memory for several values, one after the other."""

    sizes: list[Any] = field(default_factory=list)
    nominal: int = 0
    free_from: int = 0


@dataclass(frozen=True)
class Plan:
    slots: Sequence[Slot]
    slot_of: Mapping[int, int]


def plan(intervals: Sequence[Interval]) -> Plan:
    """Assign a slot to every interval; two that overlap never share one (a call may not write over what it
    reads).
    """
    slots: list[Slot] = []
    slot_of: dict[int, int] = {}
    for interval in sorted(intervals, key=lambda i: (i.first, i.key)):
        best = _best(slots, interval)
        if best is None:
            slots.append(Slot())
            best = len(slots) - 1
        slot = slots[best]
        if all(str(size) != str(interval.size) for size in slot.sizes):
            slot.sizes.append(interval.size)
        slot.nominal = max(slot.nominal, interval.nominal)
        slot.free_from = interval.last + 1
        slot_of[interval.key] = best
    return Plan(slots, slot_of)


def _best(slots: Sequence[Slot], interval: Interval) -> int | None:
    """The free slot that grows least, then the one that wastes least."""
    free = [i for i, slot in enumerate(slots) if slot.free_from <= interval.first]
    if not free:
        return None
    return min(free, key=lambda i: (max(0, interval.nominal - slots[i].nominal), slots[i].nominal, i))
