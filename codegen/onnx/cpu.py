"""Target `onnx-cpu`: `targets/onnx-cpu/model.onnx` and its weights, run by onnxruntime."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from ...ir.errors import InputError
from ..target import Progress, Target

if TYPE_CHECKING:
    from ...ir.core import Graph
    from ..artifact import ArtifactWriter

# Written out, so that listing the targets works where the package onnx is absent; a test compares it with the
# table.
_OPERATIONS = """
    abs add append_kv arange attention cast concat cos cumsum dequantize diff dim_value div embedding equal
    erf exp expand floor floor_divide full gated_mlp gather gather_last gelu greater greater_equal index
    layer_norm less less_equal linear log logical_and logical_not logical_or matmul maximum minimum mul neg
    not_equal paged_attention pow quantized_embedding quantized_linear reciprocal reduce_max reduce_mean
    reduce_sum relu remainder reshape rms_norm rope rsqrt sdpa sigmoid silu sin slice softmax sqrt sub tanh
    top_k transpose where
"""


@dataclass(frozen=True)
class OnnxCpu(Target):
    """onnxruntime's CPU kernels.

    Not batch invariant: its matrix product chooses kernels, and so the order of summation, by the number of
    rows.
    """

    name: ClassVar[str] = "onnx-cpu"
    operations: ClassVar[frozenset[str]] = frozenset(_OPERATIONS.split())
    # Those that ONNX Runtime takes from numpy.
    kv_dtypes: ClassVar[tuple[str, ...]] = ("float32", "float16", "int8")

    accuracy_level: int = field(
        default=4,
        metadata={
            "help": "what MatMulNBits computes in: 4 = int8 activations per block (alone fast for 8-bit "
            "weights, and fastest for 4-bit ones up to 16 rows), 1 = float32 (8-bit: onnxruntime 1.23)"
        },
    )
    pack: bool = field(
        default=False,
        metadata={
            "help": "let onnxruntime repack float32 weights: up to twice as fast for 2 to 16 rows, for a "
            "copy of all weights in memory (quantized weights are always repacked)"
        },
    )

    def compile(self, graph: Graph, writer: ArtifactWriter, *, progress: Progress) -> dict[str, Any]:
        """Lower `graph`, write the model and stream the weights. See `Target.compile`."""
        from .lower import lower

        if self.accuracy_level not in (0, 1, 4):
            raise InputError(f"{self.name}: accuracy_level={self.accuracy_level}", remedy="use 4 or 1")
        progress(f"{self.name}: model", 0.0)
        lowered = lower(self.legal(graph), accuracy_level=self.accuracy_level)
        model = f"targets/{self.name}/model.onnx"
        entry: dict[str, Any] = {
            "options": self.options(),
            "model": model,
            "arguments": lowered.inputs,
            "batch_invariant": False,
            "prepack": self.pack or lowered.needs_packing,
        }
        if lowered.kv_dtype is not None:
            entry |= {
                "kv_dtype": lowered.kv_dtype,
                "page_size": lowered.page_size,
                "kv_layout": ["kv_heads", "pages", "page_size", "head_dim"],
            }
        specs = lowered.weights.specs()
        if specs:
            progress(f"{self.name}: weights", 0.1)
            entry["weights"] = f"weights/{self.name}.safetensors"
            writer.write_weights(entry["weights"], specs)
            lowered.weights.locate(writer.partial / entry["weights"])
        writer.path(model).write_bytes(lowered.model().SerializeToString(deterministic=True))
        progress(self.name, 1.0)
        return entry
