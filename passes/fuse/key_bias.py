"""Scores with a bias that each key brings along, whoever asks: a number for each key and head.

    scores [B, H, T, T] + bias [B, H, 1, T]
        →  attention of [q, 1 / scale, 1 / scale, 0, …] over [k, bias, rest, 0, …]

The scaled product of what is joined to a query and to a key is the bias, which is thus kept in the cache with
its key: rounded to bfloat16, and what that leaves, since a cache of 16 bits would round a large bias by as
much as a score may differ. Zeros fill both up to a width that kernels like.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...ir.core import Value
from ...ir.ops import math as m
from ...ir.ops.shape import Concat, Expand, Full, Reshape, Transpose
from ...ir.rewriter import Rewriter
from ...ir.types import Shape

_WIDTH = 16
"""Elements of a key are a multiple of it: kernels read so many at once."""


@dataclass(frozen=True)
class KeyBias:
    """`value` seen under `shape` [B, heads, 1, T], heads being those of the keys, or one for all of them."""

    value: Value
    shape: Shape

    def joined(self, rw: Rewriter, q: Value, k: Value, scale: float) -> tuple[Value, Value]:
        """Token-major queries [B, T, H, D] and keys [B, T, Hkv, D], made wider."""
        batch, heads, _, tokens = self.shape
        flat = rw.insert(Reshape(self.value, shape=(batch, heads, tokens)))
        rows = rw.insert(Transpose(flat, perm=(-1, -2)))
        column = rw.insert(Reshape(rows, shape=(batch, tokens, heads, 1)))
        if heads != k.shape[-2]:
            column = rw.insert(Expand(column, shape=(*k.shape[:-1], 1)))
        column = column if column.dtype == k.dtype else rw.insert(m.Cast(column, dtype=k.dtype))
        rounded = rw.insert(m.Cast(rw.insert(m.Cast(column, dtype="bfloat16")), dtype=k.dtype))
        rest = rw.insert(m.Sub(column, rounded))
        ones = rw.insert(Full(value=1.0 / scale, dtype=q.dtype, shape=(*q.shape[:-1], 2)))
        return _widened(rw, q, ones), _widened(rw, k, rounded, rest)


def _widened(rw: Rewriter, x: Value, *columns: Value) -> Value:
    """x [..., D] and two columns behind it, and zeros up to a multiple of `_WIDTH`."""
    width = x.shape[-1]
    assert isinstance(width, int)
    parts, rest = [x, *columns], -(width + 2) % _WIDTH
    if rest:
        parts.append(rw.insert(Full(value=0.0, dtype=x.dtype, shape=(*x.shape[:-1], rest))))
    return rw.insert(Concat(parts, axis=-1))


def read_key_bias(bias: Value, shape: Shape) -> KeyBias | None:
    """A bias [B, heads, 1, T], perhaps repeated for every query, that is seen under a shape; None where it is
    something else.
    """
    while bias.shape == shape and isinstance(bias.producer, Expand) and bias.producer.x.type.rank == 4:
        inner = bias.producer.x
        if inner.shape[:2] != bias.shape[:2] or inner.shape[3] != bias.shape[3]:
            return None
        bias, shape = inner, inner.shape
    return KeyBias(bias, shape) if len(shape) == 4 and shape[2] == 1 else None
