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
from llmc.ir.errors import InputError, UnsupportedError
from llmc.ir.weights import quantized_of
from llmc.runtime.loader import load

from .family_configs import random_model, small_config
from .gguf_files import BOOL, F32, STRING, U32, array, byte_vocabulary, entry, write_gguf
from .graphs import logits_of
from .llama_cpp import LlamaCpp
from .models import ids_of

ROWS = ("nomic_bert", "jina_embeddings_v3", "eurobert", "modernbert")
"""Of the table, those that are tested here."""
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
    quantize: str | Callable[[str], str] = "F32",
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


def test_blocks_of_one_matrix_are_kept(tmp_path: Path) -> None:
    """`--quant keep` on the int8 kernels, beside llama.cpp on the same blocks."""

    def of_layers(name: str) -> str:
        return "Q8_0" if name.startswith("blk.") else "F32"

    model, ids = tiny("nomic_bert", **NOMIC), ids_of(40)
    files = [
        written(
            model,
            "nomic_bert",
            tmp_path / f"{name}.gguf",
            fused=True,
            quantize=of_layers,
            rope__freq_base=777.0,
            **keys,
        )
        for name, keys in (("m", {}), ("p", {"pooling_type": 1}))
    ]
    with LlamaCpp(files[0]) as opened:
        mean = opened.hidden(ids).mean(0)
    compiled = compile_model(
        files[1], tmp_path / "p.llmc", targets=["onnx-cpu"], quant="keep", kv_dtype="float32"
    )
    with load(compiled.artifact.root) as llm:
        found = llm.embeddings([ids])[0]
    np.testing.assert_allclose(found, mean / np.linalg.norm(mean), atol=5e-3)


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


def _turns(full: float, sliding: float) -> dict[str, Any]:
    bases = {"full_attention": full, "sliding_attention": sliding}
    return {kind: {"rope_type": "default", "rope_theta": base} for kind, base in bases.items()}


MODERN: dict[str, Any] = {"num_hidden_layers": 5, "norm_eps": 0.03, "local_attention": 10}
SLIDING: Any = "sliding_attention"
FULL: Any = "full_attention"
# What the configuration has → what the file says.
WINDOWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "every third": (
        {"layer_types": [FULL, SLIDING, SLIDING, FULL, SLIDING], "rope_parameters": _turns(777.0, 55.0)},
        {"rope__freq_base": 777.0, "rope__freq_base_swa": 55.0, "attention__sliding_window": 10},
    ),
    "every second": (
        {"layer_types": [FULL, SLIDING, FULL, SLIDING, FULL], "rope_parameters": _turns(777.0, 55.0)},
        {
            "rope__freq_base": 777.0,
            "rope__freq_base_swa": 55.0,
            "attention__sliding_window": 10,
            "attention__sliding_window_pattern": 2,
        },
    ),
    "no base of theirs": (
        {"layer_types": [FULL, SLIDING, SLIDING, FULL, SLIDING], "rope_parameters": _turns(777.0, 1e4)},
        {"rope__freq_base": 777.0, "attention__sliding_window": 10},
    ),
    "no window": (
        {"layer_types": [FULL] * 5, "rope_parameters": _turns(777.0, 55.0)},
        {"rope__freq_base": 777.0},
    ),
    "another gate": (
        {
            "layer_types": [FULL, SLIDING, SLIDING, FULL, SLIDING],
            "rope_parameters": _turns(777.0, 55.0),
            "hidden_activation": "silu",
        },
        {
            "rope__freq_base": 777.0,
            "rope__freq_base_swa": 55.0,
            "attention__sliding_window": 10,
            "hidden_activation": "silu",
            "rope__scaling__type": "none",
        },
    ),
}


@pytest.mark.parametrize("which", WINDOWS)
def test_windows_in_turns(which: str, tmp_path: Path) -> None:
    changes, keys = WINDOWS[which]
    model, ids = tiny("modernbert", **MODERN, **changes), ids_of(40)
    path = written(model, "modernbert", tmp_path / "m.gguf", vocab_size=model.config.vocab_size, **keys)
    assert agrees(path, hidden(model, ids), ids).config.model_type == "modernbert"


def test_windows_that_are_not_understood(tmp_path: Path) -> None:
    model = tiny("modernbert", **MODERN, layer_types=[FULL] * 5)
    path = written(model, "modernbert", tmp_path / "a.gguf", hidden_activation="relu")
    with pytest.raises(UnsupportedError, match="hidden_activation is 'relu'"):
        open_source(path)
    path = written(model, "modernbert", tmp_path / "d.gguf", attention__sliding_window_pattern=0)
    with pytest.raises(UnsupportedError, match="sliding_window_pattern is 0"):
        open_source(path)
    key = "modern-bert.attention.sliding_window_pattern"
    short = array(key, BOOL, [True, False])
    path = written(model, "modernbert", tmp_path / "b.gguf", short, attention__sliding_window=10)
    with pytest.raises(InputError, match="sliding_window_pattern has 2 values for 5 layers"):
        open_source(path)
    path = written(model, "modernbert", tmp_path / "c.gguf", embedding_length_out=9)
    with pytest.raises(UnsupportedError, match=r"modern-bert\.embedding_length_out, which is not understood"):
        open_source(path)


def test_a_window_of_each_layer(tmp_path: Path) -> None:
    types = [SLIDING, FULL, FULL, SLIDING, FULL]
    model, ids = (
        tiny("modernbert", **MODERN, layer_types=types, rope_parameters=_turns(777.0, 55.0)),
        ids_of(40),
    )
    key = array("modern-bert.attention.sliding_window_pattern", BOOL, [one == SLIDING for one in types])
    keys = {"rope__freq_base": 777.0, "rope__freq_base_swa": 55.0, "attention__sliding_window": 10}
    agrees(written(model, "modernbert", tmp_path / "m.gguf", key, **keys), hidden(model, ids), ids)


@pytest.mark.parametrize("kind", ["xlm-roberta", "roberta"])
def test_positions_that_begin_behind_padding(kind: str, tmp_path: Path) -> None:
    """transformers counts positions from behind that of padding; files lack the rows before."""
    model, ids = (
        tiny(kind, pad_token_id=4, type_vocab_size=1, layer_norm_eps=0.03, num_hidden_layers=3),
        ids_of(40),
    )
    wanted = hidden(model, ids)

    def chopped(name: str, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return array[5:] if name == "position_embd.weight" else array

    model.config.max_position_embeddings -= 5
    padding = entry("tokenizer.ggml.padding_token_id", U32, 4)
    path = written(model, "bert", tmp_path / "m.gguf", padding, change=chopped)
    assert 4 not in ids
    agrees(path, wanted, ids)


@pytest.mark.parametrize("fused", [True, False])
def test_rotary_positions_and_biases(fused: bool, tmp_path: Path) -> None:
    model, ids = tiny("jina_embeddings_v3", **NOMIC), ids_of(40)
    path = written(model, "jina_embeddings_v3", tmp_path / "m.gguf", fused=fused, rope__freq_base=777.0)
    assert agrees(path, hidden(model, ids), ids).config.model_type == "jina_embeddings_v3"


def test_a_decoder_s_layers_both_ways(tmp_path: Path) -> None:
    """EuroBERT: keys and values of fewer heads, norms before."""
    changes = {"rope_parameters": NOMIC["rope_parameters"], "rms_norm_eps": 0.03, "num_hidden_layers": 3}
    model, ids = tiny("eurobert", **changes), ids_of(40)
    path = written(model, "eurobert", tmp_path / "m.gguf", rope__freq_base=777.0, attention__head_count_kv=2)
    source = agrees(path, hidden(model, ids), ids)
    assert (source.config.model_type, source.config.num_key_value_heads) == ("eurobert", 2)
