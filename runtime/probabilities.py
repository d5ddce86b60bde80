"""What tokens are drawn from: unnormalised probabilities of a vocabulary, with sums and maxima of its blocks.

A draw looks at the few hundred blocks first, and then at the tokens of those that matter. The blocks come
from the executor (`PreparesSampling`), which reads the logits on all its threads, or from numpy.
"""

from __future__ import annotations

import math

import numpy as np

from .executor.base import Prepared

_BLOCK = 256
# top_p looks at tokens that are so likely beside the most likely one, and at more where those are too few.
_LIKELY = (2.0**-6, 2.0**-12, 2.0**-18, 2.0**-24, 0.0)
_MANY = 4  # where one block in so many holds what is looked for, all of the vocabulary is read


class Probabilities:
    """Of one row: weights [vocab] float32, the largest 1, that belong to nobody else."""

    def __init__(self, weights: np.ndarray, sums: np.ndarray, tops: np.ndarray, block: int) -> None:
        """`sums`, `tops`: [vocab // block], of each whole block."""
        self.weights = weights
        self._block = block
        self._whole = len(tops) * block
        rest = weights[self._whole :]  # each of these tokens is a block of its own
        self._sums = np.concatenate([sums, rest], dtype=np.float64)
        self._tops = np.concatenate([tops, rest])

    @staticmethod
    def prepared(weights: np.ndarray, row: int, prepared: Prepared) -> Probabilities:
        """Of row `row`, whose logits the executor made `weights`."""
        return Probabilities(weights, prepared.sums[row], prepared.tops[row], prepared.block)

    @staticmethod
    def of(logits: np.ndarray, temperature: float) -> Probabilities | None:
        """Of logits [vocab], which are used up; None where the largest is no finite number."""
        peak = logits.max()
        if not math.isfinite(peak):
            return None
        logits -= peak
        logits *= np.float32(1.0 / temperature)
        np.exp(logits, out=logits)
        blocks = logits[: len(logits) // _BLOCK * _BLOCK].reshape(-1, _BLOCK)
        return Probabilities(logits, blocks.sum(axis=1), blocks.max(axis=1), _BLOCK)

    def draw(self, u: float) -> int:
        """The token at which the running sum of all weights passes the share `u` of their total."""
        ends = np.cumsum(self._sums)
        target = u * float(ends[-1])
        at = _passed(self._sums, ends, target)
        start = self._first(at)
        if start >= self._whole:
            return start
        inside = self.weights[start : start + self._block]
        begin = float(ends[at - 1]) if at else 0.0
        return start + _passed(inside, np.cumsum(inside, dtype=np.float64), target - begin)

    def kept(self, top_k: int, top_p: float, min_p: float) -> np.ndarray | None:
        """Ids that top_k (0: all), then top_p, then min_p leave, in the order of ids; None for all."""
        ids: np.ndarray | None = None
        if 0 < top_k < len(self.weights):
            ids = self.largest(top_k)
        if top_p < 1.0:
            if ids is None:
                ids = self.nucleus(top_p)
            else:
                weights = self.weights[ids]
                ids = ids[_fewest(weights, top_p * float(weights.sum(dtype=np.float64)))]
        if min_p > 0.0:
            ids = self.at_least(min_p) if ids is None else ids[self.weights[ids] >= min_p]
        return ids

    def at_least(self, bound: float) -> np.ndarray:
        """Ids of weights from `bound` on."""
        if bound <= 0.0:
            return np.arange(len(self.weights))
        blocks = _where(self._tops >= bound)
        if len(blocks) * _MANY > len(self._tops):
            return _where(self.weights >= bound)
        whole = len(self._tops) - (len(self.weights) - self._whole)
        inside = blocks[: int(np.searchsorted(blocks, whole))]
        ids = (inside[:, None] * self._block + np.arange(self._block)).ravel()
        ids = ids[self.weights[ids] >= bound]
        if len(inside) == len(blocks):
            return ids
        return np.concatenate([ids, blocks[len(inside) :] - whole + self._whole])

    def largest(self, count: int) -> np.ndarray:
        """Ids of the `count` largest weights; among equals the lower ids are taken.

        As many blocks hold one that reaches the `count`-th largest of their maxima: only those are ordered.
        """
        bound = float(_nth(self._tops, count)) if count < len(self._tops) else 0.0
        near = self.at_least(bound)
        return near[largest(self.weights[near], count)]

    def nucleus(self, top_p: float) -> np.ndarray:
        """Ids of the fewest weights that reach the share `top_p` of their total, at least one."""
        limit = top_p * float(self._sums.sum())
        for likely in _LIKELY:
            near = self.at_least(likely)
            weights = self.weights[near]
            if not likely or weights.sum(dtype=np.float64) >= limit:
                return near[_fewest(weights, limit)]
        raise AssertionError("unreachable: the last one is 0")

    def _first(self, block: int) -> int:
        """The first token of a block."""
        whole = self._whole // self._block
        return block * self._block if block < whole else self._whole + block - whole


def _passed(weights: np.ndarray, ends: np.ndarray, target: float) -> int:
    """The first place whose running sum `ends` is above the target, and never one of no weight: rounding may
    put the target at the very end.
    """
    place = int(np.searchsorted(ends, target, side="right"))
    if place < len(weights) and weights[place] > 0:
        return place
    some = _where(weights > 0)
    return int(some[-1]) if len(some) else 0


def pick(weights: np.ndarray, u: float) -> int:
    """The place where the running sum of a few weights passes the share `u` of their total."""
    ends = np.cumsum(weights, dtype=np.float64)
    return _passed(weights, ends, u * float(ends[-1]))


def _fewest(weights: np.ndarray, limit: float) -> np.ndarray:
    """Places of the fewest weights whose sum reaches `limit`, at least one; among equals the lower places."""
    sums = np.cumsum(np.sort(weights)[::-1], dtype=np.float64)
    return largest(weights, min(int(np.searchsorted(sums, limit, side="left")) + 1, len(weights)))


def largest(values: np.ndarray, count: int) -> np.ndarray:
    """Places of the `count` largest, in their order; among equals the lower ones."""
    if count >= len(values):
        return np.arange(len(values))
    threshold = _nth(values, count)
    places = _where(values >= threshold)
    if len(places) > count:
        tied = _where(values[places] == threshold)
        places = np.delete(places, tied[len(tied) - (len(places) - count) :])
    return places


def _nth(values: np.ndarray, n: int) -> np.floating:
    """The n-th largest value, from 1."""
    values = values.copy()
    place = len(values) - n
    values.partition(place)
    return values[place]


def _where(mask: np.ndarray) -> np.ndarray:
    """Places that are true; getting to `np.flatnonzero` takes longer than this does."""
    return mask.nonzero()[0]
