"""Arrays that belong together as one memory-mapped file, and lists of strings as two arrays.

A file is a line of JSON (names, types, shapes, offsets) and then the arrays, each on a 64-byte boundary.
Pages that no query touches cost no memory.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

_MAGIC = "llmc-arrays-1"
_ALIGNMENT = 64


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], facts: Mapping[str, str]) -> None:
    """Write beside and rename: a reader sees the whole file or none, and two writers do not mix."""
    described: list[dict[str, object]] = []
    offset = 0
    for name, array in arrays.items():
        described.append(
            {"name": name, "dtype": array.dtype.str, "shape": list(array.shape), "offset": offset}
        )
        offset += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    header = json.dumps({"magic": _MAGIC, "facts": dict(facts), "arrays": described}).encode()
    header += b" " * (-(len(header) + 1) % _ALIGNMENT) + b"\n"
    handle, temporary = tempfile.mkstemp(prefix=path.name, suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(header)
            for array in arrays.values():
                file.write(np.ascontiguousarray(array).data if array.size else b"")
                file.write(b"\0" * (-array.nbytes % _ALIGNMENT))
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read_arrays(path: Path, facts: Mapping[str, str]) -> dict[str, np.ndarray] | None:
    """The arrays, mapped; None where the file is absent, damaged or made for other facts."""
    try:
        with open(path, "rb") as file:
            header = file.readline(1 << 20)
        described = json.loads(header)
        if described["magic"] != _MAGIC or described["facts"] != dict(facts):
            return None
        data = np.memmap(path, np.uint8, mode="r").view(np.ndarray)  # plain arrays index faster
        found: dict[str, np.ndarray] = {}
        for entry in described["arrays"]:
            dtype, shape = np.dtype(entry["dtype"]), tuple(entry["shape"])
            start = len(header) + int(entry["offset"])
            size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
            if start + size > len(data):
                return None
            found[entry["name"]] = data[start : start + size].view(dtype).reshape(shape)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found


class Strings(Sequence[str]):
    """Strings as one array of UTF-8 bytes and one of boundaries, so that a million of them need no
    objects."""

    def __init__(self, data: np.ndarray, bounds: np.ndarray) -> None:
        self.data, self.bounds = data, bounds

    @classmethod
    def of(cls, values: Sequence[str]) -> Strings:
        encoded = [value.encode("utf-8", "replace") for value in values]
        bounds = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum([len(value) for value in encoded], out=bounds[1:])
        return cls(np.frombuffer(b"".join(encoded), np.uint8), bounds)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # slices are not needed
        return self.data[self.bounds[index] : self.bounds[index + 1]].tobytes().decode()

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))
