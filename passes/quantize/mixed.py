"""Bits by layer under a budget of size. Numbers in, numbers out; the walk that measures is `sensitivity.py`.

Every weight has options (bits, size, loss). A weight's options on the lower convex hull of loss over size are
steps of falling worth; taking the steps of all weights in the order of loss saved per bit is optimal for
every budget that a step ends on (Everett 1963), and what is left goes to the best steps that still fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .grid import Grid

WIDTHS = (2, 3, 4, 5, 6, 8)
HEADER = 160  # bytes that a tensor takes in a weight file beside its data: its entry, and alignment


@dataclass(frozen=True)
class Option:
    """One way to store a weight: its size in bits, all included, and what it loses."""

    bits: int
    size: int
    loss: float


def stored_bits(n: int, k: int, grid: Grid) -> int:
    """Bits of a quantized weight [n, k]: codes, float16 scales, zero points (two a byte where codes have at
    most 4 bits, as targets pack them).
    """
    zero = 0 if grid.symmetric else 4 if grid.bits <= 4 else 8
    groups = grid.groups(k)
    return n * (k * grid.bits + groups * (16 + zero)) + 8 * HEADER * (2 if grid.symmetric else 3)


def hull(options: Sequence[Option]) -> list[Option]:
    """The options that are best for some price of a bit, by size: losses fall, ever more slowly."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.size, o.loss)):
        if kept and option.loss >= kept[-1].loss:
            continue
        while len(kept) > 1 and _worth(kept[-2], kept[-1]) <= _worth(kept[-1], option):
            kept.pop()
        kept.append(option)
    return kept


def _worth(a: Option, b: Option) -> float:
    """Loss saved per bit of the step from a to b."""
    return (a.loss - b.loss) / (b.size - a.size)


def smallest(options: Mapping[str, Sequence[Option]]) -> int:
    """Bits that all weights need at least."""
    return sum(min(o.size for o in choices) for choices in options.values())


def allocate(options: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Option] | None:
    """An option for every weight with least total loss within `budget` bits; None where none fits."""
    hulls = {name: hull(choices) for name, choices in options.items()}
    chosen = {name: steps[0] for name, steps in hulls.items()}
    left = budget - sum(o.size for o in chosen.values())
    if left < 0:
        return None
    while True:
        steps = [
            (_worth(chosen[name], to), name, to)
            for name, choices in hulls.items()
            for to in choices
            if 0 < to.size - chosen[name].size <= left
        ]
        if not steps:
            return chosen
        _, name, to = max(steps, key=lambda step: step[:2])
        left -= to.size - chosen[name].size
        chosen[name] = to
