"""The factors of loaded adapters, as the kernels of `lora` read them (ir/ops/lora.py has the layout)."""

from __future__ import annotations

import contextlib
import itertools
import math
import mmap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ...ir.dtypes import to_numpy
from ...ir.errors import InputError

if TYPE_CHECKING:
    from ..adapter_places import AdapterPlaces, Factor, Factors, Place

LANES = 16
_MOST = (1 << 31) - 1
"""Elements of an array: the kernels index with 32 bits."""
_HUGE = 4 << 20
"""Bytes of an array from which large pages are asked for, as numpy does."""

Part = tuple[np.ndarray, np.ndarray, np.ndarray] | tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Blocks of scales [L, 16], of A [L, K, 16] and of B [C, r, 16]; and gains [2, rows] where the part has some.
"""
Packed = Mapping[int, Sequence[Part | None]]
"""By the number of a place, for each of its parts; None where it stays as it is."""

Bind = Callable[[str, np.ndarray], None]


def blocks_of(rows: int) -> int:
    """Blocks of 16 that hold so many."""
    return -(-rows // LANES)


class _Zeros:
    """An array by slots, of zeros, which begins with a page of memory. Those slots take memory that are
    written, until they are given back. `sparse`: of their parts few may be written, by pieces.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[np.generic], *, sparse: bool = False) -> None:
        size = math.prod(shape) * dtype.itemsize
        self._map = mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if size >= _HUGE and not sparse and (advice := getattr(mmap, "MADV_HUGEPAGE", None)) is not None:
            with contextlib.suppress(OSError):  # a kernel without them
                self._map.madvise(advice)
        self.array: np.ndarray = np.ndarray(shape, dtype, buffer=self._map)

    def give_back(self, slot: int) -> None:
        """Make a slot zeros; its pages take no memory then, but those at its edges, which others share."""
        content = self.array[slot].reshape(-1).view(np.uint8)
        first, page = slot * content.nbytes, mmap.PAGESIZE
        start, stop = -(-first // page) * page, (first + content.nbytes) // page * page
        advice = getattr(mmap, "MADV_DONTNEED", None)
        if advice is None or start >= stop:
            content[:] = 0
            return
        content[: start - first] = 0
        content[stop - first :] = 0
        self._map.madvise(advice, start, stop - start)


class _Arrays:
    """Of one place: rank [A, P] int32, scale [A, P, L, 16], a [A, P, L, K, 16], b [A, C, 16 · L, 16], and
    where it has gains gained [A, P] int32 and gain [A, 2, N].
    """

    def __init__(self, place: Place, slots: int, blocks: int) -> None:
        dtype, parts = to_numpy(place.dtype), len(place.parts)
        columns = columns_of(place)
        self._columns = np.cumsum([0, *(blocks_of(rows) for _, rows in place.parts)])
        sparse = place.stack is not None
        self._all = (
            _Zeros((slots, parts, blocks, LANES), np.dtype(np.float32), sparse=sparse),
            _Zeros((slots, parts, blocks, place.k, LANES), dtype, sparse=sparse),
            _Zeros((slots, columns, blocks * LANES, LANES), dtype, sparse=sparse),
        )
        self._rank = _Zeros((slots, parts), np.dtype(np.int32))
        self.rank = self._rank.array
        self.scale, self.a, self.b = (one.array for one in self._all)
        self._gained = _Zeros((slots, parts), np.dtype(np.int32))
        self._gain = _Zeros((slots if place.gains else 0, 2, rows_of(place)), np.dtype(np.float32))
        self.gained, self.gain = self._gained.array, self._gain.array

    def take(self, old: _Arrays) -> None:
        """The slots of others. What an adapter does not use of its slot stays untouched."""
        both = min(len(old.rank), len(self.rank))
        self.rank[:both] = old.rank[:both]
        self.gained[:both] = old.gained[:both]
        for slot in np.flatnonzero(old.gained.any(1)):
            self.gain[slot] = old.gain[slot]
        for slot, part in np.argwhere(old.rank > 0):
            rank = int(old.rank[slot, part])
            blocks, columns = blocks_of(rank), slice(*self._columns[part : part + 2])
            self.scale[slot, part, :blocks] = old.scale[slot, part, :blocks]
            self.a[slot, part, :blocks] = old.a[slot, part, :blocks]
            self.b[slot, columns, :rank] = old.b[slot, columns, :rank]

    def clear(self, slot: int) -> None:
        """Nothing is in the slot any more."""
        if self.rank[slot].any():
            self.rank[slot] = 0
            for one in self._all:
                one.give_back(slot)
        if self.gained[slot].any():
            self.gained[slot] = 0
            self._gain.give_back(slot)


def rows_of(place: Place) -> int:
    """Rows of all parts of a place."""
    return sum(rows for _, rows in place.parts)


def columns_of(place: Place) -> int:
    """Blocks of 16 rows of a place's B, each part's last one maybe not full."""
    return sum(blocks_of(rows) for _, rows in place.parts)


class Slots(Protocol):
    """Where the factors of loaded adapters are kept, all but `packed` between two steps."""

    @property
    def slots(self) -> int: ...

    @property
    def blocks(self) -> int: ...

    def packed(self, factors: Factors) -> Packed: ...

    def set(self, slot: int, packed: Packed) -> None: ...

    def clear(self, slot: int) -> None: ...


class WithSlots:
    """`adapters.TakesAdapters` for an executor whose `_adapters` keeps the factors; None where its kernels
    have no places.
    """

    _adapters: Slots | None

    def packed_adapter(self, factors: Factors) -> Packed:
        """See `adapters.TakesAdapters`. Raises InputError for numbers that the kernels cannot hold."""
        return self._slots().packed(factors)

    def set_adapter(self, slot: int, packed: Packed) -> None:
        """Fill a slot; between two steps. Raises InputError where there is no room for more."""
        self._slots().set(slot, packed)

    def clear_adapter(self, slot: int) -> None:
        """Empty a slot; between two steps."""
        self._slots().clear(slot)

    def _slots(self) -> Slots:
        if self._adapters is None:
            raise InputError("these kernels take no adapters", remedy="compile with --adapters")
        return self._adapters


class AdapterMemory:
    """Slots for adapters, none at first; they grow in number and rank with what is put into them, and give
    their memory back when they are cleared.

    Experts have hundreds of parts: adapters that change some have a second slot, of those places alone, and
    all others take no room there.

    `bind` is told each array's address anew, by the name of the kernels' argument.
    """

    def __init__(self, places: AdapterPlaces, bind: Bind) -> None:
        self._all_places = places
        layers = {number: place for number, place in enumerate(places.places) if place.stack is None}
        experts = {number: place for number, place in enumerate(places.places) if place.stack is not None}
        self._layers = _Places(layers, bind)
        self._experts = _Places(experts, bind) if experts else None
        self._second: dict[int, int] = {}
        """By an adapter's slot, its slot among those that change experts."""
        self._seconds = np.full(1, -1, np.int32)
        """The same by every slot, -1 where it changes none; the last is for tokens without an adapter."""

    @property
    def slots(self) -> int:
        return self._layers.slots

    @property
    def blocks(self) -> int:
        """Largest rank there is room for, in 16."""
        return self._layers.blocks

    def sizes(self) -> dict[str, int]:
        """The symbols of the kernels' shapes."""
        found = {"A": self._layers.slots, "L": self._layers.blocks}
        experts = self._experts
        return found if experts is None else {**found, "AE": experts.slots, "LE": experts.blocks}

    def expert_slots(self, adapter: np.ndarray) -> np.ndarray | None:
        """Of tokens' slots int32 [T], those among adapters that change experts, -1 where one changes none;
        None where kernels have no places for them.
        """
        return None if self._experts is None else self._seconds[adapter]

    def _count_seconds(self) -> None:
        self._seconds = np.full(self.slots + 1, -1, np.int32)
        for slot, own in self._second.items():
            self._seconds[slot] = own

    def packed(self, factors: Factors) -> Packed:
        """See `pack`; changes nothing, so any thread may call it."""
        return pack(self._all_places, factors)

    def set(self, slot: int, packed: Packed) -> None:
        """Fill a slot; what was in it is gone. Raises InputError where there are more slots than the kernels
        count, and leaves it empty.
        """
        self.clear(slot)
        of_experts = {n: parts for n, parts in packed.items() if self._all_places.places[n].stack is not None}
        if of_experts:
            assert self._experts is not None
            taken = set(self._second.values())
            own = next(i for i in itertools.count() if i not in taken)
            self._experts.set(own, of_experts)
            self._second[slot] = own
        try:
            self._layers.set(slot, {n: parts for n, parts in packed.items() if n not in of_experts})
        except InputError:
            self.clear(slot)
            raise
        self._count_seconds()

    def clear(self, slot: int) -> None:
        """Empty a slot."""
        if slot < self._layers.slots:
            self._layers.clear(slot)
        own = self._second.pop(slot, None)
        if own is not None:
            assert self._experts is not None
            self._experts.clear(own)
            self._count_seconds()


class _Places:
    """Slots of some of the places, by their numbers."""

    def __init__(self, places: Mapping[int, Place], bind: Bind) -> None:
        self._places, self._bind = places, bind
        self.slots, self.blocks = 0, 1
        self._held: dict[int, int] = {}
        """By a slot that is filled, the blocks of its largest rank."""
        self._arrays: dict[int, _Arrays] = {}
        self._resize(0, 1)

    def set(self, slot: int, packed: Packed) -> None:
        """Fill a slot that is empty. Raises InputError where there are more slots than the kernels count."""
        own = blocks_of(rank_of(packed))
        if slot >= self.slots or own > self.blocks:
            least, blocks = max(slot, *self._held, 0) + 1, max(own, self.blocks)
            if least > self._most(blocks):  # no room need be kept for a rank that went
                blocks = max(own, *self._held.values(), 1)
            # As many slots again, for memory that nobody touches costs nothing.
            slots = self.slots if slot < self.slots else 2 * slot + 2
            self._resize(max(least, min(slots, self._most(blocks))), blocks)
        self._held[slot] = own
        for number, parts in packed.items():
            arrays, block, row = self._arrays[number], 0, 0
            for p, ((_, rows), part) in enumerate(zip(self._places[number].parts, parts, strict=True)):
                if part is not None:
                    scale, a, b, *gain = part
                    arrays.rank[slot, p] = b.shape[1]
                    arrays.scale[slot, p, : len(scale)] = scale
                    arrays.a[slot, p, : len(a)] = a
                    arrays.b[slot, block : block + len(b), : b.shape[1]] = b
                    if gain:
                        arrays.gained[slot, p] = 1
                        arrays.gain[slot, :, row : row + rows] = gain[0]
                block, row = block + blocks_of(rows), row + rows

    def clear(self, slot: int) -> None:
        self._held.pop(slot, None)
        for arrays in self._arrays.values():
            arrays.clear(slot)

    def _most(self, blocks: int) -> int:
        """The slots that a kernel can count."""
        sizes = (max(len(p.parts) * p.k, columns_of(p) * LANES) for p in self._places.values())
        largest = max(sizes, default=1)
        return _MOST // (largest * blocks * LANES)

    def _resize(self, slots: int, blocks: int) -> None:
        if slots > self._most(blocks):
            raise InputError(
                f"{slots} slots of rank {blocks * LANES} are more than a kernel can count",
                remedy="load fewer adapters at a time, or of smaller ranks",
            )
        old = self._arrays
        try:
            self._arrays = {n: _Arrays(place, slots, blocks) for n, place in self._places.items()}
        except OSError:
            raise InputError(
                f"there is no memory for {slots} slots of rank {blocks * LANES}",
                remedy="load fewer adapters at a time, or of smaller ranks",
            ) from None
        for number in list(old):  # what was taken is dropped: both at once are those of one place alone
            self._arrays[number].take(old.pop(number))
        self.slots, self.blocks = slots, blocks
        for number, arrays in self._arrays.items():
            self._bind(f"lora_rank.{number}", arrays.rank)
            self._bind(f"lora_scale.{number}", arrays.scale)
            self._bind(f"lora_a.{number}", arrays.a)
            self._bind(f"lora_b.{number}", arrays.b)
            if self._places[number].gains:
                self._bind(f"lora_gained.{number}", arrays.gained)
                self._bind(f"lora_gain.{number}", arrays.gain)


def pack(places: AdapterPlaces, factors: Factors) -> Packed:
    """An adapter as kernels read it. Raises InputError where it does not fit into the kernels' numbers."""
    return {number: _packed(places.places[number], parts) for number, parts in factors.items()}


def rank_of(packed: Packed) -> int:
    """The largest rank in an adapter, at least 1."""
    ranks = (part[2].shape[1] for parts in packed.values() for part in parts if part is not None)
    return max(ranks, default=1)


def _packed(place: Place, parts: Sequence[Factor | None]) -> list[Part | None]:
    result: list[Part | None] = []
    for (module, _), part in zip(place.parts, parts, strict=True):
        if part is None:
            result.append(None)
            continue
        down, up, *gain = part
        with np.errstate(over="ignore", invalid="ignore"):
            scale, a, b = _steps(down, up) if place.dtype == "int8" else (np.ones(len(down)), down, up)
            scales = _in_blocks(scale.astype(np.float32)[:, None])[..., 0]
        if not all(np.isfinite(one).all() for one in (scales, a, b, *gain)):
            raise InputError(
                f"the adapter's change of {module} is beyond what float32 holds",
                remedy="merge it: llmc compile MODEL --lora FOLDER",
            )
        blocks = [_in_blocks(one.astype(to_numpy(place.dtype))).transpose(0, 2, 1) for one in (a, b)]
        packed = scales, blocks[0], blocks[1]
        result.append((*packed, gain[0]) if gain else packed)
    return result


def _steps(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scales [r] of float64, and factors in whole steps of them, -127 … 127: each row of A and each column
    of B by the largest of its numbers.
    """
    down = np.abs(a).max(1, initial=0).astype(np.float64) / 127
    up = np.abs(b).max(0, initial=0).astype(np.float64) / 127
    whole_a = np.rint(a / np.where(down == 0, 1, down)[:, None])
    return down * up, whole_a, np.rint(b / np.where(up == 0, 1, up))


def _in_blocks(rows: np.ndarray) -> np.ndarray:
    """[n, m] → [ceil(n / 16), 16, m], the rest zeros."""
    count = blocks_of(len(rows))
    whole = np.zeros((count * LANES, rows.shape[1]), rows.dtype)
    whole[: len(rows)] = rows
    return whole.reshape(count, LANES, rows.shape[1])


__all__ = ["AdapterMemory", "Packed", "Part", "WithSlots", "blocks_of", "columns_of", "pack", "rank_of"]
