"""Values stacked in front of the batch axis: taken apart, or left as they are; never another result."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from llmc.frontend.trace import trace_module
from llmc.ir.core import Graph, Op
from llmc.ir.interpreter import run
from llmc.ir.ops import math as m
from llmc.ir.ops.shape import Slice
from llmc.ir.types import Dim, TensorType, sym
from llmc.passes.base import PassContext
from llmc.passes.cache.paging import row_mixing
from llmc.passes.canonicalize.stacks import Unstack
from llmc.passes.manager import run_passes
from llmc.passes.pipelines import canonicalize
from torch import nn

from .graphs import opnames


class Stacked(nn.Module):
    """A function of three hidden states [3, 1, T, 4], made of x [1, T, 4]."""

    def __init__(self, function: Callable[[Stacked, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, torch.stack([x, x * 2, torch.relu(x)]))


def mixed(s: Stacked, h: torch.Tensor) -> torch.Tensor:
    """As alternating updates predict: each of the new states a sum of the old ones, by the token."""
    by = s.layer(h[0])[..., :3, None] * torch.tanh(h[1][..., None, :3])
    return ((h.permute(1, 2, 3, 0) @ by).permute(3, 0, 1, 2) + h)[2]


def corrected(s: Stacked, h: torch.Tensor) -> torch.Tensor:
    """As they correct: each by a factor of its own."""
    by = (s.layer(h[0])[..., :3] + 1).permute(2, 0, 1).unsqueeze(-1)
    out = (h[0] - h[1]).repeat(3, 1, 1, 1) * by + h
    out[1:] += h[0]
    return out[0] - out[2]


KNOWN: dict[str, Callable[[Stacked, torch.Tensor], torch.Tensor]] = {
    "one": lambda s, h: h[1],
    "mixed": mixed,
    "corrected": corrected,
    "mean": lambda s, h: h.mean(0) + h[1:].sum(0),
    "mean kept": lambda s, h: h.mean(0, keepdim=True) * 2,
    "chosen": lambda s, h: torch.where(h[:1] > 0, h, -h).to(torch.float64).sum(0),
    "zeros": lambda s, h: (torch.zeros_like(h) + h * 2)[1],
    "layer": lambda s, h: s.layer(h).sum(0),
    "joined again": lambda s, h: torch.cat([h[2:], h[:2] * 3])[0] + torch.cat([h, h])[5],
}
OTHER: dict[str, Callable[[Stacked, torch.Tensor], torch.Tensor]] = {
    "over the stack": lambda s, h: torch.softmax(h, 0)[1],
    "largest": lambda s, h: h.amax(0),
    "itself": lambda s, h: h * 2,
    "of three axes": lambda s, h: (h.sum(-1) * 2).transpose(0, 1),
}


def traced(function: Callable[[Stacked, torch.Tensor], torch.Tensor]) -> tuple[Stacked, Graph]:
    torch.manual_seed(0)
    module = Stacked(function).eval()
    tokens = torch.export.Dim("T", min=2, max=64)
    return module, trace_module(module, [torch.randn(1, 5, 4)], dynamic_shapes={"x": {1: tokens}})


def same(module: Stacked, graph: Graph) -> None:
    for length in (2, 7):
        x = torch.randn(1, length, 4)
        with torch.no_grad():
            torch.testing.assert_close(run(graph, {"x": x})[0], module(x), atol=1e-6, rtol=1e-6)


def stacks(graph: Graph) -> list[Op]:
    return [op for op in graph if op.results[0].shape[:2] == (3, 1)]


@pytest.mark.parametrize("name", KNOWN)
def test_nothing_stands_before_the_batch(name: str) -> None:
    """To 1e-6: sums are added in another order."""
    module, graph = traced(KNOWN[name])
    assert stacks(graph)
    graph, _ = run_passes(graph, canonicalize(), PassContext())
    assert not stacks(graph)
    same(module, graph)


@pytest.mark.parametrize("name", OTHER)
def test_what_is_not_known_keeps_its_stack(name: str) -> None:
    module, graph = traced(OTHER[name])
    graph, _ = run_passes(graph, canonicalize(), PassContext())
    assert stacks(graph)
    same(module, graph)


def test_other_graphs_are_left_alone() -> None:
    graph = Graph()
    x = graph.add_input("x", TensorType("float32", (3, sym("T"), 4)))
    graph.outputs = [graph.append(Slice(x, axis=-3, start=0, stop=1)).results[0]]
    before = opnames(graph)
    assert not Unstack().run(graph, PassContext()).changed
    assert opnames(graph) == before


@pytest.mark.parametrize(
    ("a", "b", "mixes"),
    [
        ((sym("T"), 4, 3), (sym("T"), 3, 5), False),  # each token's own matrices
        ((4, 3), (sym("T"), 3, 5), False),
        ((sym("T"), 3), (3, 5), False),
        ((1, sym("T"), 3), (sym("T"), 3, 3), True),
        ((4, sym("T")), (sym("T"), 3), True),
        ((4, 3), (3, sym("T")), False),  # each token's column
        ((2, 1, 4, 3), (2, 1, 3, sym("T")), False),
        ((sym("T"), 3), (3, sym("T")), True),
    ],
)
def test_products_that_keep_tokens_apart(a: tuple[Dim, ...], b: tuple[Dim, ...], mixes: bool) -> None:
    graph = Graph()
    left, right = (graph.add_input(n, TensorType("float32", s)) for n, s in (("a", a), ("b", b)))
    assert (row_mixing(graph.append(m.MatMul(left, right))) is not None) is mixes
