"""Sizes and masks that are in tensors, and follow from sizes and numbers alone; and what nobody reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from llmc.frontend.export import narrower
from llmc.frontend.source import open_source
from llmc.frontend.trace import trace_module, trace_source
from llmc.ir.core import Graph
from llmc.ir.errors import UnsupportedError
from llmc.ir.interpreter import run
from torch import nn

from .families import save_family
from .graphs import lowered, opnames

ROWS = 24


class Table(nn.Module):
    """A function of a table [ROWS, 4] and tokens [1, T, 4]."""

    def __init__(self, function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("table", torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(2)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.table, x)


def traced(function: Any, *, least: int = 3, most: int = 12) -> tuple[nn.Module, Graph]:
    module = Table(function)
    shapes = {"x": {1: torch.export.Dim("T", min=least, max=most)}}
    graph = trace_module(module, (torch.zeros(1, 6, 4),), dynamic_shapes=shapes)
    graph.drop_dead()
    return module, graph


def span(x: torch.Tensor) -> torch.Tensor:
    return torch.tensor(x.shape[1])


SIZES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "both ends of a cut": lambda table, x: table[12 - span(x) : 12 + span(x)] * 2,
    "up to it": lambda table, x: table[: span(x)] + x,
    "from it on": lambda table, x: table[span(x) :] * 2,
    "calculated with": lambda table, x: table[: 2 * span(x) - x.shape[1] + 1],
    "a number": lambda table, x: table[: torch.full((), 3)] * 2,
    "a bound": lambda table, x: torch.clamp(x * 10, max=-(-span(x)).item()),
    "of what was cut": lambda table, x: table[: span(x)].view(1, -1, 2, 2).transpose(1, 2) @ torch.ones(2, 2),
}


@pytest.mark.parametrize("name", SIZES)
def test_a_size_that_is_in_a_tensor_is_that_size(name: str) -> None:
    module, graph = traced(SIZES[name])
    for length in (1, 2, 3, 7, 12):
        x = torch.randn(1, length, 4)
        torch.testing.assert_close(run(graph, {"x": x})[0], module(x))


def test_the_smaller_of_a_number_and_a_size_that_is_in_a_tensor_says_where_it_turns() -> None:
    def cut(table: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return table[: torch.tensor(min(x.shape[1], 8))] * 2

    with pytest.raises(UnsupportedError) as refused:
        traced(cut)
    assert narrower(refused.value, 12) == (8, True)
    module, graph = traced(cut, most=8)
    x = torch.randn(1, 8, 4)
    assert torch.equal(run(graph, {"x": x})[0], module(x))


UNKNOWN: dict[str, tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], str]] = {
    "a value": (lambda table, x: table[: x.long().sum()], "depends on the values of a tensor"),
    "a fraction": (lambda table, x: x * table.sum().item(), "depends on the values of a tensor"),
    "what torch cuts off": (lambda table, x: table[: 3 * span(x)] * 2, "depends on the values of a tensor"),
    "some rows": (
        lambda table, x: table[torch.arange(ROWS) < 3] * 2,
        "indexing by a mask in the model is not supported",
    ),
    "a mask of tokens": (
        lambda table, x: x[torch.ones(1, x.shape[1]) > 0],
        "indexing by a mask in the model",
    ),
    "a mask behind an axis": (
        lambda table, x: table[:, torch.ones(4) > 0] * 2,
        "indexing by a mask in the model is not supported",
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_else_is_in_a_tensor_is_refused(name: str) -> None:
    function, sentence = UNKNOWN[name]
    with pytest.raises(UnsupportedError, match=sentence):
        traced(function)


def put(table: torch.Tensor, x: torch.Tensor, taken: float, value: float | None = None) -> torch.Tensor:
    y, mask = torch.zeros_like(x), torch.ones(1) == taken
    y[mask] = nn.functional.linear(x[mask], table[:4]) if value is None else value
    return y + x


MASKS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "all": lambda table, x: put(table, x, 1.0),
    "none": lambda table, x: put(table, x, 2.0),
    "a number": lambda table, x: put(table, x, 1.0, 3.0),
    "all of two axes": lambda table, x: table[torch.ones(ROWS, 4) > 0] * x[0, 0, 0],
    "none of two axes": lambda table, x: table[torch.ones(ROWS, 4) < 0] * x[0, 0, 0],
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_of_numbers_picks_all_or_none(name: str) -> None:
    module, graph = traced(MASKS[name])
    assert not {"index", "where"}.intersection(opnames(graph))
    for length in (1, 3, 12):
        x = torch.randn(1, length, 4)
        torch.testing.assert_close(run(graph, {"x": x})[0], module(x))


def test_writing_to_some_places_is_refused() -> None:
    def some(table: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        y = table + 1
        y[torch.arange(ROWS) < 2] = 0.0
        return y

    with pytest.raises(UnsupportedError, match="writing to some places of a tensor in the model"):
        traced(some)


def thrown_away(table: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y = torch.empty(4, 4)
    y.uniform_(-1, 1)
    y[:2].normal_()
    y[2:].copy_(torch.lgamma(table[:2]))
    return x * 2


def read_through_a_view(table: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y = torch.empty(4, 4)
    part = y[0]
    y.uniform_(-1, 1)
    return x + part


def test_memory_that_nobody_reads_is_not_written() -> None:
    module, graph = traced(thrown_away)
    assert opnames(graph) == ["full", "mul"]
    x = torch.randn(1, 3, 4)
    assert torch.equal(run(graph, {"x": x})[0], module(x))
    with pytest.raises(UnsupportedError, match=r"operator aten\.uniform"):
        traced(read_through_a_view)


def test_joining_leaves_out_what_is_empty_of_another_rank() -> None:
    module, graph = traced(lambda table, x: torch.cat([torch.zeros(0), x, x], dim=-2))
    x = torch.randn(1, 3, 4)
    assert torch.equal(run(graph, {"x": x})[0], module(x))


def test_of_layers_that_are_chosen_by_a_number_one_is_left(tmp_path: Path) -> None:
    """The weights of the others are not even read."""
    save_family("xmod", tmp_path, changed={"languages": ["aa", "bb", "cc"], "default_language": "bb"})
    graph, _ = lowered(trace_source(open_source(tmp_path)), "paged")
    adapters = {name.split("adapter_modules.")[1][:2] for name in graph.weights if "adapter_modules." in name}
    assert adapters == {"bb"}


def test_a_table_of_distances_bounds_the_tokens(tmp_path: Path) -> None:
    save_family("deberta (disentangled)", tmp_path, changed={"max_relative_positions": ROWS})
    assert trace_source(open_source(tmp_path)).facts["positions"] == ROWS


@pytest.mark.parametrize(("blocks", "bound"), [(4, 44), (64, None)])
def test_a_sparse_attention_is_compiled_for_as_many_tokens_as_it_is_not_sparse(
    tmp_path: Path, blocks: int, bound: int | None
) -> None:
    save_family("big_bird", tmp_path, changed={"block_size": blocks})
    graph, _ = lowered(trace_source(open_source(tmp_path)), "paged")
    assert graph.facts.get("positions") == bound
    assert opnames(graph).count("paged_attention") == 2


def test_a_model_that_picks_its_best_keys_is_compiled_for_as_many_as_it_picks(tmp_path: Path) -> None:
    save_family("doge", tmp_path, changed={"keep_window_size": 16})
    assert trace_source(open_source(tmp_path)).facts["positions"] == 16
