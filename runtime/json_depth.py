"""How deep JSON is nested: how much of it a parser takes differs between versions of Python."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def deeper(value: Any, depth: int) -> bool:
    """Whether a JSON value is nested deeper than `depth`, without recursion."""
    level = [value]
    for _ in range(depth):
        level = [
            inner
            for outer in level
            if isinstance(outer, Mapping | list | tuple)
            for inner in (outer.values() if isinstance(outer, Mapping) else outer)
        ]
        if not level:
            return False
    return True
