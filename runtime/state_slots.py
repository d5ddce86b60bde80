"""Rows of the state cache of recurrent layers: which sequence owns which.

A sequence owns a row for as long as it holds pages: from its first chunk until it ends, or is preempted and
will begin anew. Rows are never shared: a fork gets one of its own, and what stands in the parent's is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from .sequence import Sequence


class StateSlots:
    """Hands out the rows 0 .. count - 1. Holds no tensors: `copy` (from row, to row) is the executor's."""

    def __init__(self, count: int, copy: Callable[[int, int], None], row_bytes: int = 0) -> None:
        self.count = count
        self.bytes = count * row_bytes
        self._copy = copy
        self._free = list(range(count - 1, -1, -1))  # a stack: a row just freed is warm

    @property
    def num_free(self) -> int:
        """Rows that nobody owns."""
        return len(self._free)

    def give(self, sequence: Sequence) -> None:
        """Let a sequence own a row. There is one: no more sequences run than there are rows."""
        assert sequence.state_slot < 0, "a sequence owns one row"
        sequence.state_slot = self._free.pop()

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let a sequence go on from what another one's row holds now."""
        self.give(child)
        self._copy(parent.state_slot, child.state_slot)

    def take(self, sequence: Sequence) -> None:
        """Take a sequence's row away."""
        self._free.append(sequence.state_slot)
        sequence.state_slot = -1

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Raise AssertionError unless each row is free or one sequence's, and who holds pages owns one."""
        owned: list[int] = []
        for sequence in sequences:
            owns = sequence.state_slot >= 0
            assert owns == bool(sequence.block_table), "a row without pages, or pages without a row"
            if owns:
                owned.append(sequence.state_slot)
        assert sorted([*owned, *self._free]) == list(range(self.count)), "a row leaked, or has two owners"
