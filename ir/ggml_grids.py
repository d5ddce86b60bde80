"""Unpacks GGML's block types whose values stand in grids (IQ1_S, IQ1_M, IQ2_XXS … IQ3_S) and the ternary
TQ1_0 and TQ2_0. Blocks uint8 [n, bytes] → codes uint8 [n, 256], scales and minimums [n, 256 / group].

A few bits name eight (four) magnitudes in a grid, others their signs. Magnitudes are few: with their signs
they are a table of at most sixteen integers (`codebooks.py`), and a code is a place in it. Grids and signs
are those of the package gguf (`gguf.quants`), the meaning of the numbers is `dequantize_row_*` in
ggml-quants.c.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
_BITS = np.arange(8, dtype=np.uint8)


@cache
def _grid(name: str) -> Array:
    """Which of the type's magnitudes (ascending) stands where: uint8 [entries, 8 or 4]."""
    from gguf import quants

    kind = getattr(quants, name)
    kind.init_grid()
    grid = np.asarray(kind.grid).reshape(kind.grid_shape)
    return np.searchsorted(np.array(kind.grid_map, grid.dtype), grid).astype(np.uint8)


@cache
def _sign_bytes() -> Array:
    """Seven bits → eight signs, the last of which makes their number even."""
    from gguf import quants

    return np.frombuffer(quants.IQ2_XXS.ksigns, np.uint8)


def _signed(name: str, index: Array, signs: Array) -> Array:
    """Codes of entries of a grid [n, m] and a byte of signs for each eight values, uint8 [n, 256]."""
    places = _grid(name)[index].reshape(len(index), -1)
    half = np.uint8(3 if name.startswith("IQ2") else 8)
    negative = ((signs.reshape(len(index), -1, 1) >> _BITS) & 1).reshape(places.shape) != 0
    return np.where(negative, half - np.uint8(1) - places, half + places)


def _d(blocks: Array) -> Array:
    return np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)


def _words(blocks: Array, kind: type, start: int, stop: int) -> Array:
    return np.ascontiguousarray(blocks[:, start:stop]).view(kind)


def _nibbles(packed: Array) -> Array:
    """Low half first: [n, m] → [n, 2 m]."""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)


def _seven(words: Array) -> Array:
    """Four times seven bits of signs in each 32-bit word → bytes of eight signs."""
    fields = (words[..., None] >> np.array([0, 7, 14, 21], np.uint32)) & np.uint32(127)
    return _sign_bytes()[fields.reshape(len(words), -1)]


def _half_steps(d: Array, s: Array, unit: float) -> Array:
    return d * (np.float32(0.5) + s.astype(np.float32)) * np.float32(unit)


def iq2_xxs_codes(b: Array) -> Array:
    words = _words(b, np.uint32, 2, 66).reshape(len(b), 8, 2)
    index = np.ascontiguousarray(words[:, :, 0]).view(np.uint8).reshape(len(b), -1)
    return _signed("IQ2_XXS", index, _seven(words[:, :, 1]))


def iq2_xxs_scales(b: Array) -> tuple[Array, None]:
    return _half_steps(_d(b), _words(b, np.uint32, 2, 66)[:, 1::2] >> 28, 0.25), None


def iq2_xs_codes(b: Array) -> Array:
    words = _words(b, np.uint16, 2, 66)
    return _signed("IQ2_XS", words & np.uint16(511), _sign_bytes()[words >> 9])


def iq2_xs_scales(b: Array) -> tuple[Array, None]:
    return _half_steps(_d(b), _nibbles(b[:, 66:74]), 0.25), None


def iq2_s_codes(b: Array) -> Array:
    high = (b[:, 66:74, None] >> np.array([0, 2, 4, 6], np.uint8)) & np.uint8(3)
    index = b[:, 2:34].astype(np.uint16) | (high.reshape(len(b), -1).astype(np.uint16) << 8)
    return _signed("IQ2_S", index, b[:, 34:66])


def iq2_s_scales(b: Array) -> tuple[Array, None]:
    return _half_steps(_d(b), _nibbles(b[:, 74:82]), 0.25), None


def iq3_xxs_codes(b: Array) -> Array:
    return _signed("IQ3_XXS", b[:, 2:66], _seven(_words(b, np.uint32, 66, 98)))


def iq3_xxs_scales(b: Array) -> tuple[Array, None]:
    return _half_steps(_d(b), _words(b, np.uint32, 66, 98) >> 28, 0.5), None


def iq3_s_codes(b: Array) -> Array:
    high = ((b[:, 66:74, None] >> _BITS) & np.uint8(1)).reshape(len(b), -1)
    return _signed("IQ3_S", b[:, 2:66].astype(np.uint16) | (high.astype(np.uint16) << 8), b[:, 74:106])


def iq3_s_scales(b: Array) -> tuple[Array, None]:
    return _d(b) * (1 + 2 * _nibbles(b[:, 106:110])).astype(np.float32), None


def _iq1_s_steps(b: Array) -> tuple[Array, Array]:
    """Of each group of 32: its scale and its words of high bits."""
    high = _words(b, np.uint16, 34, 50)
    return _d(b) * (2 * ((high >> 12) & np.uint16(7)) + 1).astype(np.float32), high


def iq1_s_codes(b: Array) -> Array:
    """-1, 0 and 1 as 0, 1 and 2."""
    _, high = _iq1_s_steps(b)
    fields = (high[:, :, None] >> np.array([0, 3, 6, 9], np.uint16)) & np.uint16(7)
    index = b[:, 2:34].astype(np.uint16) | (fields.reshape(len(b), -1) << np.uint16(8))
    return _grid("IQ1_S")[index].reshape(len(b), -1)


def iq1_s_scales(b: Array) -> tuple[Array, Array]:
    """A group is moved by an eighth of its scale, up or down: exact, like the sum that it enters."""
    scale, high = _iq1_s_steps(b)
    moved = np.where(high & np.uint16(0x8000), np.float32(-1.125), np.float32(-0.875))
    return scale, scale * moved


def iq1_m_codes(b: Array) -> Array:
    """Places of nine, seven or one eighth, of either sign: eight values of a grid are moved together."""
    fields = (b[:, 32:48, None] >> np.array([0, 4], np.uint8)).reshape(len(b), -1)
    index = b[:, :32].astype(np.uint16) | ((fields & np.uint8(7)).astype(np.uint16) << np.uint16(8))
    down = (fields & np.uint8(8) != 0)[:, :, None]
    return (2 * _grid("IQ1_S")[index] + np.where(down, np.uint8(0), np.uint8(1))).reshape(len(b), -1)


def iq1_m_scales(b: Array) -> tuple[Array, None]:
    """Of each 16, an eighth; the block's float16 lies in the upper bits of its four words of scales."""
    words = _words(b, np.uint16, 48, 56)
    parts = (words & np.uint16(0xF000)) >> np.array([12, 8, 4, 0], np.uint16)
    d = np.bitwise_or.reduce(parts, axis=1, keepdims=True).view(np.float16).astype(np.float32)
    steps = ((words[:, :, None] >> np.array([0, 3, 6, 9], np.uint16)) & np.uint16(7)).reshape(len(b), -1)
    return d * (2 * steps + 1).astype(np.float32) * np.float32(0.125), None


def _around_one(b: Array, at: int) -> tuple[Array, Array]:
    """The scale at a byte of each block, and the minimum that makes -1, 0 and 1 of 0, 1 and 2."""
    scale = np.ascontiguousarray(b[:, at : at + 2]).view(np.float16)
    return scale, -scale


def tq2_0_codes(b: Array) -> Array:
    fields = b[:, :64].reshape(len(b), 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    return (fields & np.uint8(3)).reshape(len(b), -1)


def tq2_0_scales(b: Array) -> tuple[Array, Array]:
    return _around_one(b, 64)


def tq1_0_codes(b: Array) -> Array:
    """Five numbers to the base of three in a byte, most significant first, as a fraction of 256."""

    def digits(packed: Array, count: int) -> Array:
        powers = (3 ** np.arange(count)).astype(np.uint8).reshape(1, count, 1)
        return (packed[:, None, :] * powers).reshape(len(packed), -1)

    shifted = np.concatenate([digits(b[:, :32], 5), digits(b[:, 32:48], 5), digits(b[:, 48:52], 4)], axis=1)
    return ((shifted.astype(np.uint16) * 3) >> 8).astype(np.uint8)


def tq1_0_scales(b: Array) -> tuple[Array, Array]:
    return _around_one(b, 52)
