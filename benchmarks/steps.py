"""One sequence of a compiled model, step by step, whatever length its manifest promises."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from llmc.runtime.executor import Executor

CHUNK = 512
"""Tokens of a prompt that are computed at once."""


class Steps:
    """One sequence in a cache of its own, whatever its length."""

    def __init__(self, artifact: Path, room: int) -> None:
        from llmc.codegen.artifact import Artifact
        from llmc.runtime.executor import open_executor
        from llmc.runtime.late_scaling import LateScaling

        opened = Artifact.open(artifact)
        self.executor: Executor = open_executor(opened)
        self._late = LateScaling.read(opened.model)
        pages = -(-room // self.executor.page_size)
        self.executor.allocate_kv(pages)
        self.table = np.arange(pages, dtype=np.int32)[None]
        self.begin(room)

    def begin(self, tokens: int) -> None:
        """A new sequence, which will have so many tokens."""
        self.done = 0
        self._first = self._late.offset if tokens > self._late.original else 0

    def step(self, ids: np.ndarray, *, all_rows: bool) -> np.ndarray:
        """Compute some tokens more; logits of all of them, or of the last."""
        from llmc.runtime.executor import StepInputs

        count = len(ids)
        places = np.arange(self.done, self.done + count, dtype=np.int32)
        self.done += count
        rows = np.arange(count, dtype=np.int32) if all_rows else np.array([count - 1], np.int32)
        start, context = np.array([0, count], np.int32), np.array([self.done], np.int32)
        table = self.table[:, : -(-self.done // self.executor.page_size)].copy()
        positions = places + np.int32(self._first)
        return self.executor.step(StepInputs(ids, positions, places, start, context, table, rows))

    def prompt(self, ids: np.ndarray, more: int = 0) -> np.ndarray:
        """A new sequence, which will have `more` tokens after these; logits of the last of these."""
        self.begin(len(ids) + more)
        while len(ids) - self.done > CHUNK:
            self.step(ids[self.done : self.done + CHUNK], all_rows=False)
        return self.step(ids[self.done :], all_rows=False)[-1]
