"""Traced graphs that are kept between compilations: the same graph, and never in the way."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import llmc
import numpy as np
import pytest
from llmc.codegen import trace_cache
from llmc.codegen.trace_cache import trace_once
from llmc.frontend.rope import RopeScaling
from llmc.frontend.source import open_source
from llmc.frontend.trace import trace_source
from llmc.ir.core import Graph
from llmc.ir.parser import parse
from llmc.ir.printer import equal, print_graph
from llmc.ir.weights import ArrayTensor
from safetensors.numpy import load_file, save_file
from transformers import LlamaForCausalLM

from .models import TINY, save_tiny
from .tvm_graphs import ISA

FAMILIES = ["gemma2", "gpt2", "bert"]  # tied weights and two kinds of layers, buffers, an encoder
assert set(FAMILIES) <= set(TINY)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder's `graphs`, empty."""
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "graphs"


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """What was traced since the test began."""
    found: list[Graph] = []

    def trace(source: Any) -> Graph:
        found.append(trace_source(source))
        return found[-1]

    monkeypatch.setattr(trace_cache, "trace_source", trace)
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def graph(model: Path) -> Graph:
    return trace_source(open_source(model))


@pytest.fixture
def counted(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """As `traced`, without the time: a graph with the weights that the source has, whatever it is."""
    found: list[Any] = []

    def trace(source: Any) -> Graph:
        found.append(source)
        text = print_graph(graph)
        made = {n: v.weight for n, v in graph.weights.items() if isinstance(v.weight, ArrayTensor)}
        return parse(text, {**made, **source.weights})

    monkeypatch.setattr(trace_cache, "trace_source", trace)
    return found


def the_same(graph: Graph, other: Graph) -> None:
    assert equal(graph, other) and graph.name == other.name
    for name, value in graph.weights.items():
        a, b = value.weight, other.weights[name].weight
        assert a is not None and b is not None
        assert np.array_equal(a.read(), b.read()), name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_second_time_gives_the_graph_of_the_first(
    family: str, folder: Path, tmp_path: Path, traced: list[Graph]
) -> None:
    save_tiny(family, tmp_path / "model")
    first = trace_once(open_source(tmp_path / "model"))
    assert len(list(folder.iterdir())) == 1
    source = open_source(tmp_path / "model")
    second = trace_once(source)
    assert traced == [first]
    the_same(second, first)
    own = [v.weight for v in second.weights.values()]
    made = [one for one in own if isinstance(one, ArrayTensor)]
    assert all(one in made or any(one is held for held in source.weights.values()) for one in own)
    assert sum(one.read().nbytes for one in made) < 100_000, "a checkpoint's weights are in the cache"


def test_artifacts_are_the_same_bytes(folder: Path, tmp_path: Path, traced: list[Graph]) -> None:
    save_tiny("qwen2", tmp_path / "model")
    options: dict[str, Any] = {"targets": [f"tvm-cpu:isa={ISA}", "onnx-cpu"], "quant": "int4-g32"}
    options["verdict"] = False
    first = llmc.compile(tmp_path / "model", tmp_path / "first.llmc", **options)
    second = llmc.compile(tmp_path / "model", tmp_path / "second.llmc", **options)
    assert first.manifest["files"] == second.manifest["files"]
    llmc.compile(tmp_path / "model", tmp_path / "other.llmc", targets=["null"], quant="int8", verdict=False)
    assert len(traced) == 1


def test_another_model_of_the_same_shape_has_its_own_weights(
    folder: Path, tmp_path: Path, model: Path, traced: list[Graph]
) -> None:
    trace_once(open_source(model))
    tuned = save_tiny("llama", tmp_path / "tuned")
    path = tuned / "model.safetensors"
    tensors = {name: array + 1 for name, array in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    found = trace_once(open_source(tuned))
    assert len(traced) == 1 and found.name == "tuned"
    the_same(found, trace_source(open_source(tuned)))


@pytest.mark.parametrize("change", ["config", "length", "rope", "type", "tie"])
def test_what_the_graph_depends_on_is_another_graph(
    change: str, folder: Path, tmp_path: Path, counted: list[Any]
) -> None:
    model = save_tiny("llama", tmp_path / "model")
    for _ in range(2):
        trace_once(open_source(model))
    assert len(counted) == 1
    path = model / "model.safetensors"
    tensors = load_file(path)
    if change == "config":
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    if change == "type":
        tensors = {name: array.astype(np.float16) for name, array in tensors.items()}
    if change == "tie":  # it holds both, which are the same then
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, path, {"format": "pt"})
    source = open_source(model)
    if change == "length":
        source.length = 100
    if change == "rope":
        source.scale_rope(RopeScaling.parse("linear:2"))
    trace_once(source)
    assert len(counted) == len(list(folder.iterdir())) == 2


def test_factors_of_rotary_embeddings_in_a_file_are_values_of_the_graph() -> None:
    """GGUF files of Llama 3 have them as a tensor."""
    source = SimpleNamespace(gguf=object(), stored={"rope_freqs.weight": ArrayTensor(np.ones(3, np.float32))})
    assert trace_cache._factors(source) == [["rope_freqs.weight", [1.0, 1.0, 1.0]]]  # type: ignore[arg-type]


def test_a_damaged_file_is_made_again(folder: Path, model: Path, graph: Graph, counted: list[Any]) -> None:
    trace_once(open_source(model))
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for at in (0, *rng.integers(0, len(whole), 20).tolist(), len(whole) - 9):
        for damaged in (whole[:at], whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :]):
            path.write_bytes(damaged)
            the_same(trace_once(open_source(model)), graph)
    assert len(counted) > 30
    the_same(trace_once(open_source(model)), graph)


def test_what_cannot_be_told_or_kept_is_traced(
    folder: Path,
    tmp_path: Path,
    model: Path,
    graph: Graph,
    counted: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:  # another package's operators
        patch.setattr(trace_cache, "registered", lambda group: {"theirs": None})
        the_same(trace_once(open_source(model)), graph)
    with monkeypatch.context() as patch:  # a class that is not transformers' own
        patch.setattr(LlamaForCausalLM, "__module__", __name__)
        the_same(trace_once(open_source(model)), graph)
    with monkeypatch.context() as patch:  # masks that are too large
        patch.setattr(trace_cache, "_LARGEST", 10)
        the_same(trace_once(open_source(model)), graph)
    assert not folder.exists()
    folder.parent.write_text("no folder")
    the_same(trace_once(open_source(model)), graph)
    assert len(counted) == 4


def test_a_model_without_its_weights_is_traced(folder: Path, model: Path, graph: Graph) -> None:
    assert equal(trace_once(open_source(model, config_only=True)), graph)
    assert not folder.exists()


def test_what_was_not_used_for_longest_goes_first(
    folder: Path, model: Path, counted: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(model)
    trace_once(source)
    (first,) = folder.iterdir()
    monkeypatch.setattr(trace_cache, "_LIMIT_BYTES", first.stat().st_size * 3 // 2)
    source.length = 100
    trace_once(source)
    assert len(list(folder.iterdir())) == 1 and not first.exists()
