"""`llmc compile` and `llmc check` as a user calls them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llmc.cli.compile import kv_dtype_option
from llmc.codegen.request import KV_DTYPES

from .command_line import Capture, run

pytest.importorskip("torch")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a program begins with the peak of its parent")
def test_the_peak_is_the_programs_own_however_large_what_started_it() -> None:
    large = np.ones(512 << 20, np.uint8)
    code = "from llmc.cli.resources import peak_rss_bytes; print(peak_rss_bytes())"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert 5 << 20 < int(done.stdout) < 256 << 20
    assert large.all()


def test_compile_reports_what_it_made(capsys: Capture, tmp_path: Path, tiny_folder: Any) -> None:
    output = tmp_path / "tiny.llmc"
    words = ["compile", tiny_folder("llama"), "-o", output, "--target", "null", "--context", "128"]
    code, out, err = run(capsys, *words, "--dump-ir", tmp_path / "ir", "--json")
    assert code == 0
    report = json.loads(out)
    keys = {"artifact", "seconds", "peak_rss_bytes", "weight_bytes", "bits_per_weight", "quality", "notes"}
    assert set(report) == keys
    assert report["artifact"] == str(output)
    assert report["quality"] is None
    assert report["peak_rss_bytes"] > 10 << 20
    assert "open" in err, "progress goes to stderr"
    dumps = sorted(path.name for path in (tmp_path / "ir").iterdir())
    assert len(dumps) > 5
    assert all(name[:2].isdigit() for name in dumps), dumps
    code, out, _ = run(capsys, "inspect", output, "--json")
    assert (code, json.loads(out)["model"]["context_length"]) == (0, 128)


def test_the_command_offers_every_type_of_the_cache() -> None:
    """They stand in both: the command's options are made without what a compilation imports."""

    @kv_dtype_option
    def command() -> None: ...

    (option,) = command.__click_params__  # type: ignore[attr-defined]
    assert tuple(option.type.choices) == KV_DTYPES


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--target", "tpu"], "no target is named 'tpu'"),
        (["--target", "null:isa=avx2"], "target null has no option 'isa'"),
        (["--target", "null", "--target", "null"], "given twice"),
        (["--target", "null", "--quant", "int3"], "no quantization scheme is named 'int3'"),
        (["--target", "null", "--context", "100000"], "--context 100000"),
        (["--target", "null", "--context", "0"], "--context"),
        (["--target", "null", "--pass", "nonsense"], "no pass is named 'nonsense'"),
        (["--target", "null", "--kv-dtype", "int4"], "--kv-dtype"),
        (["--target", "onnx-cpu", "--kv-dtype", "bfloat16"], "onnx-cpu keeps no cache of bfloat16"),
    ],
)
def test_compile_refuses_impossible_options(
    options: list[str], said: str, capsys: Capture, tmp_path: Path, tiny_folder: Any
) -> None:
    code, out, err = run(capsys, "compile", tiny_folder("llama"), "-o", tmp_path / "x.llmc", *options)
    assert (code, out) == (2, "")
    assert said in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("error: ")
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_compile_overwrites_artifacts_only(capsys: Capture, tmp_path: Path, tiny_folder: Any) -> None:
    precious = tmp_path / "documents"
    precious.mkdir()
    (precious / "novel.txt").write_text("It was a dark and stormy night.")
    for model in (tiny_folder("llama"), "/nowhere"):  # asked before the model is opened
        code, _, err = run(capsys, "compile", model, "-o", precious, "--target", "null")
        assert code == 2
        assert "exists and is not an artifact" in err
    assert (precious / "novel.txt").exists()


def test_check_predicts_without_weights(capsys: Capture, tmp_path: Path, tiny_folder: Any) -> None:
    folder = tmp_path / "config-only"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_folder("gemma2") / name).read_bytes())
    code, out, err = run(capsys, "check", folder, "--target", "null", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["supported"] is True
    assert report["attention_layers"] == 2
    assert report["facts"]["architecture"] == "gemma2"
    assert report["weight_bytes"] > 100_000
    code, out, _ = run(capsys, "check", folder, "--target", "null")
    assert code == 0
    assert "2 attention layers" in out


def test_check_of_a_hub_id_reads_its_template_too(
    capsys: Capture, tmp_path: Path, tiny_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository, commit = tmp_path / "models--owner--tiny", "1" * 40
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_folder("llama") / name).read_bytes())
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
        "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
        "{% endfor %}{{ (tools or []) | tojson }}"
    )
    code, out, err = run(capsys, "check", "owner/tiny", "--target", "null", "--json")
    assert code == 0, err
    code, there, err = run(capsys, "check", folder, "--target", "null", "--json")
    assert code == 0, err
    assert json.loads(out)["tool_calls"] == json.loads(there)["tool_calls"]
    assert json.loads(out)["tool_calls"]["format"] == "hermes"


def test_check_names_what_is_wrong(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "perpetuum_mobile"}))
    code, out, err = run(capsys, "check", tmp_path, "--target", "null")
    assert code in (1, 2)
    assert out == ""
    assert "perpetuum_mobile" in err
    code, _, err = run(capsys, "check", tmp_path / "absent", "--target", "null")
    assert code == 2
    assert "does not exist" in err
    code, _, err = run(capsys, "check", tmp_path / "absent", "--target", "tvm-cpu:isa=sse9")
    assert code == 2
    assert "no instruction-set level 'sse9'" in err


@pytest.mark.parametrize("layers", [10**9, -1])
def test_absurd_layer_counts_are_refused_before_anything_is_built(
    layers: int, capsys: Capture, tmp_path: Path, tiny_folder: Any
) -> None:
    config = json.loads((tiny_folder("llama") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    for name in ("layer_types",):  # one entry a layer: transformers would compare its length
        assert name not in config or config[name] is None
    code, out, err = run(capsys, "check", tmp_path, "--target", "null")
    assert (code, out) == (2, "")
    assert f"asks for {layers} layers" in err
