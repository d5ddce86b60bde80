"""The graph's weights as GGUF tensors.

A weight of the graph may hold several of the model's parameters one below the other, or a part of them
(`passes/quantize/gguf/names.py`), in floats or quantized. Here each parameter gets its rows back:

    blocks of a GGUF scheme or of a kept GGUF file   → the same bytes
    another grid, in groups of 32 · n                → the same codes in Q4_0, Q5_0, Q8_0, Q4_1 or Q5_1
    floats                                           → F32 for vectors; F16, BF16 or F32 for matrices
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ...frontend.weights import ReorderedTensor
from ...ir.core import Graph, Value
from ...ir.dtypes import to_numpy
from ...ir.errors import CompileError, InputError, UnsupportedError
from ...ir.ggml import BLOCK_TYPES, BlockPart, BlockRows
from ...ir.ops.quant import Dequantize, Hadamard, QuantizedEmbedding, QuantizedLinear
from ...ir.types import Quantization
from ...ir.weights import LazyTensor
from ...passes.derived import ConcatRows, SliceRows
from ...passes.merged_names import merged_names, without_piece
from ...passes.quantize.gguf.blocks import pack_affine, pack_symmetric

Array = np.ndarray[Any, Any]

FLOATS: Final = {"f16": ("F16", "float16"), "bf16": ("BF16", "bfloat16"), "f32": ("F32", "float32")}


@dataclass(frozen=True)
class Rows:
    """What the file holds of a matrix or vector: `data` by rows of axis 0, `shape` of the values."""

    ggml_type: str
    shape: tuple[int, ...]
    data: LazyTensor
    value_name: str

    def reordered(self, order: Array) -> Rows:
        """Row i of the result is row order[i]."""
        return Rows(self.ggml_type, self.shape, ReorderedTensor(self.data, order), self.value_name)


class RawBlocks:
    """The bytes of a matrix in blocks as a lazy tensor, uint8 [N, bytes of a row]."""

    dtype: str = "uint8"

    def __init__(self, tensor: BlockRows) -> None:
        self.tensor = tensor
        self.shape: tuple[int, ...] = (
            tensor.shape[0],
            BLOCK_TYPES[tensor.ggml_type].row_bytes(tensor.shape[1]),
        )
        self.source = tensor.source

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        return self.tensor.blocks(start, stop)


def stored_blocks(codes: LazyTensor) -> tuple[str, LazyTensor] | None:
    """Block type and raw rows of codes that were read from blocks; None for any others, and for those that a
    factor stands beside.
    """
    if isinstance(codes, BlockPart):
        if codes.tensor.factor is not None:
            return None
        return codes.tensor.ggml_type, RawBlocks(codes.tensor)
    if isinstance(codes, ConcatRows):
        found = [stored_blocks(part) for part in codes.parts]
        held = [one for one in found if one is not None]
        if len(held) != len(found) or len({kind for kind, _ in held}) != 1:
            return None
        return held[0][0], ConcatRows([rows for _, rows in held])
    if isinstance(codes, SliceRows):
        base = stored_blocks(codes.base)
        return base and (base[0], SliceRows(base[1], codes.start, codes.start + codes.shape[0]))
    if isinstance(codes, ReorderedTensor):
        base = stored_blocks(codes.base)
        return base and (base[0], ReorderedTensor(base[1], codes.order))
    return None


class Repacked:
    """Codes on a grid of groups of 32 · n, packed into Q4_0, Q5_0, Q8_0, Q4_1 or Q5_1 as rows are read."""

    dtype: str = "uint8"

    def __init__(self, ggml_type: str, quant: Quantization, parts: Sequence[LazyTensor]) -> None:
        self.ggml_type, self.quant = ggml_type, quant
        self.codes, self.scale, *rest = parts
        self.zero_point = rest[0] if rest else None
        rows, k = self.codes.shape
        self.k = k
        self.shape: tuple[int, ...] = (rows, BLOCK_TYPES[ggml_type].row_bytes(k))
        self.source = self.codes.source

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        codes = self.codes.read(start, stop).reshape(-1, self.k // 32, 32)
        scale = self._spread(self.scale.read(start, stop))
        bits = int(self.ggml_type[1])
        if self.zero_point is None:
            moved = codes + np.uint8((1 << (bits - 1)) - (1 << (self.quant.bits - 1)))
            return pack_symmetric(scale.astype(np.float16), moved, bits)
        zero = self.zero_point.read(start, stop)
        integers = zero.dtype.kind in "iu"
        spread = self._spread(zero).astype(np.float32)
        minimum = -scale.astype(np.float32) * spread if integers else spread
        return pack_affine(scale.astype(np.float16), minimum.astype(np.float16), codes, bits)

    def _spread(self, groups: Array) -> Array:
        """One number a group → one a block of 32."""
        return groups.repeat(self.quant.group_size // 32, axis=1)[:, : self.k // 32]


class Converted:
    """A tensor in another float type."""

    def __init__(self, base: LazyTensor, dtype: str, plus: float = 0.0) -> None:
        self.base, self.dtype, self.plus = base, dtype, plus
        self.shape, self.source = base.shape, base.source

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        rows = self.base.read(start, stop).astype(np.float32)
        if self.plus:
            rows = rows + np.float32(self.plus)
        with np.errstate(over="ignore"):
            out = rows.astype(to_numpy(self.dtype))
        if self.dtype == "float16" and not np.isfinite(out).all():
            raise InputError(
                f"{self.source} holds values that float16 cannot", remedy="use --target gguf:floats=bf16"
            )
        return out


def parameters(graph: Graph, known: Mapping[str, LazyTensor], floats: str) -> dict[str, Rows]:
    """The rows of each of the model's parameters that the graph holds.

    Args:
        known: the source's parameters by name.
        floats: type of matrices that are not quantized, a key of `FLOATS`.

    Raises UnsupportedError for a quantized weight that no GGML block holds.
    """
    pieces: dict[str, list[Value]] = {}
    beside = _beside(graph)
    for value in graph.weights.values():
        if value in beside:
            continue
        name = value.name.removesuffix(".q") if value.type.quant is not None else value.name
        if value.users:
            pieces.setdefault(without_piece(name), []).append(value)
    found: dict[str, Rows] = {}
    for name, values in pieces.items():
        names = [_parameter(one, known) for one in merged_names(name)]
        if any(one is None for one in names):
            continue  # buffers and constants of the graph
        ordered = sorted(values, key=lambda v: _part_number(v.name))
        lengths = [known[one].shape[0] for one in names if one is not None]
        whole = len(names) == 1
        start = 0
        for one, length in zip(names, lengths, strict=True):
            assert one is not None
            rows = [_rows(graph, v, floats) for v in ordered]
            found[one] = _cut(rows, None if whole else (start, start + length), one)
            start += length
    return found


def _beside(graph: Graph) -> set[Value]:
    """Scales, zero points and orders of columns: what quantization adds to a weight."""
    found = {
        part
        for op in graph
        if isinstance(op, (QuantizedLinear, QuantizedEmbedding, Dequantize))
        for part in (op.scale, op.zero_point)
        if part is not None
    }
    if any(isinstance(op, Hadamard) for op in graph):
        raise UnsupportedError(
            "gguf: layers are rotated, which GGUF cannot say", remedy="leave out --pass rotate-linears"
        )
    for value in graph.weights.values():
        if value.users and re.search(r"\.(columns|order)$", value.name):
            raise UnsupportedError(
                f"gguf: {value.name} reorders columns (desc_act), which GGUF cannot say",
                remedy="use another target, or quantize anew: --quant gguf-q4_k_m",
            )
    return found


def _parameter(name: str, known: Mapping[str, LazyTensor]) -> str | None:
    """The parameter that a graph's weight was made of: passes append what they did to it after a dot."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name or None


def _part_number(name: str) -> int:
    found = re.search(r"\.part(\d+)(?:\.q)?$", name)
    return int(found.group(1)) if found else 0


def _cut(rows: Sequence[Rows], extent: tuple[int, int] | None, name: str) -> Rows:
    """Rows [start, stop) of weights one below the other; all where `extent` is None."""
    total = sum(one.shape[0] for one in rows)
    start, stop = extent or (0, total)
    kept: list[tuple[str, LazyTensor]] = []
    first = 0
    for one in rows:
        a, b = max(start, first), min(stop, first + one.shape[0])
        if a < b:
            whole = (a, b) == (first, first + one.shape[0])
            data = one.data if whole else SliceRows(one.data, a - first, b - first)
            kept.append((one.ggml_type, data))
        first += one.shape[0]
    if not kept or stop > total or len({kind for kind, _ in kept}) != 1:
        raise CompileError(
            f"gguf: the rows of {name} lie in several types of blocks", remedy="report this with the scheme"
        )
    data = kept[0][1] if len(kept) == 1 else ConcatRows([one for _, one in kept])
    return Rows(kept[0][0], (stop - start, *rows[0].shape[1:]), data, rows[0].value_name)


def _rows(graph: Graph, value: Value, floats: str) -> Rows:
    assert value.weight is not None
    shape = tuple(value.weight.shape)
    if value.type.quant is None:
        kind, dtype = FLOATS[floats] if len(shape) > 1 else FLOATS["f32"]
        return Rows(kind, shape, Converted(value.weight, dtype), value.name)
    stored = stored_blocks(value.weight)
    if stored is not None:
        return Rows(stored[0], shape, stored[1], value.name)
    return Rows(*_repacked(value, shape), value.name)


def _repacked(value: Value, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...], LazyTensor]:
    quant = value.type.quant
    assert quant is not None and value.weight is not None
    scale, zero_point = _parts(value.users)
    integers = zero_point is None or zero_point.dtype == "uint8"
    kind = _block_type(quant.bits, zero_point is not None)
    exact = scale.dtype == "float16" and (integers or (zero_point and zero_point.dtype == "float16"))
    if kind is None or quant.codebook or quant.group_size % 32 or shape[1] % 32 or not exact:
        raise UnsupportedError(
            f"gguf: {value.name} is quantized as {quant}, which no GGML block holds",
            remedy="use --quant gguf-q4_k_m or its like, or groups of 32, 64, …",
        )
    parts = [value.weight, scale, *([zero_point] if zero_point is not None else [])]
    return kind, shape, Repacked(kind, quant, parts)


def _block_type(bits: int, minimum: bool) -> str | None:
    if bits <= 5:
        return f"Q{4 if bits <= 4 else 5}_{int(minimum)}"
    return "Q8_0" if bits == 8 and not minimum else None


def _parts(users: Iterable[Any]) -> tuple[LazyTensor, LazyTensor | None]:
    for op in users:
        if isinstance(op, (QuantizedLinear, QuantizedEmbedding, Dequantize)) and op.scale.weight is not None:
            return op.scale.weight, op.zero_point.weight if op.zero_point is not None else None
    raise CompileError("gguf: a quantized weight has no scales", remedy="report this with the scheme")
