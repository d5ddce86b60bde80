"""`--rope-scaling`: how it is read, what it does to a configuration, what it refuses; on the command line, in
Python, in the manifest and in GGUF.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import llmc
import numpy as np
import pytest
from llmc.cli.main import main
from llmc.codegen.artifact import Artifact
from llmc.codegen.driver import check_model, compile_model
from llmc.frontend.gguf import read_gguf
from llmc.frontend.rope import RopeScaling, longest, rope_facts
from llmc.frontend.source import open_source
from llmc.ir.errors import InputError, LlmcError

from .command_line import Capture
from .gguf_files import F32, STRING, U32, entry, write_gguf
from .models import CONTEXT, save_tiny, tiny_config, tiny_model
from .test_frontend_gguf_model import llama_entries, llama_tensors

HALF = 8  # frequencies of the tiny models: heads of 16


def factors(folder: Path, **changes: Any) -> Path:
    """LongRoPE's lists for a tiny model, as a file."""
    lists = {
        "short_factor": [1.0 + 0.1 * i for i in range(HALF)],
        "long_factor": [1.0 + i for i in range(HALF)],
    }
    path = folder / "factors.json"
    path.write_text(json.dumps({**lists, **changes}))
    return path


# Reading ---------------------------------------------------------------------------------------------------


def test_a_scaling_is_read() -> None:
    plain = RopeScaling.parse("yarn:4")
    assert (plain.kind, plain.factor, plain.original, dict(plain.parameters)) == ("yarn", 4.0, None, {})
    told = RopeScaling.parse("yarn:2.5,original=2048,beta_fast=16,truncate=false")
    assert (told.factor, told.original) == (2.5, 2048)
    assert told.parameters == {"beta_fast": 16.0, "truncate": False}
    assert RopeScaling.parse("llama3:8").parameters == {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ntk:4", "'ntk' is no kind of scaling"),
        ("", "'' is no kind of scaling"),
        ("yarn", "says no factor"),
        ("yarn:", "factor ''"),
        ("yarn:four", "factor 'four'"),
        ("linear:0.5", "factor '0.5'"),
        ("linear:-4", "factor '-4'"),
        ("linear:nan", "factor 'nan'"),
        ("linear:inf", "factor 'inf'"),
        ("yarn:4,original", "'original' is no option of yarn"),
        ("yarn:4,original=", "original ''"),
        ("yarn:4,original=0", "original '0'"),
        ("yarn:4,original=2048.5", "original '2048.5'"),
        ("yarn:4,original=²", "original '²'"),
        ("yarn:4,original=64,original=128", "or is there twice"),
        ("linear:4,beta_fast=32", "'beta_fast=32' is no option of linear"),
        ("yarn:4,beta_fast=1,beta_slow=32", "the wrong way round"),
        ("yarn:4,beta_slow=0", "the wrong way round"),
        ("yarn:4,truncate=1", "truncate=1"),
        ("yarn:4,attention_factor=-1", "attention_factor '-1'"),
        ("llama3:8,low_freq_factor=4", "the wrong way round"),
        ("longrope:4", "longrope needs the factors"),
        ("longrope:4,factors=/nowhere/f.json", "cannot read /nowhere/f.json"),
    ],
)
def test_what_cannot_be_read_is_refused(text: str, said: str) -> None:
    with pytest.raises(InputError) as raised:
        RopeScaling.parse(text)
    assert said in str(raised.value) and raised.value.remedy


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"long_factor": None}, "has no long_factor"),
        ({"short_factor": []}, "has no short_factor"),
        ({"short_factor": [1.0] * 7 + [0.0]}, "not all numbers above 0"),
        ({"long_factor": ["1"] * 8}, "not all numbers above 0"),
        ({"long_factor": [True] * 8}, "not all numbers above 0"),
    ],
)
def test_damaged_factors_are_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        RopeScaling.parse(f"longrope:4,factors={factors(tmp_path, **changes)}")


def test_factors_for_another_width_are_refused(tmp_path: Path) -> None:
    path = factors(tmp_path, short_factor=[1.0] * 9)
    with pytest.raises(InputError, match="short_factor has 9 numbers, m has 8 frequencies"):
        RopeScaling.parse(f"longrope:4,factors={path}").apply(tiny_config("llama"), "m")


# Configurations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "context", "limit"),
    [
        ("linear:4", 1024, 1024),
        ("yarn:4", 1024, 1024),
        ("yarn:4,original=128", 512, 512),
        ("llama3:8", 2048, 2048),
        ("dynamic:2", 512, 256),  # it grows from max_position_embeddings on
        ("dynamic:2,original=128", 256, 128),
        ("linear:1.5", 384, 384),
    ],
)
def test_the_context_becomes_the_original_one_times_the_factor(text: str, context: int, limit: int) -> None:
    config = tiny_config("llama")
    scaling = RopeScaling.parse(text)
    assert scaling.apply(config, "m") == context
    assert config.max_position_embeddings == limit
    assert longest(config, limit) == context
    assert config.rope_parameters["rope_type"] == scaling.kind
    assert rope_facts(config, context, limit) == {
        "type": scaling.kind,
        "factor": scaling.factor,
        "original": scaling.original or CONTEXT,
        **({"length": context} if scaling.kind == "dynamic" else {}),
    }


def test_layers_that_see_a_window_keep_their_frequencies() -> None:
    config = tiny_config("gemma3")
    before = dict(config.rope_parameters["sliding_attention"])
    RopeScaling.parse("yarn:4").apply(config, "m")
    assert config.rope_parameters["sliding_attention"] == before
    assert config.rope_parameters["full_attention"]["rope_type"] == "yarn"


def test_a_model_without_rotary_embedding_is_refused() -> None:
    with pytest.raises(InputError, match="gpt has no rotary embedding that reaches beyond a window"):
        RopeScaling.parse("yarn:4").apply(tiny_config("gpt2"), "gpt")


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("linear:4", "scaled already (yarn:4; rope_type is yarn, not linear)"),
        ("yarn:8", "scaled already (yarn:4; factor is 4, not 8)"),
        ("yarn:4,original=128", "original_max_position_embeddings is 64, not 128"),
        ("yarn:4,beta_fast=16", "beta_fast is None, not 16"),
    ],
)
def test_a_scaling_that_contradicts_the_configuration_is_refused(text: str, said: str) -> None:
    config = tiny_config("llama", rope_parameters=dict(YARN))
    with pytest.raises(InputError) as raised:
        RopeScaling.parse(text).apply(config, "m")
    assert said in str(raised.value) and "m, which is" in str(raised.value)


def test_a_scaling_that_says_what_the_configuration_says_changes_nothing() -> None:
    config = tiny_config("llama", rope_parameters=dict(YARN))
    assert RopeScaling.parse("yarn:4,original=64").apply(config, "m") == CONTEXT
    assert config.rope_parameters == YARN and config.max_position_embeddings == CONTEXT


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("yarn:4,original=512", "original=512 contradicts m, which was made for 256 tokens"),
        ("linear:100000", "25600000 tokens are more than positions in float32 can count"),
    ],
)
def test_lengths_that_cannot_be_are_refused(text: str, said: str) -> None:
    with pytest.raises(InputError) as raised:
        RopeScaling.parse(text).apply(tiny_config("llama"), "m")
    assert said in str(raised.value) and raised.value.remedy


def test_a_module_from_python_is_refused() -> None:
    source = open_source(tiny_model("llama"))
    with pytest.raises(InputError, match="is a module from Python, built already"):
        source.scale_rope(RopeScaling.parse("yarn:4"))
    changing = tiny_model("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(LlmcError, match=r"frequencies that change with the length of a sequence \(dynamic\)"):
        open_source(changing).build_model()


def test_a_model_that_does_not_look_at_the_scaling_is_refused() -> None:
    plain = tiny_model("llama")
    with pytest.raises(LlmcError, match="computes its rotary embedding in a way of its own"):
        RopeScaling.parse("yarn:4").check_built(plain, "m")


# The command line, Python, the manifest --------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return save_tiny("llama", tmp_path / "model")


def test_compile_records_the_scaling(tiny: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "m.llmc"
    words = [
        "compile",
        str(tiny),
        "-o",
        str(out),
        "--target",
        "null",
        "--rope-scaling",
        "yarn:4,original=128",
    ]
    assert main(words) == 0
    manifest = Artifact.open(out).manifest
    assert manifest["model"]["rope_scaling"] == {"type": "yarn", "factor": 4.0, "original": 128}
    assert manifest["model"]["context_length"] == 512
    assert manifest["command"][-2:] == ["--rope-scaling", "yarn:4,original=128"]
    capsys.readouterr()
    assert main(["inspect", str(out)]) == 0
    assert "rope scaling   yarn × 4, trained on 128 tokens" in capsys.readouterr().out
    plain = tmp_path / "plain.llmc"
    compile_model(tiny, plain, targets=("null",))
    assert "rope_scaling" not in Artifact.open(plain).manifest["model"]


def test_factors_are_recorded_without_their_folder(tiny: Path, tmp_path: Path) -> None:
    text = f"longrope:4,factors={factors(tmp_path)}"
    artifact = llmc.compile(tiny, tmp_path / "m.llmc", targets=("null",), rope_scaling=text, context=200)
    assert artifact.manifest["command"][-2:] == ["--rope-scaling", "longrope:4,factors=factors.json"]
    assert artifact.model["rope_scaling"] == {
        "type": "longrope", "factor": 4.0, "original": 256, "length": 200, "factors": "short",
    }  # fmt: skip


def test_context_may_say_less_but_not_more(tiny: Path, capsys: Capture) -> None:
    report = check_model(tiny, targets=("null",), rope_scaling="dynamic:2", context=300)
    assert report.facts["context"] == 300
    assert report.facts["rope_scaling"]["length"] == 300
    words = ["check", str(tiny), "--target", "null", "--rope-scaling", "yarn:2", "--context", "513"]
    assert main(words) == 2
    assert "was made for 512 tokens" in capsys.readouterr().err
    assert main(["check", str(tiny), "--target", "null", "--context", "257"]) == 2
    assert "--rope-scaling" in capsys.readouterr().err
    assert main(["check", str(tiny), "--target", "null", "--rope-scaling", "yarn:2"]) == 0
    assert "yarn × 2, trained on 256 tokens" in capsys.readouterr().out


# GGUF ------------------------------------------------------------------------------------------------------


def test_frequency_factors_in_a_file_contradict(tmp_path: Path) -> None:
    tensors = {**llama_tensors(), "rope_freqs.weight": np.ones(8, np.float32)}
    source = open_source(write_gguf(tmp_path / "m.gguf", llama_entries(), tensors))
    with pytest.raises(InputError, match=r"scaled already by rope_freqs\.weight"):
        source.scale_rope(RopeScaling.parse("yarn:4"))


@pytest.mark.parametrize(("length", "which"), [(128, "long"), (64, "short")])
def test_longrope_of_a_file(length: int, which: str, tmp_path: Path) -> None:
    short, long = np.linspace(1, 2, 8).astype(np.float32), np.linspace(1, 30, 8).astype(np.float32)
    tensors = {**llama_tensors(), "rope_factors_long.weight": long, "rope_factors_short.weight": short}
    entries = [
        *llama_entries(),
        entry("llama.rope.scaling.original_context_length", U32, 64),
        entry("llama.rope.scaling.attn_factor", F32, 1.25),
    ]
    source = open_source(write_gguf(tmp_path / "m.gguf", entries, tensors))
    source.length = length
    model: Any = source.build_model()
    plain = 10000.0 ** -(np.arange(8) / 8)
    expected = plain / {"long": long, "short": short}[which]
    np.testing.assert_allclose(model.model.rotary_emb.inv_freq.numpy(), expected, rtol=1e-6)
    assert model.model.rotary_emb.attention_scaling == 1.25
    assert source.weights


@pytest.mark.parametrize("which", ["long", "short"])
def test_half_of_longrope_is_a_damaged_file(which: str, tmp_path: Path) -> None:
    tensors = {**llama_tensors(), f"rope_factors_{which}.weight": np.ones(8, np.float32)}
    entries = [*llama_entries(), entry("llama.rope.scaling.original_context_length", U32, 64)]
    missing = {"long": "short", "short": "long"}[which]
    with pytest.raises(InputError, match=rf"but no rope_factors_{missing}\.weight"):
        open_source(write_gguf(tmp_path / "m.gguf", entries, tensors))


def test_yarn_options_of_a_file(tmp_path: Path) -> None:
    entries = [
        *llama_entries(),
        entry("llama.rope.scaling.type", STRING, "yarn"),
        entry("llama.rope.scaling.factor", F32, 4.0),
        entry("llama.rope.scaling.original_context_length", U32, 32),
        entry("llama.rope.scaling.attn_factor", F32, 0.5),
        entry("llama.rope.scaling.yarn_beta_fast", F32, 16.0),
    ]
    found = open_source(write_gguf(tmp_path / "m.gguf", entries, llama_tensors())).config.rope_parameters
    assert found["beta_fast"] == 16.0
    assert found["attention_factor"] == pytest.approx(0.5 * (0.1 * math.log(4) + 1))
    entries.append(entry("llama.rope.scaling.yarn_ext_factor", F32, 0.5))
    with pytest.raises(LlmcError, match=r"has yarn_ext_factor 0\.5 in its yarn scaling"):
        open_source(write_gguf(tmp_path / "n.gguf", entries, llama_tensors()))


@pytest.mark.slow
def test_target_gguf_writes_the_scaling(tiny: Path, tmp_path: Path) -> None:
    """From a folder and from a file: what is read back has the same frequencies."""
    first = _written(tiny, tmp_path / "a.llmc", "yarn:4,beta_fast=16")
    assert (first.config.max_position_embeddings, first.config.rope_parameters["beta_fast"]) == (1024, 16.0)
    plain = _written(tiny, tmp_path / "b.llmc", None)
    second = _written(plain.path, tmp_path / "c.llmc", "yarn:4,beta_fast=16")
    folder = open_source(tiny)
    folder.scale_rope(RopeScaling.parse("yarn:4,beta_fast=16"))
    wanted: Any = folder.build_model()
    for source in (first, second):
        model: Any = source.build_model()
        assert np.array_equal(model.model.rotary_emb.inv_freq, wanted.model.rotary_emb.inv_freq)
        assert model.model.rotary_emb.attention_scaling == wanted.model.rotary_emb.attention_scaling
        assert source.config.max_position_embeddings == 1024
    third = _written(plain.path, tmp_path / "d.llmc", "llama3:8")
    assert "rope_freqs.weight" in read_gguf(third.path).tensors
    with pytest.raises(LlmcError, match="rotary embeddings of kind 'dynamic'"):
        _written(plain.path, tmp_path / "e.llmc", "dynamic:2")


def _written(model: Path | None, out: Path, scaling: str | None) -> Any:
    assert model is not None
    compile_model(model, out, targets=("gguf",), quant="none", rope_scaling=scaling)
    (file,) = out.rglob("*.gguf")
    return open_source(file)
