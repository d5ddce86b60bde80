"""Target `gguf`: llama.cpp loads what we write, and computes what we compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llmc.codegen.artifact import Artifact
from llmc.codegen.driver import compile_model
from llmc.frontend.gguf import read_gguf
from llmc.frontend.source import open_source
from llmc.frontend.weights import open_gguf_tensors
from llmc.ir.errors import UnsupportedError

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


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "olmo2", "granite"])
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
