"""What a step brings is checked before kernels follow it: few sequences in Python, many by numpy, alike."""

from __future__ import annotations

import numpy as np
import pytest
from llmc.runtime.executor.indices import divides, within

SIZES = [1, 7, 32, 33, 100]
"""Sequences, on both sides of where numpy takes over."""


@pytest.mark.parametrize("size", [0, *SIZES])
@pytest.mark.parametrize("columns", [None, 1, 5])
def test_elements_lie_below_the_limit(size: int, columns: int | None) -> None:
    """The largest and the smallest element decide, wherever they stand; nothing is always within."""
    array = np.full(size if columns is None else (size, columns), 3, np.int32)
    assert within(array, 4)
    assert within(array, 3) == (array.size == 0)
    if array.size:
        for wrong in (-1, 4, np.iinfo(np.int32).min, np.iinfo(np.int32).max):
            array.flat[array.size // 2] = wrong
            assert not within(array, 4)


@pytest.mark.parametrize("size", SIZES)
def test_tokens_are_divided_among_sequences(size: int) -> None:
    """In order, from 0 to the number of tokens, and no sequence more than its context has."""
    counts = np.arange(size, dtype=np.int32) % 3
    starts = np.concatenate([np.zeros(1, np.int32), np.cumsum(counts, dtype=np.int32)])
    tokens, contexts = int(starts[-1]), counts + 2
    assert divides(starts, contexts, tokens)
    assert divides(starts, counts, tokens)
    assert not divides(starts, contexts, tokens + 1)
    assert not divides(starts + 1, contexts, tokens + 1)
    fewer = counts.copy()
    fewer[-1] -= 1  # for no tokens a context of -1
    assert not divides(starts, fewer, tokens)


@pytest.mark.parametrize("size", [3, 40])
@pytest.mark.parametrize("wrong", [-1, np.iinfo(np.int32).min, np.iinfo(np.int32).max])
def test_starts_that_go_back_are_refused(size: int, wrong: int) -> None:
    """Those whose differences no 32 bits hold too."""
    starts = np.arange(size + 1, dtype=np.int32)
    starts[1] = wrong
    assert not divides(starts, np.full(size, 5, np.int32), size)
