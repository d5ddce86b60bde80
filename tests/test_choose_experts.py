"""Experts that a model computes all of, of inputs that are zero for those not chosen; attention in chunks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from llmc.codegen.driver import check_model
from llmc.frontend.trace import trace_module
from llmc.ir.core import Graph
from llmc.ir.interpreter import run
from llmc.passes.base import PassContext
from llmc.passes.canonicalize.dense_experts import ChooseExperts
from llmc.passes.manager import run_passes
from llmc.passes.pipelines import canonicalize, function
from torch import nn

from .families import save_family
from .graphs import opnames
from .models import save_tokenizer

EXPERTS, CHOSEN, WIDTH, INNER = 5, 2, 8, 6


class Dense(nn.Module):
    """In few lines what Llama 4 does. `least`: what stands for those that are not chosen."""

    def __init__(self, least: float = float("-inf"), turned: bool = False, of_results: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.gate_up = nn.Parameter(torch.randn(EXPERTS, WIDTH, 2 * INNER))
        self.down = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH))
        self.least, self.turned, self.of_results = least, turned, of_results

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.router(x)
        best, places = torch.topk(scores, CHOSEN, dim=-1)
        weights = torch.full_like(scores, self.least).scatter_(1, places, best).sigmoid()
        rows = x.repeat(EXPERTS, 1)
        if not self.of_results:
            rows = rows * weights.transpose(0, 1).reshape(-1, 1)
        gate, up = (rows.view(EXPERTS, -1, WIDTH) @ self.gate_up).chunk(2, -1)
        gate, up = (up, gate) if self.turned else (gate, up)
        return ((up * nn.functional.silu(gate)) @ self.down).sum(0)


def lowered(module: nn.Module) -> Graph:
    graph = trace_module(
        module, (torch.zeros(3, WIDTH),), dynamic_shapes=({0: torch.export.Dim("T", min=2)},)
    )
    return run_passes(graph, canonicalize(), PassContext())[0]


def test_the_chosen_experts_alone_are_computed() -> None:
    """Within 1e-5: sums in another order."""
    module = Dense()
    graph = lowered(module)
    names = opnames(graph)
    assert names.count("moe") == CHOSEN and "matmul" not in names
    for rows in (1, 2, 7):
        x = torch.randn(rows, WIDTH)
        with torch.no_grad():
            torch.testing.assert_close(
                run(graph, {graph.inputs[0].name: x})[0], module(x), atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize("module", [Dense(least=-1.0), Dense(turned=True), Dense(of_results=True)])
def test_others_stay_as_they_are(module: nn.Module) -> None:
    """What is not chosen counts; the halves are the other way round; results are not weighted."""
    graph = lowered(module)
    assert "moe" not in opnames(graph)
    x = torch.randn(4, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(run(graph, {graph.inputs[0].name: x})[0], module(x), atol=1e-5, rtol=1e-5)


def test_the_pass_says_whether_it_changed_anything() -> None:
    graph = lowered(nn.Linear(WIDTH, WIDTH))
    assert not ChooseExperts().run(graph, PassContext()).changed


def test_attention_in_chunks_is_compiled_for_one(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_family("llama4_text", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_chunk_size": 16}))
    save_tokenizer(folder)
    checked = check_model(folder)
    assert any("chunks of 16 tokens" in note for note in checked.notes)
    assert not any("chunks of" in note for note in check_model(folder, context=16).notes)


def test_chunks_of_a_function_stay_chunks() -> None:
    """Nobody holds its lengths to one of them."""

    class Chunked(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            at = torch.arange(x.shape[0]) // 4
            return (at[:, None] == at[None, :]).float() @ x

    graph = trace_module(Chunked(), (torch.zeros(6, 3),), dynamic_shapes=({0: torch.export.Dim("T", min=2)},))
    graph, _ = run_passes(graph, function([]), PassContext())
    x = torch.randn(11, 3)
    torch.testing.assert_close(run(graph, {"x": x})[0], Chunked()(x))
