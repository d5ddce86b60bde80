"""Encoders and cross-encoders by their artifact alone, without an engine: steps of whole sequences."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ...codegen.artifact import Artifact
from ...ir.errors import InputError
from ..encoder import STEP_TOKENS, WholeSequences, reads_alone
from ..executor import open_executor
from ..verified import verify_once


def open_artifact(path: Path) -> Artifact:
    """An artifact, its files checked. Raises ArtifactError where it is damaged."""
    artifact = Artifact.open(path, "size")
    verify_once(artifact)
    return artifact


class EncoderSteps:
    """An artifact's kernels, opened for whole sequences. Safe to use from several threads: a step is one's
    own, and a short text waits for one step of a long work at most.
    """

    def __init__(self, artifact: Artifact, *, longest: int, threads: int | None = None) -> None:
        executor = open_executor(artifact, threads=threads)
        tokens = max(STEP_TOKENS, longest)
        pages = WholeSequences.pages_for(executor, tokens)
        executor.allocate_kv(pages)
        self._sequences: WholeSequences | None = WholeSequences(
            executor, pages, tokens, alone=reads_alone(artifact.model)
        )
        self._lock = threading.Lock()
        self.width = executor.vocab_size
        """Columns of a result."""

    def run(
        self, lengths: Sequence[int], work: Callable[[WholeSequences, slice], np.ndarray]
    ) -> list[tuple[slice, np.ndarray]]:
        """What `work` makes of each step's sequences, consecutive ones of these lengths."""
        done: list[tuple[slice, np.ndarray]] = []
        for part in self._whole().batches(lengths):
            with self._lock:
                done.append((part, work(self._whole(), part)))
        return done

    def _whole(self) -> WholeSequences:
        if self._sequences is None:
            raise InputError("this model was closed", remedy="open it again")
        return self._sequences

    def close(self) -> None:
        """Give the kernels' memory back. A later step raises InputError."""
        with self._lock:
            self._sequences = None
