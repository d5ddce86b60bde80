"""The arrays that an artifact of kind "function" is called with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..ir.errors import InputError


def checked_inputs(
    expected: Sequence[Mapping[str, Any]], arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The arrays by name, contiguous. Raises InputError where they are not what the manifest expects."""
    names = [str(entry["name"]) for entry in expected]
    if set(names) != set(arrays):
        raise InputError(
            f"inputs given: {', '.join(arrays) or 'none'}", remedy=f"expected: {', '.join(names)}"
        )
    checked: dict[str, np.ndarray] = {}
    for entry in expected:
        name, array = str(entry["name"]), np.asarray(arrays[str(entry["name"])])
        shape: Sequence[Any] = entry["shape"]
        fits = len(shape) == array.ndim and all(
            not isinstance(want, int) or want == have for want, have in zip(shape, array.shape, strict=False)
        )
        if str(array.dtype) != entry["dtype"] or not fits:
            raise InputError(
                f"input {name} is {array.dtype}{list(array.shape)}",
                remedy=f"expected: {entry['dtype']}{list(shape)}",
            )
        checked[name] = np.ascontiguousarray(array)
    return checked
