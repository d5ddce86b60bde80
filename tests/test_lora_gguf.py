"""Adapters in GGUF files, merged into GGUF models. llama.cpp, which adds their changes, is the oracle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llmc.codegen.adapters import LoraOption, merge_gguf_adapters
from llmc.codegen.driver import compile_model
from llmc.frontend.gguf import read_gguf
from llmc.frontend.source import ModelSource, open_source
from llmc.frontend.trace import trace_source
from llmc.ir.errors import InputError, UnsupportedError

from .gguf_files import write_gguf
from .graphs import logits_of
from .llama_cpp import LlamaCpp
from .lora_files import write_lora
from .models import ids_of, save_tiny
from .test_gguf_architectures import tiny, written
from .test_gguf_target import write

IDS = ids_of(40)
LLAMA = ("attn_q", "attn_k", "attn_output", "ffn_down")
MIXTURE = ("attn_q", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "ffn_gate_inp")


def factors_of(model: Path, kinds: tuple[str, ...], rank: int = 3, seed: int = 1) -> dict[str, np.ndarray]:
    """Factors for those matrices of a model."""
    generator, found = np.random.default_rng(seed), dict[str, np.ndarray]()
    for name, info in read_gguf(model).tensors.items():
        if name.split(".")[-2] in kinds and name.endswith(".weight"):
            *stack, n, k = info.shape
            shapes = (
                ((n, rank), (k, rank)) if "token_embd" in name else ((*stack, rank, k), (*stack, n, rank))
            )
            for part, shape in zip(("a", "b"), shapes, strict=True):
                found[f"{name}.lora_{part}"] = (generator.normal(size=shape) * 0.1).astype(np.float32)
    return found


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    return write(save_tiny("llama", folder / "model"), folder)


def adapted(model: Path, *options: LoraOption) -> tuple[ModelSource, list[str]]:
    source = open_source(model)
    return source, merge_gguf_adapters(source, options)


@pytest.mark.parametrize("kind", ["llama", "embedding", "unscaled", "two", "mixture"])
def test_merged_as_llama_cpp_applies_it(kind: str, llama: Path, tmp_path: Path) -> None:
    """Over rows that GGUF has in another order, stacked experts, rows by token."""
    base, kinds, architecture = llama, LLAMA, "llama"
    if kind == "mixture":
        base = written(tiny("qwen3_moe"), "qwen3_moe", tmp_path / "moe.gguf")
        kinds, architecture = MIXTURE, "qwen3moe"
    elif kind == "embedding":
        base = write(save_tiny("llama", tmp_path / "untied", tie_word_embeddings=False), tmp_path)
        kinds = ("token_embd", "attn_v")
    alpha = 0.0 if kind == "unscaled" else 6.0
    one = write_lora(tmp_path / "one.gguf", factors_of(base, kinds), architecture=architecture, alpha=alpha)
    scaled = [(one, 1.0)]
    if kind == "two":
        scaled = [(one, -0.5), (write_lora(tmp_path / "b.gguf", factors_of(base, ("attn_q",), 2, 7)), 2.0)]
    source, notes = adapted(base, *(LoraOption(path, scale) for path, scale in scaled))
    got = logits_of(trace_source(source), IDS)
    with LlamaCpp(base) as model:
        plain = model.logits(IDS)
        model.adapt(scaled)
        wanted = model.logits(IDS)
    assert np.abs(wanted - plain).max() > 0.2 and not notes
    # llama.cpp keeps its cache in float16.
    assert np.abs(got.numpy() - wanted).max() <= 0.01 * np.abs(wanted).max()


def test_blocks_that_are_changed_become_floats_and_that_is_said(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    wide = save_tiny("llama", tmp_path / "wide", hidden_size=256, intermediate_size=256)
    base = write(wide, tmp_path, quant="gguf-q4_0")
    one = write_lora(tmp_path / "one.gguf", factors_of(base, ("attn_q",)))
    artifact = compile_model(base, tmp_path / "x.llmc", targets=["null"], quant="keep", lora=[f"{one}:0.5"])
    layers = sum("attn_q" in name for name in read_gguf(base).tensors)
    assert f"adapter one.gguf: {layers} quantized weights became floats" in artifact.notes
    assert "one.gguf:0.5" in artifact.artifact.manifest["command"]
    source, before = adapted(base, LoraOption(one))[0].stored, open_source(base).stored
    a, b = (factors_of(base, ("attn_q",))[f"blk.0.attn_q.weight.lora_{x}"] for x in "ab")
    changed, plain = source["blk.0.attn_q.weight"], before["blk.0.attn_q.weight"]
    np.testing.assert_allclose(changed.read(), plain.read() + 2 * b @ a, atol=1e-6)
    first, last = sorted(rng.integers(0, 256, 2))
    np.testing.assert_array_equal(changed.read(first, last), changed.read()[first:last])


def test_norms_are_left_out_and_that_is_said(llama: Path, tmp_path: Path) -> None:
    """As llama.cpp leaves them out."""
    norms = {"blk.0.attn_norm.weight": np.ones(64, np.float32)}
    one = write_lora(tmp_path / "one.gguf", {**factors_of(llama, ("attn_q",)), **norms})
    source, notes = adapted(llama, LoraOption(one))
    assert notes == ["adapter one.gguf: blk.0.attn_norm.weight are left out"]
    name = "model.layers.0.input_layernorm.weight"
    assert np.array_equal(source.weights[name].read(), open_source(llama).weights[name].read())


def test_bad_adapters(llama: Path, tmp_path: Path) -> None:
    factors = factors_of(llama, ("attn_q",))
    name = next(iter(factors)).removesuffix(".lora_a")

    def refused(
        why: str, given: Mapping[str, np.ndarray] = factors, kind: Any = InputError, **keys: Any
    ) -> None:
        path = write_lora(tmp_path / "bad.gguf", given, **keys)
        with pytest.raises(kind, match=why):
            adapted(llama, LoraOption(path))

    refused(
        r"changes blk\.9\.x\.weight, which .* does not have", {"blk.9.x.weight.lora_a": np.ones((2, 4), "f")}
    )
    refused(r"bad\.gguf has no .*\.lora_b", {f"{name}.lora_a": factors[f"{name}.lora_a"]})
    refused("are no factors of a change of", {**factors, f"{name}.lora_a": np.ones((3, 9), "f")})
    refused("are no factors of a change of", {**factors, f"{name}.lora_b": np.ones(64, "f")})
    refused(
        "holds NaN or numbers beyond",
        {**factors, f"{name}.lora_a": np.full_like(factors[f"{name}.lora_a"], np.nan)},
    )
    refused("architecture 'qwen2'", architecture="qwen2")
    refused("alpha is nan", alpha=float("nan"))
    refused("is no tensor of a LoRA adapter", {**factors, "x": np.ones(4, "f")}, kind=UnsupportedError)
    refused("for its output head too", factors_of(llama, ("token_embd",)), kind=UnsupportedError)
    refused("kind 'control'", kind=UnsupportedError, **{"adapter.type": "control"})
    with pytest.raises(InputError, match="is no adapter"):
        adapted(llama, LoraOption(write_gguf(tmp_path / "none.gguf", [], {})))
    folder = save_tiny("llama", tmp_path / "folder")
    one = write_lora(tmp_path / "one.gguf", factors)
    with pytest.raises(InputError, match=r"one\.gguf is a GGUF file, .* is none"):
        adapted(folder, LoraOption(one))
