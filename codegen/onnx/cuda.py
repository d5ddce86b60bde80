"""Target `onnx-cuda`: the model of `onnx-cpu`, run by onnxruntime's provider for NVIDIA's GPUs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from ...ir.errors import InputError
from ..target import Progress
from .cpu import OnnxCpu

if TYPE_CHECKING:
    from ...ir.core import Graph
    from ..artifact import ArtifactWriter

PROVIDER = "CUDAExecutionProvider"
FALLBACKS = ("none", "cpu")


@dataclass(frozen=True)
class OnnxCuda(OnnxCpu):
    """onnxruntime's CUDA kernels (package onnxruntime-gpu, extra `gpu`); those it lacks run on the CPU.

    Compiling needs no GPU. Where the machine that runs it has none, loading is an error, or with fallback=cpu
    a warning.
    """

    name: ClassVar[str] = "onnx-cuda"
    emits_as: ClassVar[str] = OnnxCpu.name

    fallback: str = field(
        default="none",
        metadata={"help": "where there is no GPU: none (an error) or cpu (onnxruntime's CPU kernels)"},
    )

    def __post_init__(self) -> None:
        if self.fallback not in FALLBACKS:
            raise InputError(f"{self.name}: fallback={self.fallback}", remedy=f"use {' or '.join(FALLBACKS)}")

    def compile(self, graph: Graph, writer: ArtifactWriter, *, progress: Progress) -> dict[str, Any]:
        """See `Target.compile`."""
        return {**super().compile(graph, writer, progress=progress), "provider": PROVIDER}
