"""AMX's eight tile registers: 16 rows of 64 bytes each, read from memory and written to it.

A thread configures them, for products of bytes or of pairs of bfloat16, and releases them when it is done.
`tdpbssd`, `tdpbsud` and `tdpbf16ps` take rows of the first operand as they lie in memory, and of the second
words: four bytes, or two bfloat16, of 16 columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm.script.ir_builder import tirx as T

from .builder import Expr

TILE_ROWS = 16
"""Rows of a tile."""

Operation = Callable[[], None]
"""Emits some instructions."""


class Steps:
    """Operations to be written in between others, spread evenly over a number of steps."""

    def __init__(self, operations: Sequence[Operation], steps: int) -> None:
        self.operations, self.steps, self.taken, self.done = operations, steps, 0, 0

    def step(self) -> None:
        self.taken += 1
        due = -(-len(self.operations) * self.taken // self.steps)
        for operation in self.operations[self.done : due]:
            operation()
        self.done = due


def configure_bytes(depth: int) -> None:
    """0 … 3: totals, 16 rows of 16 int32; 4, 5: 16 rows of `depth` bytes; 6, 7: depth / 4 rows of words."""
    _call("configure_bytes", T.int32(depth))


def configure_floats(rows: int) -> None:
    """0 … 3: totals, `rows` rows of 16 float32; 4, 5: `rows` rows of 32 bfloat16; 6, 7: 16 rows of words."""
    _call("configure_floats", T.int32(rows))


def release() -> None:
    _call("release")


def zero(register: int) -> None:
    _call(f"zero_{register}")


def load(register: int, address: Expr, stride: int) -> None:
    """From rows that stand `stride` bytes apart."""
    _call(f"load_{register}", address, T.int64(stride))


def store(register: int, address: Expr, stride: int) -> None:
    """To rows that stand `stride` bytes apart."""
    _call(f"store_{register}", address, T.int64(stride))


def multiply_bytes(total: int, first: int, second: int) -> None:
    """total += first · second of signed bytes, exactly."""
    _call(f"bytes_{total}_{first}_{second}")


def multiply_unsigned(total: int, first: int, second: int) -> None:
    """total += first · second of signed and of unsigned bytes, exactly."""
    _call(f"unsigned_{total}_{first}_{second}")


def multiply_floats(total: int, first: int, second: int) -> None:
    """total += first · second of bfloat16, in float32: sums of even and of odd elements of a row are added,
    and denormals are zeros.
    """
    _call(f"floats_{total}_{first}_{second}")


def _call(name: str, *args: Expr) -> None:
    T.evaluate(T.call_extern("int32", f"llmc_tile_{name}", *args))
