"""Memory of a compilation: sizes as people write them, and the peak that is to be expected."""

from __future__ import annotations

import re

from ..ir.errors import InputError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def parse_size(text: str) -> int:
    """Bytes of "1.5GB" (10⁹), "4GiB" (2³⁰), "800M" (10⁶) or "900000000". InputError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", text.strip().lower())
    if found is None or (found.group(3) and not found.group(2)):
        raise InputError(f"{text!r} is no size", remedy="write 1.5GB (10⁹ bytes) or 4GiB (2³⁰ bytes)")
    number, unit, binary = found.groups()
    scale = 1024 ** "kmgt".index(unit) * 1024 if binary else _UNITS[unit]
    return int(float(number) * scale)


def size_text(size: int) -> str:
    """Bytes as --max-ram takes them, in MB rounded up."""
    return f"{-(-size // 10**6)}MB"
