"""An artifact's graph with its weights, out of the layouts that kernels read: for whoever wants to run what
was shipped by the interpreter and look inside. No TVM is needed here.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...ir.core import Graph, Value
from ...ir.dtypes import to_numpy
from ...ir.errors import ArtifactError, InputError
from ...ir.parser import parse
from ...ir.printer import print_graph
from ...ir.weights import ArrayTensor, LazyTensor
from ..artifact import Artifact
from ..extensions import parse_graph
from .cpu import TvmCpu
from .kernels.layout import ROWS, unpack_rows
from .weights import Role, stored_shape, weight_roles

Array = np.ndarray[Any, Any]


class StoredTensor:
    """A weight as the graph has it, [N, K], or of experts [E, N, K]: what is read of it is unpacked then, and
    no more than that.
    """

    def __init__(self, stored: Array, role: Role, shape: tuple[int, ...], dtype: str, name: str) -> None:
        self._stored, self._role = stored, role
        self.shape, self.dtype, self.source = shape, dtype, name

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        chosen = range(*slice(start, stop).indices(self.shape[0]))
        experts = self._role.experts
        if not experts:
            return self._rows(self._stored, chosen.start, chosen.stop)
        blocks = len(self._stored) // experts
        found = np.empty((len(chosen), *self.shape[1:]), to_numpy(self.dtype))
        for i, e in enumerate(chosen):
            found[i] = self._rows(self._stored[e * blocks : (e + 1) * blocks], 0, self.shape[1])
        return found

    def _rows(self, stored: Array, start: int, stop: int) -> Array:
        """Rows start … stop-1 of a matrix, out of the blocks that hold them."""
        if start >= stop:
            return np.empty((0, self.shape[-1]), to_numpy(self.dtype))
        first = start // ROWS
        rows = self._unpacked(stored[first : -(-stop // ROWS)])
        return np.ascontiguousarray(rows[start - first * ROWS : stop - first * ROWS])

    def _unpacked(self, stored: Array) -> Array:
        """The rows of some blocks."""
        lay = self._role.layout
        match self._role.kind:
            case "linear":
                return unpack_rows(stored, ROWS * len(stored))
            case "codes" if lay is not None:
                return lay.unpack(stored)
            case "scale" if lay is not None:
                return lay.unpack_scales(stored)
            case _:
                assert lay is not None
                return lay.unpack_zero_points(stored)


def stored_weights(artifact: Artifact, graph: Graph, remedy: str) -> dict[Value, tuple[Array, Role]]:
    """The array of each weight of a legalized graph, and its role.

    Raises ArtifactError where one does not lie as this version's kernels read it.
    """
    arrays = artifact.weights(TvmCpu.name)
    found: dict[Value, tuple[Array, Role]] = {}
    for value, role in weight_roles(graph).items():
        shape, dtype = stored_shape(value, role)
        array = arrays.get(value.name)
        if array is None or array.shape != shape or str(array.dtype) != dtype:
            raise ArtifactError(
                f"{artifact.root}: weight {value.name} is stored in another way than these kernels read it",
                remedy=remedy,
            )
        found[value] = (array, role)
    return found


def stored_graph(artifact: Artifact) -> Graph:
    """The graph of an artifact's kernels with the weights that they read.

    Raises InputError where it was not compiled for tvm-cpu, ArtifactError where graph and weights do not
    belong together.
    """
    if TvmCpu.name not in artifact.manifest["targets"]:
        raise InputError(f"{artifact.root} has no target {TvmCpu.name}", remedy="compile it for that target")
    graph = TvmCpu().legal(parse_graph(artifact.read_text("ir.txt")))
    weights: dict[str, LazyTensor] = {}
    for value, (array, role) in stored_weights(artifact, graph, "compile the model again").items():
        plain = role.layout is None and role.kind != "linear"
        weights[value.name] = (
            ArrayTensor(array, value.name)
            if plain
            else StoredTensor(array, role, tuple(int(str(d)) for d in value.shape), value.dtype, value.name)
        )
    return parse(print_graph(graph), weights)
