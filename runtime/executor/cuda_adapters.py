"""The factors of loaded adapters in a GPU's memory, as the kernels of `lora` read them (ir/ops/lora.py).

All arrays of all places lie in one piece of memory, dense: slots times the largest rank. It is made anew when
there are more slots, or a larger rank, than it has, and when half of it would do.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...ir.dtypes import to_numpy
from ...ir.errors import DeviceError, InputError, LlmcError
from .adapter_memory import LANES, Packed, Part, blocks_of, columns_of, pack, rank_of
from .cuda_driver import Driver
from .gpu_program import round_up

if TYPE_CHECKING:
    from ..adapter_places import AdapterPlaces, Factors, Place

_ALIGNMENT = 256
_REMEDY = "load fewer adapters at a time, or of smaller ranks, or lower kv_tokens: the cache takes memory too"


@dataclass(frozen=True)
class _Array:
    """Of one place: [slots, …] from byte `at` of the memory on."""

    at: int
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]

    @property
    def bytes_per_slot(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def offset(self, slot: int, place: int = 0) -> int:
        """The byte in the memory at which `array[slot, place]` begins."""
        return self.at + (slot * self.shape[1] + place) * math.prod(self.shape[2:]) * self.dtype.itemsize


class _Arrays:
    """Where rank, scale, a and b of each place lie, for so many slots and ranks of so many times 16."""

    def __init__(self, places: tuple[Place, ...], slots: int, blocks: int) -> None:
        self.bytes = 0
        self.places: list[dict[str, _Array]] = []
        for place in places:
            parts, dtype = len(place.parts), to_numpy(place.dtype)
            shapes: dict[str, tuple[tuple[int, ...], np.dtype[np.generic]]] = {
                "rank": ((slots, parts), np.dtype(np.int32)),
                "scale": ((slots, parts, blocks, LANES), np.dtype(np.float32)),
                "a": ((slots, parts, blocks, place.k, LANES), dtype),
                "b": ((slots, columns_of(place), blocks * LANES, LANES), dtype),
            }
            self.places.append({name: self._add(*shape) for name, shape in shapes.items()})

    def _add(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> _Array:
        found = _Array(self.bytes, shape, dtype)
        self.bytes = round_up(self.bytes + math.prod(shape) * dtype.itemsize, _ALIGNMENT)
        return found


class CudaAdapters:
    """Slots for adapters, none at first. All but `packed` belongs between two steps, when the GPU is idle.

    `bind` is told each array's address anew, by the name of the kernels' argument, and before that `forget`
    once: launches with the old ones must not come again.
    """

    def __init__(
        self,
        places: AdapterPlaces,
        driver: Driver,
        bind: Callable[[str, int], None],
        forget: Callable[[], None],
    ) -> None:
        self._places, self._driver, self._bind, self._forget = places, driver, bind, forget
        self.slots = 0
        self.blocks = 1
        """Largest rank there is room for, in 16."""
        self._loaded: dict[int, int] = {}
        """Slot → blocks of 16 ranks of what is in it."""
        self._address = 0
        self._arrays = _Arrays(places.places, 0, 1)
        self._ranks: list[np.ndarray] = [np.zeros((0, len(place.parts)), np.int32) for place in places.places]

    def packed(self, factors: Factors) -> Packed:
        """An adapter as the kernels read it; any thread may call it while steps run. Raises InputError where
        it does not fit into the kernels' numbers.
        """
        packed = pack(self._places, factors)
        return {number: [part and _in_order(part) for part in parts] for number, parts in packed.items()}

    def set(self, slot: int, packed: Packed) -> None:
        """Fill a slot, an empty one. Raises InputError where the GPU's memory does not suffice; nothing has
        changed then.
        """
        self._driver.enter()
        own = blocks_of(rank_of(packed))
        if slot >= self.slots or own > self.blocks:
            blocks, least = max(own, *self._loaded.values(), 1), max(slot + 1, self.slots)
            try:
                self._resize(max(least, slot + 1 + slot // 4), blocks)  # all move: not each time, then
            except InputError:
                self._resize(least, blocks)
        for number, parts in packed.items():
            self._send(slot, number, parts)
        for number, parts in packed.items():
            self._ranks[number][slot] = [0 if part is None else part[2].shape[1] for part in parts]
        self._loaded[slot] = own
        self._send_ranks()

    def clear(self, slot: int) -> None:
        """Empty a slot. Memory goes back where half of it will do, and all of it with the last adapter."""
        if self._loaded.pop(slot, None) is None:
            return
        self._driver.enter()
        for ranks in self._ranks:
            ranks[slot] = 0
        self._send_ranks()
        slots, blocks = max(self._loaded, default=-1) + 1, max(self._loaded.values(), default=1)
        if 2 * _Arrays(self._places.places, slots, blocks).bytes <= self._arrays.bytes:
            with contextlib.suppress(InputError):  # no room for a copy beside it: it stays as large as it is
                self._resize(slots, blocks)

    def _send(self, slot: int, number: int, parts: Sequence[Part | None]) -> None:
        """The factors of a place into a slot; beyond their ranks it holds anything."""
        arrays, block = self._arrays.places[number], 0
        for p, ((_, rows), part) in enumerate(zip(self._places.places[number].parts, parts, strict=True)):
            if part is not None:
                scale, a, b = part[:3]  # gains have no places here
                whole = np.zeros((len(b), *arrays["b"].shape[2:]), b.dtype)
                whole[:, : b.shape[1]] = b
                for name, array, place in (("scale", scale, p), ("a", a, p), ("b", whole, block)):
                    self._driver.upload(self._address + arrays[name].offset(slot, place), array)
                self._driver.wait()  # what is sent must stay until then
            block += blocks_of(rows)

    def _send_ranks(self) -> None:
        for arrays, ranks in zip(self._arrays.places, self._ranks, strict=True):
            self._driver.upload(self._address + arrays["rank"].at, ranks)
        self._driver.wait()

    def _resize(self, slots: int, blocks: int) -> None:
        """Memory for so many, and in it what the slots hold. Raises InputError where there is none."""
        arrays, old = _Arrays(self._places.places, slots, blocks), self._address
        try:
            address = self._driver.allocate(arrays.bytes) if arrays.bytes else 0
        except DeviceError:
            raise
        except LlmcError:
            raise InputError(
                f"the GPU has no {arrays.bytes / 1e6:.0f} MB for {slots} adapters of rank {blocks * LANES}",
                remedy=_REMEDY,
            ) from None
        for before, after in zip(self._arrays.places, arrays.places, strict=True):
            for name in ("scale", "a", "b"):
                for slot in self._loaded:
                    self._move(slot, before[name], after[name], address)
        self._forget()
        if old:
            self._driver.free(old)
        self._address, self._arrays, self.slots, self.blocks = address, arrays, slots, blocks
        for number, (place, ranks) in enumerate(zip(arrays.places, self._ranks, strict=True)):
            self._ranks[number] = np.zeros(place["rank"].shape, np.int32)
            kept = min(slots, len(ranks))
            self._ranks[number][:kept] = ranks[:kept]
            for name, array in place.items():
                self._bind(f"lora_{name}.{number}", address + array.at)
        self._send_ranks()

    def _move(self, slot: int, before: _Array, after: _Array, address: int) -> None:
        """A slot's numbers to where memory from `address` on has them. Where ranks have another room, over
        this machine's memory, for want of copies with strides; they seldom do.
        """
        source, to = self._address + before.offset(slot), address + after.offset(slot)
        if before.shape[2] == after.shape[2]:
            self._driver.copy(to, source, before.bytes_per_slot)
            return
        old, new = np.empty(before.shape[1:], before.dtype), np.zeros(after.shape[1:], after.dtype)
        self._driver.download(old, source)
        self._driver.wait()
        kept = min(before.shape[2], after.shape[2])
        new[:, :kept] = old[:, :kept]
        self._driver.upload(to, new)
        self._driver.wait()


def _in_order(part: Part) -> Part:
    """The same, as a copy of memory wants it."""
    scale, a, b = part[:3]
    return scale, np.ascontiguousarray(a), np.ascontiguousarray(b)


__all__ = ["CudaAdapters"]
