"""The factors of loaded adapters, as the kernels of `lora` read them (ir/ops/lora.py has the layout)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...ir.dtypes import to_numpy
from ...ir.errors import InputError

if TYPE_CHECKING:
    from ..adapters import AdapterPlaces, Factor, Factors, Place

_LANES = 16
_MOST = (1 << 31) - 1
"""Elements of an array: the kernels index with 32 bits."""

_Packed = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Scales, A and B."""

Allocate = Callable[[Sequence[int], "np.dtype[np.generic]"], np.ndarray]
Bind = Callable[[str, np.ndarray], None]


def _blocks(rows: int) -> int:
    return -(-rows // _LANES)


@dataclass
class _Arrays:
    """Of one place: rank [A, P] int32, scale [A, P, L, 16], a [A, P, L, K, 16], b [A, C, 16 · L, 16]."""

    rank: np.ndarray
    scale: np.ndarray
    a: np.ndarray
    b: np.ndarray


class AdapterMemory:
    """Slots for adapters, none at first; they grow in number and rank with what is put into them.

    `allocate` gives zeros that take memory when they are touched; `bind` is told each array's address anew,
    by the name of the kernels' argument.
    """

    def __init__(self, places: AdapterPlaces, allocate: Allocate, bind: Bind) -> None:
        self._places, self._allocate, self._bind = places.places, allocate, bind
        self.slots = 0
        self.blocks = 1
        """Largest rank there is room for, in 16."""
        self._arrays: list[_Arrays] = []
        self._resize(0, 1)

    def set(self, slot: int, factors: Factors) -> None:
        """Fill a slot; what was in it is gone. Raises InputError where it does not fit into the kernels'
        arrays or numbers.
        """
        ranks = [a.shape[0] for parts in factors.values() for a, _ in filter(None, parts)]
        packed = {number: self._packed(number, parts) for number, parts in factors.items()}
        blocks = max(self.blocks, _blocks(max(ranks, default=1)))
        if slot >= self.slots or blocks > self.blocks:
            # Room for as many again: memory that nobody touches costs nothing.
            self._resize(self.slots if slot < self.slots else 2 * slot + 2, blocks)
        for arrays in self._arrays:
            arrays.rank[slot] = 0
        for number, parts in packed.items():
            arrays, block = self._arrays[number], 0
            for p, ((_, rows), part) in enumerate(zip(self._places[number].parts, parts, strict=True)):
                if part is not None:
                    scale, a, b = part
                    arrays.rank[slot, p] = b.shape[1]
                    arrays.scale[slot, p, : len(scale)] = scale
                    arrays.a[slot, p, : len(a)] = a
                    arrays.b[slot, block : block + len(b), : b.shape[1]] = b
                block += _blocks(rows)

    def _resize(self, slots: int, blocks: int) -> None:
        old = self._arrays
        self._arrays = [self._made(place, slots, blocks) for place in self._places]
        for before, now in zip(old, self._arrays, strict=False):
            count = len(before.rank)
            now.rank[:count] = before.rank
            for slot in np.flatnonzero(before.rank.any(1)):  # the others stay untouched
                now.scale[slot, :, : self.blocks] = before.scale[slot]
                now.a[slot, :, : self.blocks] = before.a[slot]
                now.b[slot, :, : self.blocks * _LANES] = before.b[slot]
        self.slots, self.blocks = slots, blocks
        for number, arrays in enumerate(self._arrays):
            self._bind(f"lora_rank.{number}", arrays.rank)
            self._bind(f"lora_scale.{number}", arrays.scale)
            self._bind(f"lora_a.{number}", arrays.a)
            self._bind(f"lora_b.{number}", arrays.b)

    def _made(self, place: Place, slots: int, blocks: int) -> _Arrays:
        count, columns = len(place.parts), sum(_blocks(rows) for _, rows in place.parts)
        a, b = (slots, count, blocks, place.k, _LANES), (slots, columns, blocks * _LANES, _LANES)
        for shape in (a, b):
            if np.prod(shape, dtype=np.int64) > _MOST:
                raise InputError(
                    f"{slots} slots of rank {blocks * _LANES} are more than a kernel can count",
                    remedy="load fewer adapters at a time, or of smaller ranks",
                )
        return _Arrays(
            self._allocate((slots, count), np.dtype(np.int32)),
            self._allocate((slots, count, blocks, _LANES), np.dtype(np.float32)),
            self._allocate(a, to_numpy(place.dtype)),
            self._allocate(b, to_numpy(place.dtype)),
        )

    def _packed(self, number: int, parts: Sequence[Factor | None]) -> list[_Packed | None]:
        """Blocks of scales [L, 16], of A [L, K, 16] and of B [C, r, 16], of each part."""
        result: list[_Packed | None] = []
        place = self._places[number]
        for (module, _), part in zip(place.parts, parts, strict=True):
            if part is None:
                result.append(None)
                continue
            with np.errstate(over="ignore", invalid="ignore"):
                scale, a, b = _steps(*part) if place.dtype == "int8" else (np.ones(len(part[0])), *part)
                scales = _in_blocks(scale.astype(np.float32)[:, None])[..., 0]
            if not all(np.isfinite(one).all() for one in (scales, a, b)):
                raise InputError(
                    f"the adapter's change of {module} is beyond what float32 holds",
                    remedy="merge it: llmc compile MODEL --lora FOLDER",
                )
            blocks = [_in_blocks(one.astype(to_numpy(place.dtype))).transpose(0, 2, 1) for one in (a, b)]
            result.append((scales, blocks[0], blocks[1]))
        return result


def _steps(a: np.ndarray, b: np.ndarray) -> _Packed:
    """Scales [r] of float64, and factors in whole steps of them, -127 … 127: each row of A and each column
    of B by the largest of its numbers.
    """
    down = np.abs(a).max(1, initial=0).astype(np.float64) / 127
    up = np.abs(b).max(0, initial=0).astype(np.float64) / 127
    whole_a = np.rint(a / np.where(down == 0, 1, down)[:, None])
    return down * up, whole_a, np.rint(b / np.where(up == 0, 1, up))


def _in_blocks(rows: np.ndarray) -> np.ndarray:
    """[n, m] → [ceil(n / 16), 16, m], the rest zeros."""
    count = _blocks(len(rows))
    whole = np.zeros((count * _LANES, rows.shape[1]), rows.dtype)
    whole[: len(rows)] = rows
    return whole.reshape(count, _LANES, rows.shape[1])


__all__ = ["AdapterMemory"]
