"""`llmc eval --moe`: the loss beside transformers' own, shares, starved experts, the picture; bad calls."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import llmc
import numpy as np
import pytest
import torch
from llmc.cli.bench import chosen_shares
from llmc.cli.experts import Experts, Layer, balance_loss, measure_experts, picture
from llmc.cli.main import main
from llmc.codegen.tvm import stored
from llmc.ir.errors import InputError
from llmc.ir.printer import print_graph

from .graphs import lowered, traced
from .models import CONTEXT, tiny_model
from .moe_models import save_moe, tiny_moe
from .tvm_graphs import ISA

TEXT = "The river was wide and slow, and the boats that went down it carried grain. " * 12


def layer_of(logits: torch.Tensor, k: int, name: str = "layer") -> Layer:
    experts = logits.shape[-1]
    layer = Layer(name, k, np.zeros(experts, np.int64), np.zeros(experts))
    indices = torch.topk(torch.softmax(logits, -1), k, -1).indices
    half = len(logits) // 2
    for part in (slice(0, half), slice(half, None)):
        layer.add(indices[part].numpy(), logits[part].numpy())
    return layer


@pytest.mark.parametrize(("layers", "experts", "k"), [(1, 4, 1), (3, 8, 2), (2, 60, 4)])
def test_the_loss_is_that_of_transformers(layers: int, experts: int, k: int) -> None:
    module = importlib.import_module("transformers.models.mixtral.modeling_mixtral")
    generator = torch.Generator().manual_seed(experts)
    logits = [2 * torch.randn(101, experts, generator=generator) for _ in range(layers)]
    wanted = float(module.load_balancing_loss_func(tuple(logits), experts, k))
    assert abs(balance_loss([layer_of(one, k) for one in logits]) - wanted) <= 1e-6


def test_even_use_has_a_loss_of_k() -> None:
    layer = Layer("layer", 2, np.zeros(4, np.int64), np.zeros(4))
    layer.add(np.array([[0, 1], [2, 3]]), np.zeros((2, 4)))
    assert layer.loss == pytest.approx(2.0) and layer.shares.tolist() == [0.5] * 4 and not layer.starved


def uneven() -> Experts:
    layer = Layer("model.layers.0.mlp.experts", 1, np.zeros(4, np.int64), np.zeros(4))
    layer.add(np.array([[0]] * 60 + [[1]] * 38 + [[2]] * 2), np.zeros((100, 4)))
    return Experts([layer])


def test_an_expert_that_starves_is_named() -> None:
    (warning,) = uneven().warnings()
    assert warning == (
        "model.layers.0.mlp.experts: 2 of 4 experts starve, with less than 10% of the even share 25.00%: "
        "2 (2.00%), 3 (0.00%)"
    )
    even = Layer("layer", 1, np.full(4, 25), np.full(4, 25.0), 100)
    assert not Experts([even]).warnings()


def test_layers_with_different_numbers_of_experts_have_no_common_loss() -> None:
    result = Experts([*uneven().layers, Layer("other", 1, np.full(2, 5), np.full(2, 5.0), 10)]).result()
    assert result["loss"] is None and [one["loss"] for one in result["layers"]][1] == pytest.approx(1.0)


def test_the_picture_has_a_cell_for_each_expert() -> None:
    page = ElementTree.fromstring(picture(uneven().result()))
    cells = [c for c in page.iter() if c.tag.endswith("rect") and len(c)]
    assert [c[0].text for c in cells] == [
        "expert 0: 60.00%", "expert 1: 38.00%", "expert 2: 2.00%", "expert 3: 0.00%"
    ]  # fmt: skip
    assert [c.get("stroke") for c in cells] == ["#ddd", "#ddd", "#c0392b", "#c0392b"]
    assert cells[0].get("fill") == "#1f5f8f" and cells[3].get("fill") == "#ffffff"


@pytest.mark.slow
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss and shares of a compiled model's own routers are those of the model in transformers."""
    name = "olmoe"
    save_moe(name, tmp_path / "model")
    out = tmp_path / "m.llmc"
    llmc.compile(
        str(tmp_path / "model"), out, targets=[f"tvm-cpu:isa={ISA}"], verdict=False, kv_dtype="float32"
    )
    text, drawn = tmp_path / "text.txt", tmp_path / "shares.svg"
    text.write_text(TEXT)
    words = ["eval", str(out), "--moe", str(text), "--window", "64", "--windows", "3", "--json"]
    assert main([*words, "--picture", str(drawn)]) == 0
    found = json.loads(capsys.readouterr().out)["moe"]
    assert found["windows"] == 3 and len(found["layers"]) == 2
    assert ElementTree.parse(drawn).getroot().tag.endswith("svg")

    model = tiny_moe(name)
    with llmc.load(out, kv_tokens=CONTEXT) as llm:
        ids = list(llm.encode(TEXT))
    bos = ids[:1]  # a tokenizer that begins texts with it has every window begin with it
    with torch.no_grad():
        windows = [[*bos, *ids[1 + 63 * i : 1 + 63 * (i + 1)]] for i in range(3)]
        results = [model(input_ids=torch.tensor([w]), output_router_logits=True) for w in windows]
    logits = [torch.cat([r.router_logits[i] for r in results]) for i in range(2)]
    module: Any = importlib.import_module(type(model).__module__)
    k, experts = model.config.num_experts_per_tok, model.config.num_experts
    assert abs(found["loss"] - float(module.load_balancing_loss_func(tuple(logits), experts, k))) <= 1e-6
    for layer, one in zip(found["layers"], logits, strict=True):
        assert np.allclose(layer["shares"], layer_of(one, k).shares, atol=1e-6)

    assert main(words[:-1]) == 0
    shown = capsys.readouterr().out
    assert "load-balancing loss" in shown and "3 of 8" in shown


def test_recurrent_layers_begin_with_an_empty_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each window begins anew: the routers behind a recurrence choose as in transformers."""
    model = tiny_moe("qwen3_next")
    paged, _ = lowered(traced(model), "paged")
    assert paged.facts["state"]
    monkeypatch.setattr(stored, "stored_graph", lambda artifact: paged)
    artifact: Any = SimpleNamespace(root="m.llmc", manifest={"page_size": 16})
    windows = [np.arange(5, 26, dtype=np.int32), np.arange(40, 61, dtype=np.int32)]
    found = measure_experts(artifact, windows, lambda what, share: None)
    with torch.no_grad():
        results = [model(torch.from_numpy(w[None]).long(), output_router_logits=True) for w in windows]
    assert len(found.layers) == 2
    for i, layer in enumerate(found.layers):
        wanted = layer_of(torch.cat([r.router_logits[i] for r in results]), layer.k)
        np.testing.assert_array_equal(layer.chosen, wanted.chosen)
        assert abs(layer.loss - wanted.loss) <= 1e-5


def test_a_token_reads_the_experts_that_it_chooses() -> None:
    paged, _ = lowered(traced(tiny_moe("olmoe")), "paged")
    shares = chosen_shares(print_graph(paged))
    assert len(shares) == 4 and set(shares.values()) == {3 / 8}
    dense, _ = lowered(traced(tiny_model("llama")), "fused")
    assert chosen_shares(print_graph(dense)) == {}


def test_a_model_without_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    paged, _ = lowered(traced(tiny_model("llama")), "paged")
    monkeypatch.setattr(stored, "stored_graph", lambda artifact: paged)

    class Dense:
        root = "dense.llmc"

    with pytest.raises(InputError, match=r"dense\.llmc has no experts; leave --moe away"):
        measure_experts(Dense(), [np.arange(4)], lambda what, share: None)  # type: ignore[arg-type]


def test_a_picture_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(tmp_path), "--ppl", "x", "--picture", "y.svg"]) == 2
    assert "--picture shows what --moe measures" in capsys.readouterr().err


def test_an_adapter_is_not_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(tmp_path), "--moe", "x", "--adapter", "a"]) == 2
    assert "--moe runs the artifact's own weights: leave --adapter away" in capsys.readouterr().err


def test_an_artifact_of_another_target() -> None:
    class Other:
        root, manifest = "m.llmc", {"targets": {"onnx-cpu": {}}}  # a stand-in

    with pytest.raises(InputError, match="has no target tvm-cpu; compile it for that target"):
        stored.stored_graph(Other())  # type: ignore[arg-type]
