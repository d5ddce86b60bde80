"""The weight file of an ONNX target: which forms of which weights the model wants, streamed at the end.

The model file holds no weight. Each is an initializer with external data: offset and length in
`weights/onnx-cpu.safetensors`, whose folder the executor names to onnxruntime (it refuses locations that
leave the model's own). onnxruntime maps such data and copies nothing, whereas it copies what
`add_external_initializers` hands over (1.32, a weight of 312 MB: private memory +1 MB against +314 MB).
Compiling holds one chunk of rows of one tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from onnx import TensorProto

from ...ir.core import Value
from ...ir.dtypes import itemsize, to_numpy
from ...ir.errors import CompileError
from ...ir.weights import LazyTensor
from ..weight_file import TensorSpec
from .builder import element_type

CHUNK_BYTES = 8 << 20
Transform = Callable[[np.ndarray], np.ndarray]


def _chunks(tensor: LazyTensor, transform: Transform, row_bytes: int) -> Iterator[np.ndarray]:
    """Rows of a weight in pieces that cost about `CHUNK_BYTES` to read, each transformed."""
    if not tensor.shape:
        yield transform(tensor.read())
        return
    rows = tensor.shape[0]
    step = max(1, CHUNK_BYTES // max(1, row_bytes))
    for start in range(0, rows, step):
        yield transform(tensor.read(start, min(rows, start + step)))


class WeightFile:
    """Initializers of the model and tensors of the weight file, in order of first use. Every form once."""

    def __init__(self) -> None:
        self._specs: dict[str, TensorSpec] = {}
        self.initializers: list[TensorProto] = []

    def specs(self) -> list[TensorSpec]:
        """What `ArtifactWriter.write_weights` takes; the chunks can be read once."""
        return list(self._specs.values())

    def locate(self, path: Path) -> None:
        """Point the initializers into the weight file, which was written from `specs`."""
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        for proto in self.initializers:
            begin, end = header[proto.name]["data_offsets"]
            del proto.external_data[:]
            for key, value in (
                ("location", path.name),
                ("offset", 8 + length + begin),
                ("length", end - begin),
            ):
                proto.external_data.add(key=key, value=str(value))

    def add(
        self,
        value: Value,
        form: str,
        shape: tuple[int, ...],
        dtype: str,
        transform: Transform,
        row_bytes: int | None = None,
    ) -> str:
        """The initializer `NAME` (form "") or `NAME:form`: the weight's rows through `transform`.

        `transform` takes some rows [n, …] and gives the same rows [n, …] of `shape` and `dtype`. `row_bytes`:
        what reading a row costs in memory where that is more than the row itself (a scale that is computed
        from the row of a matrix).
        """
        if value.weight is None:
            raise CompileError(
                f"onnx: {value.name or 'an operand'} must be a weight, and is computed",
                remedy="fold it into a weight first",
            )
        name = f"{value.name}:{form}" if form else value.name
        if name not in self._specs:
            cost = row_bytes or math.prod(value.weight.shape[1:]) * max(4, itemsize(value.dtype))
            self._specs[name] = (name, shape, dtype, _chunks(value.weight, transform, cost))
            proto = TensorProto(name=name, data_type=element_type(dtype), dims=shape)
            proto.data_location = TensorProto.EXTERNAL
            self.initializers.append(proto)
        return name

    def raw(self, value: Value) -> str:
        """The weight as the IR has it."""
        assert value.weight is not None
        return self.add(value, "", tuple(value.weight.shape), value.dtype, lambda rows: rows)

    def as_float32(self, value: Value) -> str:
        """The weight in float32: onnxruntime has no half-precision matrix product on CPUs."""
        assert value.weight is not None
        if value.dtype == "float32":
            return self.raw(value)
        wanted = to_numpy("float32")
        return self.add(
            value, "float32", tuple(value.weight.shape), "float32", lambda rows: rows.astype(wanted)
        )
