"""The tiny models are what the other tests believe them to be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from .models import (
    CONTEXT,
    TINY,
    VOCAB_SIZE,
    ids_of,
    reference_logits,
    save_tiny,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
)

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("name", TINY)
def test_tiny_models_are_seeded_finite_and_lively(name: str) -> None:
    ids = ids_of(24)
    first, second = (reference_logits(tiny_model(name), ids) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first.shape == (24, VOCAB_SIZE if TINY[name].causal else tiny_config(name).hidden_size)
    assert np.isfinite(first).all()
    assert 0.3 < first.std() < 30


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3"])
def test_windows_change_the_output(name: str) -> None:
    ids = ids_of(24)
    windowed = reference_logits(tiny_model(name), ids)
    wide = reference_logits(tiny_model(name, sliding_window=CONTEXT), ids)
    np.testing.assert_allclose(windowed[:8], wide[:8], atol=1e-4)
    assert np.abs(windowed[-1] - wide[-1]).max() > 1e-2


def test_soft_caps_change_the_output() -> None:
    capped = reference_logits(tiny_model("gemma2"), ids_of(24))
    loose = reference_logits(
        tiny_model("gemma2", attn_logit_softcapping=None, final_logit_softcapping=None), ids_of(24)
    )
    assert np.abs(capped).max() <= 15
    assert np.abs(capped - loose).max() > 1e-2


def test_saved_folder_loads_to_the_same_model(tmp_path: Path) -> None:
    folder = save_tiny("qwen3", tmp_path / "qwen3")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    ids = ids_of(9)
    np.testing.assert_array_equal(reference_logits(loaded, ids), reference_logits(tiny_model("qwen3"), ids))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "def main(): naïve 河\n"
    assert tokenizer(text)["input_ids"] == tiny_tokenizer().encode(text).ids
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|bos|><|turn|>user\nHi<|eos|><|turn|>assistant\n"


def test_shards_come_with_an_index(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "llama", shards=True)
    assert (folder / "model.safetensors.index.json").is_file()
    assert len(list(folder.glob("*.safetensors"))) > 1


def test_tokenizer_is_the_same_every_time() -> None:
    assert tiny_tokenizer().to_str() == tiny_tokenizer().to_str()
