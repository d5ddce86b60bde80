"""Biases along the keys with a slope a head: what fuse-attention reads them from, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from llmc.frontend.trace import trace_module
from llmc.ir.core import Graph
from llmc.ir.errors import UnsupportedError, VerifyError
from llmc.ir.interpreter import run
from llmc.ir.ops.attention import Attention
from llmc.ir.types import TensorType
from llmc.ir.verifier import verify
from llmc.passes.base import PassContext
from llmc.passes.manager import run_passes
from llmc.passes.pipelines import function
from torch import nn

from .graphs import PagedRun, logits_of, notes, opnames, passes_to, worst

HEADS, WIDTH, TABLE = 6, 8, 64
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def slopes() -> torch.Tensor:
    return 1.0 / torch.pow(2, torch.arange(1, HEADS + 1) * 8 / HEADS)


def hidden(length: int) -> torch.Tensor:
    return torch.triu(torch.ones(length, length, dtype=torch.bool), 1)


def added(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """A bias of [1, H, 1, T], and a mask added after it."""
    bias = slopes()[None, :, None, None] * torch.arange(q.shape[-2])
    scores = q @ k.transpose(-1, -2) * 0.3 + bias
    masked = scores + torch.where(hidden(q.shape[-2]), torch.finfo(torch.float32).min, 0.0)
    return torch.softmax(masked, -1) @ v


def merged(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Batch and heads in one axis, and a product that adds the bias."""
    flat = [x.reshape(HEADS, -1, WIDTH) for x in (q, k, v)]
    positions = torch.ones(1, q.shape[-2], dtype=torch.int64).cumsum(-1) - 1
    bias = (slopes()[:, None] * positions[:, None, :]).reshape(HEADS, 1, -1)
    scores = bias.baddbmm(flat[0], flat[1].transpose(-1, -2), beta=1.0, alpha=0.3)
    scores = scores.view(1, HEADS, q.shape[-2], -1).masked_fill(hidden(q.shape[-2]), -1e9)
    return (torch.softmax(scores, -1).view(HEADS, q.shape[-2], -1) @ flat[2]).view(q.shape)


def cut(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """A table of distances to the end, cut to the length; the bias is divided, too."""
    table = torch.arange(1 - TABLE, 1).view(1, 1, TABLE) * slopes().view(HEADS, 1, 1) / 2
    scores = q @ k.transpose(-1, -2) * 0.3 + table[:, :, TABLE - q.shape[-2] :]
    return torch.softmax(scores.masked_fill(hidden(q.shape[-2]), -1e9), -1) @ v


def in_mask(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The bias is in the additive mask of torch's operator."""
    bias = (slopes()[:, None, None] * torch.arange(q.shape[-2])).reshape(1, HEADS, 1, -1)
    mask = torch.masked_fill(bias / math.sqrt(WIDTH), hidden(q.shape[-2]), -1e9)
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def relative(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Distances of keys to the query, taken off."""
    steps = torch.arange(q.shape[-2])
    bias = slopes()[:, None, None] * (steps[:, None] - steps[None, :])
    return torch.softmax((q @ k.transpose(-1, -2) - bias).masked_fill(hidden(q.shape[-2]), -1e9), -1) @ v


def symmetric(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Falls on both sides of the query: no slope along the keys."""
    steps = torch.arange(q.shape[-2])
    bias = slopes()[:, None, None] * (steps[None, :] - steps[:, None]).abs()
    return torch.softmax(q @ k.transpose(-1, -2) - bias, -1) @ v


def squares(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """A slope that grows with the square of the position."""
    steps = torch.arange(q.shape[-2])
    bias = slopes()[:, None, None] * (steps * steps)
    return torch.softmax((q @ k.transpose(-1, -2) + bias).masked_fill(hidden(q.shape[-2]), -1e9), -1) @ v


class Model(nn.Module):
    """ids [1, T] → rows, by one attention."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, HEADS * WIDTH)
        self.q, self.k, self.v = (nn.Linear(HEADS * WIDTH, HEADS * WIDTH) for _ in range(3))
        self.head, self.attend = nn.Linear(HEADS * WIDTH, 20), attend

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        parts = [f(x).view(1, x.shape[1], HEADS, WIDTH).transpose(1, 2) for f in (self.q, self.k, self.v)]
        return self.head(x + self.attend(*parts).transpose(1, 2).reshape(x.shape))


def traced(attend: Attend) -> tuple[Model, Graph]:
    model = Model(attend).eval()
    shapes = {"input_ids": {1: torch.export.Dim("T", min=20, max=TABLE - 1)}}
    graph = trace_module(model, {"input_ids": torch.zeros(1, 23, dtype=torch.int64)}, dynamic_shapes=shapes)
    graph.facts["kind"] = "causal_lm"
    return model, graph


@pytest.mark.parametrize("attend", [added, merged, cut, in_mask, relative])
def test_slopes_are_read_and_the_paged_graph_computes_the_same(attend: Attend) -> None:
    """Largest difference ≤ 2e-6 of the largest value, in two chunks and beside another sequence."""
    model, graph = traced(attend)
    fused, _ = run_passes(graph.clone(), function([]), PassContext())
    (op,) = [op for op in fused if isinstance(op, Attention)]
    assert op.slopes is not None and op.slopes.shape == (HEADS,) and op.causal
    assert not {"softmax", "matmul", "sdpa"} & set(opnames(fused))
    first, second = [3 + i % 13 for i in range(40)], [1 + i % 7 for i in range(21)]
    wanted = [model(torch.tensor([ids]))[0].detach() for ids in (first, second)]
    assert worst(logits_of(fused, first), wanted[0]) <= 2e-6
    paged = PagedRun(run_passes(graph.clone(), passes_to("paged"), PassContext())[0])
    head = paged.step([("a", first[:17])])[0]
    tail, whole = paged.step([("a", first[17:]), ("b", second)])
    assert worst(torch.cat([head, tail]), wanted[0]) <= 2e-6
    assert worst(whole, wanted[1]) <= 2e-6


@pytest.mark.parametrize("attend", [symmetric, squares])
def test_other_biases_are_refused_by_what_they_are(attend: Attend) -> None:
    _, graph = traced(attend)
    _, records = run_passes(graph.clone(), function([]), PassContext())
    assert any("a bias of positions is added to the scores" in note for note in notes(records))
    with pytest.raises(UnsupportedError, match="a bias of positions is added to the scores"):
        run_passes(graph.clone(), passes_to("paged"), PassContext())


def test_slopes_of_another_number_and_beside_sinks_are_no_graph() -> None:
    def graph(slopes: int, sinks: int) -> Graph:
        g = Graph()
        q, k, v = (g.add_input(n, TensorType("float32", (1, 5, 4, 8))) for n in "qkv")
        one, other = (
            g.add_input(n, TensorType("float32", (count,))) if count else None
            for n, count in (("sinks", sinks), ("slopes", slopes))
        )
        g.outputs, g.output_names = [g.append(Attention(q, k, v, one, other, scale=1.0)).result], ["y"]
        return g

    verify(graph(4, 0), "fused")
    with pytest.raises(VerifyError, match="one number a head"):
        verify(graph(3, 0), "fused")
    with pytest.raises(VerifyError, match="sinks and slopes at once"):
        verify(graph(4, 4), "fused")


def test_the_meaning_is_that_of_the_formula() -> None:
    """The op beside softmax(q·k·scale + slope·(j - i)) · v in float64, to 1e-6."""
    g = Graph()
    q, k, v = (g.add_input(n, TensorType("float32", (1, 7, 2, 4))) for n in "qkv")
    along = g.add_input("slopes", TensorType("float32", (2,)))
    g.outputs, g.output_names = [g.append(Attention(q, k, v, None, along, scale=0.5)).result], ["y"]
    torch.manual_seed(1)
    given = {n: torch.randn(1, 7, 2, 4) for n in "qkv"} | {"slopes": torch.tensor([0.5, 0.25])}
    a, b, c = (given[n][0].double().transpose(0, 1) for n in "qkv")
    steps = torch.arange(7)
    scores = a @ b.mT * 0.5 + given["slopes"].double()[:, None, None] * (steps[None] - steps[:, None])
    wanted = torch.softmax(scores.masked_fill(hidden(7), -math.inf), -1) @ c
    torch.testing.assert_close(run(g, given)[0][0].double(), wanted.transpose(0, 1), atol=1e-6, rtol=0)
