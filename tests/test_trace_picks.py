"""Sizes that are the smaller of two, and choices of all that there is."""

from __future__ import annotations

from pathlib import Path

import llmc
import pytest
import torch
from llmc.codegen.driver import check_model
from llmc.frontend.export import OtherSize, narrower
from llmc.frontend.trace import trace_module
from llmc.ir.core import Graph
from llmc.ir.interpreter import run
from torch import nn

from .families import save_family
from .graphs import opnames
from .models import save_tokenizer

KEPT = 8


class Cut(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, : min(KEPT, x.shape[1])] * 2


class Picking(nn.Module):
    """Hides all keys but the `KEPT` nearest ones."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = x @ x.transpose(1, 2)
        places = scores.topk(min(KEPT, x.shape[1]), dim=-1).indices.to(torch.int32)
        hidden = torch.ones_like(scores, dtype=torch.bool).scatter(-1, places.long(), False)
        return scores.masked_fill(hidden, -100.0)


def traced(module: nn.Module, least: int, most: int) -> Graph:
    shapes = {"x": {1: torch.export.Dim("T", min=least, max=most)}}
    graph = trace_module(module, (torch.zeros(1, max(6, least), 4),), dynamic_shapes=shapes)
    graph.drop_dead()
    return graph


@pytest.mark.parametrize(("least", "most"), [(2, KEPT), (KEPT, 63), (KEPT + 1, 63)])
def test_the_smaller_of_two_sizes_is_the_one_that_it_is(least: int, most: int) -> None:
    graph = traced(Cut(), least, most)
    for length in {least, (least + most) // 2, most}:
        x = torch.randn(1, length, 4)
        assert torch.equal(run(graph, {"x": x})[0], Cut()(x))


def test_the_smaller_of_two_sizes_that_changes_says_where() -> None:
    with pytest.raises(OtherSize) as refused:
        traced(Cut(), 2, 63)
    assert narrower(refused.value, 63) == (KEPT, True)
    assert narrower(refused.value, KEPT) is None  # it would not end


def test_where_all_keys_are_picked_none_is() -> None:
    graph = traced(Picking(), 2, KEPT)
    assert "top_k" not in opnames(graph)
    for length in (2, 5, KEPT):
        x = torch.randn(1, length, 4)
        torch.testing.assert_close(run(graph, {"x": x})[0], Picking()(x))


@pytest.mark.slow
def test_a_model_that_picks_keys_is_compiled_for_as_many(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_family("deepseek_v32", folder)
    save_tokenizer(folder)
    checked = check_model(folder)
    assert any("64 of its" in note for note in checked.notes)
    assert checked.facts["context"] == 64
    artifact = llmc.compile(folder, tmp_path / "artifact", targets=["null"])
    assert artifact.manifest["model"]["context_length"] == 64
