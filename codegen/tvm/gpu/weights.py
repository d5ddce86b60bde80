"""A graph's weights as a GPU's kernels read them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from ....ir.core import Graph, Value
from ....ir.dtypes import to_numpy
from ....ir.errors import CompileError
from ...artifact import TensorSpec
from ..weights import PLAIN, Role, aligned_rows, experts_of, specs_of, weight_roles
from .layout import GpuLayout


def gpu_layout(role: Role, shape: tuple[int, ...]) -> GpuLayout:
    """The layout of the matrix that a weight is, or is a part of."""
    if role.layout is None:
        n, k = shape
        return GpuLayout(n, k)
    return GpuLayout(role.layout.n, role.layout.k, role.layout)


def stored_shape(weight: Value, role: Role) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of a weight as it is stored for a GPU."""
    shape = tuple(d for d in weight.shape if isinstance(d, int))
    if role == PLAIN:
        return shape, weight.dtype
    layout = gpu_layout(role, shape[-2:])
    many = max(1, role.experts)
    if role.kind in ("linear", "codes"):
        codes = (many * layout.tiles, *layout.codes_shape[1:])
        return codes, "float16" if layout.quant is None else "uint8"
    return (many * layout.tiles, *layout.groups_shape[1:]), weight.dtype


def weight_specs(graph: Graph, report: Callable[[float], None] = lambda share: None) -> list[TensorSpec]:
    """Every weight as `ArtifactWriter.write_weights` takes it, read when its chunks are asked for.

    `report` is told the share of the bytes that were packed.
    """
    return specs_of(weight_roles(graph), stored_shape, chunks, report)


def chunks(value: Value, role: Role) -> Iterator[np.ndarray]:
    """A weight as it is stored, part by part."""
    assert value.weight is not None
    wanted = to_numpy(value.dtype)
    pack: Callable[[np.ndarray], np.ndarray] = np.ascontiguousarray
    if role != PLAIN:
        layout = gpu_layout(role, tuple(d for d in value.shape[-2:] if isinstance(d, int)))
        pack = layout.pack if role.kind in ("linear", "codes") else layout.pack_groups
    for rows in experts_of(value.weight) if role.experts else aligned_rows(value.weight):
        try:
            yield pack(rows.astype(wanted, copy=False))
        except CompileError as error:
            raise CompileError(f"{value.name}: {error.message}", remedy=error.remedy) from None
