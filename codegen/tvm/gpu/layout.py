"""How weights lie in a GPU's memory: in the order in which the lanes of a warp want them (`linear.cuh`).

A matrix [N, K] is cut into tiles of 16 rows and units of 64 columns. A unit is four steps of tensor cores
(16 columns each); lane 4 · g + t holds rows g and g + 8, and of each span (16, 32 or 64 columns within one
group) the t-th quarter, four columns a step:

    bits    a lane's 16 bytes hold    a step's 8 numbers, of operand o = 0 … 3 and half h
    16      one step                  float16 number 2 · o + h
    8       two steps                 byte 2 · o + h
    4       four steps                bits 16 · h + 4 · o of a word (codebook: 8 · o + 4 · h)

Codes of 2 and 3 bits take 4, of 5 to 7 take 8. Rows and columns beyond the matrix are zero. Scales, zero
points and minima are [tiles, groups, 16].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ....ir.errors import CompileError
from ..kernels.layout import QuantLayout, round_up

ROWS = 16
UNIT = 64
MOST_HALF = 65504.0


@dataclass(frozen=True)
class GpuLayout:
    """Sizes of a weight [n, k]. `quant`: how it is quantized, None for float16."""

    n: int
    k: int
    quant: QuantLayout | None = None

    @property
    def bits(self) -> int:
        """Bits that a number takes."""
        return 16 if self.quant is None else 4 if self.quant.bits <= 4 else 8

    @property
    def group_size(self) -> int:
        return self.k if self.quant is None else self.quant.real_group

    @property
    def groups(self) -> int:
        return -(-self.k // self.group_size)

    @property
    def span(self) -> int:
        """Columns that are dealt to lanes together."""
        return UNIT if self.groups == 1 else math.gcd(self.group_size, UNIT)

    @property
    def k_padded(self) -> int:
        return round_up(self.k, UNIT)

    @property
    def tiles(self) -> int:
        return -(-self.n // ROWS)

    @property
    def codes_shape(self) -> tuple[int, ...]:
        """Of the stored numbers: uint8 [tiles, units, vectors, 32, 16], or float16 with 8 in the end."""
        last = 8 if self.quant is None else 16
        return (self.tiles, self.k_padded // UNIT, self.bits // 4, 32, last)

    @property
    def groups_shape(self) -> tuple[int, int, int]:
        return (self.tiles, self.groups, ROWS)

    def fits(self) -> bool:
        """Whether spans are whole steps."""
        return self.span % 16 == 0

    def pack(self, rows: np.ndarray) -> np.ndarray:
        """Rows of codes uint8, or of a float weight, [rows, k] → [rows/16, …] of `codes_shape`; a multiple of
        16 rows but for the last ones.

        Raises CompileError for numbers beyond float16.
        """
        if self.quant is None:
            if rows.size and not float(np.abs(rows.astype(np.float32)).max()) <= MOST_HALF:
                raise CompileError(
                    "a weight holds numbers beyond float16's largest, or that are no numbers",
                    remedy="quantize the model, or compile for another target",
                )
            rows = rows.astype(np.float16)
        full = np.zeros((round_up(len(rows), ROWS), self.k_padded), rows.dtype)
        full[: len(rows), : self.k] = rows
        span = self.span
        parts = full.reshape(-1, 2, 8, self.k_padded // UNIT, UNIT // span, 4, span // 16, 2, 2)
        # (tile, high, g, unit, span, t, step, pair, half) → steps of a unit, lanes, operands, halves
        lanes = parts.transpose(0, 3, 4, 6, 2, 5, 7, 1, 8).reshape(len(full) // ROWS, -1, 4, 32, 4, 2)
        return self._joined(lanes).reshape(len(full) // ROWS, *self.codes_shape[1:])

    def _joined(self, lanes: np.ndarray) -> np.ndarray:
        """[tiles, units, steps, lanes, operands, halves] → vectors of 16 bytes."""
        if self.bits == 16:
            return np.ascontiguousarray(lanes)
        tiles, units = lanes.shape[:2]
        if self.bits == 8:
            twos = lanes.reshape(tiles, units, 2, 2, 32, 8)
            return np.ascontiguousarray(twos.transpose(0, 1, 2, 4, 3, 5))
        o, h = np.arange(4)[:, None], np.arange(2)[None, :]
        book = self.quant is not None and self.quant.codebook is not None
        shifts = (8 * o + 4 * h if book else 16 * h + 4 * o).astype(np.uint32)
        words = np.bitwise_or.reduce((lanes.astype(np.uint32) << shifts).reshape(tiles, units, 4, 32, 8), 4)
        return np.ascontiguousarray(words.transpose(0, 1, 3, 2)).view(np.uint8)

    def pack_groups(self, values: np.ndarray) -> np.ndarray:
        """What there is one of a group: [rows, groups] → [rows/16, groups, 16]."""
        padded = np.zeros((round_up(len(values), ROWS), self.groups), values.dtype)
        padded[: len(values)] = values
        return np.ascontiguousarray(padded.reshape(-1, ROWS, self.groups).transpose(0, 2, 1))
