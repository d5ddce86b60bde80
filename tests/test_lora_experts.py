"""--lora of experts: as PEFT changes stacked parameters, and as modules by the names of the checkpoint.

PEFT is the oracle; where it cannot load an adapter, transformers over a checkpoint changed in float64.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llmc.frontend.lora import read_adapter
from llmc.frontend.source import open_source
from llmc.frontend.trace import trace_source
from llmc.ir.core import Graph
from llmc.ir.errors import InputError, UnsupportedError
from llmc.passes.adapt.lora import MergeLora
from llmc.passes.base import PassContext
from llmc.passes.manager import run_passes
from llmc.runtime.adapter_places import AdapterPlaces
from safetensors.torch import load_file, save_file

from .families import reference, save_family
from .family_configs import token_ids
from .graphs import PagedRun, logits_of, lowered, worst
from .lora_files import adapter, edit, write_adapter

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT still calls what transformers deprecates
peft = pytest.importorskip("peft")

IDS = token_ids(21)
BOTH = {"target_modules": [], "target_parameters": ["gate_up_proj", "down_proj"]}


def merged(folder: Path, *adapters: Path, scales: tuple[float, ...] = (1.0, 1.0)) -> Graph:
    passes = [MergeLora(read_adapter(one), scale) for one, scale in zip(adapters, scales, strict=False)]
    return run_passes(trace_source(open_source(folder)), passes, PassContext())[0]


def logits(graph: Graph) -> torch.Tensor:
    return PagedRun(lowered(graph, "paged")[0]).step([("a", IDS)])[0]


PARAMETERS: dict[str, dict[str, Any]] = {
    "both": BOTH,
    "one": {"target_modules": [], "target_parameters": ["experts.down_proj"], "use_rslora": True},
    "beside modules": {
        "target_modules": ["q_proj"],
        "target_parameters": ["gate_up_proj", "gate.weight"],
        "alpha_pattern": {"gate.weight": 32, "gate": 2, "q_proj": 5},
        "rank_pattern": {"gate.weight": 2},
    },
    "as many rows as the rank": {
        "r": 8,
        "target_modules": ["q_proj"],
        "target_parameters": ["down_proj"],
        "rank_pattern": {"down_proj": 2},
    },
    "patterns": {**BOTH, "rank_pattern": {r".*\.gate_up_proj": 6}, "alpha_pattern": {"down_proj": 3}},
}


# Experts of [E, N, K] under names that the checkpoint splits; of [E, K, N], in sizes that do not tell.
@pytest.mark.parametrize(
    ("family", "kind", "stored"),
    [
        *(("mixtral", kind, "float32") for kind in PARAMETERS),
        ("mixtral", "one", "bfloat16"),
        ("gpt_oss", "both", "bfloat16"),
        ("gpt_oss", "one", "float32"),
    ],
)
def test_stacked_parameters_as_peft_merges_them(family: str, kind: str, stored: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32} if family == "gpt_oss" else {}
    model, task = save_family(family, tmp_path / "model", stored, changed=sizes)
    base = reference(model, IDS, task)
    adapted = adapter(model, tmp_path / "one", scale=0.1, **PARAMETERS[kind]).eval()
    wanted = reference(adapted, IDS, task)
    assert worst(wanted, base) > 1e-2
    assert worst(logits(merged(tmp_path / "model", tmp_path / "one")), wanted) < 2e-5


def per_expert(folder: Path, pattern: str, *, seed: int = 3, rank: int = 3) -> dict[str, Any]:
    """Factors for the modules of a checkpoint whose names match."""
    generator = np.random.default_rng(seed)
    found: dict[str, Any] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if re.fullmatch(pattern, name):
            n, k = tensor.shape
            a, b = (generator.normal(size=s).astype(np.float32) * 0.1 for s in ((rank, k), (n, rank)))
            found[name.removesuffix(".weight")] = a, b
    assert found
    return found


def test_experts_by_their_old_names_as_peft_converts_them(tmp_path: Path) -> None:
    """As adapters name them that were trained when each expert was a module."""
    model, task = save_family("mixtral", tmp_path / "model")
    base = reference(model, IDS, task)
    modules = per_expert(tmp_path / "model", r".*\.experts\.\d+\.\w+\.weight")
    write_adapter(tmp_path / "one", modules, target_modules=["w1", "w2", "w3"], task_type="CAUSAL_LM")
    adapted = peft.PeftModel.from_pretrained(model, str(tmp_path / "one")).eval()
    wanted = reference(adapted, IDS, task)
    assert worst(wanted, base) > 1e-2
    assert worst(logits(merged(tmp_path / "model", tmp_path / "one")), wanted) < 2e-5


# Experts; routers and projections that were renamed; one that the class splits.
@pytest.mark.parametrize(
    ("family", "pattern"),
    [
        ("qwen2_moe", r".*\.experts\.\d+\.(gate|down)_proj\.weight"),
        ("mixtral", r".*(\.gate|\.w[13]|\.q_proj)\.weight"),
        ("exaone", r".*(c_fc_\d|out_proj|q_proj)\.weight"),
        ("sarvam_moe", r".*(query_key_value|attention\.dense)\.weight"),
    ],
)
def test_modules_by_the_names_of_the_checkpoint(family: str, pattern: str, tmp_path: Path) -> None:
    model, task = save_family(family, tmp_path / "model")
    base = reference(model, IDS, task)
    one = per_expert(tmp_path / "model", pattern)
    two = per_expert(tmp_path / "model", pattern, seed=4, rank=2)
    write_adapter(tmp_path / "one", one)
    write_adapter(tmp_path / "two", two)
    graph = merged(tmp_path / "model", tmp_path / "one", tmp_path / "two", scales=(1.0, -0.5))
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    for change, scale in ((one, 1.0), (two, -0.5)):
        for module, (a, b) in change.items():
            weight = tensors[f"{module}.weight"]
            delta = torch.from_numpy(b).double() @ torch.from_numpy(a).double()
            tensors[f"{module}.weight"] = (weight.double() + scale * delta).to(weight.dtype)
    save_file(tensors, tmp_path / "changed.safetensors", metadata={"format": "pt"})
    got = logits(graph)
    (tmp_path / "changed.safetensors").replace(file)
    wanted = reference(type(model).from_pretrained(tmp_path / "model", dtype=torch.float32), IDS, task)
    assert worst(wanted, base) > 1e-2
    assert worst(got, wanted) < 2e-5


def test_some_experts_over_weights_of_16_bits(tmp_path: Path) -> None:
    """Beside those that stay as they are stored, nothing is rounded."""
    save_family("mixtral", tmp_path / "model", "bfloat16")
    modules = per_expert(tmp_path / "model", r".*layers\.0\..*experts\.1\.w1\.weight")
    write_adapter(tmp_path / "one", modules)
    plain, changed = merged(tmp_path / "model"), merged(tmp_path / "model", tmp_path / "one")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    before, after = (graph.weights[name].weight for graph in (plain, changed))
    assert before is not None and after is not None and after.dtype == "float32"
    ((a, b),) = modules.values()
    wanted = before.read().astype(np.float32)
    wanted[1, : len(b)] += b @ a
    np.testing.assert_allclose(after.read(), wanted, atol=1e-7)
    np.testing.assert_array_equal(after.read(1, 2), after.read()[1:2])
    assert worst(logits(changed), logits(plain)) > 1e-3


def test_stacks_and_their_parts_in_any_order(tmp_path: Path) -> None:
    """What was merged into a weight that is made of others leaves them to be found."""
    model, _ = save_family("mixtral", tmp_path / "model")
    stack, parts = tmp_path / "stack", tmp_path / "parts"
    adapter(model, stack, **BOTH)
    write_adapter(parts, per_expert(tmp_path / "model", r".*(experts\.\d+\.w[12]|\.gate)\.weight"))
    for name in ("gate_up_proj", "down_proj"):
        one, other = (
            merged(tmp_path / "model", *order).weights[f"model.layers.0.mlp.experts.{name}"].weight
            for order in ((stack, parts), (parts, stack))
        )
        plain = merged(tmp_path / "model").weights[f"model.layers.0.mlp.experts.{name}"].weight
        assert one is not None and other is not None and plain is not None
        np.testing.assert_allclose(one.read(), other.read(), atol=1e-6)
        assert np.abs(one.read() - plain.read()).max() > 0.1


def test_patterns_name_modules_of_the_whole_model(tmp_path: Path) -> None:
    """Of models that take more than text, as PEFT calls them there."""
    ones = np.ones((3, 4), np.float32), np.ones((4, 3), np.float32)
    name = "model.language_model.layers.0.self_attn.q_proj"
    change = read_adapter(write_adapter(tmp_path / "one", {name: ones}, alpha_pattern={name: 30})).changes
    assert change["model.layers.0.self_attn.q_proj"].scaling == 10
    module = "model.language_model.layers.0.mlp.experts"
    config = {"target_parameters": [f"{module}.down_proj"], "alpha_pattern": {f"{module}.down_proj": 6}}
    found = read_adapter(write_adapter(tmp_path / "two", {module: ones}, **config)).parameters
    rules = found["model.layers.0.mlp.experts"].rules
    assert rules("down_proj") == (3, 2.0) and rules("gate_up_proj") is None


def test_whole_tensors_of_experts(tmp_path: Path) -> None:
    """A part that the adapter replaces, by the name that the checkpoint has for it."""
    save_family("mixtral", tmp_path / "model")
    modules = per_expert(tmp_path / "model", r".*layers\.0\..*experts\.0\.w1\.weight")
    write_adapter(tmp_path / "one", modules, modules_to_save=["w3"])
    file = tmp_path / "one" / "adapter_model.safetensors"
    label = "model.layers.0.block_sparse_moe.experts.1.w3"
    stored = load_file(tmp_path / "model" / "model.safetensors")[f"{label}.weight"]
    save_file({**load_file(file), f"base_model.model.{label}.weight": stored + 1}, file)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    plain, changed = (
        graph.weights[name].weight
        for graph in (merged(tmp_path / "model"), merged(tmp_path / "model", tmp_path / "one"))
    )
    assert plain is not None and changed is not None
    rows = len(stored)
    np.testing.assert_array_equal(changed.read()[1, rows:], plain.read()[1, rows:] + 1)
    np.testing.assert_array_equal(changed.read()[1, :rows], plain.read()[1, :rows])


def test_the_head_and_old_names_beside_parameters(tmp_path: Path) -> None:
    """What is no parameter's change is a module's as ever: a tied head, a router by the checkpoint's name."""
    tied = {"tie_word_embeddings": True}
    model, task = save_family("mixtral", tmp_path / "model", changed=tied)
    one, two = tmp_path / "one", tmp_path / "two"
    adapted = adapter(model, one, scale=0.1, target_modules=["lm_head"])
    wanted = reference(adapted.eval(), IDS, task)
    stack = {"target_parameters": ["down_proj"], "target_modules": ["lm_head"]}
    edit(one, **stack)
    assert read_adapter(one).copies == {"lm_head.weight"}
    assert worst(logits(merged(tmp_path / "model", one)), wanted) < 2e-5
    modules = per_expert(tmp_path / "model", r".*block_sparse_moe\.gate\.weight")
    write_adapter(two, modules)
    plain = merged(tmp_path / "model", two)
    edit(two, **stack)
    name = "model.layers.0.mlp.gate.weight"
    before, after = plain.weights[name].weight, merged(tmp_path / "model", two).weights[name].weight
    assert before is not None and after is not None and np.array_equal(before.read(), after.read())


def test_bad_adapters(tmp_path: Path) -> None:
    model, _ = save_family("mixtral", tmp_path / "model")
    one = tmp_path / "one"
    adapter(model, one, **BOTH)

    def refused(why: str, folder: Path = one, kind: Any = InputError) -> None:
        with pytest.raises(kind, match=why):
            merged(tmp_path / "model", folder)

    edit(one, r=2)
    refused(r"are no change of model\.layers\.0\.mlp\.experts\.\w+ \[.*\] of rank 2")
    edit(one, r=10**400)
    refused("r is '1000.*, no number for it")
    edit(one, r=4, target_parameters="down_proj")
    refused("target_parameters is 'down_proj', no list of names")
    edit(one, target_parameters=None)
    refused(r"is nested, as changes of parameters are; .* no target_parameters")
    edit(one, target_parameters=["down_proj"])
    refused(r"has 2 changes of parameters of .* has 1 that it targets: .*down_proj")
    edit(one, target_parameters=["down_proj", "gate_up_proj"])
    with pytest.raises(UnsupportedError, match=r"changes parameters .*experts.*per request"):
        AdapterPlaces(256, ()).factors(read_adapter(one))
    file = one / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({n.replace(".mlp.experts", ".mlp.other"): t for n, t in tensors.items()}, file)
    refused(r"has 2 changes of parameters of .*other .*, \w+ has 0")
    save_file({n: t for n, t in tensors.items() if "base_layer.lora_A" not in n}, file)
    refused(r"lora_B\.weight has no lora_A\.weight beside it")
    save_file({n: t for n, t in tensors.items() if "base_layer" not in n}, file)
    refused(r"has 1 changes of parameters of .*experts .* has 2 that it targets")
    save_file({n: t for n, t in tensors.items() if "base_layer" in n}, file)
    refused(r"the adapter has no .*experts\.lora_A\.weight")
    save_file({"base_model.model.base_layer.lora_A.weight": torch.ones(4, 4)}, file)
    refused("is nested in no module")
    modules = per_expert(tmp_path / "model", r".*\.experts\.0\.w1\.weight")
    strangers = {name.replace("experts.0", "experts.9"): parts for name, parts in modules.items()}
    refused(r"changes .*experts\.9\.w1, .* does not have", write_adapter(tmp_path / "two", strangers))
    smaller = {name: (a[:, :-1].copy(), b) for name, (a, b) in list(modules.items())[:1]}
    three = write_adapter(tmp_path / "three", smaller)
    refused(r"changes a weight of .*experts\.0\.w1\.weight is ", three)
    # The whole weight, and one of the tensors that it is made of.
    write_adapter(tmp_path / "four", modules, modules_to_save=["experts"])
    file = tmp_path / "four" / "adapter_model.safetensors"
    whole = merged(tmp_path / "model").weights[name := "model.layers.0.mlp.experts.gate_up_proj"].weight
    assert whole is not None
    save_file({**load_file(file), f"base_model.model.{name}": torch.from_numpy(whole.read())}, file)
    refused(r"experts\.0\.w1\.weight is part of a weight that is replaced", tmp_path / "four")


# Experts whose gate and up have the same sizes; without a gate, and both matrices square.
@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("inkling_text", ["shared_experts.gate_proj", "up_proj", "down_proj", "experts.gate_up_proj"]),
        ("nemotron_h", ["experts.up_proj", "down_proj"]),
        ("nemotron_h", ["experts.down_proj"]),
    ],
)
def test_where_sizes_do_not_tell_the_order_does(family: str, targets: list[str], tmp_path: Path) -> None:
    square = {"hidden_size": 32, "moe_intermediate_size": 32, "intermediate_size": 32}
    changed = square if family == "nemotron_h" else {}
    model, task = save_family(family, tmp_path / "model", changed=changed)
    base = reference(model, IDS, task)
    options: dict[str, Any] = {"target_modules": [], "target_parameters": targets}
    adapted = adapter(model, tmp_path / "one", scale=0.1, **options).eval()
    wanted = reference(adapted, IDS, task)
    assert worst(wanted, base) > 1e-2
    assert worst(logits_of(merged(tmp_path / "model", tmp_path / "one"), IDS), wanted) < 2e-5
