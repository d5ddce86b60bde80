"""Target `tvm-webgpu`: GPUs of any maker, kernels in WGSL that wgpu hands to Vulkan, Metal or Direct3D 12.

No GPU is needed to compile. To run, the package wgpu (llmc[webgpu]) and a driver.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...ir.core import Op
from ...ir.errors import CompileError
from ...ir.printer import print_graph
from ..memory import processors
from ..target import Progress, Target
from .cpu import interface
from .cuda import OPERATIONS, has_kernel
from .worker import Programming, ready_workers

if TYPE_CHECKING:
    from ...ir.core import Graph
    from ..artifact import ArtifactWriter

SOURCE, PROGRAM = "kernels.wgsl", "program.json"


@dataclass(frozen=True)
class TvmWebGpu(Target):
    """WGSL kernels for GPUs of any maker, compiled without one."""

    name: ClassVar[str] = "tvm-webgpu"
    operations: ClassVar[frozenset[str]] = OPERATIONS
    kv_dtype: ClassVar[str] = "float16"
    kv_dtypes: ClassVar[tuple[str, ...]] = ("float16", "bfloat16", "float32")

    def supports(self, op: Op) -> bool:
        """As tvm-cuda's kernels, but that the cache is read by pairs of elements."""
        if op.opname in ("paged_attention", "append_kv"):
            head_dim = op.operands[0].shape[-1]
            if isinstance(head_dim, int) and head_dim % 2:
                return False
        return has_kernel(op)

    def workers(self) -> int:
        """One, which makes the program."""
        return 1

    def prepared(self) -> AbstractContextManager[None]:
        """A process that imports TVM while the model is opened, where that leaves a processor idle."""
        return ready_workers(min(1, processors() - 1))

    def compile(self, graph: Graph, writer: ArtifactWriter, *, progress: Progress) -> dict[str, Any]:
        """See `Target.compile`. Raises CompileError for what WGSL cannot express."""
        from .wgsl.weights import weight_specs

        legal = self.legal(graph)
        for value, name in zip(legal.outputs, legal.output_names, strict=True):
            if value.dtype not in ("float32", "int32"):
                raise CompileError(
                    f"output {name} is {value.dtype}: tvm-webgpu gives float32 and int32",
                    remedy="compile for tvm-cpu, or let the model return float32",
                )
        folder = f"targets/{self.name}"
        weights = f"weights/{self.name}.safetensors" if legal.weights else None
        with Programming(print_graph(legal), writer.path(f"{folder}/{PROGRAM}").parent, None) as worker:
            if weights is not None:
                specs = weight_specs(legal, lambda share: progress("tvm-webgpu: weights", 0.5 * share))
                writer.write_weights(weights, specs)
            progress("tvm-webgpu: kernels", 0.5)
            built = worker.result()
        progress("tvm-webgpu", 1.0)
        entry: dict[str, Any] = {
            "options": self.options(),
            "batch_invariant": True,
            "program": f"{folder}/{PROGRAM}",
            "source": f"{folder}/{SOURCE}",
            "kv_layout": "heads",
            "arguments": built["arguments"],
            "symbols": built["symbols"],
            **interface(legal),
        }
        return entry if weights is None else {**entry, "weights": weights}
