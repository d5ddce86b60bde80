"""Weights that are rounded to nearest as their rows are read."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from ...ir.types import Quantization
from ...ir.weights import LazyTensor
from .rtn import Quantized, dequantize, quantize_rtn

Array = np.ndarray[Any, Any]
CHUNK_BYTES = 2 << 20  # float32 rows that are quantized at a time: rounding makes several copies of them


class QuantizedWeight:
    """A weight that is quantized as its rows are read; rows are independent in round to nearest.

    Targets read all codes, then all scales, then all zero points. The scales and zero points that came with
    the codes are kept until they were read, so that each row is quantized once: they are a small part of the
    weight.
    """

    def __init__(self, base: LazyTensor, quant: Quantization) -> None:
        self.base, self.quant = base, quant
        self.rows, self.k = base.shape
        self.groups = -(-self.k // quant.group_size)
        self._kept: dict[str, Array] = {}
        self._known = np.zeros(0, dtype=bool)
        self._lock = threading.Lock()  # of what is kept

    def read(self, part: str, start: int, stop: int) -> Array:
        """Rows of "codes", "scale" or "zero_point"."""
        with self._lock:
            if part in self._kept and self._known[start:stop].all():
                rows = self._kept[part][start:stop].copy()
                if stop == self.rows:
                    del self._kept[part]
                return rows
        step = max(1, CHUNK_BYTES // (4 * max(1, self.k)))
        pieces: list[Array] = []
        for first in range(start, max(stop, start + 1), step):
            parts = self._quantized(first, min(first + step, stop))
            if part == "codes":
                with self._lock:
                    self._keep(first, parts)
            pieces.append(parts[part])
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def round(self, rows: Array) -> None:
        """Write over rows of the base, float32 [n, K], what their codes stand for: for those who have read
        the base anyway.
        """
        bits, size = self.quant.bits, self.quant.group_size
        step = max(1, CHUNK_BYTES // (4 * max(1, self.k)))
        for first in range(0, len(rows), step):
            few = rows[first : first + step]
            few[:] = dequantize(self._codes(few), bits=bits, group_size=size)

    def _keep(self, first: int, parts: dict[str, Array]) -> None:
        if not self._kept:
            self._known = np.zeros(self.rows, dtype=bool)
        for name in ("scale", "zero_point"):
            if name in parts:
                if name not in self._kept:
                    self._known[:] = False
                    self._kept[name] = np.empty((self.rows, self.groups), parts[name].dtype)
                self._kept[name][first : first + len(parts[name])] = parts[name]
        self._known[first : first + len(parts["codes"])] = True

    def _quantized(self, start: int, stop: int) -> dict[str, Array]:
        q = self._codes(self.base.read(start, stop))
        found: dict[str, Array] = {"codes": q.codes, "scale": q.scale}
        return found if q.zero_point is None else {**found, "zero_point": q.zero_point}

    def _codes(self, rows: Array) -> Quantized:
        return quantize_rtn(
            rows,
            bits=self.quant.bits,
            group_size=self.quant.group_size,
            symmetric=self.quant.symmetric,
            what=self.base.source,
        )


class QuantizedPart:
    """Codes, scales or zero points of a `QuantizedWeight` as a lazy tensor."""

    def __init__(self, weight: QuantizedWeight, part: str) -> None:
        self.weight, self.part = weight, part
        self.shape: tuple[int, ...] = (weight.rows, weight.k if part == "codes" else weight.groups)
        self.dtype = "float16" if part == "scale" else "uint8"
        self.source = f"{part}({weight.base.source})"

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        end = self.shape[0] if stop is None else min(stop, self.shape[0])
        return np.ascontiguousarray(self.weight.read(self.part, start, end))
