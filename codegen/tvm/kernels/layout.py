"""How weights lie in memory: one layout for all instruction-set levels, in blocks of 16 output rows.

Float weights [N, K] are stored [ceil(N/16), K, 16]: a vector of 16 outputs for each k.
Quantized weights are stored [blocks, groups, steps, 64] bytes. With 8 bits a step is 4 consecutive k of 16
rows (byte 4·row + k). With 4 bits it is 8 consecutive k: the low nibbles hold the first 4, the high nibbles
the last 4. That is the operand order of `vpdpbusd`, which multiplies 4 neighbouring bytes in each 32-bit
lane. Rows beyond N and k beyond K are zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ....ir.errors import CompileError

ROWS = 16
"""Output rows in a block."""


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def packed_shape(n: int, k: int) -> tuple[int, int, int]:
    """Shape of a packed float weight [n, k]."""
    return (-(-n // ROWS), k, ROWS)


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
class QuantLayout:
    """Sizes of a quantized weight [n, k] with `bits` 4 or 8 and groups of `group_size` along k.

    Each group is padded to `group` = a multiple of 8, so that the activations have `k_padded` columns: with
    the usual groups (8 divides them, they divide k) that is k.
    """

    n: int
    k: int
    bits: int
    group_size: int

    def __post_init__(self) -> None:
        if self.bits not in (4, 8) or self.group_size < 1:
            raise CompileError(
                f"no kernel multiplies by weights of {self.bits} bits in groups of {self.group_size}",
                remedy="quantize to 4 or 8 bits",
            )

    @property
    def real_group(self) -> int:
        """Elements of a group (the last one of a row may have fewer)."""
        return min(self.group_size, self.k)

    @property
    def group(self) -> int:
        """Elements that a group takes in memory."""
        return round_up(self.real_group, 8)

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
    def steps(self) -> int:
        """64-byte vectors a group takes for a block."""
        return self.group * self.bits // 32

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """Shape of the packed weight, uint8."""
        return (self.blocks, self.groups, self.steps, 64)

    @property
    def scale_shape(self) -> tuple[int, int, int]:
        """Shape of the packed scales (float16) and zero points (uint8)."""
        return (self.blocks, self.groups, ROWS)

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
        """Rows of q uint8 [rows, k], values below 2**bits → uint8 [rows/16, groups, steps, 64].

        A tensor may be packed chunk by chunk; all chunks but the last have a multiple of 16 rows.
        """
        x = self._padded(q)
        blocks = x.shape[0]
        if self.bits == 8:
            x = x.reshape(blocks, ROWS, self.groups, self.steps, 4).transpose(0, 2, 3, 1, 4)
        else:
            x = x.reshape(blocks, ROWS, self.groups, self.steps, 2, 4).transpose(0, 2, 3, 4, 1, 5)
            x = x[:, :, :, 0] | (x[:, :, :, 1] << 4)
        return np.ascontiguousarray(x).reshape(blocks, self.groups, self.steps, 64)

    def unpack(self, packed: np.ndarray) -> np.ndarray:
        """Inverse of `pack`: uint8 [n, k]."""
        blocks = packed.shape[0]
        if self.bits == 8:
            x = packed.reshape(blocks, self.groups, self.steps, ROWS, 4).transpose(0, 3, 1, 2, 4)
        else:
            x = np.stack((packed & 15, packed >> 4), 3)
            x = x.reshape(blocks, self.groups, self.steps, 2, ROWS, 4).transpose(0, 4, 1, 2, 3, 5)
        x = x.reshape(blocks * ROWS, self.groups, self.group)[:, :, : self.real_group]
        return np.ascontiguousarray(x.reshape(blocks * ROWS, -1)[: self.n, : self.k])

    def pack_groups(self, values: np.ndarray) -> np.ndarray:
        """Scales or zero points [rows, groups] → [rows/16, groups, 16], of the same dtype, in chunks like
        `pack`.
        """
        n = values.shape[0]
        padded = np.zeros((round_up(n, ROWS), self.groups), values.dtype)
        padded[:n] = values
        return np.ascontiguousarray(padded.reshape(-1, ROWS, self.groups).transpose(0, 2, 1))
