"""GGUF files of encoders by the table of frontend/gguf_architectures.py: llama.cpp's hidden states are what
transformers' model computes, and what we compile of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from llmc.codegen.driver import compile_model
from llmc.frontend.gguf_architectures import ARCHITECTURES
from llmc.frontend.gguf_tabled import named
from llmc.frontend.source import open_source
from llmc.frontend.trace import trace_source
from llmc.frontend.weights import ReorderedTensor, open_gguf_tensors
from llmc.ir.errors import UnsupportedError
from llmc.ir.weights import quantized_of
from llmc.runtime.loader import load

from .family_configs import random_model, small_config
from .gguf_files import BOOL, F32, STRING, U32, byte_vocabulary, entry, write_gguf
from .graphs import logits_of
from .llama_cpp import LlamaCpp
from .models import ids_of

_KINDS = {bool: BOOL, int: U32, float: F32, str: STRING}


def tiny(kind: str, **changes: Any) -> Any:
    """A random model without a head; `changes` of its configuration."""
    config = small_config(kind)
    for name, value in changes.items():
        setattr(config, name, value)
    config.use_cache = False
    return random_model(config, transformers.AutoModel.from_config(config).__class__)


def hidden(model: Any, ids: list[int]) -> np.ndarray[Any, Any]:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids])).last_hidden_state[0].numpy()


def written(
    model: Any,
    kind: str,
    path: Path,
    *further: bytes,
    fused: bool = False,
    leave: tuple[str, ...] = (),
    change: Callable[[str, np.ndarray[Any, Any]], np.ndarray[Any, Any]] = lambda name, array: array,
    quantize: str = "F32",
    vocabulary: list[bytes] | None = None,
    **keys: Any,
) -> Path:
    """A file of an encoder as llama.cpp's converter writes it; `keys` has what is not in every file, "__" for
    a dot.
    """
    config, arch = model.config, ARCHITECTURES[kind]
    heads = config.num_attention_heads
    common = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        arch.norm_key: float(getattr(config, arch.norm_field)),
        "attention.causal": False,
    }
    common |= {name.replace("__", "."): value for name, value in keys.items()}
    entries = [entry("general.architecture", STRING, arch.name)]
    entries += [entry(f"{arch.name}.{k}", _KINDS[type(v)], v) for k, v in common.items() if k not in leave]
    entries += vocabulary or byte_vocabulary([f"<x{i}>" for i in range(config.vocab_size - 256)])
    entries += [
        entry("tokenizer.ggml.token_type_count", U32, getattr(config, "type_vocab_size", 1)),
        *further,
    ]
    name_of, tensors = named(arch, config.num_hidden_layers), dict[str, np.ndarray[Any, Any]]()
    for parameter, value in model.named_parameters():
        if (name := name_of(parameter)) is not None and name not in leave:
            tensors[name] = change(name, value.detach().numpy())
    for name in list(tensors) if fused else []:
        if (match := re.fullmatch(r"(blk\.\d+\.attn_)q(\..*)", name)) is not None:
            parts = [tensors.pop(f"{match[1]}{part}{match[2]}") for part in "qkv"]
            tensors[f"{match[1]}qkv{match[2]}"] = np.concatenate(parts)
    return write_gguf(path, entries, tensors, quantize)


def agrees(path: Path, wanted: np.ndarray[Any, Any], ids: list[int]) -> Any:
    """The opened file, after llama.cpp's hidden states and ours were compared with `wanted`."""
    with LlamaCpp(path) as opened:  # its products are of float16, and its gelu is a table
        assert np.abs(opened.hidden(ids) - wanted).max() <= 0.01 * np.abs(wanted).max()
    source = open_source(path)
    assert source.task == "encoder"
    np.testing.assert_allclose(logits_of(trace_source(source), ids), wanted, atol=2e-5)
    return source


NOMIC: dict[str, Any] = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 777.0},
    "layer_norm_eps": 0.03,
    "num_hidden_layers": 3,
}


def test_rotary_positions_and_a_gate(tmp_path: Path) -> None:
    """nomic-embed-text: queries, keys and values are one matrix; and vectors of a file that is pooled."""
    model, ids = tiny("nomic_bert", **NOMIC), ids_of(40)
    wanted = hidden(model, ids)
    path = written(model, "nomic_bert", tmp_path / "m.gguf", fused=True, rope__freq_base=777.0)
    assert agrees(path, wanted, ids).config.model_type == "nomic_bert"
    path = written(model, "nomic_bert", tmp_path / "q.gguf", rope__freq_base=777.0)
    agrees(path, wanted, ids)  # llama.cpp takes three matrices too
    path = written(
        model, "nomic_bert", tmp_path / "p.gguf", fused=True, rope__freq_base=777.0, pooling_type=1
    )
    artifact = compile_model(path, tmp_path / "p.llmc", targets=["onnx-cpu"], kv_dtype="float32").artifact
    with load(artifact.root) as llm:
        found = llm.embeddings([ids])[0]
    np.testing.assert_allclose(found, wanted.mean(0) / np.linalg.norm(wanted.mean(0)), atol=1e-5)


def test_one_matrix_that_is_cut_keeps_its_blocks(tmp_path: Path) -> None:
    model = tiny("nomic_bert")
    path = written(model, "nomic_bert", tmp_path / "m.gguf", fused=True, quantize="Q8_0")
    source = open_source(path)
    assert source.gguf is not None
    whole = open_gguf_tensors(source.gguf)["blk.1.attn_qkv.weight"].read()
    for i, part in enumerate("qkv"):
        tensor = source.weights[f"layers.1.self_attn.{part}_proj.weight"]
        assert isinstance(tensor, ReorderedTensor)
        assert tensor.shape == (64, 64) and tensor.ggml_type == "Q8_0"
        assert np.array_equal(tensor.read(), whole[64 * i : 64 * (i + 1)])
        parts = quantized_of(tensor)
        assert parts is not None and parts.codes.shape == (64, 64)


def test_one_matrix_of_another_height_is_refused(tmp_path: Path) -> None:
    def shorter(name: str, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return array[:-1] if "attn_v" in name else array

    path = written(tiny("nomic_bert"), "nomic_bert", tmp_path / "m.gguf", fused=True, change=shorter)
    with pytest.raises(UnsupportedError, match=r"blk\.0\.attn_qkv\.weight has no place"):
        assert open_source(path).weights


def test_without_types_of_tokens(tmp_path: Path) -> None:
    path = written(
        tiny("nomic_bert"), "nomic_bert", tmp_path / "m.gguf", fused=True, leave=("token_types.weight",)
    )
    with pytest.raises(UnsupportedError, match=r"no token_types\.weight"):
        open_source(path)


def test_one_matrix_with_biases(tmp_path: Path) -> None:
    model, ids = tiny("bert", num_hidden_layers=3, layer_norm_eps=0.03), ids_of(40)
    agrees(written(model, "bert", tmp_path / "m.gguf", fused=True), hidden(model, ids), ids)
