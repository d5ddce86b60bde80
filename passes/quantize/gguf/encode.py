"""Rows of floats → rows of GGML blocks, at the least weighted error that the search finds.

    encode("Q4_K", w [N, K], importance [K]) → uint8 [N, bytes of a row]

The error is Σ importance[k] · (w[n, k] - ŵ[n, k])²: with the mean square of a linear layer's input as
importance that is the error of its output, as if inputs were uncorrelated (llama.cpp's importance matrix).
Every block is at least as good as the plain rounding of its type, which is tried too.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np

from ....ir.errors import InputError
from ....ir.ggml import BLOCK_TYPES
from .blocks import pack_affine, pack_symmetric
from .fit import codes_of, dot, fit_scale, fit_scale_minimum, half, ratio
from .k_quants import encode_q4_k, encode_q5_k, encode_q6_k

Array = np.ndarray[Any, Any]
CHUNK: Final = 1 << 17  # values encoded at a time: the temporaries of a search stay in a core's cache


def encode(ggml_type: str, w: Array, importance: Array | None = None, *, what: str = "weight") -> Array:
    """Blocks of float rows.

    Args:
        ggml_type: one of `ENCODERS`.
        w: [N, K], K divisible by the type's block size.
        importance: [K], not negative; None weighs all columns alike.
        what: the tensor's name, for errors.
    Raises:
        InputError: NaN or Inf in the weights, values beyond float16 scales, or rows of the wrong length.
    """
    kind = BLOCK_TYPES[ggml_type]
    n, k = w.shape
    if k % kind.block_size:
        raise InputError(
            f"{what}: rows of {k} are no whole {ggml_type} blocks of {kind.block_size}",
            remedy="use a type with smaller blocks, or floats",
        )
    w = np.ascontiguousarray(w, dtype=np.float32)
    if not np.isfinite(w).all():
        raise InputError(
            f"{what} holds NaN or infinite values",
            remedy="the checkpoint is damaged or must not be quantized (--quant none)",
        )
    group = kind.quant.group_size
    weights = np.ones(k, np.float32) if importance is None else normalized(importance, what)
    weights = weights.reshape(1, -1, group)
    out = np.empty((n, kind.row_bytes(k)), np.uint8)
    step = max(1, CHUNK // max(1, k))

    def run(start: int) -> None:
        rows = w[start : start + step].reshape(-1, k // group, group)
        out[start : start + step] = ENCODERS[ggml_type](rows, weights, what).reshape(len(rows), -1)

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:  # numpy lets go of the GIL
        for _ in pool.map(run, range(0, n, step)):
            pass
    return out


def normalized(importance: Array, what: str) -> Array:
    """Importances as float32 with the mean 1; InputError where they are no such numbers."""
    found = np.asarray(importance, np.float64)
    if not np.isfinite(found).all() or (found < 0).any():
        raise InputError(
            f"{what}: its importances hold negative numbers, NaN or infinity",
            remedy="calibrate on another text",
        )
    mean = found.mean()
    return np.ones(len(found), np.float32) if mean <= 0 else (found / mean).astype(np.float32)


def _symmetric(x: Array, w: Array, low: int, high: int, what: str) -> tuple[Array, Array]:
    """float16 scales and codes (float32, from `low`): the fitted grid, or plain rounding where that is
    better.
    """
    at = np.abs(x).argmax(-1)[..., None]
    extreme = np.take_along_axis(x, at, -1)[..., 0]
    plain = np.abs(extreme) / high if high > 31 else extreme / low
    best = _try_scale(x, w, half(plain, what), low, high)
    found = _try_scale(x, w, half(fit_scale(x, w, low, high), what), low, high)
    better = found[0] < best[0]
    return np.where(better, found[1], best[1]), np.where(better[..., None], found[2], best[2])


def _try_scale(x: Array, w: Array, d: Array, low: int, high: int) -> tuple[Array, Array, Array]:
    step = d.astype(np.float32)
    codes = codes_of(x, ratio(np.ones_like(step), step), low, high)
    gap = x - step[..., None] * codes
    return dot(w * gap, gap), d, codes


def _affine(x: Array, w: Array, top: int, what: str) -> tuple[Array, Array, Array]:
    """float16 scales and minimums, and codes: the fitted grid, or plain rounding where that is better."""
    low, high = x.min(-1), x.max(-1)
    best = _try_affine(x, w, half((high - low) / top, what), half(low, what), top)
    d, m = fit_scale_minimum(x, w, top, below_zero=False)
    found = _try_affine(x, w, half(d, what), half(m, what), top)
    better = found[0] < best[0]
    d, m = np.where(better, found[1], best[1]), np.where(better, found[2], best[2])
    return d, m, np.where(better[..., None], found[3], best[3])


def _try_affine(x: Array, w: Array, d: Array, m: Array, top: int) -> tuple[Array, Array, Array, Array]:
    step, low = d.astype(np.float32), m.astype(np.float32)
    codes = codes_of(x, ratio(np.ones_like(step), step), 0, top, low)
    gap = x - step[..., None] * codes - low[..., None]
    return dot(w * gap, gap), d, m, codes


def _encode_symmetric(bits: int) -> Encoder:
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1

    def run(x: Array, w: Array, what: str) -> Array:
        d, codes = _symmetric(x, w, low, high, what)
        return pack_symmetric(d, (codes - low).astype(np.uint8), bits)

    return run


def _encode_affine(bits: int) -> Encoder:
    def run(x: Array, w: Array, what: str) -> Array:
        d, m, codes = _affine(x, w, (1 << bits) - 1, what)
        return pack_affine(d, m, codes.astype(np.uint8), bits)

    return run


Encoder = Callable[[Array, Array, str], Array]
"""(x [rows, groups, size], importances [1, groups, size], name) → blocks [rows, …]."""

ENCODERS: Final[dict[str, Encoder]] = {
    "Q4_0": _encode_symmetric(4),
    "Q5_0": _encode_symmetric(5),
    "Q8_0": _encode_symmetric(8),
    "Q4_1": _encode_affine(4),
    "Q5_1": _encode_affine(5),
    "Q4_K": encode_q4_k,
    "Q5_K": encode_q5_k,
    "Q6_K": encode_q6_k,
}
