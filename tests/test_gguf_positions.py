"""GGUF files whose rotary embeddings are stretched, or whose layers have windows: what their key-values say
is what llama.cpp computes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llmc.frontend.gguf import read_gguf
from llmc.frontend.gguf_model import read_config
from llmc.frontend.source import open_source
from llmc.frontend.trace import trace_source
from llmc.ir.errors import InputError, UnsupportedError

from .gguf_cases import CHANGES, FOUR
from .gguf_files import BOOL, F32, U32, array, entry
from .graphs import logits_of
from .llama_cpp import LlamaCpp
from .models import ids_of
from .test_gguf_architectures import _with, tiny, written


@pytest.mark.parametrize("said", ["layers", "period", ""])
def test_windows_in_some_layers(said: str, tmp_path: Path):
    """OLMo 3 stretches the layers that see everything alone; which these are is said by layer, by their
    distance, or not at all.
    """
    changes = {**FOUR, "sliding_window": 12}
    changes["layer_types"] = [*["sliding_attention"] * 3, "full_attention"]
    full = {"rope_type": "default", "rope_theta": 5e4}
    scaled = {**full, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    changes["rope_parameters"] = {"sliding_attention": full, "full_attention": scaled}
    model, ids = tiny("olmo3", **changes), ids_of(40)
    with torch.inference_mode():
        wanted = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    entries = [entry("olmo2.attention.sliding_window", U32, 12)]
    if said == "layers":
        entries.append(array("olmo2.attention.sliding_window_pattern", BOOL, [1, 1, 1, 0]))
    elif said:
        entries.append(entry("olmo2.attention.sliding_window_pattern", U32, 4))
    path = written(model, "olmo3", tmp_path / "m.gguf", *entries)
    with LlamaCpp(path) as opened:
        assert np.abs(opened.logits(ids) - wanted).max() <= 0.01 * np.abs(wanted).max()
    source = open_source(path)
    assert source.config.model_type == "olmo3" and source.config.layer_types == changes["layer_types"]
    np.testing.assert_allclose(logits_of(trace_source(source), ids), wanted, atol=2e-5)


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_the_temperature_of_a_yarn(temperature: float, tmp_path: Path):
    """Ministral 3 has a multiplier of the logarithm, of which llama.cpp divides by what is there without."""
    rope = {**CHANGES["ministral3"]["rope_parameters"], "mscale_all_dim": temperature}
    model, ids = tiny("ministral3", rope_parameters=rope), ids_of(40)
    with torch.inference_mode():
        wanted = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    path = written(model, "ministral3", tmp_path / "m.gguf")
    with LlamaCpp(path) as opened:
        assert np.abs(opened.logits(ids) - wanted).max() <= 0.01 * np.abs(wanted).max()
    np.testing.assert_allclose(logits_of(trace_source(open_source(path)), ids), wanted, atol=2e-5)

    file = open_source(path).gguf
    assert file is not None
    for key, value in (("type", "none"), ("type", "linear"), ("attn_factor", 2.0)):
        other = _with(file, {**file.metadata, f"mistral3.rope.scaling.{key}": value})
        with pytest.raises(UnsupportedError, match=r"beside attention\.temperature_scale"):
            read_config(other)


def test_a_scaling_without_a_kind_is_linear(tmp_path: Path):
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e4}
    model, ids = tiny("arcee", rope_parameters=rope), ids_of(40)
    with torch.inference_mode():
        wanted = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 5e4}
    path = written(model, "arcee", tmp_path / "m.gguf", entry("arcee.rope.scaling.factor", F32, 4.0))
    with LlamaCpp(path) as opened:
        assert np.abs(opened.logits(ids) - wanted).max() <= 0.01 * np.abs(wanted).max()
    np.testing.assert_allclose(logits_of(trace_source(open_source(path)), ids), wanted, atol=2e-5)


@pytest.mark.parametrize(
    ("key", "value", "error", "said"),
    [
        ("sliding_window", np.array([8, 8]), UnsupportedError, "is not understood"),
        ("sliding_window_pattern", "abcd", InputError, "has 'abcd' for 4 layers"),
        ("sliding_window_pattern", np.array([1, 0]), InputError, "has 2 values for 4 layers"),
        ("sliding_window_pattern", 0, UnsupportedError, "sliding_window_pattern is 0"),
    ],
)
def test_windows_that_are_none(key: str, value: Any, error: type[Exception], said: str, tmp_path: Path):
    """Of a file that says them in another kind than llama.cpp reads."""
    window = entry("olmo2.attention.sliding_window", U32, 12)
    model = tiny("olmo3", **{**FOUR, "sliding_window": 12, "layer_types": ["full_attention"] * 4})
    path = written(model, "olmo3", tmp_path / "m.gguf", window)
    file = read_gguf(path)
    with pytest.raises(error, match=said):
        read_config(_with(file, {**file.metadata, f"olmo2.attention.{key}": value}))


def test_a_yarn_that_is_not_cut(tmp_path: Path):
    """llama.cpp cuts the dimensions that yarn turns to whole ones; the published model does not."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 5e4}
    model, ids = tiny("gpt_oss", rope_parameters={**yarn, "truncate": False}), ids_of(40)
    with torch.inference_mode():
        wanted = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    model.config.rope_parameters["truncate"] = True
    source = open_source(written(model, "gpt_oss", tmp_path / "m.gguf"))
    np.testing.assert_allclose(logits_of(trace_source(source), ids), wanted, atol=2e-5)
