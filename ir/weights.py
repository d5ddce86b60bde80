"""Lazy tensors: weights that stay where they are until rows of them are wanted.

A graph names its weights by objects with this protocol. Nothing here opens a file: readers of safetensors and
GGUF live in the frontend, and passes wrap tensors into others (a merged QKV, a quantized matrix) in the same
way.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np

from .dtypes import from_numpy, itemsize, to_numpy
from .errors import CompileError


@runtime_checkable
class LazyTensor(Protocol):
    """A weight that is read by rows of axis 0.

    Attributes:
        shape: lengths of the axes; `()` for a scalar.
        dtype: element type by llmc's name ("float32", "bfloat16", …).
        source: where it comes from, for errors and graph text ("model.safetensors:lm_head.weight").
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str: ...

    @property
    def source(self) -> str: ...

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray[Any, Any]:
        """Rows [start:stop) of axis 0 (all of a scalar), C-contiguous, of `dtype`; nothing is kept in
        memory.
        """
        ...


class ArrayTensor:
    """A numpy array as a lazy tensor, for weights that are in memory anyway (small ones, and tests)."""

    def __init__(self, array: np.ndarray[Any, Any], source: str = "memory") -> None:
        self._array = array
        self.shape: tuple[int, ...] = tuple(array.shape)
        self.dtype: str = from_numpy(array.dtype)
        self.source = source

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray[Any, Any]:
        rows = self._array if not self.shape else self._array[start:stop]
        return np.ascontiguousarray(rows).reshape(rows.shape)

    def __repr__(self) -> str:
        return f"ArrayTensor({self.dtype}{list(self.shape)}, {self.source!r})"


class ShapeOnlyTensor:
    """A weight of which only the shape is known: for `llmc check` and for compiling without the values."""

    def __init__(self, shape: tuple[int, ...], dtype: str, source: str = "shape only") -> None:
        to_numpy(dtype)  # an unknown name is refused here, not at the first read
        self.shape = shape
        self.dtype = dtype
        self.source = source

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray[Any, Any]:
        raise CompileError(
            f"{self.source} has no values: only its shape {list(self.shape)} was given",
            remedy="compile from the checkpoint itself",
        )

    def __repr__(self) -> str:
        return f"ShapeOnlyTensor({self.dtype}{list(self.shape)}, {self.source!r})"


def num_elements(tensor: LazyTensor) -> int:
    """Elements of a tensor; 1 for a scalar."""
    count = 1
    for length in tensor.shape:
        count *= length
    return count


def num_bytes(tensor: LazyTensor) -> int:
    """Bytes of a tensor as `read` gives it (a GGUF tensor counts dequantized)."""
    return num_elements(tensor) * itemsize(tensor.dtype)


def read_chunks(tensor: LazyTensor, chunk_bytes: int = 32 << 20) -> Iterator[np.ndarray[Any, Any]]:
    """The tensor in row order, in pieces of at most `chunk_bytes` (at least one row); one piece for a
    scalar.
    """
    if not tensor.shape:
        yield tensor.read()
        return
    rows = tensor.shape[0]
    row_bytes = max(1, num_bytes(tensor) // max(1, rows))
    step = max(1, chunk_bytes // row_bytes)
    for start in range(0, rows, step):
        yield tensor.read(start, min(rows, start + step))
