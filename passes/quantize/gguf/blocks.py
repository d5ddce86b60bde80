"""Codes and scales → the bytes of GGML blocks (the inverse of `ir/ggml.py`'s unpacking)."""

from __future__ import annotations

from typing import Any

import numpy as np

from ....ir.ggml import pack_six_bits

Array = np.ndarray[Any, Any]


def _bytes(numbers: Array) -> Array:
    """Numbers [n, m] → their bytes [n, m · itemsize]."""
    return np.ascontiguousarray(numbers).view(np.uint8).reshape(len(numbers), -1)


def _fields(codes: Array, chunk: int, fields: int, bits: int) -> Array:
    """Codes [n, values] → bytes in chunks of `chunk`: the first `chunk` codes in the lowest `bits`, the next
    above.
    """
    n = len(codes)
    grouped = codes.reshape(n, -1, fields, chunk)
    out = grouped[:, :, 0].copy()
    for i in range(1, fields):
        out |= grouped[:, :, i] << np.uint8(bits * i)
    return out.reshape(n, -1)


def _fifth_bits(codes: Array) -> Array:
    """Bit 4 of 32 codes each, as four bytes, least first."""
    return np.packbits(codes >> np.uint8(4), axis=1, bitorder="little")


def pack_symmetric(d: Array, codes: Array, bits: int) -> Array:
    """Q4_0, Q5_0 or Q8_0. d float16 [rows, G], codes uint8 [rows, G, 32] → uint8 [rows, bytes]."""
    scale, flat = _bytes(d.reshape(-1, 1)), codes.reshape(-1, 32)
    if bits == 8:
        parts = [scale, flat ^ np.uint8(128)]
    elif bits == 5:
        parts = [scale, _fifth_bits(flat), _fields(flat & np.uint8(15), 16, 2, 4)]
    else:
        parts = [scale, _fields(flat, 16, 2, 4)]
    return np.concatenate(parts, axis=1).reshape(len(d), -1)


def pack_affine(d: Array, m: Array, codes: Array, bits: int) -> Array:
    """Q4_1 or Q5_1. d and m float16 [rows, G], codes uint8 [rows, G, 32] → uint8 [rows, bytes]."""
    flat = codes.reshape(-1, 32)
    parts = [_bytes(d.reshape(-1, 1)), _bytes(m.reshape(-1, 1))]
    if bits == 5:
        parts.append(_fifth_bits(flat))
    parts.append(_fields(flat & np.uint8(15), 16, 2, 4))
    return np.concatenate(parts, axis=1).reshape(len(d), -1)


def pack_k(d: Array, dmin: Array, sc: Array, mn: Array, codes: Array, bits: int) -> Array:
    """Q4_K or Q5_K. d, dmin float16 [S]; sc, mn uint8 [S, 8]; codes uint8 [S, 8, 32] → uint8 [S, bytes]."""
    parts = [_bytes(d.reshape(-1, 1)), _bytes(dmin.reshape(-1, 1)), pack_six_bits(sc, mn)]
    if bits == 5:
        shifts = np.arange(8, dtype=np.uint8).reshape(1, 8, 1)
        parts.append(np.bitwise_or.reduce((codes >> np.uint8(4)) << shifts, axis=1))
    parts.append(_fields((codes & np.uint8(15)).reshape(len(codes), -1), 32, 2, 4))
    return np.concatenate(parts, axis=1)


def pack_q6_k(d: Array, sc: Array, codes: Array) -> Array:
    """d float16 [S], sc int8 [S, 16], codes uint8 [S, 256] → uint8 [S, 210]."""
    low = _fields(codes & np.uint8(15), 64, 2, 4)
    high = _fields(codes >> np.uint8(4), 32, 4, 2)
    return np.concatenate([low, high, sc.view(np.uint8), _bytes(d.reshape(-1, 1))], axis=1)
