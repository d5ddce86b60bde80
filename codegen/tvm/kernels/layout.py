"""How weights lie in memory: one layout for all instruction-set levels, in blocks of 16 output rows.

Float weights [N, K] are stored [ceil(N/16), K, 16]: a vector of 16 outputs for each k.

Quantized weights are stored [blocks, groups, bytes]. Their bits are split into planes of 8, 4, 2 and 1 bits,
so that every width from 2 to 8 takes its bits and no more (6 = 4 + 2, 5 = 4 + 1, 3 = 2 + 1); a group's planes
stand one after the other, the low bits first. A word is 4 consecutive k of 16 rows, in the operand order of
`vpdpbusd`, which multiplies 4 neighbouring bytes in each 32-bit lane: byte 4 · row + k.

    plane    64 bytes hold    where
    8 bits   1 word           the byte
    4 bits   2 words          the low and the high half of a byte
    2 bits   4 words          bits 0-1, 2-3, 4-5, 6-7
    1 bit    8 words          32 bytes for 4 words: rows 0-7 in bits 0-3 (one a word), rows 8-15 in bits 4-7

Rows beyond N and k beyond K are zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ....ir.codebooks import CODEBOOKS
from ....ir.errors import CompileError
from ....ir.hadamard import WIDEST, reflections
from . import super_scales

ROWS = 16
"""Output rows in a block."""
SAMPLING_BLOCK = 256
"""Tokens of a vocabulary whose probabilities `sampling` adds up."""


def generates(inputs: Iterable[str]) -> bool:
    """Whether a step with these inputs is one of a model that generates, and so keeps something of each
    sequence: then a kernel that prepares sampling comes with it.
    """
    return any(name.startswith(("kv_pages.", "state.")) for name in inputs)


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def packed_shape(n: int, k: int) -> tuple[int, int, int]:
    """Shape of a packed float weight [n, k]."""
    return (-(-n // ROWS), k, ROWS)


def has_bytes(codebook: str) -> bool:
    """Whether a codebook's values are integers that the int8 kernels can multiply by."""
    return all(v == int(v) and -128 <= v < 128 for v in CODEBOOKS[codebook])


def fits_rotation(size: int) -> bool:
    """Whether runs of `size` columns are whole vectors of 16, and not more than a kernel rotates."""
    return size % 16 == 0 and size <= WIDEST and reflections(size) is not None


def pack_rows(rows: np.ndarray) -> np.ndarray:
    """Rows [n, k] of a float weight → [ceil(n/16), k, 16].

    n must be a multiple of 16 except for the last rows.
    """
    n, k = rows.shape
    padded = np.zeros((round_up(n, ROWS), k), rows.dtype)
    padded[:n] = rows
    return np.ascontiguousarray(padded.reshape(-1, ROWS, k).transpose(0, 2, 1))


def unpack_rows(packed: np.ndarray, n: int) -> np.ndarray:
    """Inverse of `pack_rows`: the first n rows [n, k]."""
    return np.ascontiguousarray(packed.transpose(0, 2, 1).reshape(-1, packed.shape[1])[:n])


@dataclass(frozen=True)
class Plane:
    """Bits `shift` … `shift + width - 1` of all values of a group."""

    width: int
    shift: int
    offset: int
    """Where the plane begins in a group's bytes."""

    @property
    def words(self) -> int:
        """Words that share a byte."""
        return min(4, 8 // self.width)

    def pack(self, x: np.ndarray) -> np.ndarray:
        """Values uint8 [blocks, 16, groups, group] → bytes [blocks, groups, bytes]."""
        blocks, _, groups, group = x.shape
        part = (x >> self.shift) & ((1 << self.width) - 1)
        words = part.reshape(blocks, ROWS, groups, -1, self.words, 4).transpose(4, 0, 2, 3, 1, 5)
        packed = words[0].copy()
        for w in range(1, self.words):
            packed |= words[w] << (w * self.width)
        if self.width == 1:
            packed = packed[..., :8, :] | (packed[..., 8:, :] << 4)
        return packed.reshape(blocks, groups, 2 * self.width * group)

    def unpack(self, packed: np.ndarray) -> np.ndarray:
        """Inverse of `pack`: this plane's bits in their place."""
        blocks, groups, size = packed.shape
        group = size // (2 * self.width)
        if self.width == 1:
            halves = packed.reshape(blocks, groups, -1, 8, 4)
            packed = np.concatenate((halves & 15, halves >> 4), 3)
        lanes = packed.reshape(blocks, groups, -1, 1, ROWS, 4)
        shifts = (np.arange(self.words, dtype=np.uint8) * self.width).reshape(-1, 1, 1)
        part = ((lanes >> shifts) & ((1 << self.width) - 1)) << self.shift
        return part.transpose(0, 4, 1, 2, 3, 5).reshape(blocks, ROWS, groups, group)


@dataclass(frozen=True)
class QuantLayout:
    """Sizes of a quantized weight [n, k] and of its scales and zero points, in groups of `group_size` along
    k.

    Each group is padded to `group` = a multiple of 8 (16 for widths of several planes and of 2 bits), so that
    the activations have `k_padded` columns: with the usual groups that is k.

    `super_group`: columns that share a float16 factor of their scales and minima (`super_scales`), or 0.
    `zero_point`: None, "uint8", or the float dtype of a minimum. `codebook`: what codes of 4 bits stand for.
    """

    n: int
    k: int
    bits: int
    group_size: int
    codebook: str | None = None
    scale_dtype: str = "float16"
    zero_point: str | None = None
    super_group: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8 or self.group_size < 1:
            raise CompileError(
                f"no kernel multiplies by weights of {self.bits} bits in groups of {self.group_size}",
                remedy="quantize to 2 … 8 bits",
            )

    @property
    def real_group(self) -> int:
        """Elements of a group (the last one of a row may have fewer)."""
        return min(self.group_size, self.k)

    @property
    def align(self) -> int:
        """What a group is padded to a multiple of."""
        return 8 if self.bits in (4, 8) else 16

    @property
    def group(self) -> int:
        """Elements that a group takes in memory."""
        return round_up(self.real_group, self.align)

    @property
    def groups(self) -> int:
        return -(-self.k // self.real_group)

    @property
    def k_padded(self) -> int:
        """Columns of the quantized activations."""
        return self.groups * self.group

    @property
    def blocks(self) -> int:
        return -(-self.n // ROWS)

    @property
    def words(self) -> int:
        """Words of a step, which is what a kernel unpacks at a time: a vector of the narrowest plane, or half
        of one of single bits.
        """
        return 1 if self.bits == 8 else 2 if self.bits == 4 else 4

    @property
    def steps(self) -> int:
        """Steps of a group."""
        return self.group // (4 * self.words)

    @property
    def planes(self) -> tuple[Plane, ...]:
        """The planes of a group, low bits first."""
        if self.bits == 8:
            return (Plane(8, 0, 0),)
        found: list[Plane] = []
        shift = offset = 0
        for width in (4, 2, 1):
            if self.bits & width:
                found.append(Plane(width, shift, offset))
                shift += width
                offset += 2 * width * self.group
        return tuple(found)

    @property
    def weight_shape(self) -> tuple[int, int, int]:
        """Shape of the packed weight, uint8."""
        return (self.blocks, self.groups, 2 * self.bits * self.group)

    @property
    def scale_shape(self) -> tuple[int, int, int]:
        """Shape of the packed scales, of `scale_storage`."""
        if self.super_group:
            return (self.blocks, -(-self.groups // self.per_super), ROWS * (2 + self.per_super))
        return (self.blocks, self.groups, ROWS)

    @property
    def per_super(self) -> int:
        """Groups that share a factor of their scales."""
        return self.super_group // self.group_size

    @property
    def scale_storage(self) -> str:
        """Element type of the stored scales."""
        return "uint8" if self.super_group else self.scale_dtype

    @property
    def zero_storage(self) -> str | None:
        """Element type of the stored zero points."""
        return "uint8" if self.super_group and self.zero_point is not None else self.zero_point

    @property
    def zero_shape(self) -> tuple[int, int, int]:
        """Shape of the packed zero points, of `zero_storage`."""
        if self.super_group and self.zero_point != "uint8":
            return self.scale_shape
        return (self.blocks, self.groups, ROWS // 2 if self.packs_zero_points else ROWS)

    @property
    def packs_zero_points(self) -> bool:
        """Zero points of at most 4 bits stand two a byte: row r in the low half of byte r, r + 8 in the
        high.
        """
        return self.zero_point == "uint8" and self.bits <= 4

    def _padded(self, q: np.ndarray) -> np.ndarray:
        """q [n, k] → [blocks, 16, groups, group] with zeros where there is nothing."""
        n, k = q.shape
        if k != self.k:
            raise CompileError(
                f"rows of {k} values where {self.k} are due", remedy="pack the tensor that was planned"
            )
        full = np.zeros((round_up(n, ROWS), self.groups * self.real_group), np.uint8)
        full[:n, :k] = q
        full = full.reshape(-1, ROWS, self.groups, self.real_group)
        return np.pad(full, ((0, 0), (0, 0), (0, 0), (0, self.group - self.real_group)))

    def pack(self, q: np.ndarray) -> np.ndarray:
        """Rows of q uint8 [rows, k], values below 2**bits → uint8 [rows/16, groups, bytes].

        A tensor may be packed chunk by chunk; all chunks but the last have a multiple of 16 rows.
        """
        x = self._padded(q)
        planes = [plane.pack(x) for plane in self.planes]
        return np.ascontiguousarray(planes[0] if len(planes) == 1 else np.concatenate(planes, 2))

    def unpack(self, packed: np.ndarray) -> np.ndarray:
        """Inverse of `pack`: uint8 [n, k]."""
        blocks = packed.shape[0]
        x = np.zeros((blocks, ROWS, self.groups, self.group), np.uint8)
        for plane in self.planes:
            x |= plane.unpack(packed[:, :, plane.offset :][:, :, : 2 * plane.width * self.group])
        x = x[:, :, :, : self.real_group]
        return np.ascontiguousarray(x.reshape(blocks * ROWS, -1)[: self.n, : self.k])

    def pack_scales(self, values: np.ndarray) -> np.ndarray:
        """Scales or minima [rows, groups] → [rows/16, …] of `scale_shape`, in chunks like `pack`."""
        rows = self.pack_groups(values)
        return super_scales.pack(rows, self.per_super) if self.super_group else rows

    def pack_groups(self, values: np.ndarray) -> np.ndarray:
        """What there is one of a group: [rows, groups] → [rows/16, groups, 16], of the same dtype, in chunks
        like `pack`.
        """
        n = values.shape[0]
        padded = np.zeros((round_up(n, ROWS), self.groups), values.dtype)
        padded[:n] = values
        return np.ascontiguousarray(padded.reshape(-1, ROWS, self.groups).transpose(0, 2, 1))

    def unpack_scales(self, stored: np.ndarray) -> np.ndarray:
        """Inverse of `pack_scales`: [n, groups]."""
        groups = super_scales.unpack(stored, self.groups) if self.super_group else stored
        return np.ascontiguousarray(groups.transpose(0, 2, 1).reshape(-1, self.groups)[: self.n])

    def unpack_zero_points(self, stored: np.ndarray) -> np.ndarray:
        """Inverse of `pack_zero_points`: [n, groups]."""
        if self.zero_point != "uint8":
            return self.unpack_scales(stored)
        if self.packs_zero_points:
            stored = np.concatenate((stored & 15, stored >> 4), 2)
        return np.ascontiguousarray(stored.transpose(0, 2, 1).reshape(-1, self.groups)[: self.n])

    def pack_zero_points(self, values: np.ndarray) -> np.ndarray:
        """Zero points or minima [rows, groups] → [rows/16, groups, 16 or 8], in chunks like `pack`.

        Raises CompileError for a zero point beyond 4 bits where two of them share a byte.
        """
        if self.zero_point != "uint8":
            return self.pack_scales(values)
        rows = self.pack_groups(values)
        if not self.packs_zero_points:
            return rows
        if rows.size and rows.max() > 15:
            raise CompileError(
                f"a zero point of {rows.max()} beside codes of {self.bits} bits",
                remedy="zero points of at most 4 bits are 0 … 15",
            )
        return rows[:, :, :8] | (rows[:, :, 8:] << 4)
