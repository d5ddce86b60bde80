"""How many tokens there are: counted by ids that are no padding, and compared with places."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from llmc.ir.core import Graph, Value
from llmc.ir.interpreter import run
from llmc.ir.ops import math as m
from llmc.ir.ops.shape import Arange, DimValue, Full, Reshape
from llmc.ir.types import TensorType, sym
from llmc.passes.base import PassContext
from llmc.passes.canonicalize.fold import FoldConstants

from .graphs import opnames

T = sym("T")


def made(make: Callable[[Graph, Value], Value], kind: str = "encoder", name: str = "input_ids") -> Graph:
    graph = Graph("g", "traced")
    graph.facts["kind"] = kind
    ids = graph.add_input(name, TensorType("int64", (1, T)))
    graph.outputs, graph.output_names = [make(graph, ids)], ["y"]
    return graph


def length(graph: Graph, ids: Value) -> Value:
    """sum(ids ≠ 7), as a column."""
    seven = graph.append(Full(value=7, dtype="int64")).result
    other = graph.append(m.Cast(graph.append(m.NotEqual(ids, seven)).result, dtype="int64")).result
    count = graph.append(m.ReduceSum(other, axes=(-1,))).result
    return graph.append(Reshape(count, shape=(1, 1))).result


def seen(graph: Graph, ids: Value) -> Value:
    places = graph.append(Arange(length=T)).result
    return graph.append(m.Less(places, length(graph, ids))).result


def test_tokens_that_are_no_padding_are_all_tokens() -> None:
    graph = made(seen)
    result = FoldConstants().run(graph, PassContext())
    assert result.notes == ["g counts tokens other than 7: taken as the number of tokens"]
    assert opnames(graph) == ["full"]
    assert run(graph, {"input_ids": torch.tensor([[1, 7, 3]])})[0].tolist() == [[True] * 3]


@pytest.mark.parametrize(("kind", "name"), [("function", "input_ids"), ("encoder", "token_type_ids")])
def test_other_inputs_are_counted(kind: str, name: str) -> None:
    graph = made(seen, kind, name)
    assert not FoldConstants().run(graph, PassContext()).notes
    assert run(graph, {name: torch.tensor([[1, 7, 3]])})[0].tolist() == [[True, True, False]]


@pytest.mark.parametrize("op", [m.Equal, m.Less])
def test_other_comparisons_are_counted(op: type[m.Comparison]) -> None:
    def some(graph: Graph, ids: Value) -> Value:
        seven = graph.append(Full(value=7, dtype="int64")).result
        other = graph.append(m.Cast(graph.append(op(ids, seven)).result, dtype="int64")).result
        return graph.append(m.ReduceSum(other, axes=(-1,))).result

    graph = made(some)
    assert not FoldConstants().run(graph, PassContext()).notes
    assert "reduce_sum" in opnames(graph)


@pytest.mark.parametrize(
    ("start", "step", "more", "known"),
    [
        (0, 1, 0, True),
        (0, 1, 2, True),
        (2, 1, 2, True),
        (1, 1, 0, False),
        (0, 1, -1, False),
        (0, 2, 9, False),
    ],
)
def test_places_below_their_number(start: int, step: int, more: int, known: bool) -> None:
    def below(graph: Graph, ids: Value) -> Value:
        places = graph.append(Arange(length=T, start=start, step=step)).result
        return graph.append(m.Less(places, graph.append(DimValue(dim=T + more)).result)).result

    graph = made(below)
    before = graph.clone()
    FoldConstants().run(graph, PassContext())
    assert (opnames(graph) == ["full"]) is known
    for n in (1, 2, 9):
        ids = {"input_ids": torch.zeros(1, n, dtype=torch.int64)}
        assert torch.equal(run(graph, ids)[0], run(before, ids)[0])


def test_fractions_are_compared() -> None:
    """2⁻²⁴ and the like: casts to floats may round."""

    def below(graph: Graph, ids: Value) -> Value:
        places = graph.append(m.Cast(graph.append(Arange(length=T)).result, dtype="float32")).result
        number = graph.append(DimValue(dim=T, dtype="float32")).result
        return graph.append(m.Less(places, number)).result

    graph = made(below)
    FoldConstants().run(graph, PassContext())
    assert "less" in opnames(graph)
