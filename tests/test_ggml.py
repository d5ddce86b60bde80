"""GGML's block types: parts that stand for exactly the numbers that ggml's own arithmetic gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from llmc.frontend.gguf import read_gguf
from llmc.frontend.weights import ReorderedTensor, open_gguf_tensors, transformed
from llmc.ir.errors import InputError
from llmc.ir.ggml import BLOCK_TYPES, pack_six_bits, unpack_six_bits
from llmc.ir.ops.quant import dequantized
from llmc.ir.weights import LazyTensor, QuantizedTensors, quantized_of

from .gguf_files import STRING, assemble, entry, tensor_info

TYPES = sorted(BLOCK_TYPES)
# Where a block holds its float16 scales (and minimums): random bytes there would be NaN now and then.
HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2),
          "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,), "IQ1_M": (), "NVFP4": ()}  # fmt: skip


def random_blocks(name: str, rows: int, k: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Rows of random blocks of a type, uint8 [rows, bytes]: any bits, but finite float16 numbers."""
    kind = BLOCK_TYPES[name]
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows * (k // kind.block_size), kind.type_size), dtype=np.uint8)
    if name == "MXFP4":  # an exponent: the least there are, and usual ones
        raw[:, 0] = rng.choice([0, 1, 2, *range(110, 130)], len(raw))
        return raw.reshape(rows, -1)
    if name == "IQ1_M":  # four bits of it in each of four words
        numbers = (rng.standard_normal(len(raw)) * 0.02).astype(np.float16).view(np.uint16)
        words = raw[:, 48:].copy().view(np.uint16) & 0x0FFF
        words |= (numbers[:, None] >> np.array([0, 4, 8, 12], np.uint16)) << 12
        raw[:, 48:] = words.view(np.uint8)
    for at in HALVES.get(name, (0,)):
        numbers = (rng.standard_normal(len(raw)) * 0.02).astype(np.float16)
        raw[:, at : at + 2] = numbers.view(np.uint8).reshape(-1, 2)
    return raw.reshape(rows, -1)


def values(parts: QuantizedTensors) -> np.ndarray[Any, Any]:
    """The float32 weight that parts stand for, by the IR's own meaning."""
    zero = None if parts.zero_point is None else torch.from_numpy(parts.zero_point.read())
    read = (torch.from_numpy(parts.codes.read()), torch.from_numpy(parts.scale.read()), zero)
    return dequantized(parts.quant, *read).numpy()


def gguf_with(path: Path, name: str, raw: np.ndarray[Any, Any], k: int) -> dict[str, Any]:
    info = tensor_info("t", (len(raw), k), int(GGMLQuantizationType[name]), 0)
    path.write_bytes(assemble([entry("general.architecture", STRING, "llama")], [info], raw.tobytes()))
    return dict(open_gguf_tensors(read_gguf(path)))


@pytest.mark.parametrize("name", TYPES)
def test_parts_equal_ggml_bit_for_bit(name: str, tmp_path: Path) -> None:
    raw = random_blocks(name, 7, 512)
    tensor = gguf_with(tmp_path / "m.gguf", name, raw, 512)["t"]
    parts = quantized_of(tensor)
    assert parts is not None
    wanted = dequantize(raw, GGMLQuantizationType[name])
    assert np.array_equal(values(parts), wanted)
    assert np.array_equal(tensor.read(), wanted)
    assert parts.codes.dtype == "uint8" and parts.codes.read().max() < 1 << parts.quant.bits
    assert parts.scale.read().dtype.name == parts.scale.dtype == parts.quant.scale_dtype


@pytest.mark.parametrize("name", TYPES)
def test_rows_are_read_by_themselves(name: str, tmp_path: Path) -> None:
    raw = random_blocks(name, 9, 256, seed=1)
    parts = quantized_of(gguf_with(tmp_path / "m.gguf", name, raw, 256)["t"])
    assert parts is not None
    for part in (parts.codes, parts.scale, parts.zero_point):
        if part is not None:
            assert np.array_equal(part.read(3, 8), part.read()[3:8])
            assert part.read(4, 4).shape == (0, part.shape[1])
            assert part.read().shape == part.shape


def test_reordered_rows_keep_their_parts(tmp_path: Path) -> None:
    tensor = gguf_with(tmp_path / "m.gguf", "Q4_K", random_blocks("Q4_K", 12, 256), 256)["t"]

    def interleave(a: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return a.reshape(3, 2, 2, *a.shape[1:]).swapaxes(1, 2).reshape(a.shape)

    moved: LazyTensor = transformed(tensor, interleave)
    parts = quantized_of(moved)
    assert isinstance(moved, ReorderedTensor) and parts is not None
    assert np.array_equal(values(parts), interleave(tensor.read()))


def test_floats_carry_no_parts(tmp_path: Path) -> None:
    raw = np.zeros((2, 128), np.uint8)
    assert quantized_of(gguf_with(tmp_path / "a.gguf", "F32", raw, 32)["t"]) is None


@pytest.mark.parametrize("name", TYPES)
def test_stacked_experts_are_the_matrices_one_behind_the_other(name: str, tmp_path: Path) -> None:
    raw = random_blocks(name, 6, 256, seed=3)
    info = tensor_info("t", (2, 3, 256), int(GGMLQuantizationType[name]), 0)
    data = assemble([entry("general.architecture", STRING, "llama")], [info], raw.tobytes())
    (tmp_path / "b.gguf").write_bytes(data)
    stacked = open_gguf_tensors(read_gguf(tmp_path / "b.gguf"))["t"]
    one = quantized_of(gguf_with(tmp_path / "a.gguf", name, raw, 256)["t"])
    parts = quantized_of(stacked)
    assert parts is not None and one is not None
    assert np.array_equal(values(parts), stacked.read())
    for whole, flat in ((parts.codes, one.codes), (parts.scale, one.scale)):
        assert np.array_equal(whole.read().reshape(flat.shape), flat.read())
        assert np.array_equal(whole.read(1, 2), whole.read()[1:]) and whole.read(1, 1).shape[0] == 0


def test_a_scale_that_is_no_number_is_refused(tmp_path: Path) -> None:
    raw = random_blocks("Q4_0", 2, 64)
    raw[1, :2] = np.array([np.nan], np.float16).view(np.uint8)
    parts = quantized_of(gguf_with(tmp_path / "m.gguf", "Q4_0", raw, 64)["t"])
    assert parts is not None
    with pytest.raises(InputError, match=r"m\.gguf:t holds NaN or infinite scales"):
        parts.scale.read()


def test_six_bit_scales_survive_packing() -> None:
    rng = np.random.default_rng(2)
    scales, minimums = rng.integers(0, 64, (2, 100, 8), dtype=np.uint8)
    found = unpack_six_bits(pack_six_bits(scales, minimums))
    assert np.array_equal(found[0], scales) and np.array_equal(found[1], minimums)
