"""Hadamard matrices (Sylvester's construction), by which activations and weights are rotated before they are
quantized.

H_1 = [1], H_2n = [[H_n, H_n], [H_n, -H_n]]; divided by √n they are orthogonal and their own inverses, so that
a product keeps its meaning when both factors are multiplied. A value that stands out is spread over all n,
and what rounds to 8 bits beside it loses less (QuaRot: Ashkboos et al., 2024, section 4; here runs of a
group's columns instead of whole rows, so that a group is rotated as it is made).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@cache
def hadamard(size: int) -> Array:
    """H / √size, float32 [size, size], for a power of two. Not to be written to."""
    matrix = np.ones((1, 1), np.float64)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    found = (matrix / np.sqrt(size)).astype(np.float32)
    found.flags.writeable = False
    return found


def rotate_columns(rows: Array, size: int) -> Array:
    """Rows [n, K], each run of `size` columns times `hadamard(size)`, as float32; K is a multiple of size."""
    n, k = rows.shape
    wide = np.ascontiguousarray(rows, dtype=np.float32).reshape(-1, size)
    return (wide @ hadamard(size)).reshape(n, k)
