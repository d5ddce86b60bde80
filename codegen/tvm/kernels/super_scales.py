"""Scales of two levels: a float16 for each `super_group` columns times an int8 for each group, as GGML's K
types store them.

In the IR such scales and minima are their float32 products, which are exact (11 bits by 8). Here the factors
are found again, whatever rows were merged, split or permuted in between; a kernel multiplies them again, so
that nothing is rounded. A super-group of P groups takes 32 + 16 · P bytes of a block of 16 rows: 16 float16,
then 16 int8 a group.
"""

from __future__ import annotations

import numpy as np

from ....ir.errors import CompileError

_LIKELY = (63, 128, 127, 31, 32, 15)
"""Largest integers of a super-group that quantizers to 6, 8 and 4 bits leave; the others are tried after."""


def factors(products: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [m, P] → float16 [m] and int8 [m, P] whose products they are.

    Raises CompileError where a row has no such factors.
    """
    values = products.astype(np.float64)
    base = np.zeros(len(values), np.float16)
    whole = np.zeros(values.shape, np.int8)
    largest = np.abs(values).max(1, initial=0.0)
    left = np.flatnonzero(largest)
    for top in dict.fromkeys((*_LIKELY, *range(1, 129))):
        if not len(left):
            break
        with np.errstate(over="ignore"):
            candidate = (largest[left] / top).astype(np.float16)
        step = candidate.astype(np.float64)
        usable = np.isfinite(step) & (step > 0)
        step[~usable] = 1.0
        # 128 is -128 times a negative factor.
        step = np.where((values[left] == 128 * step[:, None]).any(1), -step, step)
        integers = np.rint(values[left] / step[:, None])
        fits = (integers >= -128) & (integers <= 127) & (integers * step[:, None] == values[left])
        found = usable & fits.all(1)
        base[left[found]] = step[found].astype(np.float16)
        whole[left[found]] = integers[found].astype(np.int8)
        left = left[~found]
    if len(left):
        raise CompileError(
            f"scales {products[left[0]].tolist()} are no float16 times integers of 8 bits",
            remedy="give the quantization super_group = 0",
        )
    return base, whole


def pack(packed: np.ndarray, per_super: int) -> np.ndarray:
    """float32 [blocks, groups, 16] → uint8 [blocks, ceil(groups / P), 32 + 16 · P]."""
    blocks, groups, rows = packed.shape
    supers = -(-groups // per_super)
    full = np.zeros((blocks, supers * per_super, rows), np.float32)
    full[:, :groups] = packed
    split = full.reshape(blocks, supers, per_super, rows).transpose(0, 1, 3, 2)
    base, whole = factors(split.reshape(-1, per_super))
    head = base.reshape(blocks, supers, rows).view(np.uint8)
    tail = whole.reshape(blocks, supers, rows, per_super).transpose(0, 1, 3, 2)
    tail = np.ascontiguousarray(tail).view(np.uint8).reshape(blocks, supers, per_super * rows)
    return np.concatenate((head, tail), 2)


def unpack(stored: np.ndarray, groups: int) -> np.ndarray:
    """Inverse of `pack`: float32 [blocks, groups, 16]."""
    blocks, supers, _ = stored.shape
    base = np.ascontiguousarray(stored[:, :, :32]).view(np.float16).astype(np.float32)
    whole = np.ascontiguousarray(stored[:, :, 32:]).view(np.int8).reshape(blocks, supers, -1, 16)
    products = base[:, :, None, :] * whole.astype(np.float32)
    return products.reshape(blocks, -1, 16)[:, :groups]
