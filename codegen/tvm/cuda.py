"""Target `tvm-cuda`: NVIDIA's GPUs from Ampere on, kernels in CUDA C++ compiled ahead for each architecture.

No GPU is needed to compile, and to run neither TVM nor a CUDA toolkit: the driver alone.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from ...ir import ops as _ops  # noqa: F401  # pyright: ignore[reportUnusedImport]  (registers the ops)
from ...ir.core import Op
from ...ir.define import OPS
from ...ir.errors import InputError
from ...ir.ops.moe import Moe, QuantizedMoe
from ...ir.ops.state import Recurrence
from ...ir.printer import print_graph
from ...plugins.entries import package_of
from ..memory import processors
from ..target import Progress, Target
from .cpu import adapters_entry, interface
from .worker import Programming, ready_workers

if TYPE_CHECKING:
    from ...ir.core import Graph
    from ..artifact import ArtifactWriter

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "ptx")
"""What kernels are compiled for; a GPU runs those of its own generation that are not newer than it is, and
"ptx", which its driver compiles when it is opened, from the oldest of them on.
"""
SOURCE, PROGRAM = "kernels.cu", "program.json"
WITHOUT_KERNEL = frozenset({"attention", "sdpa", "cumsum", "hadamard"})
OPERATIONS = frozenset(name for name, op in OPS.items() if package_of(op) is None) - WITHOUT_KERNEL
_MOST_HEAD_DIM = 512  # beyond 256 registers do not suffice, and part of a row waits in local memory


@dataclass(frozen=True)
class TvmCuda(Target):
    """CUDA kernels for NVIDIA's GPUs, compiled without one; results do not depend on the batch."""

    name: ClassVar[str] = "tvm-cuda"
    operations: ClassVar[frozenset[str]] = OPERATIONS
    kv_dtype: ClassVar[str] = "float16"

    arch: str = field(
        default="sm_80+sm_90+ptx",
        metadata={"help": f"GPU architectures, joined by +: {', '.join(ARCHITECTURES)}; or all"},
    )

    adapters: bool = field(
        default=False,
        metadata={"help": "places for LoRA adapters that requests choose among"},
    )

    def __post_init__(self) -> None:
        self.architectures()  # one that does not exist is refused before the model is opened

    def architectures(self) -> tuple[str, ...]:
        """Those asked for, in the order of `ARCHITECTURES`. Raises InputError for an unknown one."""
        asked = list(ARCHITECTURES) if self.arch == "all" else self.arch.split("+")
        for arch in asked:
            if arch not in ARCHITECTURES:
                raise InputError(
                    f"tvm-cuda has no architecture {arch!r}",
                    remedy=f"arch={'+'.join(ARCHITECTURES)} or some of them, or arch=all",
                )
        return tuple(arch for arch in ARCHITECTURES if arch in asked)

    def supports(self, op: Op) -> bool:
        """See `has_kernel`."""
        return has_kernel(op)

    def workers(self) -> int:
        """One, which makes the program and then has it compiled."""
        return 1

    def prepared(self) -> AbstractContextManager[None]:
        """A process that imports TVM while the model is opened, where that leaves a processor idle."""
        return ready_workers(min(1, processors() - 1))

    def compile(self, graph: Graph, writer: ArtifactWriter, *, progress: Progress) -> dict[str, Any]:
        """See `Target.compile`. Raises CompileError where neither NVRTC nor nvcc is installed."""
        from .gpu.lora import MOST_RANK
        from .gpu.weights import weight_specs

        if self.adapters:
            from .placed import with_places

            graph = with_places(graph, gains=False, embeddings=False)
        legal = self.legal(graph)
        folder = f"targets/{self.name}"
        weights = f"weights/{self.name}.safetensors" if legal.weights else None
        inside = writer.path(f"{folder}/{PROGRAM}").parent
        with Programming(print_graph(legal), inside, self.architectures()) as worker:
            if weights is not None:
                specs = weight_specs(legal, lambda share: progress("tvm-cuda: weights", 0.5 * share))
                writer.write_weights(weights, specs)
            progress("tvm-cuda: kernels", 0.5)
            built = worker.result()
        for image in built["images"]:
            image["path"] = f"{folder}/{image.pop('file')}"
        progress("tvm-cuda", 1.0)
        entry: dict[str, Any] = {
            "options": self.options(),
            "batch_invariant": True,
            "program": f"{folder}/{PROGRAM}",
            "source": f"{folder}/{SOURCE}",
            "images": built["images"],
            "kv_layout": "heads",
            "arguments": built["arguments"],
            "symbols": built["symbols"],
            **interface(legal),
            **adapters_entry(legal, MOST_RANK),
        }
        return entry if weights is None else {**entry, "weights": weights}


def has_kernel(op: Op) -> bool:
    """Whether the kernels take this instance of an op: float32, sizes known, and recurrences that leave
    their state for the next step.
    """
    if isinstance(op, Recurrence):
        return bool(op.kept)
    if op.opname in ("rms_norm", "layer_norm", "gated_mlp"):
        return op.operands[0].dtype == "float32" and isinstance(op.result.shape[-1], int)
    if op.opname in ("quantized_linear", "quantized_embedding"):
        from .gpu.layout import GpuLayout
        from .weights import quant_layout

        layout = quant_layout(op)  # type: ignore[arg-type]
        return GpuLayout(layout.n, layout.k, layout).fits()
    if isinstance(op, Moe | QuantizedMoe):
        return op.x.dtype == "float32" and isinstance(op.indices.shape[-1], int) and _has_expert_kernel(op)
    if op.opname == "rope":
        x, cos = op.operands[:2]
        heads = isinstance(x.shape[-2], int) and isinstance(x.shape[-1], int)
        floats = x.dtype == cos.dtype == "float32"
        return floats and x.type.rank == 3 and cos.shape[:-1] == x.shape[:1] and heads
    if op.opname == "paged_attention":
        head_dim = op.operands[0].shape[-1]
        return isinstance(head_dim, int) and head_dim <= _MOST_HEAD_DIM
    return True


def _has_expert_kernel(op: Moe | QuantizedMoe) -> bool:
    """Whether the products of experts can be computed where they lie."""
    from .gpu.layout import GpuLayout
    from .weights import expert_layouts

    if isinstance(op, Moe):
        floats = ("float32", "float16", "bfloat16")
        return all(w.is_weight and w.dtype in floats for w in (op.gate_up, op.down))
    return all(GpuLayout(lay.n, lay.k, lay).fits() for lay in expert_layouts(op))
