"""Lazy tensors over GGUF files and over transformers' weight conversions.

Safetensors rows come from `safetensors.py`. Here are the tensors that need work on the way: GGUF blocks,
dequantized a chunk of rows at a time, and tensors that transformers itself would convert while loading
(un-permuted q/k projections, norms stored as weight + 1, experts merged from many tensors). The conversions
are transformers' own functions; this file only finds out how little has to be read for the rows that are
asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np

from ..ir.dtypes import from_numpy
from ..ir.errors import CompileError, InputError
from ..ir.ggml import block_parts, times
from ..ir.weights import LazyTensor, QuantizedTensors, concat_quantized, quantized_of
from .gguf import GGUFFile, GGUFTensorInfo
from .mapped import MappedFile

# Elements dequantized at once: gguf's numpy code keeps several temporaries of this size.
_CHUNK_ELEMENTS: Final = 1 << 20
_ROW_ELEMENTS: Final = 1 << 14  # of them in a row as gguf's code sees them

Transform = Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]


class GGUFTensor:
    """A GGUF tensor: float32 when read, raw blocks on request.

    Attributes:
        shape: torch order. dtype: always "float32". source: "file.gguf:name".
        ggml_type: block type ("Q4_1"). block_size, type_size: elements and bytes of a block.
        quantized: codes, scales and minimums of matrices in one of `ir.ggml.BLOCK_TYPES`, read from their
            blocks; None for other types and other ranks.
        factor: what all of its values are multiplied by (`ir.ggml.BlockRows`), once it is known.
    """

    dtype: str = "float32"
    factor: np.ndarray[Any, Any] | None = None

    def __init__(self, file: MappedFile, info: GGUFTensorInfo) -> None:
        self._file = file
        self._offset = info.offset
        self._row_bytes = info.nbytes // math.prod(info.shape[:-1])  # of the last axis
        self.shape = info.shape
        self.ggml_type = info.ggml_type
        self.block_size = info.block_size
        self.type_size = info.type_size
        self.name = info.name
        self.source = f"{file.path.name}:{info.name}"
        self._kind = _dequantizable(self.source, info.ggml_type)
        self.quantized: QuantizedTensors | None = block_parts(self)

    def blocks(self, start: int = 0, stop: int | None = None) -> np.ndarray[Any, Any]:
        """Raw bytes of rows [start:stop) of axis 0: uint8, [rows, …, bytes of the last axis].

        A tensor of one axis has one row of blocks; it comes whole, as [bytes].
        """
        if len(self.shape) == 1:
            return self._bytes(0, self._row_bytes)
        first, last, _ = slice(start, stop).indices(self.shape[0])
        last = max(first, last)
        inner = math.prod(self.shape[1:-1]) * self._row_bytes
        data = self._bytes(first * inner, last * inner)
        return data.reshape(last - first, *self.shape[1:-1], self._row_bytes)

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray[Any, Any]:
        if len(self.shape) == 1:
            return np.ascontiguousarray(self._dequantize(self.blocks()[None])[0][start:stop])
        first, last, _ = slice(start, stop).indices(self.shape[0])
        last = max(first, last)
        out = np.empty((last - first, *self.shape[1:]), np.float32)
        step = max(1, _CHUNK_ELEMENTS // math.prod(self.shape[1:]))
        for row in range(first, last, step):
            end = min(last, row + step)
            out[row - first : end - first] = times(self.factor, self._dequantize(self.blocks(row, end)), row)
        return out

    def _bytes(self, begin: int, end: int) -> np.ndarray[Any, Any]:
        begin, end = self._offset + begin, self._offset + end
        data = np.frombuffer(self._file.view(begin, end), np.uint8).copy()
        self._file.drop(begin, end)
        return data

    def _dequantize(self, blocks: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        from gguf.quants import dequantize

        if self.ggml_type in ("F32", "F16"):  # gguf takes these as values, every other type as bytes
            blocks = blocks.view(np.float32 if self.ggml_type == "F32" else np.float16)
            return blocks.astype(np.float32, copy=False)
        # Each block stands for itself, and gguf takes 16 rows at a time: long ones, for its calls cost more
        # than short rows' arithmetic.
        single = blocks.reshape(-1, self.type_size)
        long = _ROW_ELEMENTS // self.block_size
        whole = len(single) // long * long
        pieces = (single[:whole].reshape(-1, long * self.type_size), single[whole:].reshape(1, -1))
        values = [dequantize(rows, self._kind).reshape(-1) for rows in pieces if rows.size]
        columns = blocks.shape[-1] // self.type_size * self.block_size
        return np.concatenate([*values, np.empty(0, np.float32)]).reshape(*blocks.shape[:-1], columns)

    def __repr__(self) -> str:
        return f"GGUFTensor({self.ggml_type}{list(self.shape)}, {self.source!r})"


def _dequantizable(source: str, ggml_type: str) -> Any:
    """gguf's constant for a block type; InputError where gguf cannot dequantize it."""
    from gguf import quants
    from gguf.constants import GGMLQuantizationType

    kind = GGMLQuantizationType[ggml_type]
    known = {*quants._type_traits, GGMLQuantizationType.F32, GGMLQuantizationType.F16}  # pyright: ignore[reportPrivateUsage]  # gguf has no public list
    if kind not in known:
        names = ", ".join(sorted(one.name for one in known))
        raise InputError(
            f"{source} has the type {ggml_type}, which cannot be dequantized", remedy=f"use one of {names}"
        )
    return kind


def open_gguf_tensors(file: GGUFFile) -> dict[str, GGUFTensor]:
    """The file's tensors by GGUF name, mapped but not read."""
    if not file.tensors:
        raise InputError(
            f"{file.path.name} holds no tensors (a vocabulary-only file)", remedy="give a file with weights"
        )
    found: dict[str, GGUFTensor] = {}
    for part in file.parts or (file,):
        if part.tensors:
            mapped = MappedFile(part.path)
            found |= {name: GGUFTensor(mapped, info) for name, info in part.tensors.items()}
    return found


class ReorderedTensor:
    """A tensor with its rows (axis 0) in another order, or some of them; raw blocks stay available, picked
    alike.
    """

    def __init__(self, base: LazyTensor, order: np.ndarray[Any, Any]) -> None:
        self.base = base
        self.order = order
        self.shape: tuple[int, ...] = (len(order), *base.shape[1:])
        self.dtype = base.dtype
        self.source = base.source
        if isinstance(base, GGUFTensor) and len(base.shape) > 1:
            self.ggml_type = base.ggml_type
            self.block_size = base.block_size
            self.type_size = base.type_size

    @property
    def quantized(self) -> QuantizedTensors | None:
        """The base's quantized parts, reordered alike."""
        whole = quantized_of(self.base)
        return whole and whole.map_rows(lambda part: ReorderedTensor(part, self.order))

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray[Any, Any]:
        return self._pick(self.base.read, start, stop)

    def blocks(self, start: int = 0, stop: int | None = None) -> np.ndarray[Any, Any]:
        """As `GGUFTensor.blocks`; only over a GGUF tensor of two or more axes."""
        if not isinstance(self.base, GGUFTensor):
            raise CompileError(f"{self.source} is not stored in GGUF blocks")
        return self._pick(self.base.blocks, start, stop)

    def _pick(
        self, read: Callable[[int, int], np.ndarray[Any, Any]], start: int, stop: int | None
    ) -> np.ndarray[Any, Any]:
        rows = self.order[start:stop]
        if len(rows) == 0:
            return read(0, 0)
        # Reordered rows lie close together (within one head), so one read covers them with little waste.
        first = int(rows.min())
        return np.ascontiguousarray(read(first, int(rows.max()) + 1)[rows - first])

    def __repr__(self) -> str:
        return f"ReorderedTensor({self.dtype}{list(self.shape)}, {self.source!r})"


class ReorderedColumns:
    """Columns of a matrix in another order: column i of the result is column order[i] of the base."""

    def __init__(self, base: LazyTensor, order: np.ndarray[Any, Any]) -> None:
        self._base, self._order = base, order
        self.shape, self.dtype, self.source = base.shape, base.dtype, base.source

    @property
    def quantized(self) -> QuantizedTensors | None:
        """The base's quantized parts; their columns stay where they are."""
        whole = quantized_of(self._base)
        if whole is None or whole.columns is not None:
            return None
        return replace(whole, columns=np.argsort(self._order))

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray[Any, Any]:
        return np.ascontiguousarray(self._base.read(start, stop)[:, self._order])

    def __repr__(self) -> str:
        return f"ReorderedColumns({self.dtype}{list(self.shape)}, {self.source!r})"


class TransformedTensor:
    """A tensor behind a function of numpy arrays.

    `by_row` says that rows [a:b) of the result come from rows [a:b) of the base alone; otherwise every read
    reads the whole base.
    """

    def __init__(self, base: LazyTensor, transform: Transform, by_row: bool) -> None:
        self._base = base
        self._transform = transform
        self._by_row = by_row
        sample = transform(base.read(0, 1) if by_row else base.read())
        self.dtype = from_numpy(sample.dtype)
        self.shape: tuple[int, ...] = (base.shape[0], *sample.shape[1:]) if by_row else tuple(sample.shape)
        self.source = base.source

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray[Any, Any]:
        if self._by_row:
            return np.ascontiguousarray(self._transform(self._base.read(start, stop)))
        return np.ascontiguousarray(self._transform(self._base.read())[start:stop])

    def __repr__(self) -> str:
        return f"TransformedTensor({self.dtype}{list(self.shape)}, {self.source!r})"


class TurnedTensor:
    """Stacked matrices [E, N, K], each transposed: [E, K, N]."""

    def __init__(self, straight: LazyTensor) -> None:
        self.straight = straight
        experts, rows, columns = straight.shape
        self.shape: tuple[int, ...] = (experts, columns, rows)
        self.dtype, self.source = straight.dtype, straight.source

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray[Any, Any]:
        return np.ascontiguousarray(self.straight.read(start, stop).swapaxes(1, 2))

    def __repr__(self) -> str:
        return f"TurnedTensor({self.dtype}{list(self.shape)}, {self.source!r})"


def transformed(base: LazyTensor, transform: Transform) -> LazyTensor:
    """`transform` applied to a tensor, reading as few rows as it allows.

    How the function acts on rows is found by trying it on a probe with the same number of rows and few
        columns: it may do nothing, only reorder rows (q and k un-permuted), work row by row (a norm
        stored as weight + 1, an inserted axis), or need the whole tensor (a transpose).
    """
    rows = base.shape[0]
    if rows > 1 << 23:
        return TransformedTensor(base, transform, by_row=False)
    probe = np.arange(1, rows * 2 + 1, dtype=np.float32).reshape(rows, *([1] * (len(base.shape) - 2)), 2)
    if len(base.shape) == 1:
        probe = np.ascontiguousarray(probe[:, 0])
    try:
        whole = transform(probe.copy())
        order = _row_order(probe, whole)
        by_row = order is None and _works_by_row(transform, probe, whole)
    except Exception:  # noqa: BLE001  # a foreign function that the probe's few columns do not suit: read whole
        order, by_row = None, False
    if order is not None:
        return base if np.array_equal(order, np.arange(rows)) else ReorderedTensor(base, order)
    return TransformedTensor(base, transform, by_row)


def _row_order(probe: np.ndarray[Any, Any], whole: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | None:
    """Which probe row became each row of `whole`; None where the rows are not just reordered."""
    if whole.shape != probe.shape:
        return None
    rows = len(probe)
    first_column = probe.reshape(rows, -1)[:, 0]  # increasing, so a search tells where a row came from
    order = np.minimum(np.searchsorted(first_column, whole.reshape(rows, -1)[:, 0]), rows - 1)
    complete = np.array_equal(probe[order], whole) and np.array_equal(np.sort(order), np.arange(rows))
    return order if complete else None


def _works_by_row(transform: Transform, probe: np.ndarray[Any, Any], whole: np.ndarray[Any, Any]) -> bool:
    rows = len(probe)
    cut = max(1, rows // 3)
    if rows == 1 or whole.shape[:1] != (rows,):
        return False
    return np.array_equal(
        np.concatenate([transform(probe[:cut].copy()), transform(probe[cut:].copy())]), whole
    )


class MergedTensor:
    """A tensor that transformers makes of several (experts stacked, gate and up joined, a fused QKV split).

    Args:
        shape, dtype: of the result, from the model.
        convert: {source pattern: tensors} → the result; a transformers conversion.
        sources: {source pattern: lazy tensors in order}.
        stacks_rows: the conversion begins by stacking the tensors of each pattern along a new axis 0, so rows
            [start:stop) need only those tensors.
        moves_rows: the conversion only stacks, joins and cuts along other axes than the last one, so that it
            does the same with the sources' codes and scales.
        leaves_first: the conversion only joins and cuts along other axes than the first one, so that rows
            [start:stop) need only those of each tensor.
        names: what the checkpoint calls the sources, in the same order.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        convert: Callable[[Mapping[str, Sequence[np.ndarray[Any, Any]]]], np.ndarray[Any, Any]],
        sources: Mapping[str, Sequence[LazyTensor]],
        stacks_rows: bool,
        moves_rows: bool = False,
        leaves_first: bool = False,
        names: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        first = next(iter(sources.values()))[0]
        self.shape = shape
        self.dtype = first.dtype
        self.source = f"{first.source} and others, merged into {name}"
        self._convert = convert
        self._sources = sources
        self._names = names or {}
        self._name = name
        self._stacks_rows = stacks_rows and all(len(tensors) == shape[0] for tensors in sources.values())
        self._moves_rows = moves_rows
        flat = [tensor for tensors in sources.values() for tensor in tensors]
        self._leaves_first = leaves_first and all(tensor.shape[:1] == shape[:1] for tensor in flat)

    @property
    def quantized(self) -> QuantizedTensors | None:
        """The sources' own quantized parts, converted alike, where all have them on one grid."""
        if not self._moves_rows:
            return None
        flat = [tensor for tensors in self._sources.values() for tensor in tensors]

        def merged(parts: Sequence[LazyTensor]) -> LazyTensor:
            left = iter(parts)
            sources = {name: [next(left) for _ in tensors] for name, tensors in self._sources.items()}
            shape = (*self.shape[:-1], parts[0].shape[-1])
            return MergedTensor(
                self._name,
                shape,
                self._convert,
                sources,
                stacks_rows=self._stacks_rows,
                leaves_first=self._leaves_first,
            )

        return concat_quantized(flat, merged)

    @property
    def stored(self) -> Mapping[str, LazyTensor]:
        """See `ir.weights.MadeOf`."""
        return {
            name: tensor
            for pattern, names in self._names.items()
            for name, tensor in zip(names, self._sources[pattern], strict=True)
        }

    def with_stored(self, tensors: Mapping[str, LazyTensor]) -> LazyTensor:
        """See `ir.weights.MadeOf`."""
        sources = {pattern: [tensors[name] for name in names] for pattern, names in self._names.items()}
        return MergedTensor(
            self._name,
            self.shape,
            self._convert,
            sources,
            self._stacks_rows,
            self._moves_rows,
            self._leaves_first,
            self._names,
        )

    def row_order(self, most: int) -> np.ndarray[Any, Any] | None:
        """Which row of the sources, counted through all of `stored`, each row of a matrix is; None where rows
        are anything else than moved, or there are more than `most`.
        """
        flat = [tensor for tensors in self._sources.values() for tensor in tensors]
        rows = sum(tensor.shape[0] for tensor in flat)
        if rows > most or any(len(shape) != 2 for shape in (self.shape, *(one.shape for one in flat))):
            return None
        probe = np.arange(1, 2 * rows + 1, dtype=np.float32).reshape(rows, 2)
        ends = np.cumsum([tensor.shape[0] for tensor in flat])[:-1]
        left = iter(np.split(probe, ends))
        parts = {name: [next(left).copy() for _ in tensors] for name, tensors in self._sources.items()}
        try:
            whole = self._convert(parts)
        except CompileError:  # a conversion that few columns do not suit
            return None
        if whole.shape != (self.shape[0], 2):
            return None
        order = np.minimum(np.searchsorted(probe[:, 0], whole[:, 0]), rows - 1)
        return order if np.array_equal(probe[order], whole) else None

    def first_matrix(self) -> MergedTensor | None:
        """Of stacked matrices: the first, made of its own tensors; None where they are stacked of more."""
        if not self._stacks_rows or len(self.shape) != 3 or not self._names:
            return None
        return MergedTensor(
            self._name,
            self.shape[1:],
            lambda parts: self._convert(parts)[0],
            {pattern: tensors[:1] for pattern, tensors in self._sources.items()},
            stacks_rows=False,
            names={pattern: names[:1] for pattern, names in self._names.items()},
        )

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray[Any, Any]:
        rows = slice(start, stop)
        first, last, _ = rows.indices(self.shape[0])
        if last <= first:
            first_source = next(iter(self._sources.values()))[0]
            return np.empty((0, *self.shape[1:]), first_source.read(0, 0).dtype)
        cut = self._stacks_rows or self._leaves_first
        picked = rows if self._stacks_rows else slice(None)
        span = (first, last) if self._leaves_first else ()
        parts = {
            pattern: [one.read(*span) for one in tensors[picked]]
            for pattern, tensors in self._sources.items()
        }
        result = self._convert(parts)
        wanted = (last - first, *self.shape[1:]) if cut else self.shape
        if tuple(result.shape) != wanted:
            raise CompileError(
                f"{self.source}: the conversion gave {list(result.shape)}, the model has {list(wanted)}"
            )
        return np.ascontiguousarray(result if cut else result[rows])

    def __repr__(self) -> str:
        return f"MergedTensor({self.dtype}{list(self.shape)}, {self.source!r})"
