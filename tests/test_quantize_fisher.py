"""Gradients of drawn tokens' likelihood by pieces of the vocabulary, against logits as a whole."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llmc.ir.core import Graph
from llmc.passes.base import PassContext
from llmc.passes.quantize import fisher, head, sensitivity
from llmc.passes.quantize.attach import is_quantizable
from llmc.passes.quantize.blocks import Activations, run_ops
from llmc.passes.quantize.calibrated import open_work
from llmc.passes.quantize.fisher import HeadGradient, head_gradient
from llmc.passes.quantize.grid import Grid
from llmc.passes.quantize.head import Head, find_head

from .graphs import fused_once
from .small_models import FAMILIES

CAPPED = ["llama", "gemma2", "granite"]  # nothing, a soft cap, a factor after the head


def tiny(name: str) -> Graph:
    return fused_once(("small", name), FAMILIES[name].build, attention="eager")


def whole(found: Head, hidden: torch.Tensor) -> HeadGradient:
    """The definition: all logits at once, tokens drawn from them with seed 0."""
    leaf = hidden.clone().requires_grad_()
    out = found.after[-1].result if found.after else found.layer.result
    made = run_ops((found.layer, *found.after), {found.x: leaf}, [found.layer.result, out], {})
    logits = made[out]
    drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=torch.Generator().manual_seed(0))
    loss = -logits.log_softmax(-1).gather(1, drawn).sum()
    of_layer, of_hidden = torch.autograd.grad(loss, [made[found.layer.result], leaf])
    return HeadGradient(of_hidden, of_layer.square().sum(0))


@pytest.mark.parametrize("name", CAPPED)
@pytest.mark.parametrize("tokens", [1, 7])
def test_pieces_give_what_all_logits_give(
    name: str, tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "CHUNK", 100)  # of 384 tokens: the last piece is shorter
    monkeypatch.setattr(fisher, "DRAWN", 2 * 384)  # two tokens at a time
    found = find_head(tiny(name))
    hidden = torch.randn(tokens, int(str(found.x.shape[-1])), generator=torch.Generator().manual_seed(1))
    expected = whole(found, hidden)
    given = head_gradient(found, hidden, {}, torch.Generator().manual_seed(0), {}, tmp_path / "logits")
    torch.testing.assert_close(given.hidden, expected.hidden, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(given.squares, expected.squares, rtol=1e-5, atol=1e-7)
    assert expected.squares.max() > 1e-3
    assert list((tmp_path / "logits").iterdir()) == []


def losses(graph: Graph) -> dict[str, list[float]]:
    rng = np.random.default_rng(0)
    grids = {w: [Grid(b, 32, False) for b in (2, 4)] for w in graph.weights.values() if is_quantizable(w)}
    with ExitStack() as stack:
        folder = open_work(PassContext(), stack).scratch("x")
        found = sensitivity.measure(graph, [rng.integers(10, 384, 32)] * 3, Activations(folder), grids)
    return {w.name: values for w, values in found.items()}


def test_a_head_on_disk_and_small_pieces_give_the_same_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = tiny("gemma2")
    expected = losses(graph)
    assert expected
    assert all(two > four > 0 for two, four in expected.values())
    kept: list[Any] = []
    monkeypatch.setattr(sensitivity, "LARGE", 0)
    monkeypatch.setattr(
        sensitivity, "DiskCache", lambda folder: kept.append(folder) or head.DiskCache(folder)
    )
    assert losses(graph) == expected
    assert len(kept) == 1
    monkeypatch.setattr(head, "CHUNK", 100)
    monkeypatch.setattr(fisher, "DRAWN", 1)
    monkeypatch.setattr(sensitivity, "ELEMENTS", 64 * 5)
    for name, values in losses(graph).items():
        assert values == pytest.approx(expected[name], rel=1e-4), name
