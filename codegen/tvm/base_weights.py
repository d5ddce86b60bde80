"""What an artifact's linear layers multiply by and add, and rows of its embeddings, for adapters that need to
know it: the gains of DoRA, and what takes the place of a bias, of rows or of a matrix.

    y = W x + b   →   y = m / ‖W + B A‖ ∘ (W x + B A x) + b       norms of rows

Norms are of the weights as they were quantized, read out of the artifact as an adapter is loaded.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...ir.errors import ArtifactError, CompileError, UnsupportedError
from ...ir.hadamard import rotate_columns
from ...ir.ops.nn import Embedding, Linear
from ...ir.ops.quant import QuantizedEmbedding, QuantizedLinear, quantization
from ...ir.weights import LazyTensor, QuantizedTensors, dequantize_rows
from ...passes.adapt.lora_embeddings import Table, tables_of
from ...passes.adapt.lora_places import columns_of, is_transposed, layers_of, rotation_of
from ..extensions import parse_graph
from .stored import stored_graph

if TYPE_CHECKING:
    from ...ir.core import Op, Value
    from ..artifact import Artifact

Array = np.ndarray[Any, Any]
_AGAIN = "install the package, or compile the model again"
_ROWS = 1024
"""Of a weight that are in memory at a time."""


class BaseWeights:
    """Of an artifact that was compiled for tvm-cpu; read when first asked for."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact

    def gains(self, module: str, a: Array, b: Array, magnitude: Array) -> Array:
        """[2, rows] of a module: m / ‖W + B A‖, and what its bias loses by it, (1 - m / ‖…‖) · bias.

        Args:
            a, b: [r, K], and [rows, r] with the scaling in it. magnitude: m [rows]; NaN where a row is not
                scaled.

        Raises ArtifactError where graph and weights of the artifact are not of this version, UnsupportedError
        where a bias is none of its weights.
        """
        op, first = self._linear(module)
        size, columns = rotation_of(op), columns_of(op)
        a = a if columns is None else a[:, self._weight(columns).read()]
        a = rotate_columns(a, size) if size else a
        gain = np.ones(len(b), np.float32)
        for start in range(0, len(b), _ROWS):
            part = b[start : start + _ROWS]
            rows = self._rows(op, first + start, first + start + len(part))
            norm = np.linalg.norm(rows + part @ a, axis=1)
            wanted = magnitude[start : start + len(part)]
            scaled = wanted / np.where(norm == 0, np.float32(1), norm)
            gain[start : start + len(part)] = np.where(np.isnan(wanted), np.float32(1), scaled)
        bias = self._bias(op, first, len(b))
        return np.stack([gain, (1 - gain) * (0 if bias is None else bias)]).astype(np.float32)

    def bias(self, module: str, rows: int) -> Array | None:
        """[rows] float32 that a module of so many rows adds, None where it adds none. Raises as `gains`."""
        return self._bias(*self._linear(module), rows)

    def rows(self, module: str, start: int, stop: int) -> Array:
        """Rows of a module's matrix as the module has them, float32 [n, columns]. Raises as `gains`."""
        op, first = self._layer(module)
        if isinstance(op, Table):
            found, size = self._rows(op.op, start, stop), op.rotation
        else:
            found, size = self._rows(op, first + start, first + stop), rotation_of(op)
            columns = columns_of(op)
            if columns is not None:
                ordered = np.empty_like(found)
                ordered[:, self._weight(columns).read()] = found
                found = ordered
        return rotate_columns(found, size) if size else found

    def is_transposed(self, module: str) -> bool:
        """Whether the module's own matrix is [columns, rows]. Raises as `gains`."""
        op, _ = self._layer(module)
        return not isinstance(op, Table) and is_transposed(op)

    def _layer(self, module: str) -> tuple[Op | Table, int]:
        """What computes a module, and the module's first row there."""
        if module not in self._layers:
            raise ArtifactError(f"{self._text} has no layer of {module}", remedy=_AGAIN)
        return self._layers[module]

    def _linear(self, module: str) -> tuple[Op, int]:
        op, first = self._layer(module)
        assert not isinstance(op, Table)
        return op, first

    @cached_property
    def _layers(self) -> dict[str, tuple[Op | Table, int]]:
        """By module: the op that computes it, and its first row; or the embedding."""
        try:
            graph = parse_graph(self._artifact.read_text("ir.txt"))
        except CompileError as error:
            raise ArtifactError(
                f"{self._text} is of another version of llmc, or its ops are of a package that is not "
                f"installed ({error.message})",
                remedy=_AGAIN,
            ) from None
        found: dict[str, tuple[Op | Table, int]] = {table.module: (table, 0) for table in tables_of(graph)}
        for op, parts in layers_of(graph):
            row = 0
            for module, rows in parts:
                found[module] = op, row
                row += rows
        return found

    @cached_property
    def _weights(self) -> dict[str, LazyTensor]:
        graph = stored_graph(self._artifact)
        return {name: value.weight for name, value in graph.weights.items() if value.weight is not None}

    @property
    def _text(self) -> Path:
        return self._artifact.root / "ir.txt"

    def _weight(self, value: Value) -> LazyTensor:
        return self._weights[value.name]

    def _rows(self, op: Op, start: int, stop: int) -> Array:
        """Rows of a layer's weight, float32 [n, K]; their columns rotated, or in another order, as what it
        reads is.
        """
        if isinstance(op, QuantizedLinear | QuantizedEmbedding):
            zero = None if op.zero_point is None else self._weight(op.zero_point)
            quant = quantization(op.q.type, op.opname)
            parts = QuantizedTensors(quant, self._weight(op.q), self._weight(op.scale), zero)
            return dequantize_rows(parts, start, stop).astype(np.float32)
        assert isinstance(op, Linear | Embedding)
        return self._weight(op.weight).read(start, stop).astype(np.float32)

    def _bias(self, op: Op, start: int, rows: int) -> Array | None:
        assert isinstance(op, Linear | QuantizedLinear)
        if op.bias is None:
            return None
        if op.bias.name not in self._weights:
            raise UnsupportedError(
                f"the bias of {op.loc} is computed: magnitudes (DoRA) and biases need one that is stored",
                remedy="merge the adapter: llmc compile MODEL --lora FOLDER",
            )
        return self._weight(op.bias).read(start, start + rows).astype(np.float32)


__all__ = ["BaseWeights"]
