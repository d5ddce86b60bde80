"""A graph's weights as WGSL kernels read them: as tvm-cuda's, but for numbers that WGSL has none of."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from ....ir.core import Graph, Value
from ....ir.dtypes import HALVES, to_numpy
from ....ir.errors import CompileError
from ....ir.ops.nn import Embedding
from ...artifact import TensorSpec
from ..gpu import weights
from ..weights import PLAIN, Role, specs_of, weight_roles


def weight_specs(graph: Graph, report: Callable[[float], None]) -> list[TensorSpec]:
    """See `gpu/weights.py`. Raises CompileError for whole numbers beyond 32 bits."""
    return specs_of(weight_roles(graph), _stored_shape, _chunks, report)


def _stored_shape(weight: Value, role: Role) -> tuple[tuple[int, ...], str]:
    shape, dtype = weights.stored_shape(weight, role)
    return shape, _stored_dtype(weight, dtype) if role == PLAIN else dtype


def _stored_dtype(weight: Value, dtype: str) -> str:
    """Of a weight without a layout: what kernels hold of it (`generic.py`); tables of embeddings stay."""
    if dtype in ("int64", "bool"):
        return "int32"
    if dtype not in HALVES:
        return dtype
    tables = {isinstance(op, Embedding) and i == 1 for op, i in weight.uses}
    if tables == {True, False}:
        raise CompileError(
            f"{weight.name}: a table of {dtype} that other operations read too",
            remedy="compile for tvm-cpu or tvm-cuda",
        )
    return dtype if tables == {True} else "float32"


def _chunks(value: Value, role: Role) -> Iterator[np.ndarray]:
    wanted = to_numpy(_stored_shape(value, role)[1])
    limits = np.iinfo(np.int32)
    for chunk in weights.chunks(value, role):
        whole = chunk.dtype == np.int64 and chunk.size > 0
        if whole and not limits.min <= chunk.min() <= chunk.max() <= limits.max:
            raise CompileError(
                f"{value.name}: holds whole numbers beyond 32 bits, which WGSL has none of",
                remedy="compile for tvm-cpu or tvm-cuda",
            )
        yield chunk.astype(wanted, copy=False)
