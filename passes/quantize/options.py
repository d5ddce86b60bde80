"""What schemes and passes say about grids, read and checked in one place."""

from __future__ import annotations

import re

from ...ir.errors import InputError


def check_grid(name: str, bits: int, group: int) -> None:
    """Raise InputError for options of the pass `name` that make no grid."""
    if not 2 <= bits <= 8:
        raise InputError(f"pass {name}: bits={bits}", remedy="use 2 to 8 bits")
    if group < 0:
        raise InputError(f"pass {name}: group={group}", remedy="use 0 (whole rows) or more")


def check_group(option: str, group: int) -> None:
    """Raise InputError for a group size of `option` ("--quant int4-g7") that no kernel takes."""
    if group < 8 or group % 8 or group > 1024:
        raise InputError(
            f"{option}: group size {group}",
            remedy="use a multiple of 8 from 8 to 1024, such as 32, 64 or 128",
        )


def parse_scheme(scheme: str, method: str, bits: str) -> tuple[int, int, bool] | None:
    """(bits, group, symmetric) of `METHOD-intB-gN[-sym]`, None for other schemes; the group defaults to 32.

    Raises InputError for a group size that no kernel takes.
    """
    m = re.fullmatch(rf"{method}-int([{bits}])(?:-g(\d+))?(-sym)?", scheme)
    if m is None:
        return None
    group = int(m.group(2) or 32)
    check_group(f"--quant {scheme}", group)
    return int(m.group(1)), group, m.group(3) is not None
