"""Lazy tensors: weights that stay where they are until rows of them are wanted.

A graph names its weights by objects with this protocol. Nothing here opens a file: readers of safetensors and
GGUF live in the frontend, and passes wrap tensors into others (a merged QKV, a quantized matrix) in the same
way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np

from .codebooks import codebook
from .dtypes import from_numpy, itemsize, to_numpy
from .errors import CompileError
from .types import Quantization


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
        memory. Threads may read at the same time.
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


class LongerTensor:
    """A table that goes on beyond what is stored of it, `base`, by a rule that whoever reads `base` must
    know; it has no values itself.
    """

    def __init__(self, base: LazyTensor, shape: tuple[int, ...]) -> None:
        self.base, self.shape = base, shape
        self.dtype, self.source = base.dtype, base.source

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray[Any, Any]:
        raise CompileError(
            f"{self.source} is read beyond {list(self.base.shape)}, where nothing is stored",
            remedy="report the model",
        )


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


@dataclass(frozen=True, eq=False)
class QuantizedTensors:
    """The parts that a checkpoint stores of a quantized weight [N, K], or of one for each expert, [E, N, K],
    beside the values that they stand for.

    A lazy tensor that has them carries them as its attribute `quantized` (`quantized_of` asks for it); its
    `read` gives the dequantized values.

    Attributes:
        quant: how the parts stand for numbers (`types.Quantization`).
        codes: uint8 [(E,) N, K], one value a byte.
        scale: `quant.scale_dtype` [(E,) N, G], G = ceil(K / group_size).
        zero_point: uint8, float16 or float32 [(E,) N, G] as `Quantization` says, or None.
        columns: int64 [K], a permutation, or None for the order of the weight: column j of `codes` is column
            columns[j] of the weight (GPTQ's desc_act, whose groups are scattered), so that a product takes
            x[..., columns].
    """

    quant: Quantization
    codes: LazyTensor
    scale: LazyTensor
    zero_point: LazyTensor | None = None
    columns: np.ndarray[Any, Any] | None = None

    def map_rows(self, change: Callable[[LazyTensor], LazyTensor]) -> QuantizedTensors:
        """The same weight with its rows picked or reordered: `change` is applied to each part."""
        zero_point = None if self.zero_point is None else change(self.zero_point)
        return replace(self, codes=change(self.codes), scale=change(self.scale), zero_point=zero_point)

    def agrees_with(self, other: QuantizedTensors) -> bool:
        """Whether the rows of both may stand in one weight: same grid, same kind of zero point, same order of
        columns.
        """
        return (
            _same_order(self.columns, other.columns)
            and self.quant == other.quant
            and self.codes.shape[1:] == other.codes.shape[1:]
            and self.scale.dtype == other.scale.dtype
            and _dtype(self.zero_point) == _dtype(other.zero_point)
        )


def _same_order(one: np.ndarray[Any, Any] | None, other: np.ndarray[Any, Any] | None) -> bool:
    if one is None or other is None:
        return one is other
    return np.array_equal(one, other)


def _dtype(tensor: LazyTensor | None) -> str | None:
    return None if tensor is None else tensor.dtype


def quantized_of(tensor: LazyTensor | None) -> QuantizedTensors | None:
    """The quantized parts that a tensor carries; None for plain floats."""
    found = getattr(tensor, "quantized", None)
    return found if isinstance(found, QuantizedTensors) else None


def straight_of(tensor: LazyTensor | None) -> LazyTensor | None:
    """The stored [E, N, K] of a tensor that gives its matrices transposed, [E, K, N]; None for others.

    A lazy tensor that knows it carries it as its attribute `straight`: codes lie in rows, and what turns the
    matrices back finds them there.
    """
    return getattr(tensor, "straight", None)


class MadeOf(Protocol):
    """A lazy tensor that is made of tensors of a checkpoint.

    Attributes:
        stored: those, by their names there.
    """

    @property
    def stored(self) -> Mapping[str, LazyTensor]: ...

    def with_stored(self, tensors: Mapping[str, LazyTensor]) -> LazyTensor:
        """The same made of others of these names and shapes, all of one type."""
        ...


def made_of(tensor: LazyTensor | None) -> MadeOf | None:
    """The tensor where it is made of a checkpoint's; None for one that is one of them, and others."""
    # By its class: asking an object evaluates its properties.
    return cast("MadeOf", tensor) if hasattr(type(tensor), "with_stored") else None


def stored_name(tensor: LazyTensor | None) -> str | None:
    """What a checkpoint calls a tensor that the model calls otherwise: its attribute `stored_name`."""
    return getattr(tensor, "stored_name", None)


def name_stored(tensor: LazyTensor, name: str) -> None:
    """Note what the checkpoint calls a tensor."""
    cast("Any", tensor).stored_name = name


def concat_quantized(
    parts: Sequence[LazyTensor], concat: Callable[[Sequence[LazyTensor]], LazyTensor]
) -> QuantizedTensors | None:
    """The parts of weights one below the other; None where one has none or their grids differ.

    Args:
        concat: puts lazy tensors one below the other (`passes.derived.ConcatRows`).
    """
    found = [quantized_of(p) for p in parts]
    first = found[0] if found else None
    if first is None:
        return None
    held = [q for q in found if q is not None and first.agrees_with(q)]
    if len(held) != len(found):
        return None
    zeros = [q.zero_point for q in held if q.zero_point is not None]
    return replace(
        first,
        codes=concat([q.codes for q in held]),
        scale=concat([q.scale for q in held]),
        zero_point=concat(zeros) if zeros else None,
    )


def dequantize_rows(parts: QuantizedTensors, start: int = 0, stop: int | None = None) -> np.ndarray[Any, Any]:
    """Rows [start:stop) of the values, float32 [rows, (N,) K] in the weight's own order of columns, by
    `Quantization`'s table.
    """
    codes, quant = parts.codes.read(start, stop), parts.quant
    k = codes.shape[-1]

    def spread(groups: LazyTensor) -> np.ndarray[Any, Any]:
        rows = groups.read(start, stop).astype(np.float32)
        return np.repeat(rows, quant.group_size, axis=-1)[..., :k]

    scale = spread(parts.scale)
    if quant.codebook is not None:
        values = codebook(quant.codebook)[codes] * scale
    elif parts.zero_point is None:
        values = (codes.astype(np.float32) - np.float32(1 << (quant.bits - 1))) * scale
    elif parts.zero_point.dtype == "uint8":
        values = (codes.astype(np.float32) - spread(parts.zero_point)) * scale
    else:
        values = codes.astype(np.float32) * scale + spread(parts.zero_point)
    if parts.columns is None:
        return values
    ordered = np.empty_like(values)
    ordered[..., parts.columns] = values
    return ordered


class DequantizedTensor:
    """A weight that is stored in codes: float32 [(E,) N, K] when read, its parts as `quantized`."""

    dtype: str = "float32"

    def __init__(self, parts: QuantizedTensors, source: str) -> None:
        self.quantized = parts
        self.shape: tuple[int, ...] = parts.codes.shape
        self.source = source

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray[Any, Any]:
        return dequantize_rows(self.quantized, start, stop)

    def __repr__(self) -> str:
        return f"DequantizedTensor({self.quantized.quant}, {list(self.shape)}, {self.source!r})"
