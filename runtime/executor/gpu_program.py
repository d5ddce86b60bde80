"""The program of a step on a GPU (`program.json` of targets for GPUs): sizes, memory, launches.

Everything that depends on sizes alone is made once for them (`Program.prepared`): the steps of a decoding
batch repeat the same launches.
"""

from __future__ import annotations

import ast
import logging
import operator
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ...ir.errors import ArtifactError, LlmcError

_ALIGNMENT = 256
_KEPT = 64
"""Sizes of steps whose launches are kept."""
_RECORD_AT = 3
"""How often a step of some sizes comes until its launches are recorded: prompts' steps rarely come again."""
_log = logging.getLogger("llmc.runtime")
_BINARY: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_CALLS: dict[str, Callable[[int, int], int]] = {"min": min, "max": max}

Size = Callable[[Mapping[str, int]], int]
Given = tuple[str, int]
"""What a launch passes: an "address", or an "int32" or "int64"."""


class Driver(Protocol):
    """One GPU and what runs on it in order. One thread at a time, and `enter` makes that thread the one.

    Addresses are whole numbers; those within one piece of memory follow each other.
    """

    name: str
    apart: bool
    """Whether pieces of memory that one launch reads and writes must be of different allocations."""

    def enter(self) -> None: ...
    def free_bytes(self) -> int: ...
    def allocate(self, size: int) -> int: ...
    def free(self, address: int) -> None: ...
    def pinned(self, size: int) -> np.ndarray: ...
    def zero(self, address: int, size: int) -> None: ...
    def upload(self, address: int, array: np.ndarray) -> None: ...
    def download(self, array: np.ndarray, address: int) -> None: ...
    def copy(self, to: int, source: int, size: int) -> None: ...
    def wait(self) -> None: ...
    def function(self, module: Any, name: str, shared: int) -> Any: ...
    def prepare(
        self, function: Any, grid: Sequence[int], block: int, shared: int, given: Sequence[Given]
    ) -> Any: ...
    def launch(self, prepared: Any) -> None: ...
    def recorded(self, launches: Sequence[Any]) -> Any: ...
    def replay(self, executable: Any) -> None: ...
    def forget(self, executable: Any) -> None: ...


def size_of(text: str) -> Size:
    """A size in text as a function of its symbols. Raises ArtifactError for anything but whole numbers,
    names, + - *, // and % by a number that is written out, and min and max of two.
    """
    try:
        return _function(ast.parse(text, mode="eval").body, text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise _strange(text) from None


def _function(node: ast.expr, text: str) -> Size:
    match node:
        case ast.Constant(value=int() as value) if type(value) is int:
            return lambda _: value
        case ast.Name(id=name):
            return lambda sizes: sizes[name]
        case ast.BinOp(op=ast.FloorDiv() | ast.Mod(), right=b) if not _positive(b):
            raise _strange(text)  # it might be zero for some sizes
        case ast.BinOp(left=a, op=sign, right=b) if type(sign) in _BINARY:
            return _joined(_BINARY[type(sign)], _function(a, text), _function(b, text))
        case ast.Call(func=ast.Name(id=name), args=[a, b], keywords=[]) if name in _CALLS:
            return _joined(_CALLS[name], _function(a, text), _function(b, text))
        case _:
            raise _strange(text)


def _positive(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) is int and node.value > 0


def _joined(how: Callable[[int, int], int], a: Size, b: Size) -> Size:
    return lambda sizes: how(a(sizes), b(sizes))


def _strange(text: str) -> ArtifactError:
    return ArtifactError(
        f"program.json holds {text[:60]!r} where a size is due", remedy="compile the model again"
    )


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class _Kernel:
    def __init__(self, entry: Mapping[str, Any], find: Callable[[str, int], Any]) -> None:
        self.symbols = tuple(entry["symbols"])
        self.scratch = [size_of(text) for text in entry["scratch"]]
        self.launches = [
            (
                find(item["function"], int(item["shared"])),
                [size_of(text) for text in item["grid"]],
                int(item["block"]),
                int(item["shared"]),
                [(str(kind), int(which)) for kind, which in item["arguments"]],
                _range(item["rows"]) if "rows" in item else None,
            )
            for item in entry["launches"]
        ]

    def check(self, arrays: int, numbers: int) -> None:
        """Raise ValueError or KeyError where a launch asks for what a call does not give."""
        ones = dict.fromkeys(self.symbols, 1)
        if numbers != len(self.symbols):
            raise ValueError(f"{numbers} sizes")
        for size in self.scratch:
            size(ones)
        most = {"array": arrays, "scratch": len(self.scratch), "int32": numbers, "int64": numbers}
        for _, grid, _, _, arguments, rows in self.launches:
            for size in (*grid, *(rows[:1] if rows is not None else ())):
                size(ones)
            if any(not 0 <= which < most[kind] for kind, which in arguments):
                raise ValueError(f"arguments {arguments}")


def _range(given: Sequence[Any]) -> tuple[Size, int, int]:
    size, least, most = given
    return size_of(str(size)), int(least), int(most)


class Prepared:
    """The launches of a step of given sizes, over memory where it was when they were made.

    A step that comes again is recorded, and from then on is one launch: some microseconds for each of
    hundreds of kernels are saved.
    """

    def __init__(self, launches: Sequence[Any]) -> None:
        self.launches = launches
        self._runs = 0
        self._recorded: Any = None

    def run(self, driver: Driver) -> None:
        self._runs += 1
        if self._runs == _RECORD_AT and self.launches:
            try:
                self._recorded = driver.recorded(self.launches)
            except LlmcError as error:
                _log.warning("launches are not recorded: %s", error.message)
        if self._recorded is not None:
            driver.replay(self._recorded)
            return
        for launch in self.launches:
            driver.launch(launch)

    def drop(self, driver: Driver) -> None:
        """Give back what the driver holds; nothing of it runs."""
        if self._recorded is not None:
            driver.forget(self._recorded)
            self._recorded = None


class Room:
    """A piece of the GPU's memory that grows; what was in it is lost then."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self.address = self.size = 0

    def grow(self, size: int) -> None:
        """At least `size` bytes, and half as much again as there were, where that is there. Nothing that is
        running uses what it had. Raises LlmcError where the memory is full: then there are none.
        """
        old, wanted = self.address, max(size, self.size + self.size // 2)
        self.address = self.size = 0
        if old:
            self._driver.wait()
            self._driver.free(old)
        try:
            self.address, self.size = self._driver.allocate(wanted), wanted
        except LlmcError:
            self.address, self.size = self._driver.allocate(size), size


class Pieces:
    """Pieces of memory that a step, or a kernel, uses all at once: one after the other in one allocation, or
    where the driver wants them apart, each in its own.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._rooms: list[Room] = []

    def allocations(self, sizes: Sequence[int]) -> list[int]:
        """Bytes of each allocation that they take."""
        if self._driver.apart:
            return list(sizes)
        return [sum(round_up(size, _ALIGNMENT) for size in sizes)]

    def lacks(self, allocations: Sequence[int]) -> bool:
        """Whether there is less than that."""
        have = [room.size for room in self._rooms]
        return len(have) < len(allocations) or any(a > b for a, b in zip(allocations, have, strict=False))

    def grow(self, allocations: Sequence[int]) -> None:
        """Make it so many bytes; addresses that were told before hold no longer."""
        self._rooms += [Room(self._driver) for _ in range(len(allocations) - len(self._rooms))]
        for room, size in zip(self._rooms, allocations, strict=False):
            if size > room.size:
                room.grow(size)

    def addresses(self, sizes: Sequence[int]) -> list[int]:
        """Where each piece begins."""
        if self._driver.apart:
            return [room.address for room, _ in zip(self._rooms, sizes, strict=False)]
        found: list[int] = []
        at = self._rooms[0].address if sizes else 0
        for size in sizes:
            found.append(at)
            at += round_up(size, _ALIGNMENT)
        return found


class Program:
    """Raises ArtifactError for an entry that is none."""

    def __init__(self, entry: Mapping[str, Any], driver: Driver, module: Any, arguments: int) -> None:
        """`arguments`: how many a step has."""
        self._driver = driver
        try:
            self.symbols: tuple[str, ...] = tuple(entry["symbols"])
            self._slots = [[size_of(text) for text in sizes] for sizes in entry["slots"]]
            self._numbers = [size_of(text) for text in entry["numbers"]]
            self._kernels = [
                _Kernel(item, lambda name, shared: driver.function(module, name, shared))
                for item in entry["kernels"]
            ]
            self._calls = [
                (int(kernel), [int(a) for a in arrays], [int(n) for n in sizes])
                for kernel, arrays, sizes in entry["calls"]
            ]
            self._check(arguments)
        except (KeyError, TypeError, ValueError, IndexError, ArithmeticError) as error:
            raise ArtifactError(
                f"program.json does not describe a step ({error!r})", remedy="compile the model again"
            ) from None
        self._workspace, self._scratch = Pieces(driver), Pieces(driver)
        self._made: OrderedDict[tuple[int, ...], Prepared] = OrderedDict()

    def _check(self, arguments: int) -> None:
        """Raise ValueError or KeyError where a number leads out of its table, or a size names no symbol."""
        ones = dict.fromkeys(self.symbols, 1)
        for size in (*self._numbers, *(size for slot in self._slots for size in slot)):
            size(ones)
        for kernel, arrays, numbers in self._calls:
            if not 0 <= kernel < len(self._kernels):
                raise ValueError(f"kernel {kernel}")
            if any(not -len(self._slots) <= a < arguments for a in arrays):
                raise ValueError(f"arrays {arrays}")
            if any(not 0 <= n < len(self.symbols) + len(self._numbers) for n in numbers):
                raise ValueError(f"sizes {numbers}")
            self._kernels[kernel].check(len(arrays), len(numbers))

    def forget(self) -> None:
        """Addresses have changed: launches are made anew."""
        self._driver.wait()
        for made in self._made.values():
            made.drop(self._driver)
        self._made.clear()

    def prepared(self, sizes: Mapping[str, int], addresses: Sequence[int]) -> Prepared:
        """The launches of a step of these sizes; `addresses` of its arguments, in the manifest's order, are
        the same for the same sizes until `forget`.
        """
        key = tuple(sizes[name] for name in self.symbols)
        if key in self._made:
            self._made.move_to_end(key)
            return self._made[key]
        values = [sizes[name] for name in self.symbols] + [number(sizes) for number in self._numbers]
        slots = [max((size(sizes) for size in slot), default=0) for slot in self._slots]
        owns = [self._own(call, values) for call in self._calls]
        scratches = [
            [size(own) for size in self._kernels[call[0]].scratch]
            for call, own in zip(self._calls, owns, strict=True)
        ]
        self._grow(self._workspace, [slots])
        self._grow(self._scratch, scratches)
        places = self._workspace.addresses(slots)
        launches: list[Any] = []
        for (kernel, arrays, _), own, scratch in zip(self._calls, owns, scratches, strict=True):
            where = [addresses[a] if a >= 0 else places[-1 - a] for a in arrays]
            launches += self._launches(self._kernels[kernel], own, where, self._scratch.addresses(scratch))
        made = self._made[key] = Prepared(launches)
        if len(self._made) > _KEPT:
            self._made.popitem(last=False)[1].drop(self._driver)
        return made

    def _own(self, call: tuple[int, list[int], list[int]], values: Sequence[int]) -> dict[str, int]:
        kernel, _, numbers = call
        return dict(zip(self._kernels[kernel].symbols, (values[n] for n in numbers), strict=True))

    def _grow(self, pieces: Pieces, uses: Sequence[Sequence[int]]) -> None:
        """Memory for each of some uses, one after the other: steps and kernels share it."""
        wanted = [pieces.allocations(sizes) for sizes in uses]
        count = max(map(len, wanted), default=0)
        most = [max((w[i] for w in wanted if i < len(w)), default=0) for i in range(count)]
        if pieces.lacks(most):
            self.forget()
            pieces.grow(most)

    def _launches(
        self, kernel: _Kernel, own: Mapping[str, int], arrays: Sequence[int], scratch: Sequence[int]
    ) -> list[Any]:
        found: list[Any] = []
        numbers = [own[name] for name in kernel.symbols]
        for function, grid, block, shared, arguments, rows in kernel.launches:
            if rows is not None and not rows[1] <= rows[0](own) <= rows[2]:
                continue
            blocks = [size(own) for size in grid]
            if min(blocks) <= 0:
                continue
            given: list[Given] = []
            for kind, which in arguments:
                match kind:
                    case "array":
                        given.append(("address", arrays[which]))
                    case "scratch":
                        given.append(("address", scratch[which]))
                    case _:
                        given.append((kind, numbers[which]))
            found.append(self._driver.prepare(function, blocks, block, shared, given))
        return found
