"""page-kv-cache: what it makes of positions and rows, and what it refuses because sequences would meet."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from llmc.frontend.trace import trace_module
from llmc.ir.core import Graph
from llmc.ir.errors import UnsupportedError, VerifyError
from llmc.ir.ops.cache import GatherLast, PagedAttention
from llmc.ir.ops.math import CumSum
from llmc.ir.ops.nn import Linear
from llmc.ir.ops.shape import Full
from llmc.ir.types import sym
from llmc.ir.verifier import verify
from llmc.passes.base import PassContext
from llmc.passes.cache.paging import PageKvCache
from llmc.passes.manager import run_passes
from torch import nn

from .graphs import PagedRun, logits_of, lowered, notes, opnames, passes_to, worst
from .graphs import traced as traced_model
from .models import tiny_model

WIDTH, HEADS = 16, 2
Change = Callable[[torch.Tensor], torch.Tensor]


def nothing(x: torch.Tensor) -> torch.Tensor:
    return x


class Tiny(nn.Module):
    """ids [1, T] → rows: embedding (and learned positions), attention, `change`, norm, head."""

    def __init__(self, change: Change = nothing, *, causal: bool = True, offset: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.places = nn.Embedding(20, WIDTH), nn.Embedding(64, WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 20)
        self.inner = Inner(change)
        self.causal, self.offset = causal, offset

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(1, x.shape[1], HEADS, WIDTH // HEADS).transpose(1, 2)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        if self.offset is not None:  # positions as OPT counts them
            ones = torch.ones_like(input_ids)
            x = x + self.places((torch.cumsum(ones, dim=1) * ones).long() - 1 + self.offset)
        q, k, v = (self.split(layer(x)) for layer in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + y.transpose(1, 2).reshape(x.shape)
        return self.head(self.norm(self.inner(x)))


class Inner(nn.Module):
    def __init__(self, change: Change) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.change(x)


def traced(model: Tiny) -> Graph:
    # From 20 on, so that torch takes no length for one of the widths below; the graph holds for all lengths.
    shapes = {"input_ids": {1: torch.export.Dim("T", min=20, max=64)}}
    graph = trace_module(model, {"input_ids": torch.zeros(1, 23, dtype=torch.int64)}, dynamic_shapes=shapes)
    graph.facts["kind"] = "causal_lm" if model.causal else "encoder"
    return graph


def paged(model: Tiny) -> Graph:
    graph, _ = run_passes(traced(model), passes_to("paged", page_size=4), PassContext())
    return graph


def expected(model: Tiny, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids]))[0]


FIRST, SECOND = [3, 1, 4, 1, 5, 9, 2, 6, 5], [2, 7, 1, 8]


@pytest.mark.parametrize("offset", [None, 0, 2])
def test_positions_of_a_batch_in_chunks(offset: int | None) -> None:
    model = Tiny(offset=offset)
    graph = paged(model)
    assert graph.facts["page_size"] == 4 and {op.opname for op in graph} >= {"append_kv", "paged_attention"}
    assert not {"arange", "cumsum"} & set(opnames(graph))
    run = PagedRun(graph, seed=4)
    start = run.step([("a", FIRST[:5])])[0]
    whole, end = run.step([("b", SECOND), ("a", FIRST[5:])])
    assert worst(torch.cat((start, end)), expected(model, FIRST)) < 1e-5
    assert worst(whole, expected(model, SECOND)) < 1e-5
    again = run.step([("b", [3]), ("a", [7])])
    assert worst(again[0], expected(model, [*SECOND, 3])[-1:]) < 1e-5
    assert worst(again[1], expected(model, [*FIRST, 7])[-1:]) < 1e-5


class Counting(Tiny):
    """Positions as RoBERTa counts them: tokens that are no padding, from the padding's own number on."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        real = input_ids.ne(0).int()
        x = self.embed(input_ids) + self.places((torch.cumsum(real, dim=1) * real).long() + 0)
        q, k, v = (self.split(layer(x)) for layer in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(x + y.transpose(1, 2).reshape(x.shape))


def test_tokens_that_are_counted_become_positions_and_it_is_said() -> None:
    model = Counting()
    graph, records = run_passes(traced(model), passes_to("paged", page_size=4), PassContext())
    assert notes(records) == ["module counts tokens other than 0: taken as positions"]
    run = PagedRun(graph)
    head = run.step([("a", FIRST[:5])])[0]
    whole, tail = run.step([("b", SECOND), ("a", FIRST[5:])])
    assert worst(torch.cat((head, tail)), expected(model, FIRST)) < 1e-5
    assert worst(whole, expected(model, SECOND)) < 1e-5


class Cut(Tiny):
    """A table of places, of which a text's first rows are taken."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids) + self.places.weight[: input_ids.shape[1]]
        q, k, v = (self.split(layer(x)) for layer in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.head(x + y.transpose(1, 2).reshape(x.shape))


def test_a_table_that_is_cut_to_the_tokens_of_a_step_is_no_table_of_places() -> None:
    """A later step would take its first rows again; an encoder sees whole texts, one in a step."""
    with pytest.raises(UnsupportedError, match="slice in module cuts or joins along the axis of tokens"):
        paged(Cut())
    model = Cut(causal=False)
    graph = paged(model)
    assert graph.facts["alone"] is True
    assert worst(PagedRun(graph).step([("a", FIRST)])[0], expected(model, FIRST)) < 1e-5


def test_an_encoder_sees_the_whole_sequence_and_no_other() -> None:
    model = Tiny(causal=False)
    graph = paged(model)
    (op,) = [op for op in graph if isinstance(op, PagedAttention)]
    assert op.causal is False
    rows = PagedRun(graph).step([("a", FIRST), ("b", SECOND)])
    assert worst(rows[0], expected(model, FIRST)) < 1e-5
    assert worst(rows[1], expected(model, SECOND)) < 1e-5


def test_rows_are_chosen_before_the_norm_and_the_head() -> None:
    graph = paged(Tiny(lambda x: x * 2.0 + 1.0))
    names = opnames(graph)
    after = names[names.index("gather_last") + 1 :]
    assert after[-2:] == ["layer_norm", "linear"] and {"mul", "add"} <= set(after)
    assert graph.outputs[0].shape == (sym("R"), 20)
    assert next(op for op in graph if isinstance(op, GatherLast)).x.shape == (sym("T"), WIDTH)


def test_rows_that_part_and_meet_are_chosen_before_they_part() -> None:
    """Rows are chosen of what attention gives, and of what is added to it, which attention reads whole."""
    model = Tiny(lambda x: x + torch.tanh(x))
    graph = paged(model)
    assert [op.x.producer.opname for op in graph if isinstance(op, GatherLast)] == ["embedding", "reshape"]
    of_wanted = [op.opname for op in graph if op.results[0].shape[0] == sym("R")]
    assert of_wanted == ["gather_last", "gather_last", "add", "tanh", "add", "layer_norm", "linear"]
    rows = PagedRun(graph).step([("a", FIRST), ("b", SECOND)], last_only=True)
    assert worst(rows[0], expected(model, FIRST)[-1:]) < 1e-5
    assert worst(rows[1], expected(model, SECOND)[-1:]) < 1e-5


def test_of_the_last_layer_only_keys_values_and_queries_are_of_all_rows() -> None:
    model = tiny_model("llama")
    graph, _ = lowered(traced_model(model), "paged")
    wanted = {op.loc for op in graph if isinstance(op, Linear) and op.results[0].shape[0] == sym("R")}
    last = f"model.layers.{model.config.num_hidden_layers - 1}"
    assert {"lm_head", f"{last}.self_attn.o_proj", f"{last}.mlp.down_proj"} <= wanted
    assert not [where for where in wanted if not where.startswith((last, "lm_head")) or "k_proj" in where]


MIXING: dict[str, tuple[Change, str]] = {
    "mean": (lambda x: x - x.mean(1, keepdim=True), "reduce_mean in inner reduces over tokens"),
    "softmax": (lambda x: torch.softmax(x, 1), "softmax in inner normalises over tokens"),
    "look ahead": (
        lambda x: torch.cat((x[:, 1:], torch.zeros_like(x[:, :1])), 1),
        "slice in inner cuts or joins along the axis of tokens",
    ),
    "sum": (lambda x: x.cumsum(1), "cumsum in inner runs along the tokens"),
    "product": (lambda x: x @ x.transpose(1, 2) @ x, "matmul in inner"),
    "attention by hand": (
        lambda x: torch.sigmoid(x @ x.transpose(1, 2)) @ x,
        "matmul in inner",
    ),
    "attention to a prefix": (
        lambda x: nn.functional.scaled_dot_product_attention(
            x, x, x, attn_mask=torch.arange(x.shape[1])[None, :] < 3 + 0 * torch.arange(x.shape[1])[:, None]
        ),
        "less in inner has two axes of tokens: sequences would meet (the mask is neither causal nor a",
    ),
    "heads and tokens confused": (
        lambda x: x.view(1, x.shape[1], 4, 4).transpose(1, 2).reshape(1, x.shape[1], 16),
        "reshape in inner moves the axis of tokens",
    ),
    "length": (lambda x: x / x.shape[1], "dim_value in inner reads the number of tokens"),
    "by position": (
        lambda x: x[0, torch.arange(x.shape[1]) // 2][None],
        "index in inner picks rows by index",
    ),
    "by sequence and position": (
        lambda x: x[torch.zeros(1, 1, dtype=torch.long), torch.arange(x.shape[1])[None] // 2],
        "index in inner picks rows by index",
    ),
}


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_rows_is_refused_by_op_and_module(name: str) -> None:
    change, sentence = MIXING[name]
    model = Tiny(change)
    graph = traced(model)
    assert worst(logits_of(graph, FIRST), expected(model, FIRST)) < 1e-5, "alone it is right"
    with pytest.raises(UnsupportedError) as caught:
        run_passes(graph, passes_to("paged", page_size=4), PassContext())
    assert str(caught.value).startswith(sentence), str(caught.value)
    assert "sequences would meet" in str(caught.value)


def test_the_refusal_says_why_attention_was_not_fused() -> None:
    change = MIXING["attention to a prefix"][0]
    with pytest.raises(
        UnsupportedError, match=r"sequences would meet \(the mask is neither causal nor a sliding window"
    ):
        paged(Tiny(change))


def test_a_model_without_attention_is_refused() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(8, 4)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.embed(input_ids)

    graph = trace_module(Words(), {"input_ids": torch.zeros(1, 5, dtype=torch.int64)}, name="words")
    graph.facts["kind"] = "causal_lm"
    with pytest.raises(UnsupportedError, match="words holds no attention that was recognised"):
        run_passes(graph, passes_to("paged"), PassContext())


@pytest.mark.parametrize(("keys", "values"), [(8, 4), (4, 8)])
def test_values_and_keys_of_other_widths_share_pages_of_the_wider(keys: int, values: int) -> None:
    class Narrow(Tiny):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(input_ids)
            q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
            y = nn.functional.scaled_dot_product_attention(
                q[..., :keys], k[..., :keys], v[..., :values], is_causal=True
            )
            return y.transpose(1, 2).reshape(1, x.shape[1], 2 * values)

    model = Narrow()
    graph = paged(model)
    assert graph.facts["kv"][0]["head_dim"] == 8 and graph.outputs[0].shape[-1] == 2 * values
    run = PagedRun(graph)
    head = run.step([("a", FIRST[:4])])[0]
    tail, other = run.step([("a", FIRST[4:]), ("b", SECOND)])
    assert worst(torch.cat([head, tail]), expected(model, FIRST)) <= 1e-6
    assert worst(other, expected(model, SECOND)) <= 1e-6


def test_attention_that_looks_ahead_generates_nothing() -> None:
    graph = traced(Tiny(causal=False))
    graph.facts["kind"] = "causal_lm"
    with pytest.raises(UnsupportedError, match=r"sees the tokens that are to be generated; .*is_decoder"):
        run_passes(graph, passes_to("paged", page_size=4), PassContext())


def test_attention_that_was_not_fused_is_not_paged() -> None:
    """Without a mask of its own: the first layer was fused, the second has keys of rank 3."""
    model = Tiny(lambda x: nn.functional.scaled_dot_product_attention(x, x, x))
    with pytest.raises(UnsupportedError) as caught:
        paged(model)
    assert str(caught.value).startswith("sdpa in inner attends to other tokens and was not paged: sequences")
    assert "(attention over tensors of rank 3, not [B, H, T, D] (inner))" in str(caught.value)


def test_the_stage_holds_no_op_that_mixes_tokens() -> None:
    graph = paged(Tiny())
    one = graph.append(Full(value=1, dtype="int64", shape=(4,))).result
    graph.append(CumSum(one))
    with pytest.raises(VerifyError, match="cumsum may not stand in a graph of stage paged"):
        verify(graph)


def test_options_reach_the_graph() -> None:
    fused, _ = run_passes(traced(Tiny()), passes_to("fused"), PassContext())
    result = PageKvCache(page_size=8, kv_dtype="float16").run(fused, PassContext()).graph
    pages = result.input("kv_pages.0").type
    assert pages.dtype == "float16" and pages.shape == (2, sym("N"), 8, HEADS, WIDTH // HEADS)
    assert result.facts["kv"] == [{"heads": HEADS, "head_dim": WIDTH // HEADS, "window": None}]
