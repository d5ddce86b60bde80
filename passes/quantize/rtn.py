"""Round to nearest, group-wise along K. Arrays in, arrays out.

Asymmetric (GGML's Q4_1 in kind): a group's range [min(w, 0), max(w, 0)] is spread over the codes, scale =
range / (2^bits - 1), zero point = round(-min / scale). Symmetric: zero point 2^(bits-1); the grid reaches one
step further down than up, so the scale is the weight of largest magnitude / -2^(bits-1), of either sign, as
in GGML's Q4_0 (22 % less squared error at 4 bits than a scale that reaches it upwards as well). At 8 bits a
step is next to nothing, and scale = max|w| / 127. Scales are rounded to float16 before codes are chosen, so
that the codes fit the scales that are stored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...ir.errors import InputError

Array = np.ndarray[Any, Any]
SMALLEST = float(np.finfo(np.float16).smallest_subnormal)


@dataclass(frozen=True)
class Quantized:
    """codes uint8 [N, K]; scale float16 [N, G]; zero_point uint8 [N, G] or None when symmetric."""

    codes: Array
    scale: Array
    zero_point: Array | None


def _grouped(w: Array, group_size: int) -> Array:
    """[N, K] → [N, G, group_size], the last group filled up with zeros (which widen no range)."""
    n, k = w.shape
    groups = -(-k // group_size)
    if groups * group_size != k:
        w = np.pad(w, ((0, 0), (0, groups * group_size - k)))
    return w.reshape(n, groups, group_size)


def _storable(scale: Array) -> Array:
    """Scales as float16, their sign as it is. Below float16's normal range its steps are coarse, and a scale
    whose size is rounded down there would cut the largest weights off: it is rounded up.
    """
    size = np.abs(scale)
    stored = np.maximum(size, SMALLEST).astype(np.float16)
    cut = (stored.astype(np.float32) < size) & (stored < np.finfo(np.float16).smallest_normal)
    stored = np.where(cut, np.nextafter(stored, np.float16(np.inf)), stored)
    return np.copysign(stored, scale, dtype=np.float32).astype(np.float16)


def _symmetric_scale(low: Array, high: Array, bits: int) -> Array:
    """For groups with weights in low ≤ 0 … high ≥ 0."""
    half = 1 << (bits - 1)
    if bits >= 8:
        return np.maximum(-low, high) / (half - 1)
    return np.where(high > -low, -high, -low) / half


def quantize_rtn(w: Array, *, bits: int, group_size: int, symmetric: bool, what: str = "weight") -> Quantized:
    """Quantize float rows [N, K].

    Args:
        what: the tensor's name for errors.
    Raises:
        InputError: NaN or Inf in the weights, or values that float16 scales cannot reach.
    """
    w = np.asarray(w, dtype=np.float32)
    if not np.isfinite(w).all():
        raise InputError(
            f"{what} holds NaN or infinite values",
            remedy="the checkpoint is damaged or must not be quantized (--quant none)",
        )
    k = w.shape[1]
    groups = _grouped(w, group_size)
    top, half = (1 << bits) - 1, 1 << (bits - 1)
    low = groups.min(-1, initial=0.0)
    high = groups.max(-1, initial=0.0)
    with np.errstate(over="ignore"):  # an infinite scale is refused below
        scale = _symmetric_scale(low, high, bits) if symmetric else (high - low) / top
    largest = np.abs(scale).max(initial=0.0)
    if largest > np.finfo(np.float16).max:
        raise InputError(
            f"{what} needs a scale of {largest:.3g}, beyond float16",
            remedy="keep this model unquantized (--quant none)",
        )
    stored = _storable(scale)
    step = stored.astype(np.float32)
    if symmetric:
        codes = np.rint(groups / step[..., None]) + half
        zero = None
    else:
        point = np.clip(np.rint(-low / step), 0, top)
        codes = np.rint(groups / step[..., None]) + point[..., None]
        zero = point.astype(np.uint8)
    codes = np.clip(codes, 0, top).astype(np.uint8).reshape(w.shape[0], math.prod(groups.shape[1:]))[:, :k]
    return Quantized(np.ascontiguousarray(codes), stored, zero)


def dequantize(q: Quantized, *, bits: int, group_size: int) -> Array:
    """float32 [N, K]: scale · (code - zero point)."""
    k = q.codes.shape[1]
    zero: Array | float = float(1 << (bits - 1))
    if q.zero_point is not None:
        zero = np.repeat(q.zero_point.astype(np.float32), group_size, axis=1)[:, :k]
    scale = np.repeat(q.scale.astype(np.float32), group_size, axis=1)[:, :k]
    return (q.codes.astype(np.float32) - zero) * scale
