"""GGUF files of models that compute what another family's do, and of state spaces alone or in turns with
attention: llama.cpp computes of them what transformers' model does, and so do we.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llmc.frontend.gguf import read_gguf
from llmc.frontend.gguf_architectures import ARCHITECTURES
from llmc.frontend.gguf_tabled import named
from llmc.frontend.source import open_source
from llmc.frontend.trace import trace_source
from llmc.frontend.weights import open_gguf_tensors
from llmc.ir.errors import InputError, UnsupportedError

from .gguf_files import BOOL, F32, STRING, U32, array, byte_vocabulary, entry, write_gguf
from .graphs import logits_of, worst
from .llama_cpp import LlamaCpp
from .models import ids_of
from .test_gguf_architectures import _parts, tiny, written

Array = np.ndarray[Any, Any]
_KINDS = {bool: BOOL, int: U32, float: F32, str: STRING}
SCALES = {"embedding_scale": 2.0, "residual_scale": 0.7, "logit_scale": 1.5}
ALIKE: dict[str, tuple[str, dict[str, float], dict[str, Any]]] = {
    "llama (of internlm2)": ("llama", {}, {}),
    "llama (of xverse)": ("llama", {}, {}),
    "llama (of baichuan)": ("llama", {}, {"num_hidden_layers": 32, "num_key_value_heads": 4}),
    "granite (of minicpm)": (
        "granite",
        SCALES,
        {
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.7,
            "logits_scaling": 1.5,
            "attention_multiplier": 16**-0.5,
        },
    ),
}


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("row", ALIKE)
def test_a_file_is_read_as_the_family_that_computes_it(row: str, tmp_path: Path) -> None:
    family, scales, changes = ALIKE[row]
    arch, ids = ARCHITECTURES[row], ids_of(40)
    model = tiny(family, **changes)
    further = [entry(f"{arch.name}.{key}", F32, value) for key, value in scales.items()]
    if family == "llama":  # as their converters write
        further.append(entry(f"{arch.name}.tensor_data_layout", STRING, "Meta AI original pth"))
    path = written(model, row, tmp_path / "m.gguf", *further, arch=arch)
    wanted = logits(model, ids)
    with LlamaCpp(path) as opened:  # its cache is of float16
        assert worst(opened.logits(ids), wanted) <= 0.01
    source = open_source(path)
    assert source.config.model_type == family
    assert worst(logits_of(trace_source(source), ids), wanted) <= 5e-5


STATES: dict[str, dict[str, Any]] = {
    "mamba2": {"hidden_size": 64, "num_heads": 8, "head_dim": 16, "n_groups": 2, "state_size": 16},
    "jamba": {
        "num_hidden_layers": 6,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "jamba, one kind of feed-forward": {
        "num_hidden_layers": 4,
        "attn_layer_period": 8,
        "attn_layer_offset": 2,
        "num_experts": 1,
        "num_experts_per_tok": 1,
    },
}


def state_keys(c: Any) -> dict[str, Any]:
    if c.model_type == "mamba2":
        return {
            "feed_forward_length": 0,
            "attention.head_count": 0,
            "ssm.group_count": c.n_groups,
            "ssm.conv_kernel": c.conv_kernel,
            "ssm.inner_size": c.num_heads * c.head_dim,
            "ssm.state_size": c.state_size,
            "ssm.time_step_rank": c.num_heads,
            "attention.layer_norm_rms_epsilon": c.layer_norm_epsilon,
        }
    heads = [c.num_key_value_heads if kind == "attention" else 0 for kind in c.layers_block_type]
    return {
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": heads,
        "ssm.conv_kernel": c.mamba_d_conv,
        "ssm.inner_size": c.mamba_expand * c.hidden_size,
        "ssm.state_size": c.mamba_d_state,
        "ssm.time_step_rank": c.mamba_dt_rank,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "expert_count": c.num_experts,
        "expert_used_count": c.num_experts_per_tok,
    }


def states_written(model: Any, path: Path, **changes: Any) -> Path:
    """As llama.cpp's converter writes models with state spaces; `changes` of key-values."""
    config = model.config
    kind = config.model_type
    arch = ARCHITECTURES[kind]
    name_of, tensors = named(arch, config.num_hidden_layers), dict[str, Array]()
    for parameter, value in model.state_dict().items():
        x = value.detach().numpy().copy()
        if (parts := _parts(parameter, x, arch, config)) is not None:
            tensors |= parts
            continue
        name = name_of(parameter)
        assert name is not None, parameter
        part = parameter.split(".", 3)[-1]
        if part.endswith("A_log"):
            x = -np.exp(x)
        if part.endswith("conv1d.weight"):
            x = x[:, 0]
        if kind == "mamba2" and part.endswith(("A_log", ".D")):
            x = x[:, None]
        if kind == "mamba2" and part.endswith("mixer.norm.weight"):
            x = x.reshape(config.n_groups, -1)
        tensors[name] = np.ascontiguousarray(x)
    keys = {
        "block_count": config.num_hidden_layers,
        "context_length": 1 << 20,
        "embedding_length": config.hidden_size,
        "vocab_size": config.vocab_size,
        **state_keys(config),
        **changes,
    }
    entries = [entry("general.architecture", STRING, kind)]
    for key, value in keys.items():
        key = f"{kind}.{key}"
        entries.append(
            array(key, U32, value) if isinstance(value, list) else entry(key, _KINDS[type(value)], value)
        )
    vocabulary = byte_vocabulary([f"<x{i}>" for i in range(config.vocab_size - 256)])
    ends = [entry(f"tokenizer.ggml.{name}_token_id", U32, i) for name, i in (("bos", 1), ("eos", 2))]
    return write_gguf(path, [*entries, *vocabulary, *ends], tensors)


@pytest.mark.parametrize("case", STATES)
def test_state_spaces_mean_what_llama_cpp_computes(case: str, tmp_path: Path) -> None:
    kind, ids = case.partition(",")[0], ids_of(40)
    model = tiny(kind, **STATES[case])
    wanted, path = logits(model, ids), states_written(model, tmp_path / "m.gguf")
    with LlamaCpp(path) as opened:
        assert worst(opened.logits(ids), wanted) <= 0.01
    source = open_source(path)
    assert source.config.model_type == kind
    assert worst(logits_of(trace_source(source), ids), wanted) <= 5e-5


def test_attention_that_is_not_equally_far_apart_is_refused(tmp_path: Path) -> None:
    model = tiny("jamba", **STATES["jamba"])
    path = states_written(model, tmp_path / "m.gguf", **{"attention.head_count_kv": [0, 2, 2, 0, 0, 0]})
    with pytest.raises(UnsupportedError, match=r"layers \[1, 2\] of attention are not equally far apart"):
        open_source(path)


def test_heads_that_do_not_divide_a_state_space_are_refused(tmp_path: Path) -> None:
    model = tiny("mamba2", **STATES["mamba2"])
    path = states_written(model, tmp_path / "m.gguf", **{"ssm.time_step_rank": 7})
    with pytest.raises(InputError, match="128 numbers of a state space for 7 heads"):
        open_source(path)


def test_windows_of_every_fourth_layer_without_positions(tmp_path: Path) -> None:
    """EXAONE 4.0 32B: llama.cpp knows it by its 64 layers."""
    kinds = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"] * 16
    model = tiny("exaone4", num_hidden_layers=64, sliding_window=12, layer_types=kinds)
    ids, arch = ids_of(40), ARCHITECTURES["exaone4"]
    path = written(model, "exaone4", tmp_path / "m.gguf", arch=arch)
    wanted = logits(model, ids)
    with LlamaCpp(path) as opened:
        assert worst(opened.logits(ids), wanted) <= 0.01
    assert worst(logits_of(trace_source(open_source(path)), ids), wanted) <= 5e-5


def test_scales_that_an_older_file_does_not_say(tmp_path: Path) -> None:
    """MiniCPM 2B's factors."""
    arch, ids = ARCHITECTURES["granite (of minicpm)"], ids_of(40)
    scales = {"embedding_multiplier": 12.0, "residual_multiplier": 1.4 / 2**0.5, "logits_scaling": 0.25}
    model = tiny("granite", **scales, attention_multiplier=16**-0.5)
    path = written(model, "minicpm", tmp_path / "m.gguf", arch=arch)
    assert worst(logits_of(trace_source(open_source(path)), ids), logits(model, ids)) <= 5e-5


def rewritten(path: Path, out: Path, change: Callable[[dict[str, Array]], None]) -> Path:
    """The file with its tensors changed."""
    file = read_gguf(path)
    tensors: dict[str, Array] = {name: value.read() for name, value in open_gguf_tensors(file).items()}
    change(tensors)
    keys = {k: v for k, v in file.metadata.items() if not k.startswith("tokenizer.")}
    entries = [entry(k, _KINDS[type(v)], v) for k, v in keys.items()]
    entries += byte_vocabulary([f"<x{i}>" for i in range(len(tensors["token_embd.weight"]) - 256)])
    return write_gguf(out, entries, tensors)


def test_factors_of_frequencies_without_an_original_length(tmp_path: Path) -> None:
    """MiniCPM4's LongRoPE: llama.cpp takes the context's length, so that the long factors are never taken."""
    ids = ids_of(40)
    short, long = np.linspace(1, 2, 8, dtype=np.float32), np.linspace(3, 9, 8, dtype=np.float32)
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": short.tolist()}
    rope |= {"long_factor": long.tolist(), "original_max_position_embeddings": 256, "attention_factor": 1.0}
    scales = {"embedding_multiplier": 2.0, "residual_multiplier": 0.7, "logits_scaling": 1.5}
    plain = tiny("granite", **scales, attention_multiplier=16**-0.5)
    scaled = tiny("granite", **scales, attention_multiplier=16**-0.5, rope_parameters=rope)
    scaled.load_state_dict(plain.state_dict())
    further = [entry(f"minicpm.{key}", F32, value) for key, value in SCALES.items()]
    further.append(entry("minicpm.rope.scaling.type", STRING, "longrope"))
    arch = ARCHITECTURES["granite (of minicpm)"]
    path = written(plain, "minicpm", tmp_path / "m.gguf", *further, arch=arch)
    factors = {"rope_factors_long.weight": long, "rope_factors_short.weight": short}
    path = rewritten(path, tmp_path / "f.gguf", lambda tensors: tensors.update(factors))
    wanted = logits(scaled, ids)
    assert worst(logits(plain, ids), wanted) > 0.05
    with LlamaCpp(path, window=128) as opened:
        assert worst(opened.logits(ids), wanted) <= 0.01
    assert worst(logits_of(trace_source(open_source(path)), ids), wanted) <= 5e-5


def test_queries_keys_and_values_in_one_matrix_and_bias(tmp_path: Path) -> None:
    """GLM-4 9B as it was published at first."""
    model, ids = tiny("glm", attention_bias=True), ids_of(40)
    wanted, path = logits(model, ids), written(model, "glm", tmp_path / "m.gguf")

    def fuse(tensors: dict[str, Array]) -> None:
        for layer in range(model.config.num_hidden_layers):
            for kind in ("weight", "bias"):
                parts = [tensors.pop(f"blk.{layer}.attn_{part}.{kind}") for part in "qkv"]
                tensors[f"blk.{layer}.attn_qkv.{kind}"] = np.concatenate(parts)

    path = rewritten(path, tmp_path / "f.gguf", fuse)
    with LlamaCpp(path) as opened:
        assert worst(opened.logits(ids), wanted) <= 0.01
    assert worst(logits_of(trace_source(open_source(path)), ids), wanted) <= 5e-5


def test_positions_that_are_slopes_are_refused(tmp_path: Path) -> None:
    """Baichuan 13B: llama.cpp knows it by its 40 layers; 7B is a Llama."""
    model = tiny("llama", num_hidden_layers=40)
    path = written(model, "baichuan", tmp_path / "m.gguf", arch=ARCHITECTURES["llama (of baichuan)"])
    with pytest.raises(InputError, match=r"architecture 'baichuan' of m\.gguf cannot be taken"):
        open_source(path)


def test_an_activation_by_its_name(tmp_path: Path) -> None:
    """What files say since the activation is another than silu, which those without a word of it have."""
    model, ids = tiny("bitnet", hidden_act="relu2"), ids_of(40)
    with torch.inference_mode():
        wanted = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    path = written(model, "bitnet", tmp_path / "m.gguf")
    np.testing.assert_allclose(logits_of(trace_source(open_source(path)), ids), wanted, atol=2e-5)
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"relu2", b"relu3"))
    with pytest.raises(UnsupportedError, match=r"hidden_activation is 'relu3', which is not"):
        open_source(path)
    row = ARCHITECTURES["bitnet"]
    assert row.fields is not None and row.fields({}, {}) == {"hidden_act": "silu"}


def test_numbers_of_an_activation_that_are_missing_or_of_other_layers(tmp_path: Path) -> None:
    model, ids = tiny("apertus"), ids_of(40)
    path = written(model, "apertus", tmp_path / "m.gguf")
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"xielu.beta", b"xielu.bela"))
    with pytest.raises(InputError, match=r"m\.gguf lacks xielu\.beta"):
        trace_source(open_source(path))
    more = array("xielu.alpha_n", F32, [0.5] * 3)
    path = written(model, "apertus", tmp_path / "m.gguf", more)
    with pytest.raises(InputError, match=r"xielu\.alpha_n"):
        logits_of(trace_source(open_source(path)), ids)
