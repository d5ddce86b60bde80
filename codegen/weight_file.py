"""Weight files of an artifact: safetensors, every tensor 64-byte aligned, written as a stream and read by
mapping.

The format allows no holes between tensors (https://huggingface.co/docs/safetensors, "Format": the byte buffer
must be fully indexed), so the padding in front of a tensor is itself an entry, a `U8` tensor whose name
begins with `PADDING_PREFIX`. Any safetensors reader opens such a file; ours leaves the padding out.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from ..ir.errors import ArtifactError

ALIGNMENT = 64
PADDING_PREFIX = "__padding."
_MAX_HEADER = 100 << 20  # the limit of the reference implementation

_TAGS: dict[str, tuple[str, np.dtype[Any]]] = {
    "float64": ("F64", np.dtype("<f8")),
    "float32": ("F32", np.dtype("<f4")),
    "float16": ("F16", np.dtype("<f2")),
    "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16)),
    "int64": ("I64", np.dtype("<i8")),
    "int32": ("I32", np.dtype("<i4")),
    "int16": ("I16", np.dtype("<i2")),
    "int8": ("I8", np.dtype("i1")),
    "uint32": ("U32", np.dtype("<u4")),
    "uint16": ("U16", np.dtype("<u2")),
    "uint8": ("U8", np.dtype("u1")),
    "bool": ("BOOL", np.dtype("?")),
}
_BY_TAG = dict(_TAGS.values())

TensorSpec = tuple[str, Sequence[int], str, Iterable[np.ndarray]]
"""(name, shape, dtype name, chunks of rows along axis 0 in order; one chunk for a scalar)."""


@dataclass(frozen=True)
class _Slot:
    name: str
    shape: tuple[int, ...]
    dtype: str
    begin: int
    end: int


def _padding(offset: int) -> int:
    return -offset % ALIGNMENT


def _plan(specs: Sequence[TensorSpec]) -> tuple[bytes, list[_Slot], int]:
    """Header bytes (length prefix included), the place of each tensor, and the size of the data."""
    header: dict[str, Any] = {"__metadata__": {"alignment": str(ALIGNMENT), "format": "llmc"}}
    slots: list[_Slot] = []
    offset = 0
    for name, shape, dtype, _ in specs:
        if name in header or name.startswith("__"):
            raise ValueError(f"weight {name!r} is named twice or uses a reserved name")
        gap = _padding(offset)
        if gap:
            pad = f"{PADDING_PREFIX}{len(slots)}"
            header[pad] = {"dtype": "U8", "shape": [gap], "data_offsets": [offset, offset + gap]}
            offset += gap
        tag, np_dtype = _TAGS[dtype]
        end = offset + math.prod(shape) * np_dtype.itemsize
        header[name] = {"dtype": tag, "shape": list(shape), "data_offsets": [offset, end]}
        slots.append(_Slot(name, tuple(shape), dtype, offset, end))
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * _padding(8 + len(text))
    return len(text).to_bytes(8, "little") + text, slots, offset


def weight_file_size(specs: Sequence[TensorSpec]) -> int:
    """Bytes that `write_weight_file` will write for `specs`; consumes no chunk."""
    header, _, data = _plan(specs)
    return len(header) + data


class _HashingFile:
    """Writes through to a file and hashes what it wrote, so that a large file is not read again."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, data: memoryview | bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def _chunk_bytes(slot: _Slot, chunk: np.ndarray) -> memoryview:
    expected = _TAGS[slot.dtype][1]
    if chunk.dtype != expected or (slot.shape and chunk.shape[1:] != slot.shape[1:]):
        raise ValueError(
            f"weight {slot.name!r}: a chunk is {chunk.dtype}{list(chunk.shape)}, "
            f"the tensor is {slot.dtype}{list(slot.shape)}"
        )
    flat = np.ascontiguousarray(chunk).reshape(-1)
    return flat.view(np.uint8).data


def write_weight_file(path: Path, specs: Sequence[TensorSpec]) -> tuple[str, int]:
    """Write `specs` to `path` in their order, one chunk in memory at a time.

    Returns (sha256, size in bytes). Raises OSError as the file system does, and ValueError where a chunk does
    not belong to its tensor (a mistake of the caller).
    """
    header, slots, data = _plan(specs)
    with open(path, "wb") as raw:
        out = _HashingFile(raw)
        out.write(header)
        start = out.size
        for slot, (_, _, _, chunks) in zip(slots, specs, strict=True):
            out.write(bytes(slot.begin - (out.size - start)))
            for chunk in chunks:
                out.write(_chunk_bytes(slot, chunk))
            if out.size - start != slot.end:
                raise ValueError(
                    f"weight {slot.name!r}: its chunks hold {out.size - start - slot.begin} bytes, "
                    f"its shape {list(slot.shape)} needs {slot.end - slot.begin}"
                )
        assert out.size == len(header) + data
        raw.flush()
        os.fsync(raw.fileno())
    return out.hexdigest(), out.size


def _broken(path: Path, why: str) -> ArtifactError:
    return ArtifactError(f"{path}: {why}", remedy="compile the model again or copy the artifact again")


def _entries(path: Path, text: bytes) -> Iterator[tuple[str, Any]]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"the header is not JSON ({type(error).__name__})") from None
    if not isinstance(header, dict):
        raise _broken(path, "the header is not a JSON object")
    for name, entry in header.items():
        if not name.startswith("__"):
            yield name, entry


def _view(path: Path, data: np.ndarray, name: str, entry: Any) -> np.ndarray:
    """One tensor as a read-only view of the mapped bytes, after checking that its entry is possible."""
    try:
        tag, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, begin, end]
    except (TypeError, KeyError, ValueError):
        raise _broken(path, f"tensor {name!r} has an incomplete header entry") from None
    if not all(type(n) is int and n >= 0 for n in numbers) or not isinstance(tag, str) or tag not in _BY_TAG:
        raise _broken(path, f"tensor {name!r} has an impossible shape, offset or dtype")
    dtype = _BY_TAG[tag]
    if not begin <= end <= data.size or math.prod(shape) * dtype.itemsize != end - begin:
        raise _broken(path, f"tensor {name!r}: bytes {begin}..{end} do not fit its shape {shape} or the file")
    if begin % ALIGNMENT:
        raise _broken(path, f"tensor {name!r} is not {ALIGNMENT}-byte aligned")
    return data[begin:end].view(dtype).reshape(shape)


def map_weight_file(path: Path) -> dict[str, np.ndarray]:
    """Map a weight file: name → read-only array, 64-byte aligned, nothing read until it is touched.

    Raises ArtifactError where the header does not match the file.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(_MAX_HEADER, size - 8):
            raise _broken(path, f"the header says {length} bytes, the file has {size}")
        text = file.read(length)
        if (8 + length) % ALIGNMENT:
            raise _broken(path, f"its data is not {ALIGNMENT}-byte aligned")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    data = np.frombuffer(memoryview(mapped), dtype=np.uint8)[8 + length :]
    return {name: _view(path, data, name, entry) for name, entry in _entries(path, text)}
