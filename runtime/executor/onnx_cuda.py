"""Runs target `onnx-cuda` by onnxruntime's CUDA provider.

The cache stays in the machine's memory, where prefixes are shared and pages copied; a step sends the GPU the
pages of its own sequences, and no others.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from ...codegen.artifact import Artifact
from ...ir.errors import ArtifactError, InputError
from .base import Executor
from .onnx import CPU_PROVIDER, OnnxExecutor

_log = logging.getLogger("llmc.runtime")

TARGET = "onnx-cuda"


class OnnxCudaExecutor(OnnxExecutor):
    """A session whose inputs are sent away: of the cache, what a step reads."""

    def _run_model(self, feed: dict[str, Any], cache: dict[str, np.ndarray]) -> list[np.ndarray]:
        tables = {name: table for name, table in feed.items() if name.startswith("block_table")}
        used: dict[str, np.ndarray] = {}
        for name, table in tables.items():
            used[name], places = np.unique(table, return_inverse=True)
            feed = {**feed, name: places.reshape(table.shape).astype(np.int32)}
        sent: dict[str, np.ndarray] = {}
        for (index, _, _), window in zip(self._layers, self._window_of, strict=True):
            pages = used["block_table" if window is None else f"block_table.{window}"]
            for kind in ("k_pages", "v_pages", "k_scales", "v_scales"):
                if (name := f"{kind}.{index}") in cache:
                    sent[name] = np.take(cache[name], pages, 1)
        return super()._run_model(feed, sent)


def open_target(artifact: Artifact, *, isa: str | None, threads: int | None) -> Executor:
    """Open `onnx-cuda`. Raises InputError where the provider is missing or does not start, unless the
    artifact was compiled with fallback=cpu: then onnxruntime's CPU kernels run, with a warning.
    """
    import onnxruntime as ort

    entry = artifact.target(TARGET)
    provider = str(entry["provider"])
    why = f"onnxruntime {ort.__version__} has no {provider}, only {', '.join(ort.get_available_providers())}"
    if provider in ort.get_available_providers():
        failed = ""
        try:
            executor = OnnxCudaExecutor(
                artifact, threads=threads, target=TARGET, providers=(provider, CPU_PROVIDER)
            )
            if executor.providers[0] == provider:
                return executor
        except ArtifactError as error:  # it may start and then find no memory
            failed = f" ({error.__cause__})"
        why = (
            f"{provider} did not start: there is no GPU, or its driver, CUDA or cuDNN do not fit onnxruntime "
            f"{ort.__version__}{failed}"
        )
    if entry["options"].get("fallback") == "cpu":
        _log.warning("%s: %s; its CPU kernels run instead", artifact.root, why)
        return OnnxCudaExecutor(artifact, threads=threads, target=TARGET)
    raise InputError(
        f"{artifact.root}: {why}",
        remedy="pip uninstall onnxruntime, then pip install 'onnxruntime-gpu[cuda,cudnn]' (both are one "
        "module); or compile with --target onnx-cpu, or onnx-cuda:fallback=cpu",
    )
