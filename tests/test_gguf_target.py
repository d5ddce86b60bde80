"""Target `gguf`: llama.cpp loads what we write, and computes what we compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llmc.codegen.driver import compile_model
from llmc.codegen.gguf.metadata import file_type
from llmc.frontend.gguf import read_gguf
from llmc.frontend.source import open_source
from llmc.frontend.weights import open_gguf_tensors
from llmc.ir.errors import UnsupportedError
from llmc.ir.ggml import BLOCK_TYPES
from llmc.passes.quantize.rtn import dequantize, quantize_rtn

from .gguf_files import byte_vocabulary, llama_entries, llama_tensors, write_gguf
from .llama_cpp import LlamaCpp
from .models import ids_of, reference_logits, save_tiny, tiny_model

LAYERS = {"gemma3": {"layer_types": ["sliding_attention"] * 2}}  # llama.cpp's own pattern, of two layers
WIDE = {"hidden_size": 256, "intermediate_size": 512}


def changes(name: str) -> dict[str, Any]:
    """What of a tiny family GGUF cannot say, said otherwise."""
    found: dict[str, Any] = dict(LAYERS.get(name, {}))
    if name.startswith("gemma"):
        found["query_pre_attn_scalar"] = 32
    if name == "mistral":
        found["sliding_window"] = None
    return found


def write(model: Path, folder: Path, quant: str = "none", target: str = "gguf:floats=f32") -> Path:
    artifact = compile_model(model, folder / "out.llmc", targets=[target], quant=quant).artifact
    return artifact.path(artifact.target("gguf")["model"])


@pytest.mark.parametrize(
    "name", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "olmo2", "granite"]
)
def test_llama_cpp_computes_what_transformers_does(name: str, tmp_path: Path) -> None:
    folder = save_tiny(name, tmp_path / name, **changes(name))
    path = write(folder, tmp_path)
    ids = ids_of(40)
    wanted = reference_logits(tiny_model(name, **changes(name)), ids)
    with LlamaCpp(path) as model:
        assert model.vocab_size == wanted.shape[1]
        found = model.logits(ids)
        text = "The river was wide: 3.14159, Fluß and 河."
        assert model.tokenize(text) == open_tokenizer(tmp_path / "out.llmc").encode(text).ids
    # llama.cpp keeps its cache in float16.
    assert np.abs(found - wanted).max() <= 0.02


def open_tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def tensors(path: Path) -> dict[str, Any]:
    return dict(open_gguf_tensors(read_gguf(path)))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama of rows of 256 as q4_k_m, 3 layers."""
    folder = tmp_path_factory.mktemp("wide")
    model = save_tiny("llama", folder / "llama", **WIDE, num_hidden_layers=3)
    return write(model, folder, quant="gguf-q4_k_m")


def test_every_type_that_can_be_kept_has_a_number_as_the_files_type() -> None:
    """`LLAMA_FTYPE_MOSTLY_…` of llama.h."""
    from gguf.constants import LlamaFileType

    names = {name: name + "_M" * (name in ("Q4_K", "Q5_K")) for name in BLOCK_TYPES}
    names |= {"Q3_K": "Q3_K_M", "MXFP4": "MXFP4_MOE"}
    for name, theirs in names.items():
        assert file_type(name) == LlamaFileType[f"MOSTLY_{theirs}"]


def test_scheme_decides_the_types(quantized: Path) -> None:
    header = read_gguf(quantized)
    types = {name: info.ggml_type for name, info in header.tensors.items()}
    assert types["blk.0.attn_q.weight"] == types["blk.1.ffn_down.weight"] == "Q4_K"
    assert (
        types["blk.2.attn_v.weight"] == types["blk.2.ffn_down.weight"] == types["token_embd.weight"] == "Q6_K"
    )
    assert types["blk.0.attn_norm.weight"] == "F32" and "output.weight" not in types
    assert header.metadata["general.file_type"] == 15 and header.metadata["general.architecture"] == "llama"
    assert header.metadata["tokenizer.chat_template"].startswith("{{ bos_token }}")


def test_llama_cpp_runs_our_blocks(quantized: Path) -> None:
    """Against the same file dequantized by transformers' model: llama.cpp rounds activations to 8 bits."""
    import torch

    source = open_source(quantized)
    model = tiny_model("llama", **WIDE, num_hidden_layers=3)
    state = {name: torch.from_numpy(one.read()) for name, one in source.weights.items()}
    model.load_state_dict(state)
    ids = ids_of(40)
    wanted = reference_logits(model, ids)
    with LlamaCpp(quantized) as opened:
        gap = opened.logits(ids) - wanted
    assert gap.std() <= 0.1 * wanted.std()


def test_a_kept_file_is_written_with_the_same_bytes(quantized: Path, tmp_path: Path) -> None:
    again = write(quantized, tmp_path, quant="keep")
    before, after = tensors(quantized), tensors(again)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.ggml_type == after[name].ggml_type
        assert np.array_equal(tensor.blocks(), after[name].blocks()), name


@pytest.mark.parametrize(("quant", "ggml_type"), [("int4-g32-sym", "Q4_0"), ("int4-g64", "Q4_1")])
def test_other_grids_are_repacked(quant: str, ggml_type: str, tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "llama")
    found = tensors(write(folder, tmp_path, quant=quant))["blk.0.attn_output.weight"]
    w = open_source(folder).weights["model.layers.0.self_attn.o_proj.weight"].read()
    group = 32 if ggml_type == "Q4_0" else 64
    grid = {"bits": 4, "group_size": group}
    wanted = dequantize(quantize_rtn(w, **grid, symmetric=ggml_type == "Q4_0"), **grid)
    assert found.ggml_type == ggml_type
    # Exact but for the minimum of Q4_1, a product that is rounded to float16.
    assert np.abs(found.read() - wanted).max() <= (0 if ggml_type == "Q4_0" else 1e-3 * np.abs(w).max())


def test_metadata_of_a_gguf_source_is_copied(tmp_path: Path) -> None:
    shapes = {k: v for k, v in llama_tensors().items() if k != "token_embd.weight"}
    embedding = np.random.default_rng(1).standard_normal((258, 64)).astype(np.float32)
    path = write_gguf(
        tmp_path / "m.gguf",
        [*llama_entries()[:-1], *byte_vocabulary(["<s>", "</s>"])],
        {"token_embd.weight": embedding, **shapes},
    )
    out = write(path, tmp_path)
    before, after = read_gguf(path).metadata, read_gguf(out).metadata
    for key, value in before.items():
        assert np.array_equal(value, after[key]), key
    for name, tensor in tensors(path).items():
        assert np.array_equal(tensor.read(), tensors(out)[name].read()), name


@pytest.mark.parametrize(
    ("name", "changed", "quant", "message"),
    [
        ("gpt2", {}, "none", "does not write the architecture 'gpt2'"),
        ("mistral", {}, "none", "a sliding window of 12 tokens in all layers: GGUF cannot say that"),
        ("gemma3", {}, "none", "layer 1 with full_attention, where llama.cpp takes sliding_attention"),
        ("llama", {}, "int4-g8", "which no GGML block holds"),
    ],
)
def test_what_gguf_cannot_say_is_refused(
    name: str, changed: dict[str, Any], quant: str, message: str, tmp_path: Path
) -> None:
    folder = save_tiny(name, tmp_path / name, **changed)
    with pytest.raises(UnsupportedError, match=message):
        write(folder, tmp_path, quant=quant)
    assert not (tmp_path / "out.llmc").exists()


def test_rotated_layers_are_refused(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "llama")
    with pytest.raises(UnsupportedError, match="layers are rotated, which GGUF cannot say"):
        compile_model(folder, tmp_path / "out.llmc", targets=["gguf"], passes=["rotate-linears{size=16}"])
