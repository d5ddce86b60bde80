"""Published models beside llama.cpp: the same perplexity from the same file.

llama.cpp multiplies quantized weights by activations that it rounds to 8 bits (Q8_0, Q8_K blocks), and keeps
its cache in float16; ours here is float32 arithmetic on the dequantized values. `pytest -s -m slow
tests/test_gguf_parity.py` prints the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llmc.codegen.calibrate import CalibrationOptions
from llmc.codegen.driver import compile_model, trace
from llmc.codegen.request import NO_VERDICT
from llmc.frontend.source import open_source
from llmc.ir.interpreter import run
from llmc.ir.ops.nn import Linear
from llmc.passes.base import Pass, PassContext
from llmc.passes.manager import run_passes
from llmc.passes.pipelines import canonicalize, fuse
from llmc.passes.quantize.keep import KeepQuantized
from llmc.passes.stage import MarkStage

from .conftest import LONG, only_long
from .llama_cpp import LlamaCpp
from .models import real_model

WINDOW = 512


def windows(path: Path, text: str, count: int) -> tuple[list[list[int]], list[np.ndarray]]:
    """Windows of token ids, each beginning as llama.cpp begins a text, and llama.cpp's logits for them."""
    with LlamaCpp(path, window=WINDOW) as model:
        begin = model.tokenize("")
        fresh = WINDOW - len(begin)
        ids = model.tokenize(text[: count * WINDOW * 8])[len(begin) :]
        cut = [begin + ids[i * fresh : (i + 1) * fresh] for i in range(count)]
        assert len(cut[-1]) == WINDOW
        return cut, [model.logits(one) for one in cut]


def rounded_as_llama_cpp_does(exact: Any) -> Any:
    """The meaning of linear with x rounded to the blocks that llama.cpp multiplies the weight's type by: 32
    values (Q8_0, Q8_1), 256 for K types (Q8_K), one scale and 8 bits each (ggml-cpu's `vec_dot_type`).
    """

    def reference(self: Linear, dims: Any, x: torch.Tensor, *rest: Any) -> Any:
        data: Any = self.weight.weight
        kind = getattr(data, "ggml_type", None) or getattr(getattr(data, "base", None), "ggml_type", "F32")
        if kind in ("F32", "F16", "BF16"):
            return exact(self, dims, x, *rest)
        blocks = x.reshape(*x.shape[:-1], -1, 256 if kind.endswith("_K") else 32)
        scale = blocks.abs().amax(-1, keepdim=True) / 127
        rounded = torch.where(scale > 0, (blocks / scale).round() * scale, blocks)
        return exact(self, dims, rounded.reshape(x.shape), *rest)

    return reference


def ours(path: Path, cut: Sequence[list[int]], *, keep: bool) -> list[np.ndarray]:
    """Logits of the file through our graph; with `keep`, from the codes as the file stores them."""
    steps: list[Pass] = [*canonicalize(), MarkStage(stage="canonical"), *(fuse() if keep else [])]
    graph, _ = run_passes(
        trace(open_source(path), None), [*steps, *([KeepQuantized()] if keep else [])], PassContext()
    )
    found: list[np.ndarray] = []
    weights: dict[str, Any] = {}
    for ids in cut:
        (logits,) = run(graph, {graph.inputs[0].name: torch.tensor([ids])}, keep_weights=weights)
        found.append(logits[0].numpy())
    return found


def losses(logits: Sequence[np.ndarray], cut: Sequence[list[int]]) -> np.ndarray:
    """Negative log-likelihoods of all tokens but each window's first."""
    found: list[np.ndarray] = []
    for rows, ids in zip(logits, cut, strict=True):
        scores = rows[:-1].astype(np.float64)
        top = scores.max(1)
        normaliser = top + np.log(np.exp(scores - top[:, None]).sum(1))
        found.append(normaliser - scores[np.arange(len(scores)), ids[1:]])
    return np.concatenate(found)


def compare(name: str, path: Path, text: str, count: int, *, keep: bool) -> tuple[float, float]:
    """|llama.cpp's perplexity / ours - 1|, and the standard error of that over tokens (paired)."""
    cut, theirs = windows(path, text, count)
    a, b = losses(theirs, cut), losses(ours(path, cut, keep=keep), cut)
    gap = float(np.exp(a.mean() - b.mean()) - 1)
    error = float((a - b).std() / np.sqrt(len(a)))
    print(
        f"\n{name}: llama.cpp {np.exp(a.mean()):.4f}, ours {np.exp(b.mean()):.4f}, {100 * gap:+.3f} "
        f"± {100 * error:.3f} % ({count} x {WINDOW} tokens)"
    )
    return abs(gap), error


@pytest.fixture(scope="module")
def text(shared_data: Path) -> str:
    return (shared_data / "wikitext2_raw" / "wiki.test.raw").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", pytest.param("gemma3", marks=only_long)])
def test_a_kept_file_scores_as_in_llama_cpp(name: str, text: str) -> None:
    assert compare(f"{name}, kept", real_model(name), text, 2, keep=True)[0] <= 0.005


@pytest.mark.slow
def test_a_file_of_ours_scores_as_in_llama_cpp(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With activations rounded as llama.cpp rounds them; in float they score 1.3 % better than it does, since
    the inputs of down projections have outliers and a K type's block of 256 of them shares a scale.
    """
    artifact = compile_model(
        real_model("smollm2"),
        tmp_path / "out.llmc",
        targets=["gguf"],
        quant="gguf-q4_k_m",
        calibration=CalibrationOptions(tokens=4096 if LONG else 2048),
        verdict=NO_VERDICT,
    ).artifact
    path = artifact.path(artifact.target("gguf")["model"])
    monkeypatch.setattr(Linear, "reference", rounded_as_llama_cpp_does(Linear.reference))
    gap, error = compare("smollm2, gguf-q4_k_m", path, text, 12 if LONG else 6, keep=False)
    assert error <= (0.002 if LONG else 0.003)
    assert gap <= 0.002 + 2 * error


@pytest.mark.slow
def test_floats_of_ours_score_as_in_llama_cpp(text: str, tmp_path: Path) -> None:
    """Without quantization nothing but the cache's float16 differs."""
    artifact = compile_model(
        real_model("smollm2"), tmp_path / "out.llmc", targets=["gguf:floats=f32"]
    ).artifact
    path = artifact.path(artifact.target("gguf")["model"])
    assert compare("smollm2, f32", path, text, 2, keep=False)[0] <= 0.0005
