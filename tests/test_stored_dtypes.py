"""Folders as most are published: weights in bfloat16 or float16, the head tied to the embedding or not."""

from __future__ import annotations

import shutil
from pathlib import Path

import llmc
import numpy as np
import pytest
import torch
from llmc.codegen.driver import compile_model
from llmc.runtime.executor import webgpu_driver
from safetensors.torch import load_file, save_file

from .models import ids_of, save_tokenizer, tiny_model
from .moe_models import MOE, tiny_moe
from .state_models import MODELS as STATE_MODELS
from .state_models import save_state_model
from .webgpu_device import driver


@pytest.mark.parametrize("target", ["tvm-cpu", "onnx-cpu"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_floats_of_a_folder_are_computed_with(dtype: str, tied: bool, target: str, tmp_path: Path) -> None:
    check("llama", dtype, target, tmp_path, tied)


@pytest.mark.parametrize(
    "name",
    [
        *("gpt2", "qwen2", "gpt_neox"),  # biases, norms with biases, and no norm before the first product
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("olmo2", "gemma3", "phi3", "granite", *MOE)),
    ],
)
def test_biases_norms_and_experts(name: str, tmp_path: Path) -> None:
    check(name, "bfloat16", "tvm-cpu", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(STATE_MODELS))
def test_recurrences(name: str, tmp_path: Path) -> None:
    """From the files of a model in float32, rounded: parts of it are of classes of their own."""
    save_state_model(name, tmp_path / "wide")
    (tmp_path / "model").mkdir()
    for path in (tmp_path / "wide").iterdir():
        if path.suffix == ".safetensors":
            rounded = {n: x.bfloat16() if x.is_floating_point() else x for n, x in load_file(path).items()}
            save_file(rounded, tmp_path / "model" / path.name, {"format": "pt"})
            save_file({n: x.float() for n, x in rounded.items()}, path, {"format": "pt"})
        else:
            shutil.copy(path, tmp_path / "model" / path.name)
    logits = [
        llmc.load(llmc.compile(str(tmp_path / n), tmp_path / f"{n}.llmc", verdict=False).root).logits(
            ids_of(30)
        )
        for n in ("wide", "model")
    ]
    # The same numbers, but for how products of matrices of 16 and of 32 bits are summed.
    assert np.abs(logits[1] - logits[0]).max() <= 1e-4 * np.abs(logits[0]).max()


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_floats_of_16_bits_in_wgsl(tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which has none of them; the table of an embedding without a head stays as it is."""
    driver()  # skips without one
    monkeypatch.setenv(webgpu_driver.ON_CPU, "1")
    check("llama", "bfloat16", "tvm-webgpu", tmp_path, tied)


def check(name: str, dtype: str, target: str, folder: Path, tied: bool = True) -> None:
    """Logits of transformers in float32 over the same weights: 3e-5 of the largest, since weights are exact
    in float32 and activations are float32.
    """
    ids = ids_of(30)
    model = tiny_moe(name) if name in MOE else tiny_model(name, tie_word_embeddings=tied)
    kind = getattr(torch, dtype)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.to(kind))
        wanted = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    model.to(kind).save_pretrained(folder / "model")
    save_tokenizer(folder / "model")
    compile_model(folder / "model", folder / "out", quant="none", context=64, targets=[target])
    got = llmc.load(folder / "out").logits(ids)
    assert np.abs(got - wanted).max() <= 3e-5 * np.abs(wanted).max()
