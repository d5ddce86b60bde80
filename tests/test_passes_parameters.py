"""Which weights of 16 bits become float32, and which stay; every target is given such a graph."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
import torch
from llmc.codegen.target import get_target
from llmc.ir.core import Graph, Value
from llmc.ir.interpreter import run
from llmc.ir.ops import math as m
from llmc.ir.ops import nn
from llmc.ir.ops.shape import Full, Reshape, Slice, Transpose
from llmc.ir.types import TensorType, sym
from llmc.ir.verifier import verify
from llmc.ir.weights import ArrayTensor
from llmc.passes.canonicalize.parameters import widen_parameters

T = sym("T")


def graph_of(build: Callable[..., Value], *shapes: tuple[int, ...]) -> Graph:
    """build(graph, x float32 [T, 8], weights of bfloat16, …) → its only output."""
    graph = Graph()
    x = graph.add_input("x", TensorType("float32", (T, 8)))
    rng = np.random.default_rng(0)
    weights = [
        graph.add_weight(f"w{i}", ArrayTensor(rng.standard_normal(shape).astype(ml_dtypes.bfloat16), f"w{i}"))
        for i, shape in enumerate(shapes)
    ]
    graph.outputs, graph.output_names = [build(graph, x, *weights)], ["y"]
    return graph


def dtypes(graph: Graph) -> dict[str, str]:
    verify(graph)
    return {name: v.dtype for name, v in graph.weights.items()}


def linear(graph: Graph, x: Value, w: Value, b: Value) -> Value:
    return graph.append(nn.Linear(x, w, b)).result


def normed(graph: Graph, x: Value, w: Value, b: Value) -> Value:
    return graph.append(nn.LayerNorm(x, w, b, eps=1e-5)).result


def test_matrices_stay_and_biases_and_norms_do_not() -> None:
    graph = graph_of(linear, (6, 8), (6,))
    before = graph.weights["w1"].weight
    assert before is not None
    values = before.read().astype(np.float32)
    assert widen_parameters(graph) == 1
    assert dtypes(graph) == {"w0": "bfloat16", "w1": "float32"}
    after = graph.weights["w1"].weight
    assert after is not None and np.array_equal(after.read(), values)
    graph = graph_of(normed, (8,), (8,))
    assert widen_parameters(graph) == 2 and set(dtypes(graph).values()) == {"float32"}
    assert widen_parameters(graph) == 0


def test_what_is_computed_of_them_is_float32_with_the_constants_beside() -> None:
    """1 - w, and a part of it that is added."""

    def build(graph: Graph, x: Value, w: Value) -> Value:
        one = graph.append(Full(1.0, "bfloat16", ())).result
        rest = graph.append(m.Sub(one, w)).result
        part = graph.append(Slice(rest, -1, 0, 8)).result
        return graph.append(m.Mul(x, graph.append(m.Cast(part, dtype="float32")).result)).result

    graph = graph_of(build, (16,))
    assert widen_parameters(graph) == 1
    assert dtypes(graph) == {"w0": "float32"}
    assert all(op.result.dtype == "float32" for op in graph if op.opname in ("sub", "slice", "mul"))


def test_a_table_that_is_a_matrix_too_stays_and_a_small_one_does_not() -> None:
    def build(graph: Graph, x: Value, w: Value) -> Value:
        ids = graph.add_input("ids", TensorType("int32", (T,)))
        rows = graph.append(nn.Embedding(ids, w)).result
        return graph.append(m.Add(x, graph.append(m.Cast(rows, dtype="float32")).result)).result

    assert widen_parameters(big := graph_of(build, (4096, 8))) == 0 and dtypes(big) == {"w0": "bfloat16"}
    assert widen_parameters(small := graph_of(build, (32, 8))) == 1 and dtypes(small) == {"w0": "float32"}


def test_matrices_that_are_moved_and_stay_no_layer_are_multiplied_in_float32() -> None:
    """W x of several heads, as it is traced and as targets get it."""

    def build(graph: Graph, x: Value, w: Value) -> Value:
        columns = graph.append(Transpose(x, perm=(-1, -2))).result
        return graph.append(m.MatMul(graph.append(Reshape(w, shape=(2, 1, 8))).result, columns)).result

    graph = graph_of(build, (2, 8))
    assert widen_parameters(graph) == 0 and graph.outputs[0].dtype == "float32"
    x = np.random.default_rng(1).standard_normal((3, 8)).astype(np.float32)
    weight = graph.weights["w0"].weight
    assert weight is not None
    wanted = weight.read().astype(np.float32)[:, None] @ x.T
    legal = get_target("tvm-cpu").legal(graph)
    for one in (graph, legal):
        np.testing.assert_allclose(run(one, {"x": torch.from_numpy(x)})[0].numpy(), wanted, atol=1e-5)
    (product,) = (op for op in legal if isinstance(op, m.MatMul))
    assert {v.dtype for v in product.operands} == {"float32"}


@pytest.mark.parametrize("target", ["tvm-cpu", "tvm-cuda", "tvm-webgpu", "onnx-cpu"])
def test_no_target_is_given_others(target: str) -> None:
    def build(graph: Graph, x: Value, w: Value, b: Value, scale: Value, shift: Value) -> Value:
        return normed(graph, linear(graph, x, w, b), scale, shift)

    legal = get_target(target).legal(graph_of(build, (8, 8), (8,), (8,), (8,)))
    assert dtypes(legal) == {"w0": "bfloat16", "w1": "float32", "w2": "float32", "w3": "float32"}
