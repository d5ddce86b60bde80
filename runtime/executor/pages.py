"""Pages of a cache as bytes: of each array in order, what it has of a page, in C order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def pages_as_bytes(arrays: Sequence[np.ndarray], axis: int, pages: Sequence[int]) -> np.ndarray:
    """uint8 [pages, bytes of a page], a copy. `axis`: which axis of the arrays counts pages."""
    rows: list[np.ndarray] = []
    for array in arrays:
        part = np.moveaxis(array, axis, 0)[np.asarray(pages, np.intp)]
        size = array.itemsize * (array.size // max(1, array.shape[axis]))
        rows.append(np.ascontiguousarray(part).view(np.uint8).reshape(len(pages), size))
    return np.concatenate(rows, axis=1)


def pages_from_bytes(
    arrays: Sequence[np.ndarray], axis: int, pages: Sequence[int], contents: np.ndarray
) -> None:
    """Write pages that `pages_as_bytes` gave of arrays of the same shapes, but for the number of pages."""
    at = 0
    for array in arrays:
        view = np.moveaxis(array, axis, 0)
        size = view[0].size * array.itemsize
        part = np.ascontiguousarray(contents[:, at : at + size]).view(array.dtype)
        view[np.asarray(pages, np.intp)] = part.reshape(len(pages), *view.shape[1:])
        at += size
    assert at == contents.shape[1]
