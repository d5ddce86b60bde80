"""A strict reader of safetensors files: https://huggingface.co/docs/safetensors (section "Format").

8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data.
Everything the header claims is checked against the file's size before a byte of data is mapped, so a short
file is refused by name instead of being read as zeros.
"""

from __future__ import annotations

import json
import math
import os
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np

from ..ir.dtypes import FLOAT8, itemsize, to_numpy
from ..ir.errors import InputError
from .mapped import MappedFile

# The format's own bound (its reference reader refuses more).
MAX_HEADER_BYTES: Final = 100_000_000

_DTYPES: Final[dict[str, str]] = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F64": "float64",
    "F8_E4M3": FLOAT8,
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U32": "uint32",
    "U8": "uint8",
    "BOOL": "bool",
}
_AGAIN: Final = "download the file again"


class SafetensorsTensor:
    """One tensor of a file; rows are copied out of the mapping and the mapping's pages given back."""

    def __init__(self, file: MappedFile, name: str, shape: tuple[int, ...], dtype: str, offset: int) -> None:
        self._file = file
        self._offset = offset
        self.shape = shape
        self.dtype = dtype
        self.source = f"{file.path.name}:{name}"

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray[Any, Any]:
        rows = self.shape[0] if self.shape else 1
        first, last, _ = slice(start, stop).indices(rows)
        last = max(first, last)
        row_bytes = math.prod(self.shape[1:]) * itemsize(self.dtype)
        begin, end = self._offset + first * row_bytes, self._offset + last * row_bytes
        out = np.frombuffer(self._file.view(begin, end), to_numpy(self.dtype)).copy()
        self._file.drop(begin, end)
        return out.reshape((last - first, *self.shape[1:]) if self.shape else ())

    def __repr__(self) -> str:
        return f"SafetensorsTensor({self.dtype}{list(self.shape)}, {self.source!r})"


def read_header(path: Path) -> tuple[dict[str, tuple[str, tuple[int, ...], int, int]], dict[str, str]]:
    """Read and check a file's header; no tensor data is touched.

    Returns:
        {name: (llmc dtype, shape, first byte in the file, last byte + 1)} and the file's free-form metadata.

    Raises:
        InputError: naming the file, the tensor where there is one, and what is wrong.
    """
    try:
        size = os.stat(path).st_size
        with open(path, "rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length < 2:
                raise InputError(
                    f"{path.name} is no safetensors file: it has {size} bytes and no header", remedy=_AGAIN
                )
            if length > MAX_HEADER_BYTES or 8 + length > size:
                raise InputError(
                    f"{path.name} is truncated or no safetensors file: its header claims {length} bytes, "
                    f"the file has {size}",
                    remedy=_AGAIN,
                )
            raw = file.read(length)
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror}", remedy="check the path and its permissions"
        ) from None
    header = _parse_json(path, raw)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InputError(f"{path.name}: __metadata__ in the header is not a map of strings", remedy=_AGAIN)
    data_start = 8 + length
    tensors = {name: _check_entry(path, name, entry, data_start, size) for name, entry in header.items()}
    _check_overlap(path, tensors)
    return tensors, metadata


def open_safetensors(path: Path) -> dict[str, SafetensorsTensor]:
    """The tensors of a file, by name, after the checks of `read_header`."""
    tensors, _ = read_header(path)
    if not tensors:
        return {}
    file = MappedFile(path)
    return {
        name: SafetensorsTensor(file, name, shape, dtype, a) for name, (dtype, shape, a, _) in tensors.items()
    }


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(n for n in names if names.count(n) > 1)!r} occurs twice")
    return out


def _parse_json(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_refuse_duplicates)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path.name}: the header is no JSON ({error})", remedy=_AGAIN) from None
    if not isinstance(header, dict):
        raise InputError(f"{path.name}: the header is no JSON object", remedy=_AGAIN)
    return header


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _check_entry(
    path: Path, name: str, entry: Any, data_start: int, size: int
) -> tuple[str, tuple[int, ...], int, int]:
    where = f"{path.name}: tensor {name!r}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise InputError(f"{where} lacks dtype, shape or data_offsets", remedy=_AGAIN)
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or not all(_is_size(n) for n in shape):
        raise InputError(f"{where} has the impossible shape {shape!r}", remedy=_AGAIN)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(n) for n in offsets):
        raise InputError(f"{where} has impossible data_offsets {offsets!r}", remedy=_AGAIN)
    if entry["dtype"] not in _DTYPES:
        raise InputError(
            f"{where} has the element type {entry['dtype']!r}, which llmc does not read",
            remedy=f"convert it to one of {', '.join(_DTYPES)}",
        )
    dtype = _DTYPES[entry["dtype"]]
    begin, end = offsets
    wanted = math.prod(shape) * itemsize(dtype)
    if end - begin != wanted:
        raise InputError(
            f"{where}: {dtype}{shape} takes {wanted} bytes, data_offsets give {end - begin}", remedy=_AGAIN
        )
    if data_start + end > size:
        raise InputError(
            f"{where} ends at byte {data_start + end}, the file has {size}: it is truncated", remedy=_AGAIN
        )
    return dtype, tuple(shape), data_start + begin, data_start + end


def _check_overlap(path: Path, tensors: dict[str, tuple[str, tuple[int, ...], int, int]]) -> None:
    spans = sorted((a, b, name) for name, (_, _, a, b) in tensors.items() if b > a)
    for (_, end, before), (begin, _, after) in pairwise(spans):
        if begin < end:
            raise InputError(f"{path.name}: tensors {before!r} and {after!r} overlap", remedy=_AGAIN)
