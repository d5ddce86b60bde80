"""`--quant keep`: stored codes reach the graph through merged layers, reordered rows, permuted columns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from llmc.frontend.weights import ReorderedTensor
from llmc.ir.core import Graph
from llmc.ir.errors import InputError
from llmc.ir.interpreter import run
from llmc.ir.ops.nn import Embedding, Linear
from llmc.ir.ops.quant import QuantizedEmbedding, QuantizedLinear
from llmc.ir.ops.shape import Concat, Gather
from llmc.ir.types import Quantization, TensorType, sym
from llmc.ir.verifier import verify
from llmc.ir.weights import ArrayTensor, LazyTensor, QuantizedTensors, quantized_of
from llmc.passes.base import Pass, PassContext
from llmc.passes.derived import ConcatRows, SliceRows
from llmc.passes.quantize.heads import QuantizeHead
from llmc.passes.quantize.keep import KeepQuantized
from llmc.passes.quantize.scheme import weight_passes
from llmc.passes.registry import quantization_passes

from .graphs import PagedRun, lowered, opnames, traced, worst
from .models import ids_of, tiny_model

T = sym("T")


class Stored:
    """A weight with quantized parts, its values computed here from the definition in float64."""

    dtype = "float32"

    def __init__(
        self, n: int, k: int, *, bits: int = 4, group: int = 16, zero: str = "uint8",
        permuted: bool = False, seed: int = 0,
    ) -> None:  # fmt: skip
        rng = np.random.default_rng(seed)
        groups = -(-k // group)
        codes = rng.integers(0, 1 << bits, (n, k)).astype(np.uint8)
        scale = rng.uniform(0.01, 0.1, (n, groups)).astype(np.float16)
        point = {
            "none": None,
            "uint8": rng.integers(0, 1 << bits, (n, groups)).astype(np.uint8),
            "float16": rng.normal(0, 0.3, (n, groups)).astype(np.float16),
        }[zero]
        columns = rng.permutation(k) if permuted else None
        wide = [
            None if a is None else np.repeat(a.astype(np.float64), group, 1)[:, :k] for a in (scale, point)
        ]
        q = codes.astype(np.float64)
        if wide[1] is None:
            values = wide[0] * (q - (1 << (bits - 1)))
        elif zero == "uint8":
            values = wide[0] * (q - wide[1])
        else:
            values = wide[0] * q + wide[1]
        if columns is not None:
            values = values[:, columns.argsort()]
        self.values = values.astype(np.float32)
        self.shape: tuple[int, ...] = (n, k)
        self.source = f"stored{seed}"
        self.quantized = QuantizedTensors(
            Quantization(bits, group, zero == "none"),
            ArrayTensor(codes), ArrayTensor(scale), None if point is None else ArrayTensor(point), columns,
        )  # fmt: skip

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray[Any, Any]:
        return self.values[start:stop].copy()


def linear_graph(data: LazyTensor, bias: bool = False) -> Graph:
    graph = Graph(stage="fused")
    n, k = data.shape
    x = graph.add_input("x", TensorType("float32", (T, k)))
    b = graph.add_weight("b", ArrayTensor(np.arange(n, dtype=np.float32))) if bias else None
    y = graph.append(Linear(x, graph.add_weight("w", data), b)).result
    graph.outputs, graph.output_names = [y], ["y"]
    return graph


def run_linear(graph: Graph, k: int) -> np.ndarray:
    x = np.random.default_rng(9).normal(size=(5, k)).astype(np.float32)
    return run(graph, {"x": torch.from_numpy(x)})[0].numpy()


def kept(graph: Graph) -> tuple[Graph, list[str]]:
    result = KeepQuantized().run(graph, PassContext())
    result.graph.stage = "quantized"
    verify(result.graph)
    return result.graph, result.notes


KINDS: dict[str, dict[str, Any]] = {
    "symmetric": {"zero": "none"},
    "zero points": {"zero": "uint8", "bits": 3},
    "float minimum": {"zero": "float16"},
    "permuted columns": {"permuted": True},
    "ragged last group": {"group": 24},
}


@pytest.mark.parametrize("kind", KINDS)
def test_kept_layer_computes_what_the_stored_weight_says(kind: str) -> None:
    data = Stored(12, 40, **KINDS[kind])
    wanted = run_linear(linear_graph(data, bias=True), 40)
    graph, notes = kept(linear_graph(data, bias=True))
    np.testing.assert_allclose(run_linear(graph, 40), wanted, atol=2e-5)
    names = opnames(graph)
    assert "linear" not in names and ("gather" in names) is (kind == "permuted columns")
    assert notes == []
    (op,) = [op for op in graph if isinstance(op, QuantizedLinear)]
    assert op.q.weight is data.quantized.codes and op.scale.weight is data.quantized.scale


def test_rows_that_are_joined_cut_and_reordered_keep_their_parts() -> None:
    one, other = Stored(6, 32, seed=1), Stored(10, 32, seed=2)
    joined = ConcatRows([one, other])
    order = np.random.default_rng(3).permutation(16)
    for data, values in (
        (joined, joined.read()),
        (SliceRows(joined, 4, 9), joined.read(4, 9)),
        (ReorderedTensor(joined, order), joined.read()[order]),
        (SliceRows(ReorderedTensor(joined, order), 1, 7), joined.read()[order][1:7]),
    ):
        parts = quantized_of(data)
        assert parts is not None and parts.codes.shape == data.shape
        graph, _ = kept(linear_graph(data))
        wanted = run_linear(linear_graph(ArrayTensor(values)), 32)
        np.testing.assert_allclose(run_linear(graph, 32), wanted, atol=2e-5)


DIFFERENT: dict[str, list[LazyTensor]] = {
    "bits": [Stored(6, 32, bits=4), Stored(4, 32, bits=8, seed=1)],
    "groups": [Stored(6, 32, group=16), Stored(4, 32, group=32, seed=1)],
    "kinds of zero point": [Stored(6, 32, zero="none"), Stored(4, 32, zero="uint8", seed=1)],
    "types of zero point": [Stored(6, 32, zero="float16"), Stored(4, 32, zero="uint8", seed=1)],
    "orders of columns": [Stored(6, 32, permuted=True), Stored(4, 32, permuted=True, seed=1)],
    "one is permuted": [Stored(6, 32, permuted=True), Stored(4, 32, seed=1)],
    "one is of floats": [Stored(6, 32), ArrayTensor(np.ones((4, 32), np.float32)), Stored(4, 32, seed=2)],
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_merged_layer_of_different_grids_is_cut(kind: str) -> None:
    data = ConcatRows(DIFFERENT[kind])
    assert quantized_of(data) is None
    wanted = run_linear(linear_graph(data, bias=True), 32)
    graph, _ = kept(linear_graph(data, bias=True))
    np.testing.assert_allclose(run_linear(graph, 32), wanted, atol=2e-5)
    assert sum(isinstance(op, Concat) for op in graph) == 1
    assert sum(isinstance(op, QuantizedLinear) for op in graph) == 2
    assert sum(isinstance(op, Linear) for op in graph) == (kind == "one is of floats")


def test_neighbours_on_one_grid_stay_one_layer() -> None:
    data = ConcatRows([ConcatRows([Stored(6, 32), Stored(4, 32, seed=1)]), Stored(4, 32, bits=8, seed=2)])
    graph, _ = kept(linear_graph(data))
    assert [op.q.shape[0] for op in graph if isinstance(op, QuantizedLinear)] == [10, 4]


@pytest.mark.parametrize("permuted", [False, True])
def test_table_that_is_embedding_and_head(permuted: bool) -> None:
    data = Stored(12, 32, permuted=permuted)
    graph = Graph(stage="fused")
    ids = graph.add_input("ids", TensorType("int32", (T,)))
    table = graph.add_weight("w", data)
    x = graph.append(Embedding(ids, table)).result
    graph.outputs = [x, graph.append(Linear(x, table, None)).result]
    graph.output_names = ["x", "y"]
    tokens = {"ids": torch.tensor([3, 11, 0], dtype=torch.int32)}
    wanted = run(graph, tokens)
    graph, _ = kept(graph)
    assert {type(op) for op in graph} >= {QuantizedEmbedding, QuantizedLinear}
    assert sum(isinstance(op, Gather) for op in graph) == 2 * permuted
    for got, want in zip(run(graph, tokens), wanted, strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=0)


def test_nothing_to_keep_is_refused() -> None:
    graph = linear_graph(ArrayTensor(np.ones((4, 8), np.float32)))
    with pytest.raises(InputError, match=r"main is not quantized.*choose a scheme, such as --quant int8"):
        KeepQuantized().run(graph, PassContext())


def beside_floats() -> Graph:
    """A layer with codes before one without."""
    graph = linear_graph(Stored(12, 32))
    data = ArrayTensor(np.ones((3, 12), np.float32))
    graph.outputs = [graph.append(Linear(graph.outputs[0], graph.add_weight("f", data))).result]
    return graph


def test_floats_beside_codes_are_said() -> None:
    _, said = kept(beside_floats())
    assert said == ["1 weights of linear layers are stored as floats and stay so"]


def test_a_head_that_stays_floats_is_named_with_the_way_out() -> None:
    graph = beside_floats()
    graph.facts["kind"] = "causal_lm"
    _, said = kept(graph.clone())
    assert said == ["f is stored as floats and stays so; --quant-head int8 gives it 8 bits a weight"]
    first, head = weight_passes("keep", "int8")
    assert isinstance(first, KeepQuantized) and first.head and isinstance(head, QuantizeHead)
    assert not first.run(graph, PassContext()).notes  # what is behind sees to it


def test_keep_is_a_scheme() -> None:
    passes: list[Pass] = quantization_passes("keep")
    assert passes == [KeepQuantized()]


def test_model_whose_layers_are_stored_in_codes() -> None:
    """Llama, paged: q and k of one permutation, v of another grid, o and the MLP of floats and codes."""
    model = tiny_model("llama")
    source = traced(model)
    stored = {
        "q_proj": Stored(64, 64, permuted=True, seed=1),
        "k_proj": Stored(32, 64, bits=3, seed=2),
        "down_proj": Stored(64, 96, group=32, zero="none", seed=3),
    }
    for name, value in source.weights.items():
        for part, data in stored.items():
            if part in name and "layers.0" in name:
                value.weight = data
    plain, _ = lowered(source, "paged")
    graph, records = lowered(source, "paged", quantization_passes("keep"))
    ids = ids_of(21)
    (wanted,) = PagedRun(plain).step([("a", ids)])
    (got,) = PagedRun(graph).step([("a", ids)])
    assert worst(got, wanted) < 1e-5
    assert sum(isinstance(op, QuantizedLinear) for op in graph) == 3
    assert any("stored as floats" in note for r in records for note in r.notes)
