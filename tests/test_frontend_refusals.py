"""Hugging Face folders and hub ids: what must be refused, and with which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from llmc.frontend import hf
from llmc.frontend.hf import is_repo_id
from llmc.frontend.source import open_source
from llmc.ir.errors import InputError, LlmcError

from .models import save_tiny


def _refusal(folder: Path) -> LlmcError:
    with pytest.raises(LlmcError) as raised:
        _ = open_source(folder).weights
    assert raised.value.remedy
    assert "\n" not in str(raised.value)
    return raised.value


def _config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def test_missing_shard_is_named(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path, shards=True)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    error = _refusal(folder)
    assert f"shard {shard.name}" in str(error)
    assert error.exit_code == 2


def test_tensor_that_its_shard_lacks_is_named(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path, shards=True)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name = next(iter(index["weight_map"]))
    other = next(shard for shard in index["weight_map"].values() if shard != index["weight_map"][name])
    index["weight_map"][name] = other
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"tensor {name!r} is not in {other}" in str(_refusal(folder))


@pytest.mark.parametrize(
    "target", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\\b", 7]
)
def test_index_that_leaves_the_folder_is_refused(target: Any, tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model", shards=True)
    (tmp_path / "secret.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = target
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "no file in it" in str(_refusal(folder))


def test_truncated_weights_are_refused_before_reading(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match="it is truncated"):
        open_source(folder)


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = save_tiny("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    assert "lacks 1 of the tensors of LlamaForCausalLM: model.layers.1.mlp.up_proj.weight" in str(
        _refusal(folder)
    )


def test_shape_that_does_not_fit_is_named(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    _config(folder, intermediate_size=128)
    assert "has the shape [96, 64], LlamaForCausalLM wants [128, 64]" in str(_refusal(folder))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.ckpt"])
def test_pickles_are_refused_with_the_way_out(name: str, tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    (folder / "model.safetensors").rename(folder / name)
    error = _refusal(folder)
    assert f"{name}, a pickle file" in str(error)
    assert "safetensors" in error.remedy
    with pytest.raises(InputError, match="pickle file"):
        open_source(folder / name)


def test_no_weights_at_all(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    (folder / "model.safetensors").unlink()
    assert "neither model.safetensors nor" in str(_refusal(folder))


def test_custom_code_is_never_run(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    (folder / "modeling_evil.py").write_text("raise SystemExit('ran')")
    _config(
        folder,
        model_type="evil",
        architectures=["EvilLM"],
        auto_map={"AutoConfig": "modeling_evil.EvilConfig"},
    )
    error = _refusal(folder)
    assert "unknown architecture evil (EvilLM)" in str(error)
    assert "auto_map, is never run" in str(error)


def test_auto_map_of_a_known_architecture_is_ignored(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    (folder / "modeling_evil.py").write_text("raise SystemExit('ran')")
    _config(
        folder, auto_map={"AutoModelForCausalLM": "modeling_evil.EvilLM", "AutoConfig": "modeling_evil.C"}
    )
    assert type(open_source(folder).build_model()).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": ...}, "has no model_type"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "encoder-decoder"),
        (
            {"model_type": "vit", "architectures": ["ViTModel"]},
            "architecture vit (ViTModel) takes no token ids",
        ),
        ({"quantization_config": {"quant_method": "gptq"}}, "but no tensor is quantized by it"),
        (
            {"quantization_config": {"quant_method": "hqq"}},
            "is quantized with 'hqq', which llmc does not",
        ),
        (
            {"quantization_config": {"quant_method": "hqq"}},
            "is quantized with 'hqq', which llmc does not read",
        ),
        ({"quantization_config": {"bits": 4}}, "quantization_config names no quant_method"),
        ({"quantization_config": "gptq"}, "quantization_config names no quant_method"),
        ({"num_attention_heads": 7}, "not a multiple of the number of attention heads"),
        ({"hidden_act": "nonsense"}, "LlamaForCausalLM cannot be built from its configuration"),
        ({"num_hidden_layers": "two"}, "refused by transformers"),
    ],
)
def test_configurations_that_make_no_model(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    _config(folder, **changes)
    assert reason in str(_refusal(folder))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_damaged_configuration(content: bytes, tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    (folder / "config.json").write_bytes(content)
    assert "config.json" in str(_refusal(folder))


def test_folder_that_is_no_model(tmp_path: Path) -> None:
    assert "no config.json" in str(_refusal(tmp_path))


def test_one_safetensors_file_is_no_model(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    with pytest.raises(InputError, match="alone is no model") as raised:
        open_source(folder / "model.safetensors")
    assert str(folder) in raised.value.remedy


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        open_source(tmp_path / "absent")
    with pytest.raises(InputError, match=r"model\.gguf does not exist"):
        open_source("model.gguf")
    with pytest.raises(InputError, match="cannot compile a int"):
        open_source(7)  # pyright: ignore[reportArgumentType]


def test_hub_id_offline_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="owner/absent-model is no file or folder here") as raised:
        open_source("owner/absent-model")
    assert "\n" not in str(raised.value)


def test_hub_download_asks_for_the_parts_of_sentence_transformers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By name, whatever the list of them says."""
    import huggingface_hub

    folder, asked = save_tiny("bert", tmp_path), list[str]()
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense", "*": "Dense", "../x": "Dense"}
    parts = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (folder / "modules.json").write_text(json.dumps(parts))

    def snapshot_download(repo_id: str, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert hf.download("owner/model", weights=True) == folder
    assert {"2_Dense/config.json", "2_Dense/model.safetensors", "model.safetensors"} <= set(asked)
    assert not any("*" in pattern or ".." in pattern for pattern in asked)


@pytest.mark.parametrize("shards", [False, True])
def test_hub_download_asks_for_safe_files_only(
    shards: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    folder = save_tiny("llama", tmp_path, shards=shards)
    asked: list[str] = []

    def snapshot_download(repo_id: str, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert open_source("owner/model").name == "owner/model"
    assert not any("*" in pattern or pattern.endswith((".bin", ".py", ".pt")) for pattern in asked)
    weights = {pattern for pattern in asked if pattern.endswith(".safetensors")}
    assert weights == {path.name for path in folder.glob("*.safetensors")}
    asked.clear()
    open_source("owner/model", config_only=True)
    assert not any(pattern.endswith(".safetensors") for pattern in asked)


@pytest.mark.parametrize(
    ("text", "answer"),
    [("gpt2", True), ("a/b-c.d_e", True), ("../a", False), ("a/b/c", False), ("a/..", False), ("/a", False)],
)
def test_hub_ids(text: str, answer: bool) -> None:
    assert is_repo_id(text) is answer
