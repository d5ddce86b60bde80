"""A strict reader of GGUF headers: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and
3).

GGUF files come from strangers, and every number in the header is theirs: counts, string lengths, dimensions,
offsets. Each is checked against what the file can hold before anything is allocated, read or mapped for it,
so that no claim costs more than the bytes which back it. Only little-endian files are read.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from ..ir.errors import InputError

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
DEFAULT_ALIGNMENT: Final = 32
MAX_DIMS: Final = 4  # GGML_MAX_DIMS
MAX_KEY_BYTES: Final = 65_535  # the specification's bound on keys
MAX_NAME_BYTES: Final = 1_024  # the specification says 64; published files exceed it

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS: Final[dict[int, tuple[str, int]]] = {
    0: ("<B", 1), 1: ("<b", 1), 2: ("<H", 2), 3: ("<h", 2), 4: ("<I", 4), 5: ("<i", 4),
    6: ("<f", 4), 7: ("<B", 1), 10: ("<Q", 8), 11: ("<q", 8), 12: ("<d", 8),
}  # fmt: skip
_AGAIN: Final = "download the file again"


@dataclass(frozen=True)
class GGUFTensorInfo:
    """Where a tensor lies and how it is stored.

    Attributes:
        shape: in torch's order (GGUF writes the fastest axis first).
        ggml_type: name of the block type ("Q4_1", "F32").
        block_size, type_size: elements and bytes of one block.
        offset, nbytes: extent in the file, in bytes from its start.
    """

    name: str
    shape: tuple[int, ...]
    ggml_type: str
    block_size: int
    type_size: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GGUFFile:
    """A checked header. Arrays in `metadata` are lists of strings or numpy arrays.

    `parts`: the files of a model in several, of which this is the first; `size` and `tensors` are of all.
    """

    path: Path
    size: int
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensorInfo] = field(repr=False)
    parts: tuple[GGUFFile, ...] = field(default=(), repr=False)

    @property
    def architecture(self) -> str:
        """`general.architecture`; InputError where the file does not say it."""
        value = self.metadata.get("general.architecture")
        if not isinstance(value, str) or not value:
            raise InputError(
                f"{self.path.name} has no general.architecture", remedy="use a GGUF file of a model"
            )
        return value


def read_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Read and check the header of a GGUF file; no tensor data is touched.

    Raises:
        InputError: naming the file, the key or tensor where there is one, and what is wrong.
    """
    path = Path(path)
    try:
        size = os.stat(path).st_size
        with open(path, "rb", buffering=1 << 18) as file:
            return _Reader(path, size, file).read()
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror}", remedy="check the path and its permissions"
        ) from None


class _Reader:
    """One pass over a header. `left` is what the file still holds: no claim may exceed it."""

    def __init__(self, path: Path, size: int, file: BinaryIO) -> None:
        self.path = path
        self.size = size
        self.file = file
        self.position = 0

    @property
    def left(self) -> int:
        return self.size - self.position

    def fail(self, what: str) -> InputError:
        return InputError(f"{self.path.name}: {what}", remedy=_AGAIN)

    def take(self, count: int, what: str) -> bytes:
        if count > self.left:
            raise self.fail(
                f"{what} needs {count} bytes, the file has {self.left} left: it is truncated or damaged"
            )
        data = self.file.read(count)
        if len(data) != count:
            raise self.fail(f"the file became shorter while {what} was read")
        self.position += count
        return data

    def number(self, code: str, what: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code), what))[0]

    def text(self, what: str, limit: int | None = None) -> str:
        length = self.number("<Q", what)
        if limit is not None and length > limit:
            raise self.fail(f"{what} claims {length} bytes, more than the {limit} that GGUF allows")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"{what} is not UTF-8") from None

    def read(self) -> GGUFFile:
        magic = self.take(4, "the magic") if self.size >= 4 else b""
        if magic != MAGIC:
            raise InputError(
                f"{self.path.name} is no GGUF file: it starts with {magic!r}", remedy="give a GGUF file"
            )
        version = self.number("<I", "the version")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            kind = "big-endian GGUF" if swapped in VERSIONS else f"GGUF version {version}"
            raise InputError(
                f"{self.path.name} is {kind}; llmc reads little-endian versions 2 and 3",
                remedy="convert it with a current convert_hf_to_gguf.py",
            )
        num_tensors = self.number("<Q", "the tensor count")
        num_keys = self.number("<Q", "the key count")
        # The smallest entries: a key of 1 byte with a 1-byte value; a tensor with a 1-byte name and 1
        # dimension.
        if num_keys * 14 > self.left or num_tensors * 33 > self.left:
            raise self.fail(f"{num_keys} keys and {num_tensors} tensors cannot fit into {self.size} bytes")
        metadata: dict[str, Any] = {}
        for index in range(num_keys):
            key = self.text(f"key {index}", MAX_KEY_BYTES)
            if not key or key in metadata:
                raise self.fail(f"key {index} ({key!r}) is empty or occurs twice")
            metadata[key] = self.value(self.number("<I", f"the type of {key}"), key)
        tensors = self.tensors(num_tensors, metadata)
        return GGUFFile(self.path, self.size, version, metadata, tensors)

    def value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            value = self.number(_SCALARS[kind][0], key)
            if kind == _BOOL and value > 1:
                raise self.fail(f"{key} is a boolean of value {value}")
            return bool(value) if kind == _BOOL else value
        if kind == _STRING:
            return self.text(key)
        if kind == _ARRAY:
            return self.array(key)
        raise self.fail(f"{key} has the unknown value type {kind}")

    def array(self, key: str) -> list[str] | np.ndarray[Any, Any]:
        kind = self.number("<I", f"the element type of {key}")
        count = self.number("<Q", f"the length of {key}")
        if kind == _STRING:
            if count * 8 > self.left:
                raise self.fail(f"{key} claims {count} strings, the file has {self.left} bytes left")
            return [self.text(key) for _ in range(count)]
        if kind not in _SCALARS:
            raise self.fail(f"{key} is an array of the unsupported type {kind}")
        code, width = _SCALARS[kind]
        if count * width > self.left:
            raise self.fail(f"{key} claims {count} elements, the file has {self.left} bytes left")
        dtype = np.dtype(np.bool_) if kind == _BOOL else np.dtype(code)
        raw = self.take(count * width, key)
        if kind == _BOOL and any(byte > 1 for byte in raw):
            raise self.fail(f"{key} holds booleans other than 0 and 1")
        return np.frombuffer(raw, dtype)

    def tensors(self, count: int, metadata: dict[str, Any]) -> dict[str, GGUFTensorInfo]:
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if (
            not isinstance(alignment, int)
            or alignment < 1
            or alignment & (alignment - 1)
            or alignment > 1 << 20
        ):
            raise self.fail(f"general.alignment is {alignment!r}, not a power of two")
        relative = [self.tensor(index) for index in range(count)]
        start = -(-self.position // alignment) * alignment
        tensors: dict[str, GGUFTensorInfo] = {}
        for info in relative:
            if info.name in tensors:
                raise self.fail(f"tensor {info.name!r} occurs twice")
            if info.offset % alignment:
                raise self.fail(
                    f"tensor {info.name!r} starts at {info.offset}, which is not aligned to {alignment}"
                )
            begin = start + info.offset
            if begin + info.nbytes > self.size:
                raise self.fail(
                    f"tensor {info.name!r} ends at byte {begin + info.nbytes}, the file has {self.size}: "
                    "it is truncated or damaged"
                )
            tensors[info.name] = replace(info, offset=begin)
        self.check_overlap(tensors)
        return tensors

    def tensor(self, index: int) -> GGUFTensorInfo:
        name = self.text(f"the name of tensor {index}", MAX_NAME_BYTES)
        num_dims = self.number("<I", f"tensor {name!r}")
        if not 1 <= num_dims <= MAX_DIMS:
            raise self.fail(f"tensor {name!r} has {num_dims} dimensions; GGUF has 1 to {MAX_DIMS}")
        dims = struct.unpack(f"<{num_dims}Q", self.take(8 * num_dims, f"the shape of tensor {name!r}"))
        elements = math.prod(dims)
        if not 0 < elements < 1 << 62:
            raise self.fail(f"tensor {name!r} has the impossible shape {list(reversed(dims))}")
        type_id = self.number("<I", f"the type of tensor {name!r}")
        ggml_type, block_size, type_size = self.block_type(name, type_id)
        if dims[0] % block_size:
            raise self.fail(
                f"tensor {name!r}: rows of {dims[0]} are no whole {ggml_type} blocks of {block_size}"
            )
        offset = self.number("<Q", f"the offset of tensor {name!r}")
        if offset > self.size:
            raise self.fail(f"tensor {name!r} starts at byte {offset}, the file has {self.size}")
        nbytes = elements // block_size * type_size
        return GGUFTensorInfo(name, tuple(reversed(dims)), ggml_type, block_size, type_size, offset, nbytes)

    def block_type(self, name: str, type_id: int) -> tuple[str, int, int]:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            kind = GGMLQuantizationType(type_id)
        except ValueError:
            raise self.fail(f"tensor {name!r} has the unknown type {type_id}") from None
        return kind.name, *GGML_QUANT_SIZES[kind]

    def check_overlap(self, tensors: dict[str, GGUFTensorInfo]) -> None:
        ordered = sorted(tensors.values(), key=lambda info: info.offset)
        for before, after in pairwise(ordered):
            if before.offset + before.nbytes > after.offset:
                raise self.fail(f"tensors {before.name!r} and {after.name!r} overlap")
