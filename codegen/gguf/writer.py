"""A GGUF file, version 3, written as a stream: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

Key-values and the list of tensors come first and are small; each tensor's rows then pass through memory in
chunks.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from ...ir.errors import CompileError
from ...ir.weights import LazyTensor

ALIGNMENT: Final = 32
CHUNK_BYTES: Final = 8 << 20

_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY, _UINT64 = 4, 5, 6, 7, 8, 9, 10
_ELEMENTS: Final = {"uint8": 0, "int8": 1, "uint16": 2, "int16": 3, "uint32": 4, "int32": 5, "float32": 6,
                    "bool": 7, "uint64": 10, "int64": 11, "float64": 12}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the file.

    Attributes:
        shape: of the values, in torch's order.
        type_id: ggml's number of the block type.
        nbytes: in the file.
        rows: gives the bytes: numbers or raw blocks, rows of axis 0 as the file has them.
    """

    name: str
    shape: tuple[int, ...]
    type_id: int
    nbytes: int
    rows: LazyTensor


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Sequence[TensorEntry],
    progress: Callable[[float], None] = lambda share: None,
) -> None:
    """Write the file. Values of `metadata`: str, bool, int, float, lists of one of these, numpy arrays.

    Raises CompileError where a tensor's rows do not add up to its size; OSError as the system does.
    """
    total = max(1, sum(t.nbytes for t in tensors))
    done = 0
    with open(path, "wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
        for key, value in metadata.items():
            file.write(_text(key) + _value(value))
        offset = 0
        for tensor in tensors:
            file.write(_info(tensor, offset))
            offset += tensor.nbytes + -tensor.nbytes % ALIGNMENT
        file.write(bytes(-file.tell() % ALIGNMENT))
        for tensor in tensors:
            _write_rows(file, tensor)
            file.write(bytes(-tensor.nbytes % ALIGNMENT))
            done += tensor.nbytes
            progress(done / total)


def _write_rows(file: BinaryIO, tensor: TensorEntry) -> None:
    rows = tensor.shape[0]
    step = max(1, CHUNK_BYTES // max(1, tensor.nbytes // rows))
    written = 0
    for start in range(0, rows, step):
        data = np.ascontiguousarray(tensor.rows.read(start, min(rows, start + step)))
        file.write(data.reshape(-1).view(np.uint8).data)
        written += data.nbytes
    if written != tensor.nbytes:
        raise CompileError(
            f"gguf: {tensor.name} has {written} bytes instead of {tensor.nbytes}",
            remedy="report this with the model's name",
        )


def _text(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw


def _info(tensor: TensorEntry, offset: int) -> bytes:
    dims = b"".join(struct.pack("<Q", n) for n in reversed(tensor.shape))
    head = _text(tensor.name) + struct.pack("<I", len(tensor.shape)) + dims
    return head + struct.pack("<IQ", tensor.type_id, offset)


def _value(value: Any) -> bytes:
    if isinstance(value, (list, tuple, np.ndarray)):
        return struct.pack("<I", _ARRAY) + _array(value)
    kind, raw = _scalar(value)
    return struct.pack("<I", kind) + raw


def _scalar(value: Any) -> tuple[int, bytes]:
    if isinstance(value, str):
        return _STRING, _text(value)
    if isinstance(value, bool):
        return _BOOL, struct.pack("<B", value)
    if isinstance(value, float):
        return _FLOAT32, struct.pack("<f", value)
    number = int(value)
    if number < 0:
        return _INT32, struct.pack("<i", number)
    return (_UINT32, struct.pack("<I", number)) if number < 1 << 32 else (_UINT64, struct.pack("<Q", number))


def _array(items: Any) -> bytes:
    if isinstance(items, np.ndarray):
        return struct.pack("<IQ", _ELEMENTS[items.dtype.name], items.size) + items.tobytes()
    if not items or isinstance(items[0], str):  # an empty list is one of strings: numbers are numpy arrays
        return struct.pack("<IQ", _STRING, len(items)) + b"".join(_text(one) for one in items)
    kind = "bool" if isinstance(items[0], bool) else "int32"
    if any(isinstance(one, float) for one in items):
        kind = "float32"
    return _array(np.array(items, kind))


def tensor_bytes(shape: Sequence[int], block_size: int, type_size: int) -> int:
    """Bytes of a tensor in blocks of `block_size` values and `type_size` bytes."""
    return math.prod(shape) // block_size * type_size
