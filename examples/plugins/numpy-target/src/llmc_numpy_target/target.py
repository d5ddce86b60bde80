"""The compiler's half: a graph that holds only ops of `kernels.KERNELS`, as text, and its weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from llmc.plugins import (
    ArtifactWriter,
    Graph,
    InputError,
    Progress,
    Target,
    UnsupportedError,
    print_graph,
    read_chunks,
)

from .kernels import KERNELS

_CACHES = ("float32", "float16")


@dataclass(frozen=True)
class NumpyCpu(Target):
    """numpy, op by op: slow, and right wherever numpy runs. Quantized weights are dequantized when it is
    loaded.
    """

    name: ClassVar[str] = "numpy-cpu"
    operations: ClassVar[frozenset[str]] = frozenset(KERNELS)
    kv_dtype: ClassVar[str] = "float32"
    kv_dtypes: ClassVar[tuple[str, ...]] = _CACHES

    rows: int = field(default=256, metadata={"help": "tokens of a sequence that attention takes at a time"})

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise InputError(f"numpy-cpu: rows={self.rows}", remedy="take at least one row at a time")

    def compile(self, graph: Graph, writer: ArtifactWriter, *, progress: Progress) -> dict[str, Any]:
        cache = graph.facts.get("kv_dtype", "float32")
        if cache not in _CACHES:
            raise UnsupportedError(
                f"numpy-cpu has no cache of {cache}", remedy=f"compile with --kv-dtype {' or '.join(_CACHES)}"
            )
        legal = self.legal(graph)
        text, weights = f"targets/{self.name}/graph.txt", f"weights/{self.name}.safetensors"
        writer.path(text).write_text(print_graph(legal), encoding="utf-8", newline="\n")
        progress("numpy-cpu: weights", 0.1)
        specs = [
            (name, value.weight.shape, value.weight.dtype, read_chunks(value.weight))
            for name, value in legal.weights.items()
            if value.weight is not None
        ]
        entry: dict[str, Any] = {
            "options": self.options(),
            "batch_invariant": False,  # BLAS sums a row in an order that depends on how many rows there are
            "graph": text,
            "arguments": [value.name for value in legal.inputs],
        }
        if specs:
            writer.write_weights(weights, specs)
            entry["weights"] = weights
        progress("numpy-cpu", 1.0)
        return entry
