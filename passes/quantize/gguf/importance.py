"""The importance matrix: how much each input column of a linear layer matters, measured on calibration text.

importance[k] = mean of x[k]² over all tokens that reach the layer in the float model. It is llama.cpp's
imatrix (tools/imatrix), and the diagonal of the Hessian that GPTQ uses whole.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from ....ir.core import Graph, Value
from ....ir.ops.nn import Linear
from ...base import Progress
from ...work import WorkFolder
from ..blocks import Activations, split_blocks

Array = np.ndarray[Any, Any]

FLOOR: Final = 1e-3  # of the mean: a column that calibration never moved may matter to other text
_PIECE: Final = "gguf.importance"


def importances(
    graph: Graph, sequences: Sequence[Array], work: WorkFolder | None, progress: Progress
) -> dict[str, Array]:
    """float32 [K] by the name of each linear layer's weight, not below `FLOOR` of their mean.

    Args:
        sequences: int64 [T] token ids each.
        work: where values between layers lie meanwhile, and the result stays for `--resume`.
    """
    if work is not None and work.done(_PIECE):
        return work.load(_PIECE)
    if work is not None:
        found = _measure(graph, sequences, work.scratch("gguf-activations"), progress)
        work.save(_PIECE, found)
        return found
    with tempfile.TemporaryDirectory(prefix="llmc-") as folder:
        return _measure(graph, sequences, Path(folder) / "activations", progress)


def _measure(graph: Graph, sequences: Sequence[Array], folder: Path, progress: Progress) -> dict[str, Array]:
    segments = [segment for block in split_blocks(graph) for segment in block.segments]
    values = Activations(folder)
    found: dict[str, Array] = {}
    try:
        values.begin(graph, sequences)
        for i, segment in enumerate(segments):
            progress("importance of weights", i / len(segments))
            weights = [op.weight for op in segment.layers if isinstance(op, Linear) and op.weight.is_weight]
            if weights:
                mean = _mean_square(values, segment.layers[0].x)
                found |= {weight.name: mean for weight in weights}
            if i + 1 < len(segments):
                values.advance(segment)
    finally:
        values.close()
    return found


def _mean_square(values: Activations, x: Value) -> Array:
    total, count = 0.0, 0
    for i in range(len(values)):
        rows = values.load(i, [x])[x].double().reshape(-1, x.shape[-1])
        total = total + (rows * rows).sum(0).numpy()
        count += len(rows)
    mean = np.asarray(total / max(1, count))
    return np.maximum(mean, FLOOR * mean.mean()).astype(np.float32)
