"""Rotations by which activations and weights are made even before they are quantized.

Of a power of two, `rotation(n)` is Sylvester's Hadamard matrix, H_1 = [1], H_2n = [[H_n, H_n], [H_n, -H_n]],
over √n. For each factor of 3, 5 or 7 it is the Kronecker product with the reflection I - (2 / p) · J, where J
is all ones: rotation(p · n) = (I - (2 / p) J) ⊗ rotation(n). A reflection takes two operations a value and
spreads less than a Hadamard matrix would (those of 12, 20 and 28 times a power of two would take many more).

All are symmetric, orthogonal and so their own inverses: a product keeps its meaning when both factors are
multiplied. A value that stands out is spread over all n, and what rounds to 8 bits beside it loses less
(QuaRot: Ashkboos et al., 2024, section 4; here runs of a group's columns instead of whole rows, so that a
group is rotated as it is made).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
REFLECTED = (3, 5, 7)
"""Odd factors that an order may have. A reflection leaves 1 - 2 / p of a value where it was."""
WIDEST = 640
"""Columns that kernels rotate together and quantize as they are made, at most."""
_RUN = 64
"""Columns by which the Hadamard part is multiplied as a matrix of its own, at most."""


def reflections(size: int) -> list[int] | None:
    """The odd factors of an order, largest first; None where there is no rotation of that order."""
    if size < 1:
        return None
    found: list[int] = []
    for factor in sorted(REFLECTED, reverse=True):
        while size % factor == 0:
            found.append(factor)
            size //= factor
    return found if size & (size - 1) == 0 else None


@cache
def rotation(size: int) -> Array:
    """float32 [size, size], for an order with `reflections`. Not to be written to."""
    factors = reflections(size)
    assert factors is not None, f"no rotation of {size} columns"
    matrix = np.ones((1, 1))
    for factor in factors:
        matrix = np.kron(matrix, np.eye(factor) - 2 / factor)
    hadamard = np.ones((1, 1))
    while len(hadamard) * len(matrix) < size:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    found = np.kron(matrix, hadamard / np.sqrt(len(hadamard))).astype(np.float32)
    found.flags.writeable = False
    return found


def rotate_columns(rows: Array, size: int) -> Array:
    """Rows [n, K], each run of `size` columns times `rotation(size)`, as float32; K is a multiple of size."""
    n, k = rows.shape
    run = min(size & -size, _RUN)  # rotation(size) is rotation(size / run) ⊗ rotation(run)
    wide = np.ascontiguousarray(rows, dtype=np.float32).reshape(-1, run) @ rotation(run)
    if run < size:
        wide = rotation(size // run) @ wide.reshape(-1, size // run, run)
    return wide.reshape(n, k)
