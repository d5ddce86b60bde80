"""NF4 against bitsandbytes, bit for bit: codes, absmax codes, weights; lazily read; over the graph."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llmc.ir.codebooks import codebook
from llmc.ir.errors import InputError
from llmc.ir.ops.quant import QuantizedEmbedding, QuantizedLinear
from llmc.ir.weights import ArrayTensor, DequantizedTensor
from llmc.passes.derived import ConcatRows
from llmc.passes.quantize import nf4_pass
from llmc.passes.quantize.nf4 import (
    block_absmax,
    dequantize_absmax,
    dequantize_nf4,
    dynamic_map,
    quantize_absmax,
    quantize_nf4,
)
from llmc.passes.quantize.nf4_pass import nf4_parts
from llmc.passes.registry import quantization_passes

from .graphs import PagedRun, lowered, notes, traced, worst
from .models import ids_of, tiny_model


def drawn(n: int, k: int, seed: int, kind: str = "normal") -> np.ndarray:
    w = np.random.default_rng(seed).normal(0, 0.05, (n, k)).astype(np.float32)
    if kind == "zeros":
        w[n // 2 :] = 0
    elif kind == "constant":
        w[:] = 0.037
    elif kind == "huge":
        w *= np.float32(1e30)
    return w


def theirs(w: np.ndarray) -> tuple[np.ndarray, Any]:
    """bitsandbytes' codes, one a byte, and its state."""
    bnb = pytest.importorskip("bitsandbytes.functional")
    packed, state = bnb.quantize_4bit(torch.from_numpy(w), quant_type="nf4", compress_statistics=True)
    flat = packed.numpy().reshape(-1)
    codes = np.stack([flat >> 4, flat & 15], 1).reshape(-1)[: w.size]
    return codes.reshape(w.shape), state


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40),
    st.sampled_from([1, 3, 40, 64, 72, 96, 100, 128, 576]),
    st.integers(0, 2**32 - 1),
    st.sampled_from(["normal", "normal", "zeros", "constant", "huge"]),
)
def test_bit_for_bit(n: int, k: int, seed: int, kind: str) -> None:
    w = drawn(n, k, seed, kind)
    codes, stored = quantize_nf4(w)
    wanted, state = theirs(w)
    np.testing.assert_array_equal(codes, wanted)
    np.testing.assert_array_equal(stored.codes, state.absmax.numpy())
    np.testing.assert_array_equal(stored.nested, state.state2.absmax.numpy())
    assert stored.offset == state.offset.item()


def test_many_blocks_and_dequantized_weights() -> None:
    w = drawn(600, 1536, 6)
    codes, stored = quantize_nf4(w)
    wanted, state = theirs(w)
    import bitsandbytes.functional as bnb

    np.testing.assert_array_equal(codes, wanted)
    np.testing.assert_array_equal(stored.codes, state.absmax.numpy())
    np.testing.assert_array_equal(dynamic_map(), state.state2.code.numpy())
    again = bnb.dequantize_4bit(torch.from_numpy((codes[:, ::2] << 4 | codes[:, 1::2]).reshape(-1, 1)), state)
    np.testing.assert_array_equal(dequantize_nf4(codes, stored), again.numpy())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.sampled_from([8, 24, 40, 64, 96, 128]), st.integers(0, 999))
def test_error_is_within_half_a_step_of_the_definition(n: int, k: int, seed: int) -> None:
    """Against float64: the nearest of 16 values to w / absmax, whatever the order of blocks and rows."""
    w = drawn(n, k, seed)
    codes, stored = quantize_nf4(w)
    flat = w.reshape(-1).astype(np.float64)
    table = codebook("nf4").astype(np.float64)
    blocks = [flat[i : i + 64] for i in range(0, flat.size, 64)]
    for block, chosen in zip(blocks, np.split(codes.reshape(-1), range(64, flat.size, 64)), strict=True):
        scaled = block / abs(block).max()
        best = abs(scaled[:, None] - table).min(1)
        assert (abs(scaled - table[chosen]) <= best + 1e-6).all()
    absmax = np.array([abs(block).max() for block in blocks])
    # Dynamic codes: gaps of 1.4 % of the range at the top, and smaller below.
    slack = 0.008 * np.repeat(stored.nested, 256)[: len(absmax)] + 1e-6
    assert (abs(dequantize_absmax(stored) - absmax) <= slack).all()


@pytest.mark.parametrize("k", [64, 96, 40, 72])
def test_parts_read_in_pieces(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    w = drawn(50, k, 3)
    codes, stored = quantize_nf4(w)
    monkeypatch.setattr(nf4_pass, "_CHUNK_BYTES", 4 * k * 7)
    parts = nf4_parts(ArrayTensor(w))
    assert parts.quant.group_size == math.gcd(k, 64)
    pieces = [parts.codes.read(a, b) for a, b in ((0, 3), (3, 40), (40, 40), (40, None))]
    np.testing.assert_array_equal(np.concatenate(pieces), codes)
    values = DequantizedTensor(parts, "w").read()
    np.testing.assert_array_equal(values, dequantize_nf4(codes, stored))


def test_parts_of_a_merged_weight_are_quantized_each_on_its_own() -> None:
    one, other = drawn(8, 64, 1), drawn(24, 64, 2) * np.float32(30)
    parts = nf4_parts(ConcatRows([ArrayTensor(one), ArrayTensor(other)]))
    wanted = np.concatenate([dequantize_nf4(*quantize_nf4(w)) for w in (one, other)])
    np.testing.assert_array_equal(DequantizedTensor(parts, "w").read(), wanted)


def test_rows_without_a_common_group_are_refused() -> None:
    with pytest.raises(InputError, match=r"rows of 100 have no group of 8 in common.*choose another scheme"):
        nf4_parts(ArrayTensor(drawn(4, 100, 0), "model.safetensors:w"))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_finite_is_refused_with_the_tensors_name(bad: float) -> None:
    w = drawn(4, 64, 0)
    w[2, 5] = bad
    with pytest.raises(InputError, match=r"model\.safetensors:w holds NaN or infinite values"):
        nf4_parts(ArrayTensor(w, "model.safetensors:w")).codes.read()


def test_absmax_of_pieces_is_absmax_of_the_whole() -> None:
    w = drawn(30, 40, 4)
    whole = block_absmax(iter([w]), w.size)
    pieces = block_absmax(iter([w[:1], w[1:8], w[8:8], w[8:]]), w.size)
    np.testing.assert_array_equal(whole, pieces)
    assert len(quantize_absmax(whole).codes) == math.ceil(w.size / 64)


def test_over_the_graph() -> None:
    """Linear layers in NF4, embedding and head in 8 bits; values are those of the float graph within NF4's
    error.
    """
    source = traced(tiny_model("qwen2"))
    plain, _ = lowered(source, "paged")
    graph, records = lowered(source, "paged", quantization_passes("nf4"))
    ids = ids_of(17)
    (wanted,) = PagedRun(plain).step([("a", ids)])
    (got,) = PagedRun(graph).step([("a", ids)])
    assert 1e-4 < worst(got, wanted) < 0.5
    kinds = [op.q.type.quant for op in graph if isinstance(op, (QuantizedLinear, QuantizedEmbedding))]
    assert [q.bits for q in kinds if q and q.codebook is None] == [8, 8]
    assert len([q for q in kinds if q and q.codebook == "nf4"]) == 2 * 4
    assert any("4.5 bits a weight" in note for note in notes(records))
