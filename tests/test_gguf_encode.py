"""Encoders of GGML's block types: never worse than plain rounding, at least as good as llama.cpp's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from gguf.quants import quantize as plain_blocks
from hypothesis import given, settings
from hypothesis import strategies as st
from llmc.ir.errors import InputError
from llmc.ir.ggml import BLOCK_TYPES
from llmc.passes.quantize.gguf.encode import ENCODERS, encode

from . import llama_cpp

Array = np.ndarray[Any, Any]
TYPES = sorted(ENCODERS)
PLAIN = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")  # gguf's own rounding has these


def values(ggml_type: str, blocks: Array) -> Array:
    return dequantize(blocks, GGMLQuantizationType[ggml_type])


def errors(ggml_type: str, w: Array, blocks: Array, importance: Array) -> Array:
    """Weighted squared error of each row."""
    gap = w.astype(np.float64) - values(ggml_type, blocks)
    return (gap * gap * importance).sum(1)


def rounded_k(w: Array, ggml_type: str) -> Array:
    """Plain rounding into a K type: each group's range or extreme, its scale to the nearest step."""
    bits = BLOCK_TYPES[ggml_type].quant.bits
    if ggml_type == "Q6_K":
        x = w.reshape(-1, 16, 16)
        extreme = np.take_along_axis(x, np.abs(x).argmax(-1)[..., None], -1)[..., 0] / -32
        largest = np.take_along_axis(extreme, np.abs(extreme).argmax(-1)[:, None], -1)
        d = (largest / -128).astype(np.float16).astype(np.float32)
        step = d * np.rint(np.divide(extreme, d, out=np.zeros_like(extreme), where=d != 0)).clip(-128, 127)
        step = step[..., None]
        codes = np.rint(np.divide(x, step, out=np.zeros_like(x), where=step != 0)).clip(-32, 31)
        return (step * codes).reshape(w.shape)
    top = (1 << bits) - 1
    x = w.reshape(-1, 8, 32)
    low = np.minimum(x.min(-1), 0)
    scale = (np.maximum(x.max(-1), low) - low) / top
    parts: list[Array] = []
    for numbers in (scale, -low):
        d = (numbers.max(-1, keepdims=True) / 63).astype(np.float16).astype(np.float32)
        near = np.rint(np.divide(numbers, d, out=np.zeros_like(numbers), where=d != 0)).clip(0, 63)
        parts.append((d * near)[..., None])
    step, bottom = parts
    codes = np.rint(np.divide(x + bottom, step, out=np.zeros_like(x), where=step != 0)).clip(0, top)
    return (step * codes - bottom).reshape(w.shape)


def drawn(seed: int, kind: str, rows: int = 6, k: int = 512) -> tuple[Array, Array]:
    """Weights and importances."""
    rng = np.random.default_rng(seed)
    w = {
        "normal": lambda: rng.standard_normal((rows, k)),
        "tails": lambda: rng.standard_t(3, (rows, k)),
        "shifted": lambda: rng.standard_normal((rows, k)) + 0.7,
        "groups of their own size": lambda: (
            rng.standard_normal((rows, k)) * np.exp(rng.normal(0, 2, (rows, k // 32))).repeat(32, 1)
        ),
        "mostly zero": lambda: rng.standard_normal((rows, k)) * (rng.random((rows, k)) < 0.05),
        "tiny": lambda: rng.standard_normal((rows, k)) * 1e-5,
    }[kind]()
    return np.ascontiguousarray(w * 0.04, np.float32), np.exp(rng.normal(0, 1.5, k)).astype(np.float32)


KINDS = ("normal", "tails", "shifted", "groups of their own size", "mostly zero", "tiny")


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1 << 30), st.sampled_from(KINDS), st.sampled_from(TYPES), st.booleans())
def test_never_worse_than_plain_rounding(seed: int, kind: str, ggml_type: str, weighted: bool) -> None:
    w, importance = drawn(seed, kind)
    if not weighted:
        importance = np.ones_like(importance)
    found = errors(ggml_type, w, encode(ggml_type, w, importance), importance)
    if ggml_type in PLAIN:
        plain = errors(ggml_type, w, plain_blocks(w, GGMLQuantizationType[ggml_type]), importance)
    else:
        gap = w.astype(np.float64) - rounded_k(w, ggml_type)
        plain = (gap * gap * importance).sum(1)
    # Both errors are sums of float32 products: equal codes may differ in the last digits.
    assert (found <= plain * (1 + 1e-5) + 1e-20).all()


@pytest.mark.parametrize("ggml_type", TYPES)
@pytest.mark.parametrize("kind", ["normal", "tails", "shifted", "groups of their own size"])
def test_no_worse_than_llama_cpp(ggml_type: str, kind: str) -> None:
    w, importance = drawn(7, kind, rows=16, k=1024)
    row_bytes = BLOCK_TYPES[ggml_type].row_bytes(1024)
    for weights in (None, importance):
        theirs = llama_cpp.quantize(ggml_type, w, weights, row_bytes)
        measure = np.ones_like(importance) if weights is None else importance
        ours = errors(ggml_type, w, encode(ggml_type, w, weights), measure).sum()
        assert ours <= errors(ggml_type, w, theirs, measure).sum()


@pytest.mark.parametrize("ggml_type", TYPES)
def test_encoding_again_loses_little(ggml_type: str) -> None:
    """Values that lie on a grid already are mostly found there again."""
    w, _ = drawn(3, "normal", rows=8)
    once = values(ggml_type, encode(ggml_type, w))
    twice = values(ggml_type, encode(ggml_type, once))
    assert ((twice - once) ** 2).sum() <= 0.2 * ((once - w) ** 2).sum()


@pytest.mark.parametrize("ggml_type", TYPES)
def test_zero_and_constant_groups(ggml_type: str) -> None:
    w = np.zeros((3, 512), np.float32)
    w[1] = 0.25
    w[2, 256:] = -0.5
    found = values(ggml_type, encode(ggml_type, w))
    assert (found[0] == 0).all() and (found[2, :256] == 0).all()
    assert np.abs(found - w).max() <= 1e-3


def test_importance_decides_what_is_kept() -> None:
    w, importance = drawn(5, "normal", rows=32)
    weighted, even = (values("Q4_0", encode("Q4_0", w, i)) for i in (importance, None))
    gap = ((weighted - w) ** 2 * importance).sum(), ((even - w) ** 2 * importance).sum()
    assert gap[0] < 0.9 * gap[1]


@pytest.mark.parametrize(
    ("w", "importance", "message"),
    [
        (np.full((1, 64), np.nan), None, "layer holds NaN or infinite values"),
        (np.full((1, 64), 1e9), None, "layer needs a scale of .* beyond float16"),
        (np.ones((1, 48)), None, "layer: rows of 48 are no whole Q4_0 blocks of 32"),
        (np.ones((1, 64)), np.full(64, -1.0), "layer: its importances hold negative numbers"),
    ],
)
def test_bad_input_is_refused(w: Array, importance: Array | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        encode("Q4_0", w, importance, what="layer")


def test_importances_that_are_all_zero_count_alike() -> None:
    w, _ = drawn(1, "normal")
    assert np.array_equal(encode("Q4_K", w, np.zeros(512)), encode("Q4_K", w))
