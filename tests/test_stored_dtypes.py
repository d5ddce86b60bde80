"""Folders as most are published: weights in bfloat16 or float16, the head tied to the embedding or not."""

from __future__ import annotations

from pathlib import Path

import llmc
import numpy as np
import pytest
import torch
from llmc.codegen.driver import compile_model

from .models import ids_of, save_tokenizer, tiny_model


@pytest.mark.parametrize("target", ["tvm-cpu", "onnx-cpu"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_floats_of_a_folder_are_computed_with(dtype: str, tied: bool, target: str, tmp_path: Path) -> None:
    """Logits of transformers in float32 over the same weights: 3e-5 of the largest, since weights are exact
    in float32 and activations are float32.
    """
    model, ids = tiny_model("llama", tie_word_embeddings=tied), ids_of(30)
    kind = getattr(torch, dtype)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.to(kind))
        wanted = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    model.to(kind).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    compile_model(tmp_path / "model", tmp_path / "out", quant="none", context=64, targets=[target])
    got = llmc.load(tmp_path / "out").logits(ids)
    assert np.abs(got - wanted).max() <= 3e-5 * np.abs(wanted).max()
