"""A GGUF file of Gemma 3n, whose layers carry several inputs: llama.cpp computes of it what transformers'
model does, and so do we. As many layers as llama.cpp takes for granted: the first twenty have keys of their
own, the first ten have sparse gates.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from llmc.frontend.gguf import read_gguf
from llmc.frontend.gguf_architectures import ARCHITECTURES
from llmc.frontend.gguf_model import read_config
from llmc.frontend.gguf_tabled import named
from llmc.frontend.source import open_source
from llmc.frontend.trace import trace_source
from llmc.ir.errors import InputError
from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

from .family_configs import random_model
from .gguf_files import BOOL, F32, STRING, U32, array, byte_vocabulary, entry, write_gguf
from .graphs import logits_of, worst
from .llama_cpp import LlamaCpp
from .models import ids_of

LAYERS, WINDOW = 22, 12


def tiny() -> Any:
    config = Gemma3nTextConfig(
        vocab_size=384,
        vocab_size_per_layer_input=384,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        sliding_window=WINDOW,
        hidden_size_per_layer_input=256,
        laurel_rank=64,
        num_kv_shared_layers=LAYERS - 20,
        layer_types=["full_attention" if i % 5 == 4 else "sliding_attention" for i in range(LAYERS)],
        activation_sparsity_pattern=[0.95] * 10 + [0.0] * (LAYERS - 10),
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
            "full_attention": {"rope_type": "default", "rope_theta": 5e5},
        },
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config.use_cache = False
    model = random_model(config, Gemma3nForCausalLM)
    for name, weight in model.named_parameters():
        # Each layer adds little to what it is given, as in a trained model: twenty-two that add much make
        # noise of every rounding.
        if name.endswith("_coefs.weight") or ".post_" in name:
            weight.data *= 0.1
    return model


def written(model: Any, path: Path) -> Path:
    config, arch = model.config, ARCHITECTURES["gemma3n_text"]
    name_of, tensors = named(arch, LAYERS), dict[str, np.ndarray]()
    state = {k: v.detach().numpy() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    for stack, part in (("altup_proj", "projections"), ("altup_unembd_proj", "unembed_projections")):
        tensors[f"{stack}.weight"] = np.stack(
            [state.pop(f"model.altup_{part}.{i}.weight") for i in range(config.altup_num_inputs - 1)]
        )
    for parameter, value in state.items():
        name = name_of(parameter)
        assert name is not None, parameter
        tensors[name] = value
    for i in range(20, LAYERS):  # which the published model has too, and nothing reads
        for part in "kv":
            tensors[f"blk.{i}.attn_{part}.weight"] = np.zeros((32, 64), np.float32)
        tensors[f"blk.{i}.attn_k_norm.weight"] = np.ones(16, np.float32)
    deviations = NormalDist().inv_cdf(0.95)
    scales = [deviations if one else -float("inf") for one in config.activation_sparsity_pattern]
    numbers = {
        "block_count": LAYERS,
        "context_length": 256,
        "embedding_length": 64,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 16,
        "attention.value_length": 16,
        "attention.sliding_window": WINDOW,
        "attention.shared_kv_layers": LAYERS - 20,
        "embedding_length_per_layer_input": 256,
        "altup.active_idx": 0,
        "altup.num_inputs": 4,
    }
    floats = {arch.norm_key: 1e-6, "rope.freq_base": 5e5, "rope.freq_base_swa": 5e3}
    floats["final_logit_softcapping"] = 30.0
    sliding = [t == "sliding_attention" for t in config.layer_types]
    entries = [
        entry("general.architecture", STRING, arch.name),
        *(entry(f"{arch.name}.{key}", U32, value) for key, value in numbers.items()),
        *(entry(f"{arch.name}.{key}", F32, value) for key, value in floats.items()),
        array(f"{arch.name}.feed_forward_length", U32, [96] * LAYERS),
        array(f"{arch.name}.attention.sliding_window_pattern", BOOL, sliding),
        array(f"{arch.name}.activation_sparsity_scale", F32, scales),
        *byte_vocabulary([f"<x{i}>" for i in range(128)]),
        *(entry(f"tokenizer.ggml.{name}_token_id", U32, i) for name, i in (("bos", 1), ("eos", 2))),
    ]
    return write_gguf(path, entries, tensors)


@pytest.mark.slow
def test_a_file_means_what_llama_cpp_computes(tmp_path: Path) -> None:
    model, ids = tiny(), ids_of(40)
    with torch.inference_mode():
        wanted = model(input_ids=torch.tensor([ids])).logits[0]
    path = written(model, tmp_path / "m.gguf")
    with LlamaCpp(path) as opened:
        assert worst(opened.logits(ids), wanted) <= 0.01
    source = open_source(path)
    assert source.config.activation_sparsity_pattern == model.config.activation_sparsity_pattern
    assert worst(logits_of(trace_source(source), ids), wanted) <= 2e-5
    file = read_gguf(path)
    keys = dict(file.metadata)
    keys["gemma3n.attention.sliding_window_pattern"] = 5  # every fifth sees everything, as llama.cpp reads it
    assert read_config(replace(file, metadata=keys)).layer_types == model.config.layer_types
    for name in ("attention.shared_kv_layers", "activation_sparsity_scale"):
        left = {k: v for k, v in file.metadata.items() if not k.endswith(name)}
        with pytest.raises(InputError, match=f"lacks gemma3n.{name}"):
            read_config(replace(file, metadata=left))
