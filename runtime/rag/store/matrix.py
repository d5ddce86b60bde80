"""All vectors of a store in one matrix, and the nearest of them: exact, by one product.

The matrix stays float16, in a file of the cache folder that is mapped into memory, or in memory where that
folder cannot be written. It is multiplied a block at a time, so that only a block of it is ever float32.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ....ir.errors import InputError

_BLOCK = 1024
"""Rows that are float32 at a time: 1.5 MB of 384 dimensions."""

Vectors = tuple[list[str], np.ndarray]
"""Ids in order, and [N, dimensions] float16."""


class MatrixCache:
    """The vectors of the newest generation that was asked for."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._guard = threading.Lock()
        self._generation = -1
        self._vectors: Vectors = ([], np.zeros((0, 0), np.float16))

    def of(self, generation: int, read: Callable[[], Vectors]) -> Vectors:
        """The vectors of a generation: remembered, from the folder, or read from the store."""
        with self._guard:
            if generation < self._generation:  # somebody still reads an older state: it is not worth keeping
                return read()
            if self._generation != generation:
                found = self._load(generation)
                if found is None:
                    found = read()
                    if self._save(generation, found):
                        found = self._load(generation) or found
                self._generation, self._vectors = generation, found
            return self._vectors

    def _paths(self, generation: int) -> tuple[Path, Path]:
        return self._folder / f"vectors-{generation}.json", self._folder / f"vectors-{generation}.npy"

    def _load(self, generation: int) -> Vectors | None:
        ids_path, matrix_path = self._paths(generation)
        try:
            matrix = np.load(matrix_path, mmap_mode="r", allow_pickle=False)
            ids = json.loads(ids_path.read_text(encoding="utf-8"))
        except (OSError, ValueError, EOFError, RecursionError):
            return None
        if matrix.ndim != 2 or matrix.dtype != np.float16 or not isinstance(ids, list):
            return None
        return (ids, matrix) if len(ids) == len(matrix) else None

    def _save(self, generation: int, vectors: Vectors) -> bool:
        """Write both files, the matrix last; and remove those of other generations."""
        ids_path, matrix_path = self._paths(generation)
        try:
            self._folder.mkdir(exist_ok=True, parents=True)
            _write_beside(ids_path, json.dumps(vectors[0]).encode())
            _write_beside(matrix_path, vectors[1])
            for old in self._folder.glob("vectors-*.*"):
                if old not in (ids_path, matrix_path) and not old.name.endswith(".partial"):
                    old.unlink(missing_ok=True)
        except OSError:
            return False
        return True


def _write_beside(path: Path, content: bytes | np.ndarray) -> None:
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=f"{path.name}-", suffix=".partial", delete=False
    ) as file:
        try:
            if isinstance(content, bytes):
                file.write(content)
            else:
                np.lib.format.write_array(file, content, allow_pickle=False)
            file.flush()
            os.replace(file.name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(file.name)
            raise


def query_vector(vector: np.ndarray, dimensions: int) -> np.ndarray:
    """[dimensions] float32 of what somebody searches for, checked."""
    if vector.shape != (dimensions,):
        raise InputError(
            f"the question's vector is of shape {list(vector.shape)}, the store's are of [{dimensions}]",
            remedy="use the embedder that the store was made with",
        )
    return np.ascontiguousarray(vector, dtype=np.float32)


def nearest(vectors: Vectors, vector: np.ndarray, limit: int) -> list[tuple[str, float]]:
    """The `limit` ids of the largest products with `vector`, best first, equal ones in order of their ids."""
    ids, matrix = vectors
    scores = np.empty(len(ids), np.float32)
    block = np.empty((min(_BLOCK, len(ids)), matrix.shape[1]), np.float32)
    for begin in range(0, len(ids), _BLOCK):
        rows = matrix[begin : begin + _BLOCK]
        single = block[: len(rows)]
        _to_single(rows, single)
        np.matmul(single, vector, out=scores[begin : begin + len(rows)])
    return best(ids, scores, limit)


def _to_single(halves: np.ndarray, out: np.ndarray) -> None:
    """float16 to float32, exact for finite numbers, in less than half of the time of numpy's conversion.

    The sign, the exponent and the fraction move to their places; then the exponent lacks 127 - 15.
    """
    bits = out.view(np.int32)
    np.copyto(bits, halves.view(np.int16))
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, np.int32(-0x7000_2000), out=bits)
    np.multiply(out, np.float32(2.0**112), out=out)


def best(ids: list[str], scores: np.ndarray, limit: int) -> list[tuple[str, float]]:
    """The `limit` largest scores with their ids, best first; `ids` ascend, and equal scores go by them."""
    if limit <= 0 or not len(ids):
        return []
    chosen = np.arange(len(ids))
    if limit < len(ids):
        edge = np.partition(scores, len(ids) - limit)[len(ids) - limit]
        chosen = np.flatnonzero(scores >= edge)
    order = chosen[np.argsort(-scores[chosen], kind="stable")][:limit]
    return [(ids[place], float(scores[place])) for place in order.tolist()]
