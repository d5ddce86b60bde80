"""An artifact's graph with its weights, out of the layouts that kernels read: for whoever wants to run what
was shipped by the interpreter and look inside. No TVM is needed here.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...ir.core import Graph
from ...ir.errors import ArtifactError, InputError
from ...ir.parser import parse
from ...ir.printer import print_graph
from ...ir.weights import ArrayTensor, LazyTensor
from ..artifact import Artifact
from ..legalize import legalize
from .cpu import TvmCpu, supports
from .kernels.layout import unpack_rows
from .weights import Role, stored_shape, weight_roles

Array = np.ndarray[Any, Any]


class StoredTensor:
    """A weight as the graph has it, unpacked when it is read: [N, K], or of experts [E, N, K]."""

    def __init__(self, stored: Array, role: Role, shape: tuple[int, ...], dtype: str, name: str) -> None:
        self._stored, self._role = stored, role
        self.shape, self.dtype, self.source = shape, dtype, name

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        experts = self._role.experts
        if not experts:
            return np.ascontiguousarray(self._matrix(self._stored, self.shape[0])[start:stop])
        blocks = len(self._stored) // experts
        chosen = range(*slice(start, stop).indices(experts))
        matrices = [self._matrix(self._stored[e * blocks : (e + 1) * blocks], self.shape[1]) for e in chosen]
        return np.stack(matrices) if matrices else np.empty((0, *self.shape[1:]), self._stored.dtype)

    def _matrix(self, stored: Array, rows: int) -> Array:
        lay = self._role.layout
        match self._role.kind:
            case "linear":
                return unpack_rows(stored, rows)
            case "codes" if lay is not None:
                return lay.unpack(stored)
            case "scale" if lay is not None:
                return lay.unpack_scales(stored)
            case _:
                assert lay is not None
                return lay.unpack_zero_points(stored)


def stored_graph(artifact: Artifact) -> Graph:
    """The graph of an artifact's kernels with the weights that they read.

    Raises InputError where it was not compiled for tvm-cpu, ArtifactError where graph and weights do not
    belong together.
    """
    if TvmCpu.name not in artifact.manifest["targets"]:
        raise InputError(f"{artifact.root} has no target {TvmCpu.name}", remedy="compile it for that target")
    graph = legalize(parse(artifact.read_text("ir.txt")), TvmCpu.operations, supports)
    arrays = artifact.weights(TvmCpu.name)
    weights: dict[str, LazyTensor] = {}
    for value, role in weight_roles(graph).items():
        shape, dtype = stored_shape(value, role)
        array = arrays.get(value.name)
        if array is None or array.shape != shape or str(array.dtype) != dtype:
            raise ArtifactError(
                f"{artifact.root}: weight {value.name} is not as ir.txt has it", remedy="compile it again"
            )
        plain = role.layout is None and role.kind != "linear"
        weights[value.name] = (
            ArrayTensor(array, value.name)
            if plain
            else StoredTensor(array, role, tuple(int(str(d)) for d in value.shape), value.dtype, value.name)
        )
    return parse(print_graph(graph), weights)
