"""Biases that each key brings along: what fuse-attention reads them from, what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from llmc.frontend.trace import trace_module
from llmc.ir.core import Graph
from llmc.ir.ops.attention import Attention
from llmc.passes.base import PassContext
from llmc.passes.manager import run_passes
from llmc.passes.pipelines import function
from torch import nn

from .graphs import PagedRun, logits_of, notes, opnames, passes_to, worst

HEADS, KV, WIDTH = 4, 2, 8
LOWEST = torch.finfo(torch.float32).min
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
sdpa = nn.functional.scaled_dot_product_attention


def hidden(q: torch.Tensor) -> torch.Tensor:
    return torch.triu(torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool), 1)


def repeated(x: torch.Tensor) -> torch.Tensor:
    """As transformers writes it."""
    b, heads, rows, width = x.shape
    wide = x[:, :, None].expand(b, heads, HEADS // heads, rows, width)
    return wide.reshape(b, HEADS, rows, width)


def in_mask(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The mask of torch's operator is one bias for every query, hidden in part, and repeated for heads."""
    mask = bias[:, :, None, :].expand(-1, -1, q.shape[-2], -1).masked_fill(hidden(q), LOWEST)
    return sdpa(q, repeated(k), repeated(v), attn_mask=repeated(mask), scale=0.4)


def in_window(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """What is hidden is no conjunction of comparisons; what is not hidden is one."""
    steps = torch.arange(q.shape[-2])
    seen = ~hidden(q) & (steps[:, None] - steps[None] < 5)
    by_numbers = torch.where(seen, 0.0, LOWEST) != 0
    mask = repeated(bias[:, :, None, :].expand(-1, -1, q.shape[-2], -1).masked_fill(by_numbers, LOWEST))
    first = sdpa(q, repeated(k), repeated(v), attn_mask=mask)
    return first + sdpa(first, repeated(k), repeated(v), attn_mask=mask.masked_fill(~seen, LOWEST))


def added(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    scores = q @ repeated(k).transpose(-1, -2) * 0.4 + repeated(bias[:, :, None, :])
    return torch.softmax(scores.masked_fill(hidden(q), LOWEST), -1) @ repeated(v)


def shared(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """One number for all heads."""
    scores = q @ repeated(k).transpose(-1, -2) * 0.4 + bias[:, :1, None, :]
    return torch.softmax(scores.masked_fill(hidden(q), LOWEST), -1) @ repeated(v)


def capped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    scores = torch.tanh(q @ repeated(k).transpose(-1, -2) / 2) * 2 + repeated(bias[:, :, None, :])
    return torch.softmax(scores.masked_fill(hidden(q), LOWEST), -1) @ repeated(v)


def of_query_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """A number for each head of queries: heads of keys are fewer."""
    wide = torch.cat([bias, 2 * bias], 1)[:, :, None, :]
    scores = q @ repeated(k).transpose(-1, -2) + wide
    return torch.softmax(scores.masked_fill(hidden(q), LOWEST), -1) @ repeated(v)


def of_queries(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """What a query says of each key."""
    mask = (repeated(bias[..., None]) * repeated(bias[:, :, None, :])).masked_fill(hidden(q), LOWEST)
    return sdpa(q, repeated(k), repeated(v), attn_mask=mask)


class Model(nn.Module):
    """ids [1, T] → rows, by one attention; a bias [1, KV, T] is computed of what is attended to."""

    def __init__(self, attend: Attend, kv: int = KV) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, HEADS * WIDTH)
        self.q = nn.Linear(HEADS * WIDTH, HEADS * WIDTH)
        self.k, self.v = (nn.Linear(HEADS * WIDTH, kv * WIDTH) for _ in range(2))
        self.bias = nn.Linear(HEADS * WIDTH, kv)
        self.head, self.attend = nn.Linear(HEADS * WIDTH, 20), attend

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        parts = [f(x).view(1, x.shape[1], -1, WIDTH).transpose(1, 2) for f in (self.q, self.k, self.v)]
        bias = torch.exp(self.bias(x)).transpose(-1, -2)
        return self.head(x + self.attend(*parts, bias).transpose(1, 2).reshape(x.shape))


def traced(attend: Attend, kv: int = KV, larger: float = 0.0) -> tuple[Model, Graph]:
    """`larger`: added to the logarithm of the bias, which then differs less from key to key."""
    model = Model(attend, kv).eval()
    with torch.no_grad():
        model.bias.bias += larger
        model.bias.weight *= 1 if not larger else 0.02
    shapes = {"input_ids": {1: torch.export.Dim("T", min=2, max=63)}}
    graph = trace_module(model, {"input_ids": torch.zeros(1, 23, dtype=torch.int64)}, dynamic_shapes=shapes)
    graph.facts["kind"] = "causal_lm"
    return model, graph


@pytest.mark.parametrize("attend", [in_mask, in_window, added, shared])
@pytest.mark.parametrize("kv", [1, KV, HEADS])
def test_a_bias_of_each_key_becomes_a_part_of_it(attend: Attend, kv: int) -> None:
    """Largest difference ≤ 5e-6 of the largest value, in two chunks and beside another sequence."""
    model, graph = traced(attend, kv)
    fused, _ = run_passes(graph.clone(), function([]), PassContext())
    found = [op for op in fused if isinstance(op, Attention)]
    assert len(found) == (2 if attend is in_window else 1)
    op = found[-1]
    assert op.window == (5 if attend is in_window else None)
    assert op.q.shape[-1] == op.k.shape[-1] == 16 and op.v.shape[-1] == WIDTH and op.causal
    assert not {"softmax", "matmul", "sdpa"} & set(opnames(fused))
    first, second = [i * 7 % 20 for i in range(33)], [i * 3 % 20 for i in range(21)]
    with torch.no_grad():
        wanted = [model(torch.tensor([ids]))[0] for ids in (first, second)]
    assert worst(logits_of(fused, first), wanted[0]) <= 5e-6
    paged = PagedRun(run_passes(graph, passes_to("paged"), PassContext())[0])
    head = paged.step([("a", first[:17])])[0]
    tail, whole = paged.step([("a", first[17:]), ("b", second)])
    assert worst(torch.cat([head, tail]), wanted[0]) <= 5e-6
    assert worst(whole, wanted[1]) <= 5e-6


def test_a_large_bias_is_not_rounded_to_16_bits() -> None:
    """Of some 100, where bfloat16 has steps of a half: what is left is what rounding keys and values costs
    (1.1e-3; 0.038 with the bias as one number).
    """
    model, graph = traced(added, larger=4.5)
    ids = [i * 7 % 20 for i in range(33)]
    with torch.no_grad():
        wanted = model(torch.tensor([ids]))[0]
    paged = PagedRun(run_passes(graph, passes_to("paged", kv_dtype="bfloat16"), PassContext())[0])
    found = torch.cat([paged.step([("a", ids[:17])])[0], paged.step([("a", ids[17:])])[0]])
    assert worst(found, wanted) <= 5e-3


REFUSED: dict[str, tuple[Attend, str]] = {
    "capped": (capped, "a bias of each key is added to scores that are capped"),
    "of heads of queries": (of_query_heads, "a bias of 4 heads is added to scores of 2 heads of keys"),
    "of queries": (of_queries, "what is added to the scores is computed from hidden states"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_biases_are_refused(name: str) -> None:
    attend, sentence = REFUSED[name]
    model, graph = traced(attend)
    fused, records = run_passes(graph, function([]), PassContext())
    assert not [op for op in fused if isinstance(op, Attention)]
    assert any(sentence in note for note in notes(records)), notes(records)
    ids = [3, 1, 4, 1, 5]
    with torch.no_grad():
        assert worst(logits_of(fused, ids), model(torch.tensor([ids]))[0]) <= 5e-6
