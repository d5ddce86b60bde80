"""Mask analysis against brute force: whatever `classify` says, the interpreter's concrete mask says the same;
what is not a causal or window mask is refused, never misread.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llmc.frontend.trace import trace_module
from llmc.ir.core import Graph
from llmc.ir.interpreter import run
from llmc.ir.ops import math as m
from llmc.ir.ops.shape import Arange, Expand, Full, Index, Reshape, Slice
from llmc.ir.types import TensorType, sym
from llmc.ir.weights import ArrayTensor
from llmc.passes.base import PassContext
from llmc.passes.fuse.masks import MaskAnalysis, MaskFacts, classify, stored_triangle
from llmc.passes.manager import run_passes
from llmc.passes.pipelines import canonicalize
from torch import nn

W = 7
LENGTHS = (1, 5, W - 1, W, W + 1, 40)
LOWEST = torch.finfo(torch.float32).min
MaskOf = Callable[[torch.Tensor], torch.Tensor]


def graph_of(mask: MaskOf) -> Graph:
    """The traced graph of a function x [T] → mask."""

    class Module(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return mask(x)

    shapes = {"x": {0: torch.export.Dim("T", min=2, max=4096)}}
    return trace_module(Module(), {"x": torch.zeros(9)}, dynamic_shapes=shapes)


def facts_of(graph: Graph) -> MaskFacts | str:
    return classify(MaskAnalysis().meaning(graph.outputs[0]))


def visible_by(graph: Graph, length: int) -> np.ndarray:
    """[T, T] of bool: the concrete mask."""
    mask = run(graph, {"x": torch.zeros(length)})[0]
    seen = mask if mask.dtype == torch.bool else mask == 0
    return np.broadcast_to(seen.numpy(), (*seen.shape[:-2], length, length)).reshape(-1, length, length)[0]


def visible_as(facts: MaskFacts, length: int) -> np.ndarray:
    i, j = np.arange(length)[:, None], np.arange(length)[None, :]
    seen = np.ones((length, length), dtype=bool)
    if facts.causal:
        seen &= j <= i
    if facts.window is not None:
        seen &= abs(i - j) < facts.window
    return seen


def rows(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(x.shape[0])[:, None]


def columns(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(x.shape[0])[None, :]


def causal(x: torch.Tensor) -> torch.Tensor:
    return columns(x) <= rows(x)


def additive(seen: torch.Tensor, hidden: float) -> torch.Tensor:
    return torch.where(seen, 0.0, hidden)


def packed(x: torch.Tensor) -> torch.Tensor:
    """transformers' form for packed sequences, with positions that count up: one sequence."""
    positions = torch.arange(x.shape[0])[None, :]
    jumps = torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1
    sequence = jumps.cumsum(-1)
    batch = torch.arange(1)[:, None, None]
    same = sequence[batch, rows(x)] == sequence[batch, columns(x)]
    return (same & causal(x))[:, None]


UNDERSTOOD: dict[str, tuple[MaskOf, MaskFacts]] = {
    "causal": (causal, MaskFacts(True, None)),
    "causal, greater": (lambda x: ~(columns(x) > rows(x)), MaskFacts(True, None)),
    "causal, strict form": (lambda x: columns(x) < rows(x) + 1, MaskFacts(True, None)),
    "causal in 4 axes": (lambda x: causal(x)[None, None], MaskFacts(True, None)),
    "everything": (lambda x: (rows(x) >= 0) & (columns(x) >= 0), MaskFacts(False, None)),
    "ones": (lambda x: torch.ones(x.shape[0], x.shape[0], dtype=torch.bool), MaskFacts(False, None)),
    "zeros to add": (lambda x: torch.zeros(x.shape[0], x.shape[0]), MaskFacts(False, None)),
    "sliding": (lambda x: causal(x) & (rows(x) - columns(x) < W), MaskFacts(True, W)),
    "sliding, transformers": (lambda x: (columns(x) > rows(x) - W) & causal(x), MaskFacts(True, W)),
    "two windows": (
        lambda x: causal(x) & (rows(x) - columns(x) < W) & (rows(x) - columns(x) < W + 3),
        MaskFacts(True, W),
    ),
    "window of one": (lambda x: causal(x) & (rows(x) - columns(x) < 1), MaskFacts(True, 1)),
    "two-sided": (
        lambda x: (rows(x) - columns(x) < W) & (columns(x) - rows(x) < W),
        MaskFacts(False, W),
    ),
    "packed": (packed, MaskFacts(True, None)),
    "packed, sliding": (lambda x: packed(x) & (columns(x) > rows(x) - W), MaskFacts(True, W)),
    "added -inf": (lambda x: additive(causal(x), float("-inf")), MaskFacts(True, None)),
    "added minimum": (lambda x: additive(causal(x), LOWEST), MaskFacts(True, None)),
    "added -1e4": (lambda x: additive(causal(x), -1e4), MaskFacts(True, None)),
    "two masks added": (
        lambda x: additive(causal(x), LOWEST) + additive(rows(x) - columns(x) < W, LOWEST),
        MaskFacts(True, W),
    ),
    "filled": (
        lambda x: torch.zeros(x.shape[0], x.shape[0]).masked_fill(~causal(x), LOWEST),
        MaskFacts(True, None),
    ),
    "full of minimum, filled with 0": (
        lambda x: torch.full((x.shape[0], x.shape[0]), LOWEST).masked_fill(causal(x), 0.0),
        MaskFacts(True, None),
    ),
    "one minus mask": (lambda x: (1.0 - causal(x).float()) * LOWEST, MaskFacts(True, None)),
    "one minus integers": (lambda x: (1 - causal(x).long()).float() * -1e4, MaskFacts(True, None)),
    "tril of ones": (
        lambda x: torch.tril(torch.ones(x.shape[0], x.shape[0], dtype=torch.bool)),
        MaskFacts(True, None),
    ),
    "tril == 0 filled": (
        lambda x: torch.zeros(x.shape[0], x.shape[0]).masked_fill(
            torch.tril(torch.ones(x.shape[0], x.shape[0])) == 0, float("-inf")
        ),
        MaskFacts(True, None),
    ),
    "triu of -inf": (
        lambda x: torch.triu(torch.full((x.shape[0], x.shape[0]), float("-inf")), diagonal=1),
        MaskFacts(True, None),
    ),
    "or with nothing": (lambda x: causal(x) | (columns(x) < 0), MaskFacts(True, None)),
    "or with itself": (lambda x: causal(x) | causal(x), MaskFacts(True, None)),
    "or with everything": (lambda x: causal(x) | (columns(x) >= 0), MaskFacts(False, None)),
    "diagonal": (lambda x: columns(x) == rows(x), MaskFacts(True, 1)),
    "both shifted": (lambda x: columns(x) + 3 <= rows(x) + 3, MaskFacts(True, None)),
    "doubled but one": (lambda x: additive(causal(x), -2e4) * 2.0, MaskFacts(True, None)),
}

REFUSED: dict[str, MaskOf] = {
    "strictly lower": lambda x: columns(x) < rows(x),
    "one ahead": lambda x: columns(x) <= rows(x) + 1,
    "upper": lambda x: columns(x) >= rows(x),
    "dilated": lambda x: causal(x) & ((rows(x) - columns(x)) % 2 == 0),
    "prefix": lambda x: causal(x) | (columns(x) < 4),
    "sinks and window": lambda x: causal(x) & ((rows(x) - columns(x) < W) | (columns(x) < 2)),
    "chunked": lambda x: causal(x) & (rows(x) // W == columns(x) // W),
    "without the diagonal": lambda x: columns(x) != rows(x),
    "nothing": lambda x: columns(x) < 0 * rows(x),
    "window far behind": lambda x: causal(x) & (rows(x) - columns(x) >= 2),
    "window behind only": lambda x: rows(x) - columns(x) < W,
    "lopsided": lambda x: (rows(x) - columns(x) < W) & (columns(x) - rows(x) < 3),
    "first keys": lambda x: (columns(x) < 5) & (rows(x) >= 0),
    "slopes differ": lambda x: columns(x) <= 2 * rows(x),
    "by the length": lambda x: columns(x) <= rows(x) + x.shape[0] - 1,
    "weak bias": lambda x: additive(causal(x), -10.0),
    "positive bias": lambda x: torch.where(causal(x), 1.0, LOWEST),
    "biased everywhere": lambda x: additive(causal(x), -2e4) + 2e4,
    "scaled away": lambda x: additive(causal(x), -2e4) * 0.1,
    "alibi": lambda x: (columns(x) - rows(x)).float() * 0.5 + additive(causal(x), LOWEST),
    "not a conjunction": lambda x: ~(causal(x) & (rows(x) - columns(x) < W)),
    "by values": lambda x: causal(x) & (x[None, :] > -1),
    "index from the end": lambda x: causal(x)[rows(x) - 1, columns(x)],
    "narrow integers": lambda x: (columns(x) * 64).to(torch.int8) <= (rows(x) * 64).to(torch.int8),
    "floats": lambda x: torch.arange(x.shape[0], dtype=torch.float32)[None, :] <= rows(x).float() + 0.5,
    "flipped": lambda x: (x.shape[0] - 1 - columns(x)) <= rows(x),
    "counted": lambda x: causal(x).long().cumsum(-1) <= W,
}


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_understood_masks_equal_the_interpreter(name: str) -> None:
    mask, expected = UNDERSTOOD[name]
    graph = graph_of(mask)
    canonical, _ = run_passes(graph.clone(), canonicalize(), PassContext())
    assert facts_of(graph) == expected
    assert facts_of(canonical) == expected
    for length in LENGTHS:
        seen = visible_by(graph, length)
        np.testing.assert_array_equal(seen, visible_as(expected, length), err_msg=f"length {length}")
        np.testing.assert_array_equal(seen, visible_by(canonical, length), err_msg=f"canonical, {length}")


@pytest.mark.parametrize("name", REFUSED)
def test_other_masks_are_refused_with_a_sentence(name: str) -> None:
    graph = graph_of(REFUSED[name])
    for g in (graph, run_passes(graph.clone(), canonicalize(), PassContext())[0]):
        facts = facts_of(g)
        assert isinstance(facts, str), f"{name} was read as {facts}"
        assert facts.startswith("the mask ")


def random_mask(draw: st.DrawFn, g: Graph, depth: int) -> m.Op:
    """A random boolean expression over query and key positions, most of them no mask that anybody wants."""
    length = sym("T")

    def position() -> object:
        value = g.append(Arange(length=length, start=draw(st.integers(-2, 3)))).result
        shape = (length, 1) if draw(st.booleans()) else (1, length)
        value = g.append(Reshape(value, shape=shape)).result
        for _ in range(draw(st.integers(0, 2))):
            number = g.append(Full(value=draw(st.integers(-3, 9)), dtype="int64")).result
            kind = draw(st.sampled_from([m.Add, m.Sub, m.Mul]))
            value = g.append(kind(value, number)).result
        return value

    if depth == 0:
        kind = draw(st.sampled_from([m.Less, m.LessEqual, m.Greater, m.GreaterEqual, m.Equal, m.NotEqual]))
        return g.append(kind(position(), position())).result  # type: ignore[arg-type]
    choice = draw(st.sampled_from(["and", "and", "or", "not", "where"]))
    a = random_mask(draw, g, depth - 1)
    if choice == "not":
        return g.append(m.LogicalNot(a)).result
    b = random_mask(draw, g, depth - 1)
    if choice == "where":
        return g.append(m.Where(a, b, random_mask(draw, g, 0))).result
    return g.append((m.LogicalAnd if choice == "and" else m.LogicalOr)(a, b)).result


@st.composite
def mask_graphs(draw: st.DrawFn) -> Graph:
    g = Graph("mask", "canonical")
    x = g.add_input("x", TensorType("float32", (sym("T"),)))
    value = random_mask(draw, g, draw(st.integers(0, 3)))
    if draw(st.booleans()):
        yes = g.append(Full(value=draw(st.sampled_from([0.0, 0.0, 1.0])), dtype="float32")).result
        no = g.append(Full(value=draw(st.sampled_from([-1e4, LOWEST, -1.0])), dtype="float32")).result
        value = g.append(m.Where(value, *((yes, no) if draw(st.booleans()) else (no, yes)))).result
    g.outputs, g.output_names = [value], ["mask"]
    assert x.name == "x"
    return g


@settings(max_examples=400, deadline=None)
@given(mask_graphs())
def test_random_masks_are_never_misread(graph: Graph) -> None:
    facts = facts_of(graph)
    if isinstance(facts, str):
        return
    for length in (1, 2, 3, 6, 13):
        seen = visible_by(graph, length)
        np.testing.assert_array_equal(seen, visible_as(facts, length), err_msg=f"{facts} at {length}")


@pytest.mark.parametrize("window", [None, 1, 3, 16])
def test_stored_triangles(window: int | None) -> None:
    table = np.tri(16, dtype=bool)
    if window is not None:
        table &= ~np.tri(16, k=-window, dtype=bool)
    g = Graph("stored", "canonical")
    g.add_input("x", TensorType("float32", (sym("T"),)))
    weight = g.add_weight("bias", ArrayTensor(table[None, None]))
    value = g.append(Slice(weight, axis=-2, start=0, stop=sym("T"))).result
    g.outputs = [g.append(Slice(value, axis=-1, start=0, stop=sym("T"))).result]
    facts = facts_of(g)
    assert isinstance(facts, MaskFacts) and facts.causal
    for length in (1, 2, 5, 16):
        np.testing.assert_array_equal(visible_by(g, length), visible_as(facts, length))


def test_a_stored_table_that_is_nearly_causal_is_not_one() -> None:
    table = np.tri(16, dtype=bool)
    table[9, 3] = False
    assert stored_triangle(ArrayTensor(table)) is None
    assert stored_triangle(ArrayTensor(np.tri(16, k=-1, dtype=bool))) is None
    assert stored_triangle(ArrayTensor(np.tri(16, k=1, dtype=bool))) is None
    assert stored_triangle(ArrayTensor(np.tri(16, dtype=np.uint8) * 2)) is None
    assert stored_triangle(ArrayTensor(np.tri(8, 16, dtype=bool))) is None


def test_length_one_axes_lose_their_index() -> None:
    """cumsum over an axis of length one, broadcast afterwards, is the same number everywhere."""
    g = Graph("unit", "canonical")
    length = sym("T")
    g.add_input("x", TensorType("float32", (length,)))
    one = g.append(m.CumSum(g.append(Full(value=1, dtype="int64", shape=(1, 1))).result)).result
    wide = g.append(Expand(one, shape=(length, length))).result
    limit = g.append(Full(value=2, dtype="int64")).result
    g.outputs = [g.append(m.Less(wide, limit)).result]
    assert facts_of(g) == MaskFacts(False, None)
    assert visible_by(g, 5).all()


def test_index_must_not_count_from_the_end() -> None:
    g = Graph("index", "canonical")
    length = sym("T")
    g.add_input("x", TensorType("float32", (length,)))
    table = g.append(Arange(length=length)).result
    back = g.append(Arange(length=length, start=-1)).result
    assert MaskAnalysis().meaning(g.append(Index(table, [back])).result) is None
    straight = g.append(Arange(length=length)).result
    assert MaskAnalysis().meaning(g.append(Index(table, [straight])).result) is not None
