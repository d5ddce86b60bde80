"""fuse-attention: what it recognises, what it refuses and with which sentence, and that meaning stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from llmc.frontend.trace import trace_module
from llmc.ir.core import Graph
from llmc.ir.interpreter import run
from llmc.ir.ops.attention import Attention
from llmc.passes.base import PassContext
from llmc.passes.manager import run_passes
from llmc.passes.pipelines import function
from torch import nn

from .graphs import notes, opnames

HEADS, KV, WIDTH, WINDOW = 4, 2, 8, 5
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]


class Block(nn.Module):
    """Projections to [B, H, T, D] around an attention; `sinks` [H] is there for those who want it."""

    def __init__(self, attend: Attend, kv: int = KV) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query = nn.Linear(32, HEADS * WIDTH)
        self.key, self.value = nn.Linear(32, kv * WIDTH), nn.Linear(32, kv * WIDTH)
        self.sinks = nn.Parameter(torch.randn(HEADS))
        self.attend, self.kv = attend, kv

    def forward(self, x: torch.Tensor) -> Any:
        length = x.shape[1]
        q = self.query(x).view(1, length, HEADS, WIDTH).transpose(1, 2)
        k = self.key(x).view(1, length, self.kv, WIDTH).transpose(1, 2)
        v = self.value(x).view(1, length, self.kv, WIDTH).transpose(1, 2)
        out = self.attend(q, k, v, self.sinks) if self.attend in WITH_SINKS else self.attend(q, k, v)
        if isinstance(out, tuple):
            return out[0].transpose(1, 2).reshape(1, length, -1), out[1]
        return out.transpose(1, 2).reshape(1, length, -1)


def repeat_kv(x: torch.Tensor, times: int = HEADS // KV) -> torch.Tensor:
    """As transformers writes it."""
    batch, heads, length, width = x.shape
    return (
        x[:, :, None].expand(batch, heads, times, length, width).reshape(batch, heads * times, length, width)
    )


def seen(q: torch.Tensor, window: int | None = None) -> torch.Tensor:
    steps = torch.arange(q.shape[-2])
    mask = steps[None, :] <= steps[:, None]
    return mask if window is None else mask & (steps[:, None] - steps[None, :] < window)


def bias(q: torch.Tensor, window: int | None = None) -> torch.Tensor:
    return torch.where(seen(q, window), 0.0, float("-inf"))[None, None]


sdpa = nn.functional.scaled_dot_product_attention


def scores_of(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return q @ repeat_kv(k, q.shape[1] // k.shape[1]).transpose(-1, -2) * 0.3


def mixed(weights: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return weights @ repeat_kv(v, weights.shape[1] // v.shape[1])


def softcapped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    capped = torch.tanh(scores_of(q, k) / 2.0) * 2.0
    return mixed(torch.softmax(capped + bias(q), -1), v)


def with_sinks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """As gpt-oss attends."""
    scores = scores_of(q, k) + bias(q, WINDOW)
    column = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
    joined = torch.cat([scores, column], dim=-1)
    joined = joined - joined.amax(-1, keepdim=True)
    return mixed(torch.softmax(joined, -1)[..., :-1], v)


def sinks_along_queries(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor
) -> torch.Tensor:
    joined = torch.cat([scores_of(q, k), sinks.reshape(1, 1, -1, 1).expand(1, HEADS, -1, -1)], dim=-1)
    return mixed(torch.softmax(joined, -1)[..., :-1], v)


def sinks_kept(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    column = sinks.reshape(1, -1, 1, 1).expand(1, -1, q.shape[-2], -1)
    joined = torch.softmax(torch.cat([scores_of(q, k) + bias(q), column], dim=-1), -1)
    padded = torch.cat([repeat_kv(v), torch.zeros_like(repeat_kv(v)[:, :, :1])], dim=2)
    return joined @ padded


def sinks_behind(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """As Granite attends with windows: what a further logit leaves to the others, behind the softmax."""
    scores = scores_of(q, k) + bias(q, WINDOW)
    left = (torch.logsumexp(scores, -1) - sinks.view(1, -1, 1)).sigmoid()
    return mixed(torch.softmax(scores, -1, dtype=torch.float32), v) * left.unsqueeze(-1)


def other_sum(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    scores = scores_of(q, k) + bias(q)
    left = (torch.logsumexp(2 * scores, -1) - sinks.view(1, -1, 1)).sigmoid()
    return mixed(torch.softmax(scores, -1), v) * left.unsqueeze(-1)


WITH_SINKS = (with_sinks, sinks_along_queries, sinks_kept, sinks_behind, other_sum)

FUSED: dict[str, tuple[Attend, dict[str, Any]]] = {
    "sdpa, is_causal": (
        lambda q, k, v: sdpa(q, repeat_kv(k), repeat_kv(v), is_causal=True),
        {"causal": True},
    ),
    "sdpa, gqa inside": (lambda q, k, v: sdpa(q, k, v, is_causal=True, enable_gqa=True), {"causal": True}),
    "sdpa, bool mask": (
        lambda q, k, v: sdpa(q, repeat_kv(k), repeat_kv(v), attn_mask=seen(q), scale=0.3),
        {"causal": True, "scale": 0.3},
    ),
    "sdpa, window": (
        lambda q, k, v: sdpa(q, repeat_kv(k), repeat_kv(v), attn_mask=seen(q, WINDOW)),
        {"causal": True, "window": WINDOW},
    ),
    "sdpa, whole": (lambda q, k, v: sdpa(q, repeat_kv(k), repeat_kv(v)), {"causal": False}),
    "eager": (
        lambda q, k, v: mixed(torch.softmax(scores_of(q, k) + bias(q), -1), v),
        {"causal": True, "scale": 0.3},
    ),
    "eager, window": (
        lambda q, k, v: mixed(torch.softmax(scores_of(q, k) + bias(q, WINDOW), -1), v),
        {"causal": True, "window": WINDOW},
    ),
    "eager, whole": (lambda q, k, v: mixed(torch.softmax(scores_of(q, k), -1), v), {"causal": False}),
    "eager, filled": (
        lambda q, k, v: mixed(torch.softmax(scores_of(q, k).masked_fill(~seen(q), -1e9), -1), v),
        {"causal": True},
    ),
    "eager, where": (
        lambda q, k, v: mixed(torch.softmax(torch.where(seen(q), scores_of(q, k), -3e38), -1), v),
        {"causal": True},
    ),
    "eager, scaled before": (
        lambda q, k, v: mixed(torch.softmax((q / 2) @ repeat_kv(k).transpose(-1, -2) + bias(q), -1), v),
        {"causal": True, "scale": 0.5},
    ),
    "soft-cap": (softcapped, {"causal": True, "softcap": 2.0, "scale": 0.3}),
    "sinks": (with_sinks, {"causal": True, "window": WINDOW}),
    "sinks behind": (sinks_behind, {"causal": True, "window": WINDOW}),
}


def traced(attend: Attend, length: int = 9, kv: int = KV) -> tuple[Block, Graph, torch.Tensor]:
    block = Block(attend, kv)
    x = torch.randn(1, length, 32)
    return block, trace_module(block, {"x": x}), x


def fused(graph: Graph) -> tuple[Graph, list[str]]:
    result, records = run_passes(graph.clone(), function([]), PassContext())
    return result, notes(records)


@pytest.mark.parametrize("name", FUSED)
def test_attention_is_fused_and_keeps_its_meaning(name: str) -> None:
    attend, fields = FUSED[name]
    block, graph, x = traced(attend)
    result, _ = fused(graph)
    (op,) = [op for op in result if isinstance(op, Attention)]
    assert not {"softmax", "sdpa", "matmul", "expand"} & set(opnames(result))
    assert op.k.shape[-2] == KV  # the repeated heads are gone
    expected = {"window": None, "softcap": None, "scale": op.scale, **fields}
    assert {key: pytest.approx(getattr(op, key)) for key in expected} == expected
    assert (op.sinks is not None) is (attend in (with_sinks, sinks_behind))
    wanted = block(x)
    torch.testing.assert_close(run(graph, {"x": x})[0], wanted, atol=2e-6, rtol=0)
    torch.testing.assert_close(run(result, {"x": x})[0], wanted, atol=2e-6, rtol=0)


def test_a_factor_of_another_sum_is_no_sink() -> None:
    block, graph, x = traced(other_sum)
    result, _ = fused(graph)
    (op,) = [op for op in result if isinstance(op, Attention)]
    assert op.sinks is None and "sigmoid" in opnames(result)
    torch.testing.assert_close(run(result, {"x": x})[0], block(x), atol=2e-6, rtol=0)


@pytest.mark.parametrize("kv", [1, 4])
@pytest.mark.parametrize("name", ["sdpa, gqa inside", "eager"])
def test_one_key_head_and_as_many_as_query_heads(name: str, kv: int) -> None:
    block, graph, x = traced(FUSED[name][0], kv=kv)
    result, _ = fused(graph)
    (op,) = [op for op in result if isinstance(op, Attention)]
    assert op.k.shape[-2] == kv
    torch.testing.assert_close(run(result, {"x": x})[0], block(x), atol=2e-6, rtol=0)


def both(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    weights = torch.softmax(scores_of(q, k) + bias(q), -1)
    return mixed(weights, v), weights


def cross(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return sdpa(q, repeat_kv(k)[:, :, :6], repeat_kv(v)[:, :, :6])


def wrong_maximum(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = scores_of(q, k)
    return mixed(torch.softmax(scores - scores.amax(-2, keepdim=True), -1), v)


REFUSED: dict[str, tuple[Attend, str]] = {
    "weights used": (both, "FuseEagerAttention: the attention weights are used elsewhere"),
    "cross": (cross, "FuseSdpa: queries and keys have different lengths (cross-attention)"),
    "cross, eager": (
        lambda q, k, v: (
            torch.softmax(q @ repeat_kv(k)[:, :, :6].transpose(-1, -2), -1) @ repeat_kv(v)[:, :, :6]
        ),
        "FuseEagerAttention: queries and keys have different lengths (cross-attention)",
    ),
    "prefix": (
        lambda q, k, v: sdpa(
            q, repeat_kv(k), repeat_kv(v), attn_mask=seen(q) | (torch.arange(q.shape[-2]) < 3)
        ),
        "FuseSdpa: the mask is not understood: it is no comparison of query and key positions",
    ),
    "upper": (
        lambda q, k, v: mixed(torch.softmax(scores_of(q, k).masked_fill(seen(q), -1e9), -1), v),
        "FuseEagerAttention: the mask is neither causal nor a sliding window",
    ),
    "biased": (
        lambda q, k, v: mixed(torch.softmax(scores_of(q, k) + torch.arange(9.0), -1), v),
        "FuseEagerAttention: a bias of positions is added to the scores that is neither a slope a head",
    ),
    "mask before the cap": (
        lambda q, k, v: mixed(torch.softmax(torch.tanh(scores_of(q, k) + bias(q)) * 2.0, -1), v),
        "FuseEagerAttention: the softmax is not over a product of queries and keys",
    ),
    "keys not transposed": (
        lambda q, k, v: torch.softmax(q[:, :, :8] @ repeat_kv(k)[:, :, :8], -1) @ repeat_kv(v)[:, :, :8],
        "FuseEagerAttention: the keys are not transposed in the last two axes",
    ),
    "another maximum": (
        wrong_maximum,
        "FuseEagerAttention: the softmax is not over a product of queries and keys",
    ),
    "sinks along the queries": (
        sinks_along_queries,
        "FuseEagerAttention: the column beside the scores is no vector of sinks over the heads",
    ),
    "sinks that give something": (
        sinks_kept,
        "FuseEagerAttention: the sinks' column is not cut off after the softmax",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_attention_is_refused_with_a_sentence_and_left_as_it_was(name: str) -> None:
    attend, sentence = REFUSED[name]
    length = {"keys not transposed": WIDTH, "sinks along the queries": HEADS}.get(name, 9)
    block, graph, x = traced(attend, length)
    result, said = fused(graph)
    assert not [op for op in result if isinstance(op, Attention)]
    assert any(note.startswith(sentence) for note in said), said
    wanted = block(x)
    for got, value in zip(
        run(result, {"x": x}), wanted if isinstance(wanted, tuple) else (wanted,), strict=True
    ):
        torch.testing.assert_close(got, value, atol=2e-6, rtol=0)


def test_heads_that_do_not_divide_are_refused() -> None:
    class Odd(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return torch.softmax(q @ k.transpose(-1, -2), -1) @ k

    example = {"q": torch.randn(2, 4, 5, 8), "k": torch.randn(1, 1, 5, 8)}
    graph = trace_module(Odd(), example)
    result, said = fused(graph)
    assert said == ["FuseEagerAttention: keys or values are shared by the batch"]
    torch.testing.assert_close(run(result, example)[0], Odd()(**example), atol=1e-6, rtol=0)


def test_a_batch_of_sequences_is_attended_to_one_by_one() -> None:
    class Batch(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return sdpa(q, k, v, is_causal=True)

    example = {name: torch.randn(3, 2, 5, 8) for name in "qkv"}
    result, _ = fused(trace_module(Batch(), example))
    assert "attention" in opnames(result)
    torch.testing.assert_close(run(result, example)[0], Batch()(**example), atol=1e-6, rtol=0)
