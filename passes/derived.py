"""Lazy weights computed from other lazy weights: merged, transposed, folded.

Each reads rows of its sources when its own rows are read. Where the sources carry quantized parts
(`ir.weights.QuantizedTensors`) and rows are merely picked, the result carries them too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..ir.dtypes import to_numpy
from ..ir.errors import CompileError
from ..ir.weights import (
    LazyTensor,
    QuantizedTensors,
    concat_quantized,
    quantized_of,
    read_chunks,
    straight_of,
)

Array = np.ndarray[Any, Any]


class ConcatRows:
    """Tensors one below the other along axis 0."""

    def __init__(self, parts: Sequence[LazyTensor]) -> None:
        if len({(p.shape[1:], p.dtype) for p in parts}) != 1:
            listed = ", ".join(f"{p.source} {p.dtype}{list(p.shape)}" for p in parts)
            raise CompileError(
                f"weights to merge differ: {listed}",
                remedy="do not merge them",
            )
        self.parts = tuple(parts)
        self.shape: tuple[int, ...] = (sum(p.shape[0] for p in parts), *parts[0].shape[1:])
        self.dtype = parts[0].dtype
        self.source = "concat(" + ", ".join(p.source for p in parts) + ")"

    @property
    def quantized(self) -> QuantizedTensors | None:
        """The parts' own quantized parts, where all have them on one grid."""
        return concat_quantized(self.parts, ConcatRows)

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        end = self.shape[0] if stop is None else min(stop, self.shape[0])
        pieces: list[Array] = []
        first = 0
        for p in self.parts:
            a, b = max(start, first), min(end, first + p.shape[0])
            if a < b:
                pieces.append(p.read(a - first, b - first))
            first += p.shape[0]
        return (
            pieces[0] if len(pieces) == 1 else np.concatenate(pieces) if pieces else self.parts[0].read(0, 0)
        )


class SliceRows:
    """Rows [start, stop) of a tensor."""

    def __init__(self, base: LazyTensor, start: int, stop: int) -> None:
        self.base, self.start = base, start
        self.shape: tuple[int, ...] = (stop - start, *base.shape[1:])
        self.dtype = base.dtype
        self.source = f"{base.source}[{start}:{stop}]"

    @property
    def quantized(self) -> QuantizedTensors | None:
        """These rows of the base's quantized parts."""
        whole = quantized_of(self.base)
        return whole and whole.map_rows(lambda part: SliceRows(part, self.start, self.start + self.shape[0]))

    @property
    def straight(self) -> LazyTensor | None:
        """Matrices [start, stop) of a stack whose columns are stored as rows, as they are stored."""
        whole = straight_of(self.base) if len(self.shape) == 3 else None
        return whole and SliceRows(whole, self.start, self.start + self.shape[0])

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        end = self.shape[0] if stop is None else min(stop, self.shape[0])
        return self.base.read(self.start + start, self.start + end)


class TransposedTensor:
    """A matrix transposed.

    A read of rows goes through the source in chunks, so memory stays at the rows asked for plus a chunk.
    """

    def __init__(self, base: LazyTensor) -> None:
        self.base = base
        self.shape: tuple[int, ...] = (base.shape[1], base.shape[0])
        self.dtype = base.dtype
        self.source = f"transpose({base.source})"

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        end = self.shape[0] if stop is None else min(stop, self.shape[0])
        return np.ascontiguousarray(
            np.concatenate([chunk[:, start:end] for chunk in read_chunks(self.base)]).T
        )


class ComputedTensor:
    """Any function of whole sources, for small tensors (norm weights, tables): the function runs at each
    read.
    """

    def __init__(self, shape: Sequence[int], dtype: str, source: str, compute: Callable[[], Array]) -> None:
        self.shape: tuple[int, ...] = tuple(shape)
        self.dtype = dtype
        self.source = source
        self._compute = compute

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        whole = self._compute()
        return np.ascontiguousarray(whole[start:stop]) if self.shape else whole


class CastTensor:
    """A tensor's values as another dtype."""

    def __init__(self, base: LazyTensor, dtype: str) -> None:
        self.base, self.dtype = base, dtype
        self.shape: tuple[int, ...] = base.shape
        self.source = base.source

    @property
    def quantized(self) -> QuantizedTensors | None:
        """The base's quantized parts, which mean the same numbers where none is rounded."""
        return quantized_of(self.base) if self.dtype == "float32" else None

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        return self.base.read(start, stop).astype(to_numpy(self.dtype))


class ScaledRows:
    """Row i of a tensor (element i of a vector) times factors[i], in float32, then as `dtype`."""

    def __init__(self, base: LazyTensor, factors: Array, dtype: str) -> None:
        self.base, self.factors = base, np.asarray(factors, np.float32)
        self.shape: tuple[int, ...] = base.shape
        self.dtype = dtype
        self.source = base.source

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        rows = self.base.read(start, stop).astype(np.float32)
        factors = self.factors[start:stop].reshape(-1, *(1,) * (rows.ndim - 1))
        return np.ascontiguousarray((rows * factors).astype(to_numpy(self.dtype)))


class ScaledColumns(ScaledRows):
    """Element i of the last axis times factors[i], in float32, then as `dtype`."""

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        rows = self.base.read(start, stop).astype(np.float32)
        return np.ascontiguousarray((rows * self.factors).astype(to_numpy(self.dtype)))
