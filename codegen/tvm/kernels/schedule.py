"""How a product by a quantized weight goes about it: sizes that change its time, and none of its bits.

What is shipped (`default_schedule`) was measured on the processors that we had (benchmarks/README.md);
`llmc compile --tune` searches for better ones on the processor that it runs on (`../tune.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from .isa import Isa
from .layout import QuantLayout
from .tile_layout import as_they_lie, in_pairs

_PANELS = 9
"""Panels below which they are not made wider for tiles."""
_MOST_ROWS, _MOST_BLOCKS, _MOST_UNPACK, _MOST_AHEAD = 16, 16, 1 << 12, 1 << 16


@dataclass(frozen=True)
class Schedule:
    """Sizes of one kernel."""

    few: tuple[int, ...]
    """Rows of a tile by weights as they lie in memory, the largest first and 1 last: as many tiles as fit of
    the first size, of the rest as many as fit of the second, ….
    """
    many: tuple[int, ...]
    """The same for panels that were unpacked."""
    width: int
    """Blocks of 16 outputs in a panel."""
    unpack: int
    """Rows from which on a panel is unpacked first (with tiles: multiplied in tile registers); 0: never."""
    ahead: int = 2048
    """Bytes of each block by which weights are fetched ahead: what a processor fetches by itself ends with a
    page of 4,096, and one token waits for nothing but weights. 0: not at all.
    """

    @staticmethod
    def parse(value: object) -> Schedule | None:
        """From what `as_json` gives, out of a file that anybody may have written; None where it is none."""
        if not isinstance(value, Mapping) or set(value) != {f.name for f in fields(Schedule)}:
            return None
        few, many = value["few"], value["many"]
        if not (_is_sizes(few) and _is_sizes(many)):
            return None
        limits = {"width": (1, _MOST_BLOCKS), "unpack": (0, _MOST_UNPACK), "ahead": (0, _MOST_AHEAD)}
        for name, (least, most) in limits.items():
            if type(value[name]) is not int or not least <= value[name] <= most:
                return None
        return Schedule(tuple(few), tuple(many), value["width"], value["unpack"], value["ahead"])

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def _is_sizes(value: object) -> bool:
    if not isinstance(value, list | tuple) or not value or value[-1] != 1:
        return False
    whole = all(type(size) is int and 1 <= size <= _MOST_ROWS for size in value)
    return whole and list(value) == sorted(set(value), reverse=True)


def default_schedule(isa: Isa, layout: QuantLayout, *, tiles: bool) -> Schedule:
    """The sizes that are shipped. `tiles`: whether many rows are multiplied in tile registers."""
    bits = layout.bits
    if isa.live_vectors >= 32:
        many, few, width = (6, 2, 1), ((6, 4, 2, 1) if bits == 8 or isa.spare_units else (4, 2, 1)), 2
    elif isa.dot == "maddubs":
        many, few, width = (4, 2, 1), (4, 2, 1), 1
    elif isa.live_vectors >= 8:
        # Bytes need no spreading, which leaves registers for more sums: few would wait for each other.
        many, few, width = (3, 1), ((4, 2, 1) if bits == 8 else (2, 1)), 1
    else:
        many, few, width = (2, 1), (1,), 1
    if tiles:
        # Tiles take rows from the nearest cache and the panel from the next one: wide panels spare the rows'
        # way there, but all threads should have some. Two tiles, some of whose rows are computed twice, take
        # less time than `vpdpbusd` from 17 rows on, and from 24 where groups are of 32 columns.
        width = next((wide for wide in (8, 4) if layout.blocks >= _PANELS * wide), 2)
        return Schedule(few, many, width, 16 if layout.group >= 48 else 24)
    if isa.pairs_rows:
        return Schedule(few, (4, 2, 1), width, 16)  # counted in instructions, not measured
    ahead = 3072 if isa.fetched_to == 1 else 4096
    if bits == 8:
        return Schedule(few, many, width, 0, ahead)
    # Halves and quarters of bytes are unpacked by a shift and a mask, which wide vectors do beside products.
    whole = bits in (2, 4)
    if isa.spare_units:
        # Then panels are read as they lie until what zero points take off each total costs more.
        return Schedule(few, many, width, (64 if layout.zero_point else 256) if whole else 32, ahead)
    cheap = whole and (isa.live_vectors >= 32 or isa.dot == "maddubs")
    return Schedule(few, many, width, 20 if cheap else 8, ahead)


def alternatives(schedule: Schedule, layout: QuantLayout, *, tiles: bool) -> list[tuple[str, list[Any]]]:
    """What a search may try, one field after the other: field → values other than the schedule's."""
    widths = [1, 2, 3]
    if tiles:  # panels as they lie have a width for few rows alone, for which no more than 2 are taken
        widths = [1, 2] if as_they_lie(layout) else [2, 4, 8, 16] if in_pairs(layout) else [1, 2, 4, 8, 16]
    rows = [(2, 1), (3, 1), (4, 2, 1), (5, 2, 1), (6, 2, 1), (6, 4, 2, 1), (8, 4, 2, 1)]
    tried: list[tuple[str, list[Any]]] = [
        ("ahead", [0, 512, 1024, 2048, 4096]),
        ("few", [(1,), *rows]),
        ("width", widths),
    ]
    if schedule.unpack:
        tried += [("unpack", [16, 32, 48] if tiles else [12, 16, 20, 24, 32, 48, 64, 128])]
        tried += [] if tiles else [("many", rows)]
    return [(name, [v for v in values if v != getattr(schedule, name)]) for name, values in tried]
