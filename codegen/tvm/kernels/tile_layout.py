"""Which weights are multiplied in tile registers, and how they lie for them (`tiles.py` has the kernels).

No TVM here: who packs weights and who chooses schedules asks, in processes that compile no kernels.
"""

from __future__ import annotations

from .isa import Isa
from .layout import QuantLayout

MOST_STARTS = 32
"""Groups for which it is kept where totals start: 2 kB each."""
_LEAST_DEPTH = 32
"""Columns of a group from which on tiles pay."""


def tile_depth(lay: QuantLayout) -> int:
    """Columns of a tile of activations: the largest part of a group that a tile holds, or 0 where tiles do
    not pay (scaling a group's totals takes longer than multiplying fewer columns) or where signed bytes do
    not hold the weights less their zero points.
    """
    signed = lay.bits < 8 or lay.zero_point is None
    depth = next(d for d in range(64, 0, -1) if lay.group % d == 0 and d % 4 == 0)
    whole = depth // 4 % lay.words == 0
    return depth if signed and whole and depth >= _LEAST_DEPTH else 0


def in_tiles(isa: Isa, lay: QuantLayout) -> bool:
    """Whether a level multiplies many rows by weights of a layout in tile registers."""
    return isa.tiles and tile_depth(lay) > 0


def in_pairs(lay: QuantLayout) -> bool:
    """Whether two tiles of rows are multiplied by those of two blocks."""
    return lay.group > tile_depth(lay) > 0


def as_they_lie(lay: QuantLayout) -> bool:
    """Whether tiles are loaded from a weight itself."""
    plain = lay.bits == 8 and lay.zero_point is None and lay.codebook is None
    return plain and in_pairs(lay) and lay.groups <= MOST_STARTS
