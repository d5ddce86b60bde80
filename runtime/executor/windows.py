"""Layers that see a window only, with pages of their own: what an executor offers, and what a step brings for
them. See docs/architecture.md, "The paged step".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from ...ir.errors import InputError
from .indices import within

if TYPE_CHECKING:
    from .base import StepInputs

WindowTables = tuple[np.ndarray, np.ndarray]
"""(slot_mapping [T], block_table [B, P]) for the layers of one window; entries of pages that lie wholly
before the window mean nothing.
"""


@runtime_checkable
class KeepsWindows(Protocol):
    """An executor whose model may have layers that see a window, with pages of their own."""

    windows: tuple[int, ...]
    """Tokens of each window whose layers have pages of their own; empty for a model without."""
    window_bytes_per_page: tuple[int, ...]
    """Bytes of one page over the layers of each window; they count in `kv_bytes_per_page` too."""

    def allocate_windows(self, pages: Sequence[int]) -> None:
        """After `allocate_kv`: give the layers of each window this many pages, and let steps bring tables of
        their own for them. Without this they have as many pages as the other layers, and the same tables.
        """
        ...

    def copy_window_pages(self, which: int, src: Sequence[int], dst: Sequence[int]) -> None:
        """`copy_pages` for the layers of window number `which`. `copy_pages` is then for the others alone."""
        ...


def window_of(pages: Any) -> int | None:
    """The window whose pages a cache's second axis counts ("N512"); None where it counts them all ("N")."""
    text = str(pages)
    return int(text[1:]) if text[:1] == "N" and text[1:].isdigit() else None


def tables_of(
    inputs: StepInputs, windows: Sequence[int], pages: Sequence[int], page_size: int
) -> list[WindowTables]:
    """The step's tables for each window, checked; `pages` of each, empty before `allocate_windows`."""
    if not pages:
        if inputs.windows is not None:
            raise InputError("the layers with a window have no pages of their own", remedy="see StepInputs")
        return [(inputs.slot_mapping, inputs.block_table)] * len(windows)
    given = inputs.windows
    if given is None or len(given) != len(windows):
        raise InputError(
            f"this model wants tables for {len(windows)} windows of its layers", remedy="see StepInputs"
        )
    for (slots, table), count in zip(given, pages, strict=True):
        if slots.shape != inputs.slot_mapping.shape or table.shape != inputs.block_table.shape:
            raise InputError("a window's tables have other shapes than the step's", remedy="see StepInputs")
        for name, array, limit in (("slot_mapping", slots, count * page_size), ("block_table", table, count)):
            if not within(array, limit):
                raise InputError(
                    f"{name} of a window holds a value outside of 0 .. {limit - 1}",
                    remedy="check the request",
                )
    return list(given)
