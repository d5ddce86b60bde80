"""Weights out of the layouts of kernels: parts read as the whole does, and cost what the part costs."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from llmc.codegen.tvm.kernels.layout import QuantLayout, pack_rows
from llmc.codegen.tvm.stored import StoredTensor, stored_weights
from llmc.codegen.tvm.weights import Role
from llmc.ir.core import Graph
from llmc.ir.errors import ArtifactError
from llmc.ir.ops import nn
from llmc.ir.types import TensorType, sym
from llmc.ir.weights import ArrayTensor

K = 256
RNG = np.random.default_rng(0)


def matrix(kind: str, n: int) -> tuple[np.ndarray, np.ndarray, Role]:
    """A matrix of n rows, how it is stored, and as what."""
    lay = QuantLayout(n, K, 4, 32, zero_point="uint8")
    if kind == "linear":
        rows = RNG.standard_normal((n, K)).astype(np.float32)
        return rows, pack_rows(rows), Role("linear")
    if kind == "codes":
        rows = RNG.integers(0, 16, (n, K), dtype=np.uint8)
        return rows, lay.pack(rows), Role("codes", lay)
    if kind == "scale":
        rows = RNG.random((n, K // 32)).astype(np.float16)
        return rows, lay.pack_scales(rows), Role("scale", lay)
    rows = RNG.integers(0, 16, (n, K // 32), dtype=np.uint8)
    return rows, lay.pack_zero_points(rows), Role("zero_point", lay)


KINDS = ("linear", "codes", "scale", "zero_point")
PARTS = [(0, None), (0, 0), (0, 1), (5, 40), (16, 32), (63, 70), (69, 70), (70, None), (40, 7)]
"""Of 70 rows: none, within a block, across blocks, the ragged last one, backwards."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("start", "stop"), PARTS)
def test_parts_of_a_matrix(kind: str, start: int, stop: int | None) -> None:
    rows, stored, role = matrix(kind, 70)
    found = StoredTensor(stored, role, rows.shape, str(rows.dtype), "w").read(start, stop)
    assert found.dtype == rows.dtype and found.flags.c_contiguous
    assert np.array_equal(found, rows[start:stop])


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_stacked_experts(kind: str) -> None:
    made = [matrix(kind, 24) for _ in range(3)]
    whole, role = np.stack([rows for rows, _, _ in made]), made[0][2]
    stored = np.concatenate([stored for _, stored, _ in made])
    tensor = StoredTensor(stored, Role(role.kind, role.layout, 3), whole.shape, str(whole.dtype), "w")
    for start, stop in ((0, None), (1, 2), (2, 2), (1, 9)):
        found = tensor.read(start, stop)
        assert found.dtype == whole.dtype and np.array_equal(found, whole[start:stop])


@pytest.mark.parametrize("experts", [0, 64])
def test_a_part_takes_the_memory_of_a_part(experts: int) -> None:
    rows, stored, role = matrix("codes", 64 * 64)
    if experts:
        lay = QuantLayout(64, K, 4, 32, zero_point="uint8")
        tensor = StoredTensor(stored, Role("codes", lay, experts), (experts, 64, K), "uint8", "w")
    else:
        tensor = StoredTensor(stored, role, rows.shape, "uint8", "w")
    tracemalloc.start()
    try:
        tensor.read(3, 4)
        assert tracemalloc.get_traced_memory()[1] < rows.nbytes // 8
    finally:
        tracemalloc.stop()


def test_arrays_that_lie_otherwise_are_refused_by_name() -> None:
    class Damaged:
        root = "m.llmc"

        def weights(self, target: str) -> dict[str, np.ndarray]:
            return {"w": np.zeros((2, 8, 16), np.float16)}

    graph = Graph()
    x = graph.add_input("x", TensorType("float32", (sym("T"), 8)))
    w = graph.add_weight("w", ArrayTensor(np.zeros((20, 8), np.float32), "w"))
    graph.outputs, graph.output_names = [graph.append(nn.Linear(x, w, None)).result], ["y"]
    with pytest.raises(ArtifactError, match=r"m\.llmc: weight w is stored in another way .*; again"):
        stored_weights(Damaged(), graph, "again")  # type: ignore[arg-type]
