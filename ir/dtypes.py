"""Names of element types, and their numpy counterparts.

llmc writes element types as strings everywhere (graph text, manifest, errors); this table is the only place
that turns them into numpy's. bfloat16 and float8_e4m3fn come from `ml_dtypes`, which registers them as numpy
extension types.
"""

from __future__ import annotations

from typing import Any, Final

import ml_dtypes
import numpy as np

from .errors import UnsupportedError

DType = str

FLOAT8: Final = "float8_e4m3fn"
"""E4M3: 4 bits of exponent, 3 of fraction, no infinity (Micikevicius et al. 2022, arXiv:2209.05433)."""
FLOAT8_LARGEST: Final = 448.0

_NUMPY: Final[dict[str, np.dtype[Any]]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    FLOAT8: np.dtype(ml_dtypes.float8_e4m3fn),
    "float64": np.dtype(np.float64),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "int16": np.dtype(np.int16),
    "int8": np.dtype(np.int8),
    "uint32": np.dtype(np.uint32),
    "uint8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
}
_NAMES: Final[dict[np.dtype[Any], str]] = {dtype: name for name, dtype in _NUMPY.items()}

NAMES: Final[frozenset[str]] = frozenset(_NUMPY)
KV_SCALE_BYTES: Final = 4
"""Bytes of the float32 scale that a KV cache of int8 keeps beside the codes of each head and token."""
FLOATS: Final[frozenset[str]] = frozenset({"float32", "float16", "bfloat16", FLOAT8, "float64"})
HALVES: Final = ("float16", "bfloat16")
"""Floats of 16 bits."""
INTEGERS: Final[frozenset[str]] = frozenset({"int64", "int32", "int16", "int8", "uint32", "uint8"})


def to_numpy(name: DType) -> np.dtype[Any]:
    """The numpy dtype of an element type's name; UnsupportedError for a name that llmc does not know."""
    try:
        return _NUMPY[name]
    except KeyError:
        raise UnsupportedError(
            f"unknown element type {name!r}", remedy=f"known: {', '.join(sorted(NAMES))}"
        ) from None


def from_numpy(dtype: np.dtype[Any] | type[Any] | str) -> DType:
    """The name of a numpy dtype; UnsupportedError for one that llmc does not use (complex, objects)."""
    wanted = np.dtype(dtype)
    try:
        return _NAMES[wanted]
    except KeyError:
        raise UnsupportedError(f"numpy dtype {wanted} has no llmc element type") from None


def itemsize(name: DType) -> int:
    """Bytes of one element."""
    return to_numpy(name).itemsize


def kv_bytes(dtype: DType, head_dim: int) -> int:
    """Bytes of one key (or value) of one head in a KV cache of that type (`kv_dtype` in the manifest)."""
    return head_dim * itemsize(dtype) + (KV_SCALE_BYTES if dtype == "int8" else 0)


def is_float(name: DType) -> bool:
    return name in FLOATS


def is_integer(name: DType) -> bool:
    return name in INTEGERS
