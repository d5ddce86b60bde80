"""The K types: blocks of 256 values whose groups' scales are themselves small integers times a float16.

    Q4_K, Q5_K    x ≈ d · sc · code - dmin · mn      8 groups of 32, sc and mn 0 … 63
    Q6_K          x ≈ d · sc · (code - 32)           16 groups of 16, sc -128 … 127

Each group's own best grid is found first (`fit.py`). Rounding its scale to d · sc loses some of that, so the
neighbouring integers are tried with their own best codes and minimums, and d and dmin are fitted to the
result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .blocks import pack_k, pack_q6_k
from .fit import codes_of, dot, fit_scale, fit_scale_minimum, half, ratio

Array = np.ndarray[Any, Any]
ROUNDS = 2


@dataclass
class _Affine:
    """d, dmin float16 [S]; sc, mn, error float32 [S, 8]; codes float32 [S, 8, 32]."""

    d: Array
    dmin: Array
    sc: Array
    mn: Array
    codes: Array
    error: Array

    def pick(self, other: _Affine) -> _Affine:
        """Of each super-block the better one."""
        better = other.error.sum(-1) < self.error.sum(-1)
        return _Affine(*(_choose(better, getattr(other, f), getattr(self, f)) for f in self.__dict__))


def _choose(better: Array, new: Array, old: Array) -> Array:
    return np.where(better.reshape(better.shape + (1,) * (new.ndim - better.ndim)), new, old)


def _super_blocks(x: Array, w: Array, groups: int) -> tuple[Array, Array]:
    """[rows, G, size] and importances [1, G, size] → [S, groups, size] each."""
    whole = np.broadcast_to(w, x.shape)
    return x.reshape(-1, groups, x.shape[-1]), whole.reshape(-1, groups, x.shape[-1])


def _codes(x: Array, d: Array, dmin: Array, sc: Array, mn: Array, top: int) -> tuple[Array, Array]:
    """Nearest codes, and the gap x - x̂ that they leave."""
    step = d.astype(np.float32)[:, None] * sc
    low = -(dmin.astype(np.float32)[:, None] * mn)
    codes = codes_of(x, ratio(np.ones_like(step), step), 0, top, low)
    return codes, x - step[..., None] * codes - low[..., None]


def _evaluate(x: Array, w: Array, d: Array, dmin: Array, sc: Array, mn: Array, top: int) -> _Affine:
    codes, gap = _codes(x, d, dmin, sc, mn, top)
    return _Affine(d, dmin, sc, mn, codes, dot(w * gap, gap))


def _of_scales(x: Array, w: Array, scale: Array, low: Array, top: int, what: str) -> _Affine:
    """Groups' scales and minimums (≤ 0), rounded to what a super-block can hold."""
    d, dmin = half(scale.max(-1) / 63, what), half(-low.min(-1) / 63, what)
    return _evaluate(x, w, d, dmin, _rounded(scale, d, 63), _rounded(-low, dmin, 63), top)


def _rounded(numbers: Array, d: Array, top: int, bottom: int = 0) -> Array:
    step = np.broadcast_to(d.astype(np.float32)[:, None], numbers.shape)
    return np.clip(np.rint(ratio(numbers, step)), bottom, top)


def _neighbours(x: Array, w: Array, now: _Affine, top: int) -> _Affine:
    """Each group with the better of the scales beside its own, and the minimum that fits each."""
    d, dmin = now.d, now.dmin
    total = w.sum(-1)
    best = now
    for step in (-1, 0, 1):
        sc = np.clip(now.sc + step, 0, 63)
        codes, _ = _codes(x, d, dmin, sc, now.mn, top)
        left = dot(w, x - (d.astype(np.float32)[:, None] * sc)[..., None] * codes)
        mn = _rounded(-ratio(left, total), dmin, 63)
        found = _evaluate(x, w, d, dmin, sc, mn, top)
        better = found.error < best.error
        best = _Affine(
            d,
            dmin,
            np.where(better, found.sc, best.sc),
            np.where(better, found.mn, best.mn),
            np.where(better[..., None], found.codes, best.codes),
            np.where(better, found.error, best.error),
        )
    return best


def _refit(x: Array, w: Array, now: _Affine, top: int, what: str) -> _Affine:
    """d and dmin by least squares for the integers that were chosen, and the nearest codes for those."""
    a = now.sc[..., None] * now.codes
    b = np.broadcast_to(now.mn[..., None], a.shape)
    wa, wb = w * a, w * b
    aa, ab, bb = (dot(p, q).sum(-1) for p, q in ((wa, a), (wa, b), (wb, b)))
    ax, bx = dot(wa, x).sum(-1), dot(wb, x).sum(-1)
    det = aa * bb - ab * ab
    sound = det > 1e-6 * aa * bb
    safe = np.where(sound, det, 1)
    d = np.where(sound, (bb * ax - ab * bx) / safe, ratio(ax, aa))
    dmin = np.where(sound, (ab * ax - aa * bx) / safe, 0)
    return _evaluate(x, w, half(np.maximum(d, 0), what), half(np.maximum(dmin, 0), what), now.sc, now.mn, top)


def _affine(x: Array, w: Array, top: int, what: str) -> _Affine:
    low = np.minimum(x.min(-1), 0)
    best = _of_scales(x, w, (np.maximum(x.max(-1), low) - low) / top, low, top, what)
    best = best.pick(_of_scales(x, w, *fit_scale_minimum(x, w, top, below_zero=True), top, what))
    for _ in range(ROUNDS):
        best = _neighbours(x, w, best, top)
        best = best.pick(_refit(x, w, best, top, what))
    return best


def encode_q4_k(x: Array, w: Array, what: str) -> Array:
    """x [rows, G, 32], importances [1, G, 32] → blocks uint8 [S, 144]."""
    return _encode_k(x, w, 4, what)


def encode_q5_k(x: Array, w: Array, what: str) -> Array:
    """x [rows, G, 32], importances [1, G, 32] → blocks uint8 [S, 176]."""
    return _encode_k(x, w, 5, what)


def _encode_k(x: Array, w: Array, bits: int, what: str) -> Array:
    x, w = _super_blocks(x, w, 8)
    found = _affine(x, w, (1 << bits) - 1, what)
    integers = (found.sc.astype(np.uint8), found.mn.astype(np.uint8), found.codes.astype(np.uint8))
    return pack_k(found.d, found.dmin, *integers, bits)


@dataclass
class _Scaled:
    """d float16 [S]; sc, error float32 [S, 16]; codes float32 [S, 16, 16], from -32."""

    d: Array
    sc: Array
    codes: Array
    error: Array

    def pick(self, other: _Scaled) -> _Scaled:
        """Of each super-block the better one."""
        better = other.error.sum(-1) < self.error.sum(-1)
        return _Scaled(*(_choose(better, getattr(other, f), getattr(self, f)) for f in self.__dict__))


def _evaluate_scaled(x: Array, w: Array, d: Array, sc: Array) -> _Scaled:
    step = d.astype(np.float32)[:, None] * sc
    codes = codes_of(x, ratio(np.ones_like(step), step), -32, 31)
    gap = x - step[..., None] * codes
    return _Scaled(d, sc, codes, dot(w * gap, gap))


def _of_signed(x: Array, w: Array, scale: Array, what: str) -> _Scaled:
    at = np.abs(scale).argmax(-1)[:, None]
    d = half(np.take_along_axis(scale, at, -1)[:, 0] / -128, what)
    return _evaluate_scaled(x, w, d, _rounded(scale, d, 127, -128))


def encode_q6_k(x: Array, w: Array, what: str) -> Array:
    """x [rows, G, 16], importances [1, G, 16] → blocks uint8 [S, 210]."""
    x, w = _super_blocks(x, w, 16)
    at = np.abs(x).argmax(-1)[..., None]
    best = _of_signed(x, w, np.take_along_axis(x, at, -1)[..., 0] / -32, what)
    best = best.pick(_of_signed(x, w, fit_scale(x, w, -32, 31), what))
    for _ in range(ROUNDS):
        now = best
        for step in (-1, 1):
            found = _evaluate_scaled(x, w, now.d, np.clip(now.sc + step, -128, 127))
            better = found.error < best.error
            best = _Scaled(
                now.d,
                np.where(better, found.sc, best.sc),
                np.where(better[..., None], found.codes, best.codes),
                np.where(better, found.error, best.error),
            )
        a = best.sc[..., None] * best.codes
        wa = w * a
        d = half(ratio(dot(wa, x).sum(-1), dot(wa, a).sum(-1)), what)
        best = best.pick(_evaluate_scaled(x, w, d, best.sc))
    codes = (best.codes + 32).astype(np.uint8).reshape(len(x), -1)
    return pack_q6_k(best.d, best.sc.astype(np.int8), codes)
