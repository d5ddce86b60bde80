"""Whether what a step brings points into what there is."""

from __future__ import annotations

import numpy as np

_SHORT = 32
"""Elements up to which Python's own numbers are faster than a call of numpy."""


def within(array: np.ndarray, limit: int) -> bool:
    """Whether all elements of an int32 array lie in 0 .. limit - 1."""
    if array.ndim == 1 and len(array) <= _SHORT:
        return all(0 <= value < limit for value in array.tolist())
    # As unsigned, a negative one is too large too.
    return not array.size or bool(array.view(np.uint32).max() < limit)
