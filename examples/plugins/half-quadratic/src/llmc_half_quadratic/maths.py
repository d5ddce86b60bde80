"""Half-quadratic quantization: arrays in, arrays out.

A group of weights w is stored as codes q and two numbers, w' = scale · q + low. Round to nearest spreads
the codes over [min w, max w], so a single large weight makes the grid coarse for all others. Here the
grid is fitted to the weights, sparing those few that fit no grid (Badri & Shaji 2023, "Half-Quadratic
Quantization of Large Machine Learning Models"): the error |w − w'|^p with p < 1 is split by
half-quadratic splitting into

    e ← shrink(w − w')              the part of the error that is put down to outliers (generalised soft
                                    thresholding, Chartrand & Yin 2016, for |·|^p)
    scale, low ← least squares of w − e on q
    q ← round((w − low) / scale)

and back. The paper moves the zero point alone; the least squares here has the scale as well, in closed form.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llmc.plugins import QuantizedRows

Array = np.ndarray[Any, Any]
POWER = 0.7
_FIRST_BETA = 4.0
_GROWTH = 1.3
_LARGEST = 65504.0


def half_quadratic(rows: Array, *, bits: int, group: int, steps: int) -> QuantizedRows:
    """Rows float32 [n, K] → codes uint8 [n, K], scale and minimum float16 [n, ceil(K / group)].

    `steps` 0 is round to nearest on the same grid. A step that makes a group's error larger is not taken
    for it.
    """
    n, k = rows.shape
    groups = -(-k // group)
    w = np.pad(rows, ((0, 0), (0, groups * group - k)), mode="edge").reshape(n, groups, group)
    counts = np.ones((groups, group), np.float32)
    counts.reshape(-1)[k:] = 0.0  # columns that are not there count for nothing
    top = np.float32((1 << bits) - 1)
    low = w.min(-1, keepdims=True)
    scale = (w.max(-1, keepdims=True) - low) / top
    scale, low = _stored(scale, low)
    q = _codes(w, scale, low, top)
    best = [q, scale, low, _error(w, q, scale, low, counts)]
    beta = np.float32(_FIRST_BETA)
    for _ in range(steps):
        outliers = shrink((w - scale * q - low) / scale, beta) * scale
        scale, low = _stored(*_fit(w - outliers, q, counts, scale, low))
        q = _codes(w, scale, low, top)
        error = _error(w, q, scale, low, counts)
        better = error < best[3]
        best = [np.where(better, new, old) for new, old in zip((q, scale, low, error), best, strict=True)]
        beta *= np.float32(_GROWTH)
    q, scale, low, _ = best
    codes = q.astype(np.uint8).reshape(n, groups * group)[:, :k]
    return QuantizedRows(
        np.ascontiguousarray(codes), scale[..., 0].astype(np.float16), low[..., 0].astype(np.float16)
    )


def shrink(x: Array, beta: float | np.floating[Any]) -> Array:
    """sign(x) · max(|x| − |x|^(p−1) / β, 0): what minimises |e|^p + β/2 · (x − e)², to first order."""
    size = np.abs(x)
    with np.errstate(divide="ignore"):  # 0^(p−1) is infinite, and 0 − ∞ is cut to 0
        cut = size ** np.float32(POWER - 1.0) / beta
    return np.sign(x) * np.maximum(size - cut, 0.0)


def _stored(scale: Array, low: Array) -> tuple[Array, Array]:
    """Both as float16 holds them, in float32, so that codes fit what is stored."""
    smallest = np.float32(np.finfo(np.float16).smallest_normal)
    scale = np.clip(scale, smallest, _LARGEST).astype(np.float16).astype(np.float32)
    return scale, np.clip(low, -_LARGEST, _LARGEST).astype(np.float16).astype(np.float32)


def _codes(w: Array, scale: Array, low: Array, top: np.float32) -> Array:
    return np.clip(np.rint((w - low) / scale), 0.0, top)


def _error(w: Array, q: Array, scale: Array, low: Array, counts: Array) -> Array:
    size = np.abs(w - scale * q - low)
    return (counts * size ** np.float32(POWER)).sum(-1, keepdims=True)


def _fit(w: Array, q: Array, counts: Array, scale: Array, low: Array) -> tuple[Array, Array]:
    """Least squares of w on q in each group; the former numbers where all codes are one."""
    total = counts.sum(-1, keepdims=True)[None]
    mean_q = (counts * q).sum(-1, keepdims=True) / total
    mean_w = (counts * w).sum(-1, keepdims=True) / total
    spread = (counts * (q - mean_q) ** 2).sum(-1, keepdims=True)
    both = (counts * (q - mean_q) * (w - mean_w)).sum(-1, keepdims=True)
    fits = (spread > 0.0) & (both > 0.0)
    slope = np.where(fits, both / np.where(fits, spread, 1.0), scale)
    return slope, np.where(fits, mean_w - slope * mean_q, low)
