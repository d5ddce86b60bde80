"""Whether what a step brings points into what there is."""

from __future__ import annotations

import numpy as np

_SHORT = 32
"""Elements up to which Python's own numbers are faster than a call of numpy."""


def within(array: np.ndarray, limit: int) -> bool:
    """Whether all elements of an int32 array lie in 0 .. limit - 1."""
    if not array.size:
        return True
    if array.size <= _SHORT:
        values = array.ravel().tolist()
        return min(values) >= 0 and max(values) < limit
    # As unsigned, a negative one is too large too.
    return bool(array.view(np.uint32).max() < limit)


def divides(query_start: np.ndarray, context_len: np.ndarray, tokens: int) -> bool:
    """Whether int32 [B + 1] divides so many tokens among B sequences, in order, and none gets more than its
    context [B] has.
    """
    if len(context_len) > _SHORT:
        counts = np.diff(query_start.astype(np.int64))
        ends = query_start[0] == 0 and query_start[-1] == tokens
        return bool(ends and (counts >= 0).all() and (counts <= context_len).all())
    starts, contexts = query_start.tolist(), context_len.tolist()
    if starts[0] != 0 or starts[-1] != tokens:
        return False
    return all(a <= b <= a + most for a, b, most in zip(starts, starts[1:], contexts, strict=False))
