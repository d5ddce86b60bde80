"""Hugging Face folders: safetensors headers, shards and names; modules from Python."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llmc.frontend.hf import open_weights
from llmc.frontend.safetensors import open_safetensors, read_header
from llmc.frontend.source import describe, open_source
from llmc.ir.errors import InputError, LlmcError, UnsupportedError
from llmc.ir.weights import ArrayTensor, LazyTensor, ShapeOnlyTensor, num_bytes, read_chunks

from .models import TINY, save_tiny, tiny_model


def _file(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def _entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    shape, offsets = (list(x) if isinstance(x, tuple) else x for x in (shape, offsets))
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


# Safetensors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", ["float32", "float16", "int64", "int32", "int8", "uint8", "bool", "bfloat16"]
)
def test_rows_of_every_element_type(dtype: str, tmp_path: Path) -> None:
    from safetensors.numpy import save

    numpy_dtype = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    data = np.random.default_rng(0).integers(0, 2, (70, 3, 5)).astype(numpy_dtype)
    raw = save({"t": data.view(np.uint16) if dtype == "bfloat16" else data})
    (tmp_path / "m.safetensors").write_bytes(raw)
    if dtype == "bfloat16":  # which numpy's writer does not know
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        header["t"]["dtype"] = "BF16"
        (tmp_path / "m.safetensors").write_bytes(_file(header, data.tobytes()))
    tensor = open_safetensors(tmp_path / "m.safetensors")["t"]
    assert (tensor.dtype, tensor.shape) == (dtype, (70, 3, 5))
    assert tensor.source == "m.safetensors:t"
    assert tensor.read().dtype == numpy_dtype
    assert np.array_equal(tensor.read(), data)
    assert np.array_equal(tensor.read(3, 60), data[3:60])
    assert tensor.read(9, 9).shape == (0, 3, 5)
    assert np.array_equal(np.concatenate(list(read_chunks(tensor, 64))), data)
    assert num_bytes(tensor) == data.nbytes


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    header = {"s": _entry(shape=(), offsets=(0, 4)), "e": _entry(shape=(0, 3), offsets=(4, 4))}
    (tmp_path / "m.safetensors").write_bytes(_file(header, struct.pack("<f", 2.5)))
    tensors = open_safetensors(tmp_path / "m.safetensors")
    assert tensors["s"].read() == np.float32(2.5)
    assert [part.shape for part in read_chunks(tensors["s"])] == [()]
    assert tensors["e"].read().shape == (0, 3)


LIES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "no safetensors file"),
    "three bytes": (b"abc", "no safetensors file"),
    "header longer than the file": (_file({}, length=1 << 20), "truncated"),
    "absurd header": (_file({}, length=1 << 60), "truncated"),
    "no JSON": (_file(b"not json"), "no JSON"),
    "no object": (_file([1]), "no JSON object"),
    "not UTF-8": (_file(b'{"\xff": 1}'), "no JSON"),
    "nested": (_file(b"[" * 100_000), "no JSON"),
    "name twice": (_file(b'{"t": {}, "t": {}}'), "occurs twice"),
    "no fields": (_file({"t": {"dtype": "F32"}}, b"\0" * 8), "lacks dtype"),
    "unknown type": (_file({"t": _entry("F8_E5M2", (8,))}, b"\0" * 8), "F8_E5M2"),
    "negative shape": (_file({"t": _entry(shape=[-2])}, b"\0" * 8), "impossible shape"),
    "boolean shape": (_file({"t": _entry(shape=[True])}, b"\0" * 8), "impossible shape"),
    "negative offset": (_file({"t": _entry(offsets=[-8, 0])}, b"\0" * 8), "impossible data_offsets"),
    "wrong extent": (_file({"t": _entry(offsets=(0, 4))}, b"\0" * 8), "takes 8 bytes"),
    "past the end": (_file({"t": _entry(offsets=(8, 16))}, b"\0" * 8), "truncated"),
    "overflowing shape": (_file({"t": _entry(shape=[1 << 61, 1 << 61])}, b"\0" * 8), "takes"),
    "overlap": (_file({"a": _entry(), "b": _entry(offsets=(4, 12))}, b"\0" * 12), "overlap"),
    "bad metadata": (_file({"__metadata__": {"a": 1}}), "__metadata__"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lying_headers_are_refused_by_name(lie: str, tmp_path: Path) -> None:
    data, reason = LIES[lie]
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(InputError) as raised:
        read_header(tmp_path / "model.safetensors")
    assert reason in str(raised.value)
    assert "model.safetensors" in str(raised.value)
    assert raised.value.remedy


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 400), byte=st.integers(0, 255), cut=st.integers(0, 400))
def test_changed_bytes_never_end_in_another_error(position: int, byte: int, cut: int, tmp_path: Path) -> None:
    header = {f"layer.{i}": _entry(offsets=(8 * i, 8 * i + 8)) for i in range(4)}
    data = bytearray(_file(header, b"\0" * 32))
    data[position % len(data)] = byte
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(data[: len(data) - cut % 40]))
    try:
        tensors = open_safetensors(path)
    except InputError:  # any other exception fails the test
        return
    assert all(tensor.read().nbytes == num_bytes(tensor) for tensor in tensors.values())


# Folders ---------------------------------------------------------------------------------------------------


def _values(tensor: LazyTensor) -> np.ndarray[Any, Any]:
    return np.concatenate(list(read_chunks(tensor, 4096)))


@pytest.mark.parametrize("family", TINY)
def test_weights_and_buffers_equal_the_loaded_model(family: str, tmp_path: Path) -> None:
    import transformers

    folder = save_tiny(family, tmp_path / family)
    source = open_source(folder)
    loaded = getattr(transformers, TINY[family].model).from_pretrained(folder, dtype="float32")
    built = source.build_model()
    assert source.task == ("causal_lm" if TINY[family].causal else "encoder")
    assert type(built).__name__ == TINY[family].model
    assert {p.device.type for p in built.parameters()} == {"meta"}
    for name, param in loaded.named_parameters():
        if TINY[family].causal or not name.startswith("pooler."):
            assert np.array_equal(_values(source.weights[name]), param.detach().numpy()), name
    expected = dict(loaded.named_buffers())
    for name, buffer in built.named_buffers():
        assert buffer.device.type == "cpu"
        assert buffer.equal(expected[name]), name
    assert describe(source)["parameters"] > 0


def test_shards_are_joined(tmp_path: Path) -> None:
    whole = open_source(save_tiny("llama", tmp_path / "whole"))
    parts = open_source(save_tiny("llama", tmp_path / "parts", shards=True))
    assert (tmp_path / "parts" / "model.safetensors.index.json").exists()
    assert parts.weights.keys() == whole.weights.keys()
    for name, tensor in whole.weights.items():
        assert np.array_equal(_values(parts.weights[name]), _values(tensor)), name


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_implementation_is_chosen(implementation: str, tmp_path: Path) -> None:
    model: Any = open_source(save_tiny("llama", tmp_path)).build_model(implementation)
    assert model.config._attn_implementation == implementation
    assert model.config.use_cache is False
    assert not model.training


def _rewrite(folder: Path, rename: Any) -> None:
    """Save the folder's tensors again under other names."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    save_file({rename(name): data for name, data in tensors.items()}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("family", "rename"),
    [
        pytest.param("llama", lambda name: name.removeprefix("model."), id="base model saved alone"),
        pytest.param("bert", lambda name: f"bert.{name}", id="taken out of a larger model"),
        pytest.param(
            "bert",
            lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "Norm.bias", "Norm.beta"
            ),
            id="legacy norm names",
        ),
    ],
)
def test_names_are_found_as_from_pretrained_finds_them(family: str, rename: Any, tmp_path: Path) -> None:
    folder = save_tiny(family, tmp_path)
    before = {name: _values(tensor) for name, tensor in open_source(folder).weights.items()}
    _rewrite(folder, rename)
    after = open_source(folder).weights
    assert after.keys() == before.keys()
    for name, data in before.items():
        assert np.array_equal(_values(after[name]), data), name


@pytest.mark.parametrize(
    ("config", "model", "options"),
    [
        ("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 3}),
        (
            "Qwen3MoeConfig",
            "Qwen3MoeForCausalLM",
            {"num_experts": 4, "moe_intermediate_size": 48, "head_dim": 16},
        ),
    ],
)
def test_experts_are_merged_lazily(config: str, model: str, options: dict[str, Any], tmp_path: Path) -> None:
    import transformers

    base = TINY["qwen2"].options
    original = getattr(transformers, model)(getattr(transformers, config)(**base, **options)).float()
    original.save_pretrained(tmp_path)
    source = open_source(tmp_path)
    for name, param in original.named_parameters():
        tensor = source.weights[name]
        assert np.array_equal(_values(tensor), param.detach().numpy()), name
        if "gate_up_proj" in name:
            assert "merged" in tensor.source
            assert np.array_equal(tensor.read(1, 2), param.detach().numpy()[1:2])
            assert tensor.read(2, 2).shape == (0, *param.shape[1:])


def test_bfloat16_stays_bfloat16(tmp_path: Path) -> None:
    import torch

    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    source = open_source(tmp_path)
    assert {tensor.dtype for tensor in source.weights.values()} == {"bfloat16"}
    assert next(source.build_model().parameters()).dtype == torch.float32


def test_tied_weights_that_differ_are_refused(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = save_tiny("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, folder / "model.safetensors"
    )
    with pytest.raises(InputError, match=r"ties lm_head\.weight to model\.embed_tokens\.weight"):
        _ = open_source(folder).weights


def test_generation_facts(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    facts = {"eos_token_id": [2, 3], "bos_token_id": 1, "do_sample": True, "temperature": 0.6, "top_k": 20}
    (folder / "generation_config.json").write_text(json.dumps(facts))
    generation = open_source(folder).generation
    assert generation.eos_token_ids == [2, 3]
    assert generation.bos_token_id == 1
    assert generation.sampling == {"temperature": 0.6, "top_k": 20.0}
    (folder / "generation_config.json").write_text(json.dumps({**facts, "do_sample": False}))
    assert open_source(folder).generation.sampling == {}


def test_config_only_needs_no_weights(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    expected = describe(open_source(folder))["parameters"]
    (folder / "model.safetensors").unlink()
    assert describe(open_source(folder, config_only=True))["parameters"] == expected


# Modules and small lazies ----------------------------------------------------------------------------------


def test_a_module_from_python() -> None:
    import torch

    module = torch.nn.Linear(3, 2)
    source = open_source(module)
    assert (source.kind, source.task, source.config) == ("module", "function", None)
    assert np.array_equal(source.weights["weight"].read(1, 2), module.weight.detach().numpy()[1:2])
    assert source.build_model() is module
    assert describe(source)["parameters"] == 8


def test_a_transformers_model_from_python() -> None:
    source = open_source(tiny_model("gemma3"))
    assert source.task == "causal_lm"
    assert source.generation.eos_token_ids == [2]


def test_small_lazy_tensors() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    tensor = ArrayTensor(array.T)
    assert tensor.read(1, 3).flags.c_contiguous
    assert np.array_equal(tensor.read(1, 3), array.T[1:3])
    assert ArrayTensor(np.array(3, np.int64)).read().shape == ()
    hollow = ShapeOnlyTensor((2, 3), "bfloat16", "lm_head")
    assert num_bytes(hollow) == 12
    with pytest.raises(LlmcError, match="lm_head has no values"):
        hollow.read()
    with pytest.raises(UnsupportedError):
        ShapeOnlyTensor((1,), "float3")
    assert isinstance(tensor, LazyTensor)
    assert isinstance(hollow, LazyTensor)


def test_open_weights_of_a_plain_folder(tmp_path: Path) -> None:
    folder = save_tiny("bert", tmp_path)
    assert set(open_weights(folder)) == set(open_source(folder).stored)
