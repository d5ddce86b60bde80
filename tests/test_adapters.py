"""Adapters that requests choose among, on compiled kernels: PEFT is the oracle of their logits, each request
alone the oracle of a batch.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llmc
import numpy as np
import pytest
import torch
from llmc.codegen.artifact import Artifact
from llmc.ir.errors import InputError, UnsupportedError
from llmc.runtime.adapters import AdapterInUseError, check_places
from llmc.runtime.llm import LLM

from .lora_files import adapter, edit, write_adapter
from .models import ids_of, real_model, reference_logits, save_tiny, tiny_model
from .quantized_files import save_bnb, save_gptq
from .tvm_graphs import ISA

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT still calls what transformers deprecates
pytest.importorskip("peft")

HERE = f"tvm-cpu:isa={ISA}"
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = [3, *ids_of(19)[4:9]]
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": LINEAR},
    "rslora": {"target_modules": ["o_proj", "k_proj"], "use_rslora": True, "r": 20, "lora_alpha": 4},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "up_proj"],
        "rank_pattern": {"k_proj": 2, "layers.0.mlp.up_proj": 33},
        "alpha_pattern": {"up_proj": 3, r"layers\.1\.self_attn\.q_proj": 32},
    },
    "head": {"target_modules": ["lm_head", "down_proj"]},
    "dora": {"target_modules": LINEAR, "use_dora": True},
    "some dora": {"target_modules": ["k_proj", "o_proj", "lm_head"], "use_dora": True, "r": 20},
    "lora bias": {"target_modules": [*LINEAR, "lm_head"], "lora_bias": True, "lora_alpha": 2},
    "trained biases": {"target_modules": ["q_proj", "v_proj", "o_proj"], "bias": "lora_only"},
    "all biases": {"target_modules": ["v_proj", "up_proj"], "bias": "all"},
    "dora and biases": {"target_modules": ["q_proj", "k_proj"], "use_dora": True, "bias": "lora_only"},
    "embedding": {"target_modules": ["embed_tokens", "k_proj"], "r": 20},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": TOKENS},
    "tokens of each": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": [3, 5]},
    },
    "saved head": {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
    "saved embedding": {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]},
    "saved layers": {"target_modules": ["q_proj"], "modules_to_save": ["k_proj", "down_proj"]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base.llmc, compiled without a thought of adapters, and an adapter of each kind."""
    path = tmp_path_factory.mktemp("adapters")
    llmc.compile(save_tiny("qwen2", path / "base"), path / "base.llmc", targets=[HERE])
    return path


@pytest.fixture(scope="module")
def wanted(folder: Path) -> dict[str, np.ndarray]:
    """PEFT's logits with each adapter, and the model's without."""
    ids = ids_of(19)
    found = {"": reference_logits(tiny_model("qwen2"), ids)}
    for seed, (kind, options) in enumerate(KINDS.items()):
        adapted = adapter(tiny_model("qwen2"), folder / kind, seed=seed, **options)
        found[kind] = reference_logits(adapted, ids)
    return found


@pytest.fixture(scope="module")
def llm(folder: Path, wanted: dict[str, np.ndarray]) -> Iterator[LLM]:
    with llmc.load(
        folder / "base.llmc",
        adapters={kind: folder / kind for kind in KINDS},
        threads=2,
        kv_tokens=4096,
        context=256,
    ) as opened:
        yield opened


@pytest.mark.parametrize("kind", ["", *KINDS])
def test_logits_are_those_of_peft(llm: LLM, wanted: dict[str, np.ndarray], kind: str) -> None:
    found = llm.logits(ids_of(19), adapter=kind or None)
    assert np.abs(found - wanted[kind]).max() < 1e-4
    assert not kind or np.abs(found - wanted[""]).max() > 1e-1


def greedy(llm: LLM, prompts: list[tuple[str, list[int]]]) -> list[list[int]]:
    """Tokens of each (adapter, prompt), computed together."""
    streams = [
        llm.stream(prompt, adapter=name or None, max_tokens=12, ignore_eos=True) for name, prompt in prompts
    ]
    return [[token for output in stream for token in output.token_ids] for stream in streams]


def test_a_batch_of_several_gives_each_its_own_tokens(llm: LLM) -> None:
    prompts = [(name, ids_of(3 + 7 * i)) for i, name in enumerate([*KINDS, "", "lora", "", "head"])]
    alone = [greedy(llm, [one])[0] for one in prompts]
    assert greedy(llm, prompts) == alone
    assert greedy(llm, prompts[::-1]) == alone[::-1]
    assert len({tuple(tokens) for tokens in alone}) > 4


def test_logits_of_a_batch_are_bit_for_bit_those_alone(llm: LLM) -> None:
    """Chunks of other sizes take rows together, one by one, and in other company."""
    ids = ids_of(100)
    whole = llm.logits(ids, adapter="lora")
    for chunk in (1, 7, 66):
        parts = [part.copy() for part in llm.iter_logits(ids, chunk, "lora")]
        np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_prefixes_are_shared_within_an_adapter_alone(llm: LLM) -> None:
    prompt = ids_of(80)[::-1]

    def cached(name: str | None) -> int:
        return llm.generate(prompt, adapter=name, max_tokens=1).cached_tokens

    assert [cached("lora"), cached("rslora"), cached(None)] == [0, 0, 0]
    assert [cached("lora"), cached("rslora"), cached(None)] == [64, 64, 64]


def test_come_and_go_while_the_model_runs(llm: LLM, folder: Path, wanted: dict[str, np.ndarray]) -> None:
    ids = ids_of(19)
    expected = greedy(llm, [("patterns", ids)])[0]
    running = llm.stream(ids, adapter="lora", max_tokens=100, ignore_eos=True)
    next(running)
    llm.load_adapter("new", folder / "lora")
    assert llm.adapters == [*KINDS, "new"]
    with pytest.raises(InputError, match="an adapter is called 'new' already"):
        llm.load_adapter("new", folder / "lora")
    np.testing.assert_array_equal(llm.logits(ids, adapter="new"), llm.logits(ids, adapter="lora"))
    held = llm.stream(ids, adapter="new", max_tokens=200, ignore_eos=True)
    next(held)
    with pytest.raises(AdapterInUseError, match="'new' is used by 1 running request"):
        llm.unload_adapter("new")
    held.close()
    running.close()
    greedy(llm, [("new", ids)])  # its prefix is in the cache now; the engine has taken up what was closed
    llm.unload_adapter("new")
    with pytest.raises(InputError, match="no adapter is called 'new'"):
        llm.generate(ids, adapter="new")
    llm.load_adapter("new", folder / "patterns")  # the same name and slot, another adapter
    assert greedy(llm, [("new", ids)])[0] == expected
    assert np.abs(llm.logits(ids, adapter="new") - wanted["patterns"]).max() < 1e-4
    llm.unload_adapter("new")


def test_a_request_made_before_its_adapter_went_is_refused(llm: LLM, folder: Path) -> None:
    llm.load_adapter("brief", folder / "lora")
    engine = llm.engine.engine
    request = engine.make_request(ids_of(5), llm.sampling(adapter="brief"))
    llm.unload_adapter("brief")
    with llm.engine.paused(), pytest.raises(InputError, match="adapter 'brief' was removed"):
        engine.submit(request)


def test_a_view_answers_with_its_adapter(llm: LLM) -> None:
    view = llm.with_adapter("lora")
    ids = ids_of(9)
    assert view.generate(ids, max_tokens=6).token_ids == greedy(llm, [("lora", ids)])[0][:6]
    np.testing.assert_array_equal(view.logits(ids), llm.logits(ids, adapter="lora"))
    assert view.grammars is llm.grammars and llm.sampling().adapter is None


def test_opened_with_one_adapter(folder: Path, wanted: dict[str, np.ndarray]) -> None:
    with llmc.load(folder / "base.llmc", adapter=folder / "lora", kv_tokens=512, context=256) as llm:
        assert np.abs(llm.logits(ids_of(19)) - wanted["lora"]).max() < 1e-4
        assert llm.generate(ids_of(19), max_tokens=1).token_ids == [int(wanted["lora"][-1].argmax())]


def test_compiled_with_places(folder: Path, llm: LLM) -> None:
    """The artifact then needs no compiler where it runs, and answers bit for bit as the other does."""
    made = llmc.compile(folder / "base", folder / "placed.llmc", targets=[HERE], adapters=True)
    assert "tvm-cpu:isa" in " ".join(made.manifest["command"])
    assert made.target("tvm-cpu")["adapters"]["places"][0]["parts"][1] == [
        "model.layers.0.self_attn.k_proj",
        32,
    ]
    from llmc.runtime.loader import load

    with load(folder / "placed.llmc", adapters={"a": folder / "head"}, kv_tokens=512, context=256) as placed:
        found = placed.logits(ids_of(19), adapter="a")
    np.testing.assert_array_equal(found, llm.logits(ids_of(19), adapter="head"))
    # Nothing of it needs what compiles models.
    program = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'tvm', 'huggingface_hub']))\n"
        f"import llmc; llm = llmc.load({str(folder / 'placed.llmc')!r}, adapter={str(folder / 'head')!r},"
        f" kv_tokens=512, context=256); print(llm.generate({ids_of(19)}, max_tokens=3).token_ids)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.split("\n")[0] == str(greedy(llm, [("head", ids_of(19))])[0][:3]), done.stderr


def test_without_places_the_command_is_named(folder: Path) -> None:
    from llmc.runtime.loader import load

    with pytest.raises(UnsupportedError, match="have no places for adapters") as caught:
        load(folder / "base.llmc", adapters={})
    assert "llmc compile base --target tvm-cpu:isa=" in caught.value.remedy
    assert "--adapters -o base.llmc" in caught.value.remedy


def test_targets_that_take_none(folder: Path) -> None:
    with pytest.raises(InputError, match="--adapters: onnx-cpu takes no adapters per request"):
        llmc.compile(folder / "base", folder / "x.llmc", targets=["onnx-cpu"], adapters=True)
    with pytest.raises(UnsupportedError, match="bert is no language model"):
        llmc.compile(save_tiny("bert", folder / "bert"), folder / "x.llmc", targets=[HERE], adapters=True)
    llmc.compile(folder / "base", folder / "null.llmc", targets=["null"])
    with pytest.raises(UnsupportedError, match="have no places") as caught:
        llmc.load(folder / "null.llmc", adapters={})
    assert "--lora" in caught.value.remedy


def test_where_layers_read_scaled_channels_none_are_taken(folder: Path, llm: LLM) -> None:
    """Factors would multiply x / s where the module reads x."""
    with pytest.raises(InputError, match=r"--adapters: quantize-awq \(--quant awq-int4-g32\) scales"):
        llmc.compile(folder / "base", folder / "x.llmc", targets=[HERE], quant="awq-int4-g32", adapters=True)
    places, passes = f"{HERE},adapters=true", ["scale-channels"]
    with pytest.raises(InputError, match="--adapters: scale-channels"):
        llmc.compile(folder / "base", folder / "x.llmc", targets=[places], quant="none", passes=passes)
    llmc.compile(folder / "base", folder / "scaled.llmc", targets=[HERE], quant="none", passes=passes)
    with pytest.raises(UnsupportedError, match="was compiled with scaled channels"):
        llmc.load(folder / "scaled.llmc", adapters={})
    # Graphs of versions before do not say it.
    scaled = Artifact.open(folder / "scaled.llmc")
    with pytest.raises(UnsupportedError, match=r"scaled\.llmc is of scale-channels, which scales"):
        check_places(scaled, llm.executor)
    artifact = Artifact.open(folder / "base.llmc")
    check_places(artifact, llm.executor)
    artifact.manifest["quantization"]["scheme"] = "awq-int4-g32"
    with pytest.raises(UnsupportedError, match=r"base\.llmc is of awq-int4-g32, which scales") as caught:
        check_places(artifact, llm.executor)
    assert "--lora" in caught.value.remedy


def test_what_can_only_be_merged_says_so(llm: LLM, tmp_path: Path) -> None:
    adapter(tiny_model("qwen2"), tmp_path / "a", target_modules=["q_proj"], modules_to_save=["norm"])
    with pytest.raises(
        UnsupportedError, match=r"model\.norm\.weight .*modules_to_save.* cannot be chosen per request"
    ) as caught:
        llm.load_adapter("a", tmp_path / "a")
    assert "--lora" in caught.value.remedy
    assert "a" not in llm.adapters


def test_adapters_of_another_model_are_refused_by_name_and_shape(llm: LLM, tmp_path: Path) -> None:
    layers = "model.layers"
    ones = np.ones((4, 64), np.float32), np.ones((64, 4), np.float32)
    write_adapter(tmp_path / "a", {f"{layers}.{i}.self_attn.q_proj": ones for i in range(9)})
    with pytest.raises(
        InputError, match=r"layers\.2\.self_attn\.q_proj, .* and 1 more, which this"
    ) as caught:
        llm.load_adapter("a", tmp_path / "a")
    assert "it has q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and 3 more" in caught.value.message
    wide = np.ones((4, 80), np.float32), np.ones((64, 4), np.float32)
    write_adapter(
        tmp_path / "b", {f"{layers}.0.self_attn.q_proj": wide, f"{layers}.0.self_attn.k_proj": ones}
    )
    with pytest.raises(InputError, match="of a model of other sizes") as caught:
        llm.load_adapter("b", tmp_path / "b")
    assert "q_proj [64, 80] where the model has [64, 64]" in caught.value.message
    assert "k_proj [64, 64] where the model has [32, 64]" in caught.value.message


def test_bad_adapters(llm: LLM, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"
    a, b = np.ones((4, 64), np.float32), np.ones((64, 4), np.float32)
    folder = write_adapter(tmp_path / "a", {name: (a, b)})
    for config, kind, reason in (
        ({"r": 0}, InputError, "r is 0, no rank"),
        ({"peft_type": "IA3"}, UnsupportedError, "of kind 'IA3'"),
        ({"peft_type": None}, UnsupportedError, "of kind None"),
    ):
        kept = (folder / "adapter_config.json").read_text()
        edit(folder, **config)
        with pytest.raises(kind, match=reason):
            llm.load_adapter("a", folder)
        (folder / "adapter_config.json").write_text(kept)
    write_adapter(folder, {name: (np.full((4, 64), np.nan, np.float32), b)})
    with pytest.raises(InputError, match=r"lora_A\.weight holds NaN"):
        llm.load_adapter("a", folder)
    write_adapter(folder, {name: (np.ones((8200, 64), np.float32), np.ones((64, 8200), np.float32))})
    with pytest.raises(
        UnsupportedError, match=r"has the rank 8200; requests choose among adapters of at most 8192"
    ):
        llm.load_adapter("a", folder)
    with pytest.raises(InputError, match=r"no adapter_config\.json there"):
        llm.load_adapter("a", tmp_path / "nothing")
    assert llm.adapters == list(KINDS)


def over(values: dict[str, np.ndarray], family: str) -> Any:
    """The tiny model with these weights in place of its own."""
    model = tiny_model(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in values:
                parameter.copy_(torch.from_numpy(values[name]))
    return model


def quantized(tmp_path: Path, values: dict[str, np.ndarray], **options: Any) -> tuple[Any, LLM, np.ndarray]:
    """PEFT over what a checkpoint stands for; its artifact opened with the adapter; logits without it."""
    llmc.compile(tmp_path / "base", tmp_path / "a.llmc", targets=[HERE], quant="keep", kv_dtype="float32")
    plain = reference_logits(over(values, "llama"), ids_of(19))
    options |= {"target_modules": LINEAR, "r": 9, "scale": 0.05}
    adapted = adapter(over(values, "llama"), tmp_path / "one", **options)
    llm = llmc.load(tmp_path / "a.llmc", adapters={"one": tmp_path / "one"}, kv_tokens=512, context=256)
    return adapted, llm, plain


@pytest.mark.slow
def test_over_nf4(tmp_path: Path) -> None:
    """QLoRA: the base as its checkpoint has it, products of floats."""
    pytest.importorskip("bitsandbytes")
    save_tiny("llama", tmp_path / "base")
    adapted, llm, plain = quantized(tmp_path, save_bnb(tmp_path / "base"))
    with llm:
        found = llm.logits(ids_of(19), adapter="one")
        wanted = reference_logits(adapted, ids_of(19))
        assert np.abs(found - wanted).max() < 1e-4
        assert np.abs(found - plain).max() > 1e-1


@pytest.mark.slow
@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_over_int4(desc_act: bool, dora: bool, tmp_path: Path) -> None:
    """The base's kernels round activations to 8 bits, and factors are of 8 bits: with an adapter logits are
    no further from PEFT's than 2.5 times what the base alone is from its own float model. Also where columns
    are stored in another order than the model's.
    """
    save_tiny("llama", tmp_path / "base")
    values = save_gptq(tmp_path / "base", desc_act=desc_act)
    adapted, llm, plain = quantized(tmp_path, values, use_dora=dora)
    with llm:
        rounding = np.abs(llm.logits(ids_of(19)) - plain).max()
        found = llm.logits(ids_of(19), adapter="one")
    wanted = reference_logits(adapted, ids_of(19))
    assert np.abs(found - wanted).max() < 2.5 * rounding
    assert np.abs(found - plain).max() > 8 * rounding


def test_commands_take_one(folder: Path, llm: LLM) -> None:
    """`run` answers with it, `eval` measures it; over kernels that are made for it."""
    from click.testing import CliRunner

    prompt, chosen = "Hello there", ["--adapter", str(folder / "lora")]
    text = folder / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 9)

    def said(*words: str) -> dict[str, Any]:
        command = importlib.import_module(f"llmc.cli.{words[0]}").command
        done = CliRunner().invoke(command, [*words[1:], "--json"], standalone_mode=False)
        assert done.exception is None, done.output
        return json.loads(done.stdout)

    artifact = str(folder / "base.llmc")
    run = ("run", artifact, prompt, "--no-chat-template", "--max-tokens", "6", "--context", "128")
    assert said(*run, *chosen)["text"] == llm.generate(prompt, max_tokens=6, adapter="lora").text
    assert said(*run)["text"] == llm.generate(prompt, max_tokens=6).text
    measure = ("eval", artifact, "--ppl", str(text), "--window", "32", "--windows", "2")
    assert said(*measure)["ppl"] != said(*measure, *chosen)["ppl"]
    against = said(*measure, *chosen, "--against", artifact)
    assert against["kl"] > 0.01  # the other one is without it


@pytest.mark.slow
def test_a_published_model_beside_peft(tmp_path: Path) -> None:
    """SmolLM2 in float32, two adapters over its linear layers, one of DoRA: logits within 1e-3 of PEFT's."""
    from llmc.cli.peer import load_transformers

    source = real_model("smollm2")
    llmc.compile(source, tmp_path / "a.llmc", targets=[HERE], kv_dtype="float32")
    names = ("one", "two")
    found: dict[str, np.ndarray] = {}
    ids = list(range(1000, 1040))
    for seed, name in enumerate(names):
        model = load_transformers(str(source), "float32")
        kind = {"r": 16, "target_modules": LINEAR, "use_dora": name == "two"}
        adapted = adapter(model, tmp_path / name, seed=seed, scale=0.02, **kind)
        found[name] = reference_logits(adapted, ids)
    with llmc.load(
        tmp_path / "a.llmc", adapters={name: tmp_path / name for name in names}, kv_tokens=512
    ) as llm:
        plain = llm.logits(ids)
        for name in names:
            got = llm.logits(ids, adapter=name)
            assert np.abs(got - np.asarray(found[name])).max() < 1e-3
            assert np.abs(got - plain).max() > 0.1
