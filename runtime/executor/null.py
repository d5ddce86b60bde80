"""The null executor: shapes only.

It serves the scheduler's tests and benchmarks, and artifacts of target `null`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ...codegen.artifact import Artifact
from ...ir.dtypes import kv_bytes
from ...ir.errors import InputError
from .base import Executor, StepInputs, columns


class NullExecutor:
    """Answers every step with zeros [R, vocab_size], keeps nothing and computes nothing."""

    batch_invariant = True
    max_pages: int | None = None

    def __init__(self, *, page_size: int = 16, vocab_size: int = 8, kv_bytes_per_page: int = 0):
        self.page_size = page_size
        self.vocab_size = vocab_size
        self.kv_bytes_per_page = kv_bytes_per_page

    def allocate_kv(self, num_pages: int) -> None:
        """Nothing is stored."""

    def copy_pages(self, src: Sequence[int], dst: Sequence[int]) -> None:
        """Nothing is stored."""

    def step(self, inputs: StepInputs) -> np.ndarray:
        """Zeros [R, vocab_size] float32."""
        return np.zeros((len(inputs.output_index), self.vocab_size), np.float32)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A null executor has no functions."""
        raise InputError("the null target computes nothing", remedy="compile for tvm-cpu or onnx-cpu")


def open_target(artifact: Artifact, *, isa: str | None, threads: int | None) -> Executor:
    """An executor with the artifact's vocabulary and page size; `isa` and `threads` mean nothing to it."""
    model, manifest = artifact.model, artifact.manifest
    dtype = manifest.get("kv_dtype") or "float32"
    per_token = sum(2 * layer["heads"] * kv_bytes(dtype, layer["head_dim"]) for layer in model.get("kv", []))
    page_size = int(manifest.get("page_size", 16))
    return NullExecutor(
        page_size=page_size, vocab_size=columns(artifact), kv_bytes_per_page=per_token * page_size
    )
