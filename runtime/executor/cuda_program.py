"""The program of a step on a GPU (`program.json` of target tvm-cuda): sizes, memory, launches.

Everything that depends on sizes alone is made once for them (`Program.prepared`): the steps of a decoding
batch repeat the same launches.
"""

from __future__ import annotations

import ast
import ctypes
import logging
import operator
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...ir.errors import ArtifactError, LlmcError
from .cuda_driver import Driver, Launch

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


def size_of(text: str) -> Size:
    """A size in text as a function of its symbols. Raises ArtifactError for anything but whole numbers,
    names, + - * // %, and min and max of two.
    """
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise _strange(text) from None
    return _function(tree.body, text)


def _function(node: ast.expr, text: str) -> Size:
    match node:
        case ast.Constant(value=int() as value) if type(value) is int:
            return lambda _: value
        case ast.Name(id=name):
            return lambda sizes: sizes[name]
        case ast.BinOp(left=a, op=sign, right=b) if type(sign) in _BINARY:
            return _joined(_BINARY[type(sign)], _function(a, text), _function(b, text))
        case ast.Call(func=ast.Name(id=name), args=[a, b], keywords=[]) if name in _CALLS:
            return _joined(_CALLS[name], _function(a, text), _function(b, text))
        case _:
            raise _strange(text)


def _joined(how: Callable[[int, int], int], a: Size, b: Size) -> Size:
    return lambda sizes: how(a(sizes), b(sizes))


def _strange(text: str) -> ArtifactError:
    return ArtifactError(
        f"program.json holds {text[:60]!r} where a size is due", remedy="compile the model again"
    )


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class _Kernel:
    def __init__(self, entry: Mapping[str, Any], find: Callable[[str, int], ctypes.c_void_p]) -> None:
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

    def __init__(self, launches: Sequence[Launch]) -> None:
        self.launches = launches
        self._runs = 0
        self._recorded: ctypes.c_void_p | None = None

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


class Program:
    """Raises ArtifactError for an entry that is none."""

    def __init__(
        self, entry: Mapping[str, Any], driver: Driver, module: ctypes.c_void_p, arguments: int
    ) -> None:
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
        self._workspace, self._scratch = Room(driver), Room(driver)
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
        offsets: list[int] = []
        total = 0
        for slot in self._slots:
            offsets.append(total)
            total = round_up(total + max((size(sizes) for size in slot), default=0), _ALIGNMENT)
        places = [self._scratch_of(call, values) for call in self._calls]
        self._grow(total, max((end for _, end in places), default=0))
        launches: list[Launch] = []
        for (kernel, arrays, _), (own, scratch, _) in zip(
            self._calls,
            ((self._own(c, values), *p) for c, p in zip(self._calls, places, strict=True)),
            strict=True,
        ):
            where = [addresses[a] if a >= 0 else self._workspace.address + offsets[-1 - a] for a in arrays]
            launches += self._launches(self._kernels[kernel], own, where, scratch)
        made = self._made[key] = Prepared(launches)
        if len(self._made) > _KEPT:
            self._made.popitem(last=False)[1].drop(self._driver)
        return made

    def _own(self, call: tuple[int, list[int], list[int]], values: Sequence[int]) -> dict[str, int]:
        kernel, _, numbers = call
        return dict(zip(self._kernels[kernel].symbols, (values[n] for n in numbers), strict=True))

    def _scratch_of(
        self, call: tuple[int, list[int], list[int]], values: Sequence[int]
    ) -> tuple[list[int], int]:
        """Where each piece of a call's scratch memory begins, and where the last one ends."""
        own, at = self._own(call, values), 0
        offsets: list[int] = []
        for size in self._kernels[call[0]].scratch:
            offsets.append(at)
            at = round_up(at + size(own), _ALIGNMENT)
        return offsets, at

    def _grow(self, workspace: int, scratch: int) -> None:
        """Memory for a step, shared by all: steps run one after the other."""
        for memory, size in ((self._workspace, workspace), (self._scratch, scratch)):
            if size > memory.size:
                self.forget()
                memory.grow(size)

    def _launches(
        self, kernel: _Kernel, own: Mapping[str, int], arrays: Sequence[int], scratch: Sequence[int]
    ) -> list[Launch]:
        found: list[Launch] = []
        numbers = [own[name] for name in kernel.symbols]
        for function, grid, block, shared, arguments, rows in kernel.launches:
            if rows is not None and not rows[1] <= rows[0](own) <= rows[2]:
                continue
            blocks = [size(own) for size in grid]
            if min(blocks) <= 0:
                continue
            given: list[Any] = []
            for kind, which in arguments:
                match kind:
                    case "array":
                        given.append(ctypes.c_uint64(arrays[which]))
                    case "scratch":
                        given.append(ctypes.c_uint64(self._scratch.address + scratch[which]))
                    case "int32":
                        given.append(ctypes.c_int32(numbers[which]))
                    case _:
                        given.append(ctypes.c_int64(numbers[which]))
            found.append(Launch(function, blocks, block, shared, given))
        return found
