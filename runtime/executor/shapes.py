"""Shapes as a manifest has them: numbers, symbols, and polynomials of symbols in text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from ...ir.dtypes import to_numpy
from ...ir.errors import InputError

MOST = (1 << 31) - 1
"""Elements of an array: kernels index with 32 bits."""


def size_of(shape: Sequence[int | str]) -> int:
    """Elements of a cache's array for one page, or one sequence: the product of what is known."""
    return math.prod(d for d in shape if isinstance(d, int))


def evaluate(dim: int | str, sizes: Mapping[str, int]) -> int:
    """A dimension of the manifest: a number, or a polynomial such as "2*T+1" or "B*T"."""
    if isinstance(dim, int):
        return dim
    total = 0
    for term in dim.replace("-", "+-").split("+"):
        if not term:
            continue
        value = -1 if term.startswith("-") else 1
        for factor in term.lstrip("-").split("*"):
            value *= int(factor) if factor.isdigit() else sizes[factor]
        total += value
    return total


def match_shape(
    name: str, shape: Sequence[int | str], dtype: str, value: np.ndarray, sizes: dict[str, int]
) -> None:
    """Give the symbols of an input's shape the sizes of `value`, in `sizes`.

    Raises InputError where its dtype or its shape does not fit.
    """
    wanted = to_numpy(dtype)
    text = f"{name} is {value.dtype}{list(value.shape)}, wanted {wanted}{list(shape)}"
    if value.dtype != wanted or value.ndim != len(shape):
        raise InputError(text, remedy="convert it")
    for d, n in zip(shape, value.shape, strict=True):
        if isinstance(d, str) and d.isidentifier():
            d = sizes.setdefault(d, n)
        if evaluate(d, sizes) != n:
            raise InputError(text, remedy="give that shape")
