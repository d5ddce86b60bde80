"""GGUF files as models: configuration, names, conversions equal to transformers', and what that drops."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llmc.frontend.source import describe, open_source
from llmc.frontend.weights import GGUFTensor, ReorderedTensor
from llmc.ir.errors import InputError, LlmcError, UnsupportedError
from llmc.ir.weights import LazyTensor, read_chunks

from .gguf_files import (
    F32,
    I32,
    STRING,
    U32,
    array,
    assemble,
    byte_vocabulary,
    entry,
    llama_entries,
    llama_tensors,
    write_gguf,
)
from .models import real_model


def _values(tensor: LazyTensor, chunk: int = 2048) -> np.ndarray[Any, Any]:
    return np.concatenate(list(read_chunks(tensor, chunk)))


def _assert_equals_transformers(path: Path, chunk: int = 2048) -> None:
    """Every tensor, read in small chunks, equals what transformers loads from the file."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    source = open_source(path)
    model = source.build_model()
    expected = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    assert expected
    for name, tensor in expected.items():
        lazy = source.weights[name]
        assert lazy.shape == tuple(tensor.shape), name
        assert np.array_equal(_values(lazy, chunk), tensor.numpy()), name
    assert set(expected) <= set(source.weights)


def _gemma3(layers: int = 2) -> tuple[list[bytes], dict[str, np.ndarray[Any, Any]]]:
    rng = np.random.default_rng(1)
    entries = [
        *llama_entries(layers, arch="gemma3", kv_heads=1),
        entry("gemma3.attention.key_length", U32, 16),
        entry("gemma3.attention.sliding_window", U32, 8),
    ]
    tensors = llama_tensors(layers, kv_heads=1)
    for i in range(layers):
        for name, size in (
            ("post_attention_norm", 64),
            ("post_ffw_norm", 64),
            ("attn_q_norm", 16),
            ("attn_k_norm", 16),
        ):
            tensors[f"blk.{i}.{name}.weight"] = rng.standard_normal(size).astype(np.float32)
    return entries, tensors


def _qwen2() -> tuple[list[bytes], dict[str, np.ndarray[Any, Any]]]:
    rng = np.random.default_rng(2)
    tensors = llama_tensors()
    for i in range(2):
        for name, size in (("attn_q", 64), ("attn_k", 32), ("attn_v", 32)):
            tensors[f"blk.{i}.{name}.bias"] = rng.standard_normal(size).astype(np.float32)
    tensors["output.weight"] = rng.standard_normal((96, 64)).astype(np.float32)
    return llama_entries(arch="qwen2"), tensors


def _gpt2() -> tuple[list[bytes], dict[str, np.ndarray[Any, Any]]]:
    rng = np.random.default_rng(3)
    entries = [
        entry("general.architecture", STRING, "gpt2"),
        entry("general.name", STRING, "tiny"),
        entry("gpt2.block_count", U32, 2),
        entry("gpt2.context_length", U32, 32),
        entry("gpt2.embedding_length", U32, 64),
        entry("gpt2.feed_forward_length", U32, 256),
        entry("gpt2.attention.head_count", U32, 4),
        entry("gpt2.attention.layer_norm_epsilon", F32, 1e-5),
        array("tokenizer.ggml.tokens", STRING, [f"t{i}" for i in range(96)]),
    ]
    shapes = {"token_embd.weight": (96, 64), "position_embd.weight": (1024, 64), "output_norm.weight": (64,),
              "output_norm.bias": (64,)}  # fmt: skip
    for i in range(2):
        for name, rows, columns in (
            ("attn_qkv", 192, 64),
            ("attn_output", 64, 64),
            ("ffn_up", 256, 64),
            ("ffn_down", 64, 256),
        ):
            shapes |= {f"blk.{i}.{name}.weight": (rows, columns), f"blk.{i}.{name}.bias": (rows,)}
        for name in ("attn_norm", "ffn_norm"):
            shapes |= {f"blk.{i}.{name}.weight": (64,), f"blk.{i}.{name}.bias": (64,)}
    return entries, {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def _qwen2moe() -> tuple[list[bytes], dict[str, np.ndarray[Any, Any]]]:
    rng = np.random.default_rng(4)
    entries, tensors = _qwen2()
    entries = [
        *llama_entries(arch="qwen2moe"),
        entry("qwen2moe.expert_count", U32, 4),
        entry("qwen2moe.expert_used_count", U32, 2),
    ]
    # The sizes that the metadata mapping of transformers does not carry are the configuration's defaults.
    wide = {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632}
    for i in range(2):
        for name in ("gate", "up", "down"):
            del tensors[f"blk.{i}.ffn_{name}.weight"]
            wide_rows, shared = wide["moe_intermediate_size"], wide["shared_expert_intermediate_size"]
            inner, outer = (wide_rows, 64) if name != "down" else (64, wide_rows)
            tensors[f"blk.{i}.ffn_{name}_exps.weight"] = rng.standard_normal((4, inner, outer)).astype(
                np.float32
            )
            inner, outer = (shared, 64) if name != "down" else (64, shared)
            tensors[f"blk.{i}.ffn_{name}_shexp.weight"] = rng.standard_normal((inner, outer)).astype(
                np.float32
            )
        tensors[f"blk.{i}.ffn_gate_inp.weight"] = rng.standard_normal((4, 64)).astype(np.float32)
        tensors[f"blk.{i}.ffn_gate_inp_shexp.weight"] = rng.standard_normal(64).astype(np.float32)
    return entries, tensors


Made = Callable[[], tuple[list[bytes], dict[str, np.ndarray[Any, Any]]]]
FAMILIES: dict[str, Made] = {
    "llama": lambda: (llama_entries(), llama_tensors()),
    "gemma3": _gemma3,
    "qwen2": _qwen2,
    "gpt2": _gpt2,
    "qwen2moe": _qwen2moe,
}


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_equal_what_transformers_loads(family: str, kind: str, tmp_path: Path) -> None:
    entries, tensors = FAMILIES[family]()
    _assert_equals_transformers(write_gguf(tmp_path / "model.gguf", entries, tensors, kind))


@pytest.mark.parametrize("family", FAMILIES)
def test_configuration_equals_transformers(family: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    entries, tensors = FAMILIES[family]()
    path = write_gguf(tmp_path / "model.gguf", entries, tensors)
    expected = AutoConfig.from_pretrained(str(tmp_path), gguf_file=path.name).to_dict()
    got = open_source(path).config.to_dict()
    # frontend/gguf_tabled.py says these of every architecture, and transformers takes its own defaults for
    # what files say of the scale of queries and do not say of tokens.
    said = {"attention_bias", "head_dim", "mlp_bias"}
    ours = {k for k, v in got.items() if expected.get(k) != v and (k in expected or k not in said)}
    tokens = {"bos_token_id", "eos_token_id", "pad_token_id"}
    assert ours <= {"_name_or_path", "dtype", "use_cache", "query_pre_attn_scalar", *tokens}


def test_tensors_that_only_move_keep_their_blocks(tmp_path: Path) -> None:
    weights = open_source(write_gguf(tmp_path / "m.gguf", llama_entries(), llama_tensors(), "Q4_1")).weights
    embedding = weights["model.embed_tokens.weight"]
    assert isinstance(embedding, GGUFTensor)
    assert embedding.ggml_type == "Q4_1"
    query = weights["model.layers.0.self_attn.q_proj.weight"]
    assert isinstance(query, ReorderedTensor)
    assert query.ggml_type == "Q4_1"
    assert query.blocks(0, 3).shape == (3, 40)
    assert weights["lm_head.weight"] is embedding


def test_facts(tmp_path: Path) -> None:
    entries = [
        *llama_entries(),
        *byte_vocabulary(["<|im_end|>", "<other>", "<|endoftext|>"]),
        entry("tokenizer.ggml.eos_token_id", U32, 257),
        entry("tokenizer.ggml.bos_token_id", U32, 1),
    ]
    source = open_source(write_gguf(tmp_path / "m.gguf", entries, llama_tensors(), "Q4_1"))
    assert source.generation.eos_token_ids == [257, 256, 258]
    assert source.generation.bos_token_id == 1
    facts = describe(source)
    assert facts["quantization"] == "Q4_1"
    assert facts["tensor_types"] == {"F32": 5, "Q4_1": 15}
    assert facts["architecture"] == "llama"
    assert facts["parameters"] == sum(tensor.size for tensor in llama_tensors().values())
    assert (facts["context_length"], facts["vocab_size"], facts["num_layers"]) == (128, 96, 2)


def test_rope_factors_scale_the_frequencies(tmp_path: Path) -> None:
    factors = np.linspace(1, 8, 8).astype(np.float32)
    plain: Any = open_source(write_gguf(tmp_path / "a.gguf", llama_entries(), llama_tensors())).build_model()
    tensors = {**llama_tensors(), "rope_freqs.weight": factors}
    scaled: Any = open_source(write_gguf(tmp_path / "b.gguf", llama_entries(), tensors)).build_model()
    expected = plain.model.rotary_emb.inv_freq.numpy() / factors
    assert np.array_equal(scaled.model.rotary_emb.inv_freq.numpy(), expected)


@pytest.mark.parametrize(
    ("kind", "parameters"),
    [
        ("linear", {"rope_type": "linear", "factor": 4.0}),
        ("yarn", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}),
        ("none", {"rope_type": "default"}),
    ],
)
def test_rope_scaling_is_carried_over(kind: str, parameters: dict[str, Any], tmp_path: Path) -> None:
    entries = [
        *llama_entries(),
        entry("llama.rope.scaling.type", STRING, kind),
        entry("llama.rope.scaling.factor", F32, 4.0),
        entry("llama.rope.scaling.original_context_length", U32, 32),
    ]
    source = open_source(write_gguf(tmp_path / "m.gguf", entries, llama_tensors()))
    assert parameters.items() <= source.config.rope_parameters.items()
    model: Any = source.build_model()
    first, last = model.model.rotary_emb.inv_freq[[0, -1]].tolist()
    assert first == pytest.approx(0.25 if kind == "linear" else 1.0)
    assert last == pytest.approx(10000.0 ** (-7 / 8) / (1 if kind == "none" else 4), rel=1e-3)


def test_rope_scaling_of_a_model_with_two_bases_reaches_the_full_layers(tmp_path: Path) -> None:
    entries, tensors = _gemma3(layers=6)  # the sixth looks at everything
    entries += [
        entry("gemma3.rope.scaling.type", STRING, "linear"),
        entry("gemma3.rope.scaling.factor", F32, 8.0),
    ]
    model: Any = open_source(write_gguf(tmp_path / "m.gguf", entries, tensors)).build_model()
    rotary = model.model.rotary_emb
    assert rotary.full_attention_inv_freq[0].item() == pytest.approx(1 / 8)
    assert rotary.sliding_attention_inv_freq[0].item() == pytest.approx(1.0)


# What must be refused --------------------------------------------------------------------------------------


def _refusal(path: Path) -> LlmcError:
    with pytest.raises(LlmcError) as raised:
        _ = open_source(path).weights
    assert raised.value.remedy
    assert "\n" not in str(raised.value)
    return raised.value


def test_unknown_rope_scaling_is_refused(tmp_path: Path) -> None:
    entries = [
        *llama_entries(),
        entry("llama.rope.scaling.type", STRING, "longrope"),
        entry("llama.rope.scaling.factor", F32, 4.0),
    ]
    assert "rope scaling 'longrope'" in str(
        _refusal(write_gguf(tmp_path / "m.gguf", entries, llama_tensors()))
    )


def test_soft_cap_that_the_model_lacks_is_refused(tmp_path: Path) -> None:
    entries = [*llama_entries(), entry("llama.attn_logit_softcapping", F32, 50.0)]
    error = _refusal(write_gguf(tmp_path / "m.gguf", entries, llama_tensors()))
    assert isinstance(error, UnsupportedError)
    assert "attn_logit_softcapping" in str(error)


def test_tensor_without_a_place_is_refused(tmp_path: Path) -> None:
    tensors = {**llama_tensors(), "blk.0.attn_q.bias": np.ones(64, np.float32)}
    error = _refusal(write_gguf(tmp_path / "m.gguf", llama_entries(), tensors))
    assert "tensor blk.0.attn_q.bias has no place in LlamaForCausalLM" in str(error)


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    tensors = llama_tensors()
    del tensors["blk.1.ffn_up.weight"]
    error = _refusal(write_gguf(tmp_path / "m.gguf", llama_entries(), tensors))
    assert "lacks 1 of the tensors of LlamaForCausalLM: model.layers.1.mlp.up_proj.weight" in str(error)
    assert error.exit_code == 2


def test_shape_that_does_not_fit_is_named(tmp_path: Path) -> None:
    tensors = {**llama_tensors(), "token_embd.weight": np.ones((90, 64), np.float32)}
    error = _refusal(write_gguf(tmp_path / "m.gguf", llama_entries(), tensors))
    assert "m.gguf:token_embd.weight has the shape [90, 64]" in str(error)


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ([entry("general.architecture", STRING, "martian")], "architecture 'martian'"),
        ([entry("general.name", STRING, "x")], "no general.architecture"),
        ([entry("general.architecture", U32, 3)], "no general.architecture"),
        ([*llama_entries(), entry("split.count", U32, 3)], "is one of 3 parts, and its name does not tell"),
        (
            [*llama_entries()[:4], entry("llama.embedding_length", STRING, "wide")],
            "architecture 'llama' of m.gguf cannot be taken from GGUF",
        ),
        (llama_entries(heads=3), "m.gguf"),
    ],
)  # fmt: skip
def test_metadata_that_makes_no_model(entries: list[bytes], reason: str, tmp_path: Path) -> None:
    with pytest.raises(LlmcError) as raised:
        _ = open_source(write_gguf(tmp_path / "m.gguf", entries, llama_tensors())).weights
    assert reason in str(raised.value)
    assert raised.value.remedy


def test_vocabulary_only_file(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(assemble(llama_entries(), [], b""))
    with pytest.raises(InputError, match="holds no tensors"):
        open_source(path)


def test_large_arrays_of_numbers_do_not_reach_transformers(tmp_path: Path) -> None:
    entries = [
        *llama_entries(),
        array("tokenizer.ggml.scores", F32, [0.0] * 5000),
        array("llama.some", I32, [1, 2]),
    ]
    assert open_source(write_gguf(tmp_path / "m.gguf", entries, llama_tensors())).config.hidden_size == 64


# Real models -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_real_tensors_equal_what_transformers_loads() -> None:
    _assert_equals_transformers(real_model("smollm2"), chunk=8 << 20)


_MEMORY_SCRIPT = """
import resource, sys
from llmc.frontend.source import open_source
from llmc.ir.weights import read_chunks
source = open_source(sys.argv[1])
weights = source.weights
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start, read = peak(), 0
for tensor in weights.values():
    for chunk in read_chunks(tensor, 16 << 20):
        read += chunk.nbytes
print(read >> 10, peak() - start)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3", "minilm"])
def test_reading_everything_holds_one_chunk(name: str) -> None:
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-c", _MEMORY_SCRIPT, str(real_model(name))],
        capture_output=True,
        text=True,
        check=True,
    )
    read, grown = map(int, done.stdout.split())
    assert read > 80_000
    assert grown < 130_000
