"""Small integers packed into words, unpacked as rows are read.

Every format here packs a run of b-bit codes as one stream of bits, lowest bit first, in little-endian 32-bit
words (8-bit and 4-bit codes never straddle a word; 3-bit ones do). Formats differ in the axis along which the
stream runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ...ir.errors import InputError
from ...ir.weights import LazyTensor, read_chunks

Array = np.ndarray[Any, Any]


def words_for(count: int, bits: int) -> int:
    """32-bit words that hold `count` codes."""
    return -(-count * bits // 32)


def unpack_stream(words: Array, bits: int, count: int) -> Array:
    """Words or bytes [rows, W] → the first `count` codes of each row's stream, uint8 [rows, count]."""
    little = words.dtype.newbyteorder("<")
    stream = np.ascontiguousarray(words).astype(little, copy=False).view(np.uint8)
    if bits == 8:
        return np.ascontiguousarray(stream[:, :count])
    if 8 % bits == 0:
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        codes = (stream[:, :, None] >> shifts) & np.uint8((1 << bits) - 1)
        return np.ascontiguousarray(codes.reshape(len(stream), stream.shape[1] * len(shifts))[:, :count])
    ones = np.unpackbits(stream, axis=1, count=count * bits, bitorder="little")
    ones = ones.reshape(len(stream), count, bits)
    return (ones << np.arange(bits, dtype=np.uint8)).sum(-1, dtype=np.uint8)


class PackedAlongRows:
    """Codes uint8 [N, K] of words or bytes [N, W]: each row is a stream."""

    dtype: str = "uint8"

    def __init__(self, words: LazyTensor, bits: int, k: int) -> None:
        self._words, self._bits = words, bits
        self.shape: tuple[int, ...] = (words.shape[0], k)
        self.source = words.source

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        return unpack_stream(self._words.read(start, stop), self._bits, self.shape[1])


class PackedAlongColumns:
    """Codes uint8 [N, K] of words int32 [words, N]: each column of the words is a stream.

    A read of some rows needs all words; they are kept, transposed, until the last row was read.
    """

    dtype: str = "uint8"

    def __init__(self, words: LazyTensor, bits: int, k: int) -> None:
        self._words, self._bits = words, bits
        self.shape: tuple[int, ...] = (words.shape[1], k)
        self.source = words.source
        self._kept: Array | None = None

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        first, last, _ = slice(start, stop).indices(self.shape[0])
        kept = self._kept  # once: another thread may be at the last row
        streams = np.ascontiguousarray(self._words.read().T) if kept is None else kept
        self._kept = None if last >= self.shape[0] else streams
        return unpack_stream(streams[first : max(first, last)], self._bits, self.shape[1])


class PermutedColumns:
    """Columns in another order: column j of the result is column columns[j] of the base."""

    def __init__(self, base: LazyTensor, columns: Array) -> None:
        self._base, self._columns = base, columns
        self.shape, self.dtype, self.source = base.shape, base.dtype, base.source

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        return np.ascontiguousarray(self._base.read(start, stop)[:, self._columns])


class SignedBytes:
    """Codes uint8 [N, K] of int8 values: shifted up by 128."""

    dtype: str = "uint8"

    def __init__(self, base: LazyTensor) -> None:
        self._base = base
        self.shape, self.source = base.shape, base.source

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        return self._base.read(start, stop).view(np.uint8) ^ np.uint8(0x80)


class Small:
    """A small part (scales, zero points), computed whole at each read."""

    def __init__(self, shape: tuple[int, ...], dtype: str, source: str, compute: Callable[[], Array]) -> None:
        self.shape, self.dtype, self.source = shape, dtype, source
        self._compute = compute

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        return np.ascontiguousarray(self._compute()[start:stop])


class RowScales:
    """Scales or biases [N, G] as they are stored: float16 where that holds every one exactly, else float32.

    Reading raises InputError for NaN or Inf among them.
    """

    def __init__(self, stored: LazyTensor) -> None:
        self._stored = stored
        self.shape, self.source = stored.shape, stored.source
        exact = stored.dtype == "float16" or all(map(_fits_half, read_chunks(stored)))
        self.dtype: str = "float16" if exact else "float32"

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        return _finite(self._stored.read(start, stop), self.source).astype(self.dtype)


def _finite(stored: Array, source: str) -> Array:
    values = stored.astype(np.float32)
    if not np.isfinite(values).all():
        raise InputError(f"{source} holds NaN or infinite scales", remedy="the checkpoint is damaged")
    return values


def _fits_half(values: Array) -> bool:
    values = values.astype(np.float32)
    with np.errstate(over="ignore", under="ignore"):
        return np.array_equal(values.astype(np.float16).astype(np.float32), values)


def scales_of(tensor: LazyTensor, shape: tuple[int, ...], arrange: Callable[[Array], Array]) -> Small:
    """The scales of a tensor as [N, G], float16 where that holds every one exactly, else float32.

    Args:
        arrange: the stored array → [N, G].
    Raises:
        InputError: NaN or Inf among them.
    """

    def read() -> Array:
        stored = arrange(tensor.read())
        values = _finite(stored, tensor.source)
        return stored if stored.dtype == np.float16 else values

    if tensor.dtype == "float16":
        return Small(shape, "float16", tensor.source, read)
    if _fits_half(read()):
        return Small(shape, "float16", tensor.source, lambda: read().astype(np.float16))
    return Small(shape, "float32", tensor.source, read)
