"""Scales and minimums of small groups that make the weighted error Σ w (x - x̂)² small.

Arrays are float32 [rows, groups, group_size]; importances w broadcast against them. For given codes the best
scale (and minimum) is a least-squares fit in closed form, and for a given grid the best codes are the nearest
ones. So several grids are tried, each fitted to its codes, and the best one goes through both steps a few
times more: the idea of `make_qx_quants` and `make_qkx3_quants` in ggml-quants.c.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ....ir.errors import InputError

Array = np.ndarray[Any, Any]
ROUNDS = 3  # of nearest codes, then the best grid for them
# How much of a group's range the first grids cut off at either end, at 4 bits and at 5.
_CUTS = ((-0.02, 0.03, 0.08, 0.14), (-0.008, 0.012, 0.03, 0.055))


def dot(a: Array, b: Array) -> Array:
    """Sums over the last axis of a product: [rows, groups, size] twice → [rows, groups]."""
    return np.einsum("rgi,rgi->rg", a, b)


def ratio(a: Array, b: Array) -> Array:
    """a / b, 0 where b is 0."""
    return np.divide(a, b, out=np.zeros_like(a), where=b != 0)


def half(d: Array, what: str) -> Array:
    """Scales as they are stored, in float16."""
    largest = np.finfo(np.float16).max
    if d.size and np.abs(d).max() > largest:
        raise InputError(
            f"{what} needs a scale of {np.abs(d).max():.3g}, beyond float16",
            remedy="keep this model unquantized (--quant none)",
        )
    return d.astype(np.float16)


def codes_of(x: Array, inverse: Array, low: int, high: int, offset: Array | None = None) -> Array:
    """Nearest codes as float32: round((x - offset) · inverse), within [low, high]."""
    shifted = x * inverse[..., None] if offset is None else (x - offset[..., None]) * inverse[..., None]
    np.rint(shifted, out=shifted)
    return np.clip(shifted, low, high, out=shifted)


def fit_scale(x: Array, w: Array, low: int, high: int) -> Array:
    """Scales d [rows, groups], of either sign, for x ≈ d · code with integer codes in [low, high].

    Args:
        low: negative; |low| = high or high + 1.
    """
    at = np.abs(x).argmax(-1)[..., None]
    extreme = np.take_along_axis(x, at, -1)[..., 0]
    if high > 31:  # 8 bits: one grid leaves nothing to search
        tries = [low + 0.0, float(high)]
    elif high > 15:
        tries = [low + step for step in (-0.5, 0.0, 0.7, 1.4)] + [high + 0.0, high - 1.0]
    else:
        tries = [low + step for step in (-0.8, -0.4, 0.0, 0.3, 0.6, 0.9, 1.3, 1.8)]
        tries += [high + step for step in (0.4, 0.0, -0.4, -0.8, -1.2)]
    best, scale = np.full(extreme.shape, -1.0, np.float32), np.zeros(extreme.shape, np.float32)
    for target in tries:
        d, gain = _scale_of(x, w, codes_of(x, ratio(np.full_like(extreme, target), extreme), low, high))
        better = gain > best
        best, scale = np.where(better, gain, best), np.where(better, d, scale)
    for _ in range(ROUNDS):
        d, gain = _scale_of(x, w, codes_of(x, ratio(np.ones_like(scale), scale), low, high))
        scale = np.where(gain > best, d, scale)
        best = np.maximum(best, gain)
    return scale


def _scale_of(x: Array, w: Array, codes: Array) -> tuple[Array, Array]:
    """The best scale for codes, and how much it takes from Σ w x²."""
    weighted = w * codes
    cross, square = dot(weighted, x), dot(weighted, codes)
    d = ratio(cross, square)
    return d, d * cross


def fit_scale_minimum(x: Array, w: Array, top: int, *, below_zero: bool) -> tuple[Array, Array]:
    """Scales d ≥ 0 and minimums m [rows, groups] for x ≈ d · code + m, codes in [0, top].

    Args:
        below_zero: m ≤ 0, as the K types have it.
    """
    low, high = x.min(-1), x.max(-1)
    if below_zero:
        low = np.minimum(low, 0)
    span = np.maximum(high, low) - low
    known = _Sums(x, w, below_zero)
    best, d, m = np.full(low.shape, np.inf, np.float32), span / top, low
    cuts = _CUTS[top > 15]
    for at in cuts:
        for end in cuts:
            start = low + np.float32(at) * span
            inverse = ratio(np.full_like(span, top / (1 - at - end)), span)
            best, d, m = _keep(best, d, m, known.fit(codes_of(x, inverse, 0, top, start)))
    for stretch in (1.0, 0.985, 1.0, 1.015, 1.0):
        inverse = ratio(np.full_like(d, stretch), d)
        best, d, m = _keep(best, d, m, known.fit(codes_of(x, inverse, 0, top, m)))
    return d, m


def _keep(best: Array, d: Array, m: Array, found: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    error, new_d, new_m = found
    better = error < best
    return np.where(better, error, best), np.where(better, new_d, d), np.where(better, new_m, m)


class _Sums:
    """Least squares for x ≈ d · code + m, with the sums that no code changes."""

    def __init__(self, x: Array, w: Array, below_zero: bool) -> None:
        self.x, self.w, self.below_zero = x, w, below_zero
        whole = np.broadcast_to(w, x.shape)
        self.one = whole.sum(-1)
        self.x1 = dot(whole, x)

    def fit(self, codes: Array) -> tuple[Array, Array, Array]:
        """Error up to the constant Σ w x², d and m. Codes that are all alike have d = 0."""
        weighted = self.w * codes
        l1, l2, lx = weighted.sum(-1), dot(weighted, codes), dot(weighted, self.x)
        det = self.one * l2 - l1 * l1
        sound = det > 1e-6 * self.one * l2
        safe = np.where(sound, det, 1)
        d = np.where(sound, (self.one * lx - self.x1 * l1) / safe, 0)
        m = np.where(sound, (l2 * self.x1 - l1 * lx) / safe, ratio(self.x1, self.one))
        if self.below_zero:
            above = m > 0
            d, m = np.where(above, ratio(lx, l2), d), np.minimum(m, 0)
        turned = d < 0
        d, m = np.where(turned, 0, d), np.where(turned, ratio(self.x1, self.one), m)
        if self.below_zero:
            m = np.minimum(m, 0)
        error = d * d * l2 + m * m * self.one + 2 * (d * m * l1 - d * lx - m * self.x1)
        return error, d, m
