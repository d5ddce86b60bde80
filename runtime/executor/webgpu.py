"""Runs target `tvm-webgpu` by wgpu-native."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from ...codegen.artifact import Artifact
from .base import Executor
from .gpu import GpuExecutor
from .webgpu_driver import WebGpuDriver


class WebGpuExecutor(GpuExecutor):
    """Used by one thread at a time."""

    target: ClassVar[str] = "tvm-webgpu"
    _driver: WebGpuDriver

    def __init__(self, artifact: Artifact, driver: WebGpuDriver) -> None:
        super().__init__(artifact, driver)
        bound = min((driver.most_bound // page for page in self._page_bytes), default=None)
        if bound is not None:  # the pages of a layer are one array
            self.max_pages = bound if self.max_pages is None else min(self.max_pages, bound)

    def _run(
        self,
        inputs: Mapping[str, np.ndarray],
        sizes: Mapping[str, int],
        outputs: Mapping[str, tuple[int, ...]],
    ) -> dict[str, np.ndarray]:
        return super()._run({name: _held(a) for name, a in inputs.items()}, sizes, outputs)

    def _load(self, artifact: Artifact, entry: Mapping[str, Any]) -> tuple[str, Any]:
        return self._driver.backend.lower(), self._driver.load(artifact.read_text(entry["source"]))


def _held(array: np.ndarray) -> np.ndarray:
    """An input as kernels hold it: in 32 bits."""
    if array.dtype.name in ("int64", "bool"):
        return array.astype(np.int32)
    return array.astype(np.float32) if array.dtype.itemsize == 2 else array


def open_target(artifact: Artifact, *, isa: str | None, threads: int | None) -> Executor:
    """Open `tvm-webgpu` on the first GPU. Raises InputError where there is none."""
    return WebGpuExecutor(artifact, WebGpuDriver())
