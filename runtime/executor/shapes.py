"""Shapes as a manifest has them: numbers, symbols, and polynomials of symbols in text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

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


def check_pages(num_pages: int, most: int | None) -> None:
    """Raise InputError for a cache of so many pages: none, or more than a kernel can count."""
    if num_pages < 1:
        raise InputError(f"a cache of {num_pages} pages holds nothing", remedy="give at least one page")
    if most is not None and num_pages > most:
        raise InputError(
            f"a layer's cache of {num_pages} pages has more elements than a kernel can count",
            remedy=f"give at most {most} pages",
        )


def check_states(count: int, shapes: Iterable[Sequence[int | str]]) -> None:
    """Raise InputError for a state cache of so many rows; `shapes` of its arrays."""
    most = min((MOST // max(1, size_of(shape)) for shape in shapes), default=MOST)
    if not 0 < count <= most:
        raise InputError(
            f"a state cache of {count} rows", remedy=f"from 1 to {most} rows, which a kernel can count"
        )


def check_names(given: Iterable[str], wanted: Iterable[str]) -> None:
    """Raise InputError where a function's inputs are not those that it has."""
    unknown, missing = sorted(set(given) - set(wanted)), sorted(set(wanted) - set(given))
    if unknown or missing:
        raise InputError(
            f"inputs missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}",
            remedy=f"give {', '.join(wanted)}",
        )


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
