"""Adapters of requests that name modules as the checkpoint does, where the model's class has other names.

transformers over a checkpoint changed in float64 is the oracle: PEFT does not load such adapters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import llmc
import numpy as np
import pytest
import torch
from llmc.codegen.artifact import Artifact
from llmc.frontend.lora import read_adapter
from llmc.frontend.source import open_source
from llmc.frontend.stored_modules import stored_modules
from llmc.ir.adapters import Adapter, LowRank
from llmc.ir.errors import ArtifactError, InputError
from llmc.ir.stored_modules import FILE, StoredModules
from llmc.ir.weights import ArrayTensor
from llmc.runtime.llm import LLM
from safetensors.torch import load_file, save_file

from .families import reference, save_family
from .family_configs import token_ids
from .lora_files import write_adapter
from .models import save_tokenizer
from .tvm_graphs import ISA

HERE = f"tvm-cpu:isa={ISA}"
IDS = token_ids(21)
NAMES = {
    # Projections, and a head, of other names; one that the class splits.
    "exaone": r"transformer\..*(c_fc_\d|c_proj|out_proj|q_proj)\.weight",
    "gpt_neox": r"embed_out\.weight",
    "sarvam_moe": r".*(query_key_value|attention\.dense)\.weight",
}


@dataclass
class Opened:
    """A model's folder, what its class is, its artifact with no adapter loaded, and the names' pattern."""

    model: Path
    kind: Any
    task: str
    llm: LLM
    pattern: str


@pytest.fixture(scope="module", params=NAMES)
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    folder = tmp_path_factory.mktemp(request.param)
    model, task = save_family(request.param, folder / "model")
    save_tokenizer(folder / "model")
    made = llmc.compile(
        folder / "model", folder / "a.llmc", targets=[HERE], adapters=True, kv_dtype="float32"
    )
    with llmc.load(made.root, adapters={}, threads=1, kv_tokens=512, context=128) as llm:
        yield Opened(folder / "model", type(model), task, llm, NAMES[request.param])


def factors(opened: Opened, seed: int = 3, rank: int = 3) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A and B of the checkpoint's modules whose names match."""
    generator = np.random.default_rng(seed)
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, tensor in load_file(opened.model / "model.safetensors").items():
        if re.fullmatch(opened.pattern, name):
            n, k = tensor.shape
            a, b = (generator.normal(size=s).astype(np.float32) * 0.1 for s in ((rank, k), (n, rank)))
            found[name.removesuffix(".weight")] = a, b
    assert found
    return found


def changed(
    opened: Opened, folder: Path, change: dict[str, tuple[np.ndarray, np.ndarray]], norm: float = 0
) -> Any:
    """Logits of transformers over the checkpoint with the change in it, rows scaled to a `norm` but 0."""
    tensors = load_file(opened.model / "model.safetensors")
    for module, (a, b) in change.items():
        weight = tensors[f"{module}.weight"]
        delta = torch.from_numpy(b).double() @ torch.from_numpy(a).double()
        rows = weight.double() + delta
        rows = rows * norm / rows.norm(dim=1, keepdim=True) if norm else rows
        tensors[f"{module}.weight"] = rows.to(weight.dtype)
    folder.mkdir()
    for file in opened.model.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = opened.kind.from_pretrained(folder, dtype=torch.float32)
    return reference(model, IDS, opened.task).numpy()


def test_logits_are_those_of_a_changed_checkpoint(opened: Opened, tmp_path: Path) -> None:
    plain = opened.llm.logits(IDS).copy()
    for seed, rank in ((3, 3), (4, 17)):
        change = factors(opened, seed, rank)
        name = str(seed)
        opened.llm.load_adapter(name, write_adapter(tmp_path / name, change))
        wanted = changed(opened, tmp_path / f"changed{name}", change)
        found = opened.llm.logits(IDS, adapter=name)
        assert np.abs(found - wanted).max() < 1e-4
        assert np.abs(found - plain).max() > 1e-2
        opened.llm.unload_adapter(name)


def test_dora_too(opened: Opened, tmp_path: Path) -> None:
    """Of what is one matrix in the checkpoint and several here, each has its own norms of rows."""
    change = factors(opened)
    file = write_adapter(tmp_path / "one", change) / "adapter_model.safetensors"
    prefix, part = "base_model.model.", "lora_magnitude_vector"
    norms = {f"{prefix}{m}.{part}": torch.full((len(b),), 0.7) for m, (_, b) in change.items()}
    save_file({**load_file(file), **norms}, file)
    opened.llm.load_adapter("one", tmp_path / "one")
    wanted = changed(opened, tmp_path / "changed", change, 0.7)
    assert np.abs(opened.llm.logits(IDS, adapter="one") - wanted).max() < 1e-4
    opened.llm.unload_adapter("one")


def test_other_sizes_are_refused(opened: Opened, tmp_path: Path) -> None:
    module, (a, b) = next(iter(factors(opened).items()))
    for number, bad in enumerate(((a[:, 1:].copy(), b), (a, b[1:].copy()), (a, np.concatenate([b, b])))):
        with pytest.raises(InputError, match="of a model of other sizes"):
            opened.llm.load_adapter("bad", write_adapter(tmp_path / str(number), {module: bad}))
    assert not opened.llm.adapters


def test_without_names_modules_are_strangers(opened: Opened, tmp_path: Path) -> None:
    """As of an artifact that a version before wrote."""
    registry = opened.llm.engine.engine.adapters
    kept, registry.stored_modules = registry.stored_modules, lambda: None
    folder = write_adapter(tmp_path / "one", factors(opened))
    with pytest.raises(InputError, match="which this model has no place for") as caught:
        opened.llm.load_adapter("one", folder)
    registry.stored_modules = kept
    assert "--lora" in caught.value.remedy
    opened.llm.load_adapter("one", folder)
    opened.llm.unload_adapter("one")


def test_names_are_few_bytes_and_survive_being_written(opened: Opened) -> None:
    artifact = Artifact.open(opened.model.parent / "a.llmc")
    found = artifact.stored_modules
    assert found is not None and found.to_json() == json.loads(artifact.read_text(FILE))
    assert len(found.to_json()["orders"]) <= 4
    again = stored_modules(open_source(opened.model))
    assert again.to_json() == found.to_json()


def test_an_artifact_whose_names_are_the_models_has_no_file(tmp_path: Path) -> None:
    save_family("llama", tmp_path / "model")
    assert not stored_modules(open_source(tmp_path / "model")).modules


def low_rank(rank: int, n: int, k: int, seed: int, scaling: float = 1.0) -> LowRank:
    generator = np.random.default_rng(seed)
    a, b = generator.normal(size=(rank, k)), generator.normal(size=(n, rank))
    return LowRank(ArrayTensor(a.astype("f")), ArrayTensor(b.astype("f")), scaling)


def product(change: LowRank) -> np.ndarray:
    return change.b.read() @ change.a.read() * change.scaling


def test_a_module_that_is_several_in_the_checkpoint() -> None:
    names = StoredModules(
        {"up": [("w1", np.arange(2, 6)), ("w3", np.array([1, 0]))], "rest": [("w1", np.arange(2))]}
    )
    one, three = low_rank(2, 6, 5, 0, scaling=0.5), low_rank(3, 2, 5, 1)
    both = names.of_modules(Adapter("a", {"w1": one, "w3": three}, {}), set()).changes
    np.testing.assert_allclose(
        product(both["up"]), np.concatenate([product(one)[2:], product(three)[::-1]]), rtol=1e-5
    )
    np.testing.assert_allclose(product(both["rest"]), product(one)[:2], rtol=1e-5)
    alone = names.of_modules(Adapter("a", {"w3": three}, {}), set()).changes
    assert list(alone) == ["up"] and not product(alone["up"])[:4].any()
    kept = names.of_modules(Adapter("a", {"w1": one, "q": three}, {}), {"w1"}).changes
    assert kept == {"w1": one, "q": three}
    with pytest.raises(InputError, match="changes up and w1, which are one matrix"):
        names.of_modules(Adapter("a", {"w1": one, "up": low_rank(1, 6, 5, 2)}, {}), {"up"})
    with pytest.raises(InputError, match="parts of up of 5, 6 columns"):
        names.of_modules(Adapter("a", {"w1": one, "w3": low_rank(1, 2, 6, 2)}, {}), set())


def test_magnitudes_of_parts() -> None:
    """Rows of what the adapter leaves alone, or only adds to, have none."""
    names = StoredModules(
        {"up": [("w1", np.array([1, 0])), ("w3", np.arange(2))], "q": [("w2", np.array([1, 0]))]}
    )
    norms = ArrayTensor(np.array([[3.0], [4.0]], np.float32))
    scaled = replace(low_rank(1, 2, 5, 0), magnitude=norms)
    for others in ({}, {"w3": low_rank(1, 2, 5, 1)}):
        found = names.of_modules(Adapter("a", {"w1": scaled, "w2": scaled, **others}, {}), set()).changes
        up, q = found["up"].magnitude, found["q"].magnitude
        assert up is not None and q is not None and q.read().tolist() == [4, 3]
        np.testing.assert_array_equal(up.read(), [4, 3, np.nan, np.nan])
    wrong = replace(scaled, magnitude=ArrayTensor(np.ones(3, np.float32)))
    with pytest.raises(InputError, match="of a model of other sizes"):
        names.of_modules(Adapter("a", {"w2": wrong}, {}), set())


def test_biases_of_parts() -> None:
    """Scaled as the factors are; rows of what the adapter leaves alone, or gives none, gain nothing."""
    names = StoredModules(
        {"up": [("w1", np.array([1, 0])), ("w3", np.arange(2))], "q": [("w2", np.array([1, 0]))]}
    )
    bias = ArrayTensor(np.array([3.0, 4.0], np.float32))
    biased = replace(low_rank(1, 2, 5, 0, scaling=0.5), bias=bias)
    for others in ({}, {"w3": low_rank(1, 2, 5, 1)}):
        found = names.of_modules(Adapter("a", {"w1": biased, "w2": biased, **others}, {}), set()).changes
        up, q = found["up"].bias, found["q"].bias
        assert up is not None and q is not None
        np.testing.assert_array_equal(q.read() * np.float32(found["q"].scaling), [2, 1.5])
        np.testing.assert_array_equal(up.read() * np.float32(found["up"].scaling), [2, 1.5, 0, 0])
    wrong = replace(biased, bias=ArrayTensor(np.ones(3, np.float32)))
    with pytest.raises(InputError, match="of a model of other sizes"):
        names.of_modules(Adapter("a", {"w2": wrong}, {}), set())


@pytest.mark.parametrize(
    "damage",
    [
        [],
        {},
        {"orders": [[[0, 1]]], "modules": {}},
        {"orders": [], "modules": {"a": [["t", 0]]}},
        {"orders": [], "modules": {"a": []}},
        {"orders": [], "modules": {"a": 3}},
        {"orders": [[[0, 1, 2]]], "modules": {"a": [["t", 0], ["u", None]]}},
        {"orders": [[[0, 0, 10**15], [0, 1, -(10**15)]]], "modules": {}},
        {"orders": [[[0, 0, 10**10], [0, 1, float("nan")]]], "modules": {}},
        {"orders": [[[0, 1, 2]]], "modules": {"a": [["t", -1]]}},
        {"orders": [[[0, 1, 2]]], "modules": {"a": [["t", True]]}},
    ],
)
def test_damaged_names(damage: Any) -> None:
    with pytest.raises(ValueError):
        StoredModules.from_json(damage)


def test_a_damaged_file_is_told_of(tmp_path: Path) -> None:
    artifact = Artifact(tmp_path, {"files": {FILE: {}}})
    (tmp_path / FILE).write_text('{"orders": 3}')
    with pytest.raises(ArtifactError, match=r"stored_modules\.json of .* is damaged"):
        _ = artifact.stored_modules


def test_experts_by_their_old_names_stay_strangers(tmp_path: Path) -> None:
    save_family("mixtral", tmp_path / "model")
    names = stored_modules(open_source(tmp_path / "model"))
    assert names.modules and all(name.endswith(".gate") for name in names.modules)
    module = "model.layers.0.block_sparse_moe.experts.0.w1"
    ones = np.ones((2, 64), np.float32), np.ones((96, 2), np.float32)
    adapter = read_adapter(write_adapter(tmp_path / "one", {module: ones}))
    assert names.of_modules(adapter, set()).changes.keys() == {module}
