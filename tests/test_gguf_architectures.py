"""GGUF files of each architecture that the table of frontend/gguf_architectures.py reads: llama.cpp computes
of them what transformers' model does, and so do we.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from llmc.codegen.driver import compile_model
from llmc.codegen.gguf.metadata import model_metadata
from llmc.frontend.gguf_architectures import ARCHITECTURES
from llmc.frontend.gguf_layout import Architecture
from llmc.frontend.gguf_parts import latent_parts, shared_parts
from llmc.frontend.gguf_tabled import configuration, named, paired_rows, readable, weights
from llmc.frontend.skeleton import model_class
from llmc.frontend.source import open_source
from llmc.frontend.trace import trace_source
from llmc.frontend.weights import open_gguf_tensors
from llmc.ir.errors import InputError, UnsupportedError
from llmc.ir.weights import ArrayTensor
from llmc.runtime.loader import load

from .family_configs import random_model, small_config
from .gguf_cases import CHANGES, KEYS
from .gguf_files import BOOL, F32, STRING, U32, array, byte_vocabulary, entry, write_gguf
from .graphs import ModelInMemory, logits_of
from .llama_cpp import LlamaCpp
from .models import ids_of
from .test_gguf_encoders import ROWS

ENCODERS = ("bert", "gemma3_text (encoder)")
OLDER = ("gpt_bigcode", "mpt")
# tests/test_gguf_encoders.py, test_gguf_gemma4.py, test_gguf_gemma3n.py, and below
ELSEWHERE = (*ENCODERS, *ROWS, *OLDER, "gemma4_text", "gemma3n_text", "olmo3")
PLAIN = Architecture("").mixer
READ = sorted(
    k
    for k, row in ARCHITECTURES.items()
    if row.fields is not None
    and k not in ELSEWHERE
    and " " not in k
    # tests/test_gguf_recurrent.py
    and row.mixer is PLAIN
    and row.merge is not shared_parts
)
SEEN = sorted(k for k, row in ARCHITECTURES.items() if "rope.dimension_sections" in row.ignores)
_KINDS = {bool: BOOL, int: U32, float: F32, str: STRING}


def tiny(kind: str, **changes: Any) -> Any:
    config = small_config(kind)
    for name, value in {**CHANGES.get(kind, {}), **changes}.items():
        setattr(config, name, value)
    config.use_cache = False
    return random_model(config, model_class(config)[0])


def written(
    model: Any,
    kind: str,
    path: Path,
    *further: bytes,
    arch: Architecture | None = None,
    quantize: str | Callable[[str], str] = "F32",
    beside: Mapping[str, np.ndarray[Any, Any]] | None = None,
) -> Path:
    """A file of a model: key-values by the table, tensors by the package gguf's names, as `write_gguf` stores
    them, and those of `beside`.
    """
    arch = arch or ARCHITECTURES[kind]
    source: Any = ModelInMemory(model)
    source.rope_scaling = None
    config, name_of = model.config, named(arch, model.config.num_hidden_layers)
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    state = model.state_dict()
    for parameter, value in state.items():
        if parameter == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if (parts := _parts(parameter, value.detach().numpy(), arch, config)) is not None:
            tensors |= parts
            continue
        name, held = name_of(parameter), value.detach().numpy().copy()
        assert name is not None, parameter
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        part = name.split(".")[-2]
        if arch.permuted and part in heads:
            held = held[paired_rows(len(held), heads[part])]
        tensors[name] = held + arch.norm_offset if name.endswith("norm.weight") else held
    keys = model_metadata(source, arch)
    counts = ("num_experts", "num_local_experts", "n_routed_experts")
    count = next((getattr(config, name) for name in counts if getattr(config, name, 0)), 0)
    more = {"expert_count": count, "expert_used_count": config.num_experts_per_tok} if count else {}
    more |= KEYS.get(kind, lambda c: {})(config)
    keys |= {f"{arch.name}.{key}": value for key, value in more.items()}
    entries = [entry(k, _KINDS[type(v)], v) for k, v in keys.items()]
    vocabulary = byte_vocabulary([f"<x{i}>" for i in range(config.vocab_size - 256)])
    ends = [entry(f"tokenizer.ggml.{name}_token_id", U32, i) for name, i in (("bos", 1), ("eos", 2))]
    for key in arch.by_layer:
        numbers = [float(v.float()) for k, v in state.items() if k.endswith(f".act_fn.{key.split('.')[1]}")]
        ends.append(array(key, F32, numbers))
    return write_gguf(path, [*entries, *vocabulary, *ends, *further], tensors | dict(beside or {}), quantize)


def _parts(
    parameter: str, value: np.ndarray[Any, Any], arch: Architecture, config: Any
) -> dict[str, np.ndarray[Any, Any]] | None:
    """A parameter that GGUF has in parts (experts of a layer; what makes keys and values of a latent)."""
    if ".act_fn." in parameter:
        return {}  # a key-value
    if "query_key_value" in parameter:
        parts = value.reshape(config.num_attention_heads, 3, -1, *value.shape[1:]).swapaxes(0, 1)
        layer, kind = parameter.split(".layers.")[1].split(".")[0], parameter.rsplit(".", 1)[1]
        return {f"blk.{layer}.attn_qkv.{kind}": np.ascontiguousarray(parts.reshape(value.shape))}
    if parameter.endswith("kv_b_proj.weight") and arch.merge is latent_parts:
        both = value.reshape(config.num_attention_heads, -1, value.shape[1])
        block, key = f"blk.{parameter.split('.')[2]}", config.qk_nope_head_dim
        return {
            f"{block}.attn_k_b.weight": np.ascontiguousarray(both[:, :key].swapaxes(1, 2)),
            f"{block}.attn_v_b.weight": np.ascontiguousarray(both[:, key:]),
        }
    match = re.fullmatch(r".*layers\.(\d+)\..*?(\bexperts\.|put_linear)(.*)", parameter)
    if match is None:
        return None
    down = "down" in match[3] or "output_linear" in parameter
    kind = "bias" if match[3].endswith("bias") else "weight"
    if arch.experts_turned and kind == "weight":
        value = value.swapaxes(1, 2)
    half = value.shape[1] // 2
    if down:
        parts = {"down": value}
    elif arch.experts_in_turns:
        parts = {"gate": value[:, 0::2], "up": value[:, 1::2]}
    else:
        parts = {"gate": value[:, :half], "up": value[:, half:]}
    return {f"blk.{match[1]}.ffn_{p}_exps.{kind}": np.ascontiguousarray(x) for p, x in parts.items()}


@pytest.mark.parametrize("kind", READ)
def test_a_file_means_what_llama_cpp_computes(kind: str, tmp_path: Path):
    model, ids = tiny(kind), ids_of(40)
    with torch.inference_mode():
        wanted = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    path = written(model, kind, tmp_path / "m.gguf")
    with LlamaCpp(path) as opened:  # its cache is of float16
        assert np.abs(opened.logits(ids) - wanted).max() <= 0.01 * np.abs(wanted).max()
    source = open_source(path)
    assert source.task == "causal_lm" and source.config.model_type == kind
    np.testing.assert_allclose(logits_of(trace_source(source), ids), wanted, atol=2e-5)


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_is_what_llama_cpp_computes(kind: str, tmp_path: Path):
    """Hidden states; and vectors of a file that says how it is pooled, through layers behind the pooling."""
    config = small_config(kind.partition(" ")[0])
    if kind != "bert":
        config.use_bidirectional_attention, config.sliding_window = True, 9
        config.num_hidden_layers, config.query_pre_attn_scalar = 6, config.head_dim
        config.layer_types = [*["sliding_attention"] * 5, "full_attention"]
        config.rope_parameters["sliding_attention"]["rope_theta"] = 5e3
    config.use_cache = False
    cls = transformers.BertModel if kind == "bert" else transformers.Gemma3TextModel
    model: Any = random_model(config, cls)
    ids, arch = ids_of(40), ARCHITECTURES[kind]
    with torch.inference_mode():
        wanted = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    window = {} if kind == "bert" else {"attention.sliding_window": 2 * (config.sliding_window - 1)}
    keys = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", config.num_attention_heads),
        "attention.key_length": config.hidden_size // 4 if kind == "bert" else config.head_dim,
        "attention.value_length": config.hidden_size // 4 if kind == "bert" else config.head_dim,
        arch.norm_key: float(getattr(config, arch.norm_field)),
        "attention.causal": False,
        **({} if kind == "bert" else {"rope.freq_base": 1e6, "rope.freq_base_swa": 5e3}),
        **window,
    }
    entries = [entry("general.architecture", STRING, arch.name)]
    entries += [entry(f"{arch.name}.{k}", _KINDS[type(v)], v) for k, v in keys.items()]
    entries += byte_vocabulary([f"<x{i}>" for i in range(config.vocab_size - 256)])
    entries += [
        entry("tokenizer.ggml.token_type_count", U32, 2),
        entry("tokenizer.ggml.eos_token_id", U32, 2),
    ]
    name_of, tensors = named(arch, config.num_hidden_layers), dict[str, np.ndarray[Any, Any]]()
    for parameter, value in model.named_parameters():
        if (name := name_of(parameter)) is not None:
            plus = arch.norm_offset if name.endswith("norm.weight") else 0.0
            tensors[name] = value.detach().numpy() + np.float32(plus)
    path = write_gguf(tmp_path / "m.gguf", entries, tensors)
    with LlamaCpp(path) as opened:  # its products are of float16
        assert np.abs(opened.hidden(ids) - wanted.numpy()).max() <= 0.01 * float(wanted.abs().max())
    source = open_source(path)
    assert source.task == "encoder"
    np.testing.assert_allclose(logits_of(trace_source(source), ids), wanted, atol=2e-5)
    pooled = entry(f"{arch.name}.pooling_type", U32, 1)
    drawn = np.random.default_rng(0)
    dense = [drawn.standard_normal(s).astype(np.float32) / 8 for s in ((96, 64), (64, 96))]
    more = {} if kind == "bert" else {"dense_2.weight": dense[0], "dense_3.weight": dense[1]}
    path = write_gguf(tmp_path / "p.gguf", [*entries, pooled], {**tensors, **more})
    artifact = compile_model(path, tmp_path / "p.llmc", targets=["onnx-cpu"], kv_dtype="float32").artifact
    with load(artifact.root) as llm:
        found = llm.embeddings([ids])[0]
    vector = wanted.mean(0).numpy()
    vector = vector if kind == "bert" else dense[1] @ (dense[0] @ vector)
    np.testing.assert_allclose(found, vector / np.linalg.norm(vector), atol=1e-5)


@pytest.mark.parametrize(("name", "layers", "every"), [("gemma2", 46, 2), ("gemma3", 62, 6)])
def test_the_largest_scales_queries_by_another_length(name: str, layers: int, every: int):
    """Gemma 2 27B: 4608 / 32, Gemma 3 27B: 5376 / 32, as published; llama.cpp goes by their layers."""
    row = next(r for r in ARCHITECTURES.values() if r.name == name)
    keys = {"embedding_length": 5376, "attention.head_count": 32, "attention.key_length": 128}
    keys |= {"block_count": layers, "attention.sliding_window": 1024}
    assert row.fields is not None
    assert row.fields(keys, {})["query_pre_attn_scalar"] == 168
    assert row.fields({**keys, "block_count": layers - 2}, {})["query_pre_attn_scalar"] == 128


def test_a_head_of_its_own_and_scaled_positions(tmp_path: Path):
    """What a file says by what it holds: an untied head, biases; and by keys that all architectures have."""
    scaled = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
    model, ids = tiny("arcee", tie_word_embeddings=False, rope_parameters=scaled), ids_of(40)
    with torch.inference_mode():
        wanted = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    source = open_source(written(model, "arcee", tmp_path / "m.gguf"))
    assert source.config.tie_word_embeddings is False
    np.testing.assert_allclose(logits_of(trace_source(source), ids), wanted, atol=2e-5)


def test_what_is_not_understood_is_refused(tmp_path: Path):
    model = tiny("olmo2")
    odd = entry("olmo2.attention.clamp_kqv", F32, 8.0)
    with pytest.raises(UnsupportedError, match=r"sets olmo2\.attention\.clamp_kqv, which is not"):
        open_source(written(model, "olmo2", tmp_path / "m.gguf", odd))
    config = tiny("smollm3", no_rope_layers=[1, 0, 1, 1])
    path = written(config, "smollm3", tmp_path / "s.gguf")
    assert open_source(path).config.no_rope_layers == [1, 1, 1, 0]  # all that such a file can mean
    file = open_source(path).gguf
    assert file is not None
    found = readable(file)
    assert found is not None
    for key in ("smollm3.block_count", "smollm3.attention.layer_norm_rms_epsilon"):
        held = {k: v for k, v in file.metadata.items() if k != key}
        with pytest.raises(InputError, match=f"lacks {key}"):
            configuration(_with(file, held), found[1])
    many = {**file.metadata, "smollm3.block_count": 1 << 31}
    with pytest.raises(InputError, match=r"block_count 2147483648, and has \d+ tensors"):
        configuration(_with(file, many), found[1])
    held = {**file.metadata, "smollm3.attention.head_count": [1, 2]}
    with pytest.raises(InputError, match="has an array of"):
        configuration(_with(file, held), found[1])
    for name in ("llama", "nothing"):
        assert readable(_with(file, {"general.architecture": name})) is None


@pytest.mark.parametrize("head", [False, True], ids=["", "head"])
@pytest.mark.parametrize("kind", OLDER)
def test_models_without_rotary_embeddings(kind: str, head: bool, tmp_path: Path):
    """As llama.cpp's converter writes them: positions that are learned, or slopes, and heads that were
    written a second time.
    """
    model, ids, arch = tiny(kind), ids_of(40), ARCHITECTURES[kind]
    config = model.config
    with torch.inference_mode():
        wanted = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    one_key = kind == "gpt_bigcode"
    more = {} if one_key else {"attention.max_alibi_bias": float(config.attn_config.alibi_bias_max)}
    keys: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.n_positions if one_key else config.max_seq_len,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.n_inner if one_key else 4 * config.hidden_size,
        "attention.head_count": config.num_attention_heads,
        **({"attention.head_count_kv": 1} if one_key else {}),
        "attention.layer_norm_epsilon": config.layer_norm_epsilon,
        **more,
    }
    entries = [entry("general.architecture", STRING, arch.name)]
    entries += [entry(f"{arch.name}.{k}", _KINDS[type(v)], v) for k, v in keys.items()]
    entries += byte_vocabulary([f"<x{i}>" for i in range(config.vocab_size - 256)])
    name_of, tensors = named(arch, config.num_hidden_layers), dict[str, np.ndarray[Any, Any]]()
    for parameter, value in model.named_parameters():
        name = name_of(parameter)
        assert name is not None, parameter
        tensors[name] = value.detach().numpy()
    if head:
        tensors["output.weight"] = tensors["token_embd.weight"]
    path = write_gguf(tmp_path / "m.gguf", entries, tensors)
    with LlamaCpp(path) as opened:
        assert np.abs(opened.logits(ids) - wanted).max() <= 0.01 * np.abs(wanted).max()
    source = open_source(path)
    assert source.task == "causal_lm" and source.config.model_type == kind
    np.testing.assert_allclose(logits_of(trace_source(source), ids), wanted, atol=2e-5)


@pytest.mark.parametrize(
    ("kind", "keys", "message"),
    [
        ("mpt", {"attention.max_alibi_bias": 16.0}, "max_alibi_bias is 16"),
        ("mpt", {}, "max_alibi_bias is 0"),
        ("gpt_bigcode", {"attention.head_count_kv": 4}, "head_count_kv is not 1"),
        ("gpt_bigcode", {}, "head_count_kv is not 1"),
    ],
)
def test_what_models_without_rotary_embeddings_do_not_know(kind: str, keys: dict[str, Any], message: str):
    fields = ARCHITECTURES[kind].fields
    assert fields is not None
    with pytest.raises(UnsupportedError, match=message):
        fields({"context_length": 64, "feed_forward_length": 96, **keys}, {})


@pytest.mark.parametrize("size", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["mpt", "olmo"])
def test_queries_are_not_clipped_at_what_is_no_size(kind: str, size: float):
    fields = ARCHITECTURES[kind].fields
    assert fields is not None
    keys = {"context_length": 64, "attention.max_alibi_bias": 8.0, "attention.layer_norm_epsilon": 1e-5}
    with pytest.raises(InputError, match="clamp_kqv is"):
        fields({**keys, "attention.clamp_kqv": size}, {})


def test_windows_of_routed_layers_beside_those_of_later_tokens():
    fields = ARCHITECTURES["exaone_moe"].fields
    assert fields is not None
    sliding = [True, True, True, False]
    keys = {"block_count": 5, "nextn_predict_layers": 1, "expert_count": 4, "expert_used_count": 2}
    keys |= {"expert_feed_forward_length": 48, "attention.sliding_window": 12}
    keys |= {"leading_dense_block_count": 1}
    pattern = "attention.sliding_window_pattern"
    wanted = [*["sliding_attention"] * 3, "full_attention"]
    for said in (sliding, np.array(sliding), [*sliding, True], 4):
        found = fields({**keys, pattern: said}, {})
        assert found["layer_types"] == wanted
        assert found["mlp_layer_types"] == ["dense", *["sparse"] * 3]
    with pytest.raises(InputError, match="has 3 values for 5 layers"):
        fields({**keys, pattern: sliding[:3]}, {})
    with pytest.raises(InputError, match="no whole number"):
        fields({**keys, pattern: float("nan")}, {})
    with pytest.raises(InputError, match="nextn_predict_layers is 5 of 5"):
        fields({**keys, "nextn_predict_layers": 5}, {})


@pytest.mark.parametrize("kind", SEEN)
def test_the_text_of_a_model_that_sees(kind: str, tmp_path: Path):
    """The same tensors as the text model alone has, under another name, with positions of three axes."""
    plain, arch = kind.partition(" ")[0], ARCHITECTURES[kind]
    model, ids = tiny(plain), ids_of(40)
    with torch.inference_mode():
        wanted = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    head = getattr(model.config, "head_dim", None)
    half = (head or model.config.hidden_size // model.config.num_attention_heads) // 2
    sections = array(f"{arch.name}.rope.dimension_sections", U32, [half // 2, half // 4, half // 4, 0])
    path = written(model, plain, tmp_path / "m.gguf", sections, arch=arch)
    with LlamaCpp(path) as opened:
        assert np.abs(opened.logits(ids) - wanted).max() <= 0.01 * np.abs(wanted).max()
    source = open_source(path)
    assert source.config.model_type == plain
    np.testing.assert_allclose(logits_of(trace_source(source), ids), wanted, atol=2e-5)


@pytest.mark.parametrize("kind", ["deepseek_v2", "deepseek_v3"])
def test_latents_under_yarn_and_as_older_files_have_them(kind: str, tmp_path: Path):
    """yarn changes the temperature by a number of its own, a tenth of which the file has."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 5e4}
    model, ids = tiny(kind, rope_parameters={**yarn, "mscale": 0.7, "mscale_all_dim": 0.7}), ids_of(40)
    with torch.inference_mode():
        wanted = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    yarned = entry("deepseek2.rope.scaling.yarn_log_multiplier", F32, 0.07)
    path = written(model, kind, tmp_path / "m.gguf", yarned)
    with LlamaCpp(path) as opened:
        assert np.abs(opened.logits(ids) - wanted).max() <= 0.01 * np.abs(wanted).max()
    source = open_source(path)
    np.testing.assert_allclose(logits_of(trace_source(source), ids), wanted, atol=2e-5)

    file, config = source.gguf, model.config
    assert file is not None
    key = config.qk_nope_head_dim + config.qk_rope_head_dim
    held = {k: v for k, v in file.metadata.items() if not k.endswith(("_mla", "expert_gating_func"))}
    held |= {"deepseek2.attention.key_length": key, "deepseek2.attention.value_length": config.v_head_dim}
    older = _with(file, held)
    row = readable(older)
    assert row is not None
    assert row[0] == kind  # experts with a bias are scored by a sigmoid
    assert {**configuration(older, row[1])} == {**configuration(file, row[1])}
    whole = {
        f"blk.{i}.attn_kv_b.weight": layer.self_attn.kv_b_proj for i, layer in enumerate(model.model.layers)
    }
    tensors = {k: v for k, v in open_gguf_tensors(file).items() if "_b.weight" not in k or "attn_q" in k}
    tensors |= {name: ArrayTensor(linear.weight.detach().numpy()) for name, linear in whole.items()}
    found, unused = weights(older, row[1], model, tensors)
    assert not unused
    for name, linear in whole.items():
        parameter = f"model.layers.{name.split('.')[1]}.self_attn.kv_b_proj.weight"
        assert np.array_equal(found[parameter].read(), linear.weight.detach().numpy())


def test_the_text_of_mistral_3(tmp_path: Path):
    """Mistral Small 3.2 is written as Ministral 3 is, without what that has beyond Mistral."""
    model, ids = tiny("mistral", sliding_window=None), ids_of(40)
    with torch.inference_mode():
        wanted = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    path = written(model, "mistral", tmp_path / "m.gguf", arch=ARCHITECTURES["mistral (of mistral3)"])
    with LlamaCpp(path) as opened:
        assert np.abs(opened.logits(ids) - wanted).max() <= 0.01 * np.abs(wanted).max()
    source = open_source(path)
    assert source.config.model_type == "mistral"
    np.testing.assert_allclose(logits_of(trace_source(source), ids), wanted, atol=2e-5)


def test_another_family_of_the_same_layout(tmp_path: Path):
    """GLM-4.7-Flash: llama.cpp's converter writes it as deepseek2, and what is read computes the same."""
    model, ids = tiny("glm4_moe_lite", first_k_dense_replace=1), ids_of(40)
    with torch.inference_mode():
        wanted = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    path = written(model, "deepseek_v3", tmp_path / "m.gguf")
    with LlamaCpp(path) as opened:
        assert np.abs(opened.logits(ids) - wanted).max() <= 0.01 * np.abs(wanted).max()
    source = open_source(path)
    np.testing.assert_allclose(logits_of(trace_source(source), ids), wanted, atol=2e-5)


def _with(file: Any, metadata: dict[str, Any]) -> Any:
    import dataclasses

    return dataclasses.replace(file, metadata=metadata)
