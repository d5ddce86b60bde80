"""Tokens that are hidden behind as many as are no padding: none, in a model of text."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from llmc.ir.core import Graph, Value
from llmc.ir.interpreter import run
from llmc.ir.ops import math as m
from llmc.ir.ops.shape import Arange, Full, Reshape
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


def seen_turned(graph: Graph, ids: Value) -> Value:
    places = graph.append(Reshape(graph.append(Arange(length=T)).result, shape=(1, T))).result
    return graph.append(m.Greater(length(graph, ids), places)).result


@pytest.mark.parametrize("make", [seen, seen_turned])
def test_no_token_of_a_text_is_hidden(make: Callable[[Graph, Value], Value]) -> None:
    graph = made(make)
    result = FoldConstants().run(graph, PassContext())
    assert result.notes == ["g hides as many tokens at the end as are 7: none, a text has no padding"]
    assert opnames(graph) == ["full"]
    assert run(graph, {"input_ids": torch.tensor([[1, 7, 3]])})[0].tolist() == [[True] * 3]


@pytest.mark.parametrize(("kind", "name"), [("function", "input_ids"), ("encoder", "token_type_ids")])
def test_other_inputs_are_counted(kind: str, name: str) -> None:
    graph = made(seen, kind, name)
    assert not FoldConstants().run(graph, PassContext()).notes
    assert run(graph, {name: torch.tensor([[1, 7, 3]])})[0].tolist() == [[True, True, False]]


def others(
    op: type[m.Comparison] = m.NotEqual, start: int = 0, step: int = 1, sure: bool = True
) -> Callable[[Graph, Value], Value]:
    """Comparisons that are like it, and are not it."""

    def make(graph: Graph, ids: Value) -> Value:
        seven = graph.append(Full(value=7, dtype="int64")).result
        counted = graph.append(m.Cast(graph.append(op(ids, seven)).result, dtype="int64")).result
        count = graph.append(m.ReduceSum(counted, axes=(-1,), keepdim=True)).result
        places = graph.append(Arange(length=T, start=start, step=step)).result
        return graph.append((m.Less if sure else m.LessEqual)(places, count)).result

    return make


OTHERS = {
    "tokens that are the one": others(m.Equal),
    "tokens below it": others(m.Less),
    "places from one on": others(start=1),
    "every second place": others(step=2),
    "up to their number": others(sure=False),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_comparisons_stay(name: str) -> None:
    graph = made(OTHERS[name])
    before = graph.clone()
    assert not FoldConstants().run(graph, PassContext()).notes
    ids = {"input_ids": torch.tensor([[1, 7, 3, 9, 7]])}
    assert torch.equal(run(graph, ids)[0], run(before, ids)[0])
    assert "reduce_sum" in opnames(graph)


def test_a_number_of_tokens_that_is_used_otherwise_is_counted() -> None:
    graph = made(length)
    assert not FoldConstants().run(graph, PassContext()).notes
    assert run(graph, {"input_ids": torch.tensor([[1, 7, 3]])})[0].tolist() == [[2]]
