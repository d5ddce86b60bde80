"""GGUF files whose NVFP4 weights have a factor beside them, as llama.cpp's converter writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from llmc.codegen.adapters import LoraOption
from llmc.frontend.gguf import read_gguf
from llmc.frontend.source import open_source
from llmc.frontend.trace import trace_source
from llmc.frontend.weights import open_gguf_tensors
from llmc.ir.errors import InputError, UnsupportedError
from llmc.ir.ops.quant import dequantized
from llmc.ir.weights import quantized_of

from .graphs import logits_of
from .llama_cpp import LlamaCpp
from .lora_files import write_lora
from .models import ids_of
from .test_gguf_architectures import tiny, written
from .test_lora_gguf import adapted
from .test_lora_gguf import factors_of as lora_of

SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "head_dim": 16}


def stored(name: str) -> str:
    return "NVFP4" if name.startswith("blk") and "gate_inp" not in name else "Q8_0"


def factors_of(path: Path, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """A number for each NVFP4 matrix of a file, one for each expert of a stack."""
    rng = np.random.default_rng(seed)
    beside: dict[str, np.ndarray[Any, Any]] = {}
    for name, tensor in open_gguf_tensors(read_gguf(path)).items():
        if tensor.ggml_type == "NVFP4":
            count = tensor.shape[0] if len(tensor.shape) > 2 else 1
            beside[name.replace("weight", "scale")] = rng.uniform(0.3, 1.5, count).astype(np.float32)
    return beside


def plain(path: Path, model: Any, kind: str, scales: dict[str, np.ndarray[Any, Any]], to: Path) -> Path:
    """The same model with its numbers multiplied out, in float32."""
    written(model, kind, to)
    values: dict[str, np.ndarray[Any, Any]] = {}
    for name, tensor in open_gguf_tensors(read_gguf(path)).items():
        value = tensor.read()
        if tensor.ggml_type == "NVFP4":
            value = dequantize(tensor.blocks(), GGMLQuantizationType.NVFP4)
            factor = scales[name.replace("weight", "scale")]
            value = value * (factor if len(factor) == 1 else factor[:, None, None])
        values[name] = value
    raw = bytearray(to.read_bytes())
    for name, info in read_gguf(to).tensors.items():
        raw[info.offset : info.offset + info.nbytes] = values[name].astype(np.float32).tobytes()
    to.write_bytes(bytes(raw))
    return to


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_factors_are_part_of_the_weights(kind: str, tmp_path: Path) -> None:
    """As floats and as codes, beside the same numbers multiplied out; and llama.cpp, which rounds
    activations.
    """
    sizes = SIZES | ({"moe_intermediate_size": 64, "num_experts_per_tok": 4} if "moe" in kind else {})
    model, ids = tiny(kind, **sizes), ids_of(24)
    first = written(model, kind, tmp_path / "first.gguf", quantize=stored)
    scales = factors_of(first)
    inputs = {name.replace("scale", "input_scale"): np.full_like(one, 7) for name, one in scales.items()}
    path = written(model, kind, tmp_path / "m.gguf", quantize=stored, beside=scales | inputs)
    other = plain(path, model, kind, scales, tmp_path / "plain.gguf")
    wanted = logits_of(trace_source(open_source(other)), ids).numpy()
    found = logits_of(trace_source(open_source(path)), ids).numpy()
    without = logits_of(trace_source(open_source(first)), ids).numpy()
    assert np.abs(found - wanted).max() < 1e-4
    assert np.linalg.norm(without - wanted) > 0.3 * np.linalg.norm(wanted)
    with LlamaCpp(path) as opened:
        theirs = opened.logits(ids)
    assert np.linalg.norm(theirs - wanted) < 0.05 * np.linalg.norm(wanted)


def test_adapters_are_added_to_what_factors_leave(tmp_path: Path) -> None:
    """Two, beside the same over the numbers multiplied out; llama.cpp takes none over such weights."""
    model, ids = tiny("llama", **SIZES), ids_of(24)
    first = written(model, "llama", tmp_path / "first.gguf", quantize=stored)
    scales = factors_of(first)
    path = written(model, "llama", tmp_path / "m.gguf", quantize=stored, beside=scales)
    other = plain(path, model, "llama", scales, tmp_path / "plain.gguf")
    changes = [lora_of(path, ("attn_q", "ffn_down"), seed=seed) for seed in (1, 2)]
    options = [LoraOption(write_lora(tmp_path / f"{i}.gguf", one), 1.5) for i, one in enumerate(changes)]
    found, wanted, without = (
        logits_of(trace_source(adapted(file, *given)[0]), ids).numpy()
        for file, given in ((path, options), (other, options), (path, []))
    )
    assert np.linalg.norm(without - wanted) > 0.2 * np.linalg.norm(wanted)
    assert np.abs(found - wanted).max() < 1e-4


def test_rows_of_a_stack_are_multiplied_by_their_own_factor(tmp_path: Path) -> None:
    """Read in parts too, as floats and as parts of codes."""
    model = tiny("qwen3_moe", **SIZES, moe_intermediate_size=64)
    first = written(model, "qwen3_moe", tmp_path / "first.gguf", quantize=stored)
    scales = factors_of(first)
    path = written(model, "qwen3_moe", tmp_path / "m.gguf", quantize=stored, beside=scales)
    source = open_source(path)
    assert source.weights
    name = "blk.1.ffn_up_exps.weight"
    tensor: Any = source.stored[name]
    assert np.array_equal(tensor.factor, scales["blk.1.ffn_up_exps.scale"])
    whole = tensor.read()
    expected = dequantize(tensor.blocks(), GGMLQuantizationType.NVFP4) * tensor.factor[:, None, None]
    assert np.array_equal(whole, expected.astype(np.float32))
    assert np.array_equal(tensor.read(1, 3), whole[1:3])
    parts = quantized_of(tensor)
    assert parts is not None
    assert np.array_equal(parts.scale.read(1, 3), parts.scale.read()[1:3])
    import torch

    read = [torch.from_numpy(part.read()) for part in (parts.codes, parts.scale)]
    assert np.abs(dequantized(parts.quant, *read, None).numpy() - whole).max() < 1e-6


def test_a_file_that_is_written_again_loses_no_factor(tmp_path: Path) -> None:
    """Blocks are copied where nothing stands beside them, and refused where a factor would be lost."""
    model = tiny("llama", **SIZES)
    first = written(model, "llama", tmp_path / "first.gguf", quantize=stored)
    path = written(model, "llama", tmp_path / "m.gguf", quantize=stored, beside=factors_of(first))
    import llmc

    llmc.compile(first, tmp_path / "again", targets=["gguf"], quant="keep")
    with pytest.raises(UnsupportedError, match="no GGML block holds"):
        llmc.compile(path, tmp_path / "m", targets=["gguf"], quant="keep")


@pytest.mark.parametrize(
    ("value", "message"), [(np.ones(3), r"has shape \[3\]"), (np.array([np.nan]), "no numbers")]
)
def test_a_factor_that_fits_no_weight_is_refused(value: Any, message: str, tmp_path: Path) -> None:
    model = tiny("llama", **SIZES)
    beside = {"blk.0.attn_q.scale": value.astype(np.float32)}
    path = written(model, "llama", tmp_path / "m.gguf", quantize=stored, beside=beside)
    with pytest.raises(InputError, match=message):
        trace_source(open_source(path))


def test_a_number_beside_other_blocks_has_no_place(tmp_path: Path) -> None:
    """What it would mean there nobody has said."""
    model = tiny("llama", **SIZES)
    beside = {"blk.0.attn_q.scale": np.ones(1, np.float32)}
    path = written(model, "llama", tmp_path / "m.gguf", quantize="Q8_0", beside=beside)
    with pytest.raises(UnsupportedError, match=r"blk\.0\.attn_q\.scale has no place"):
        trace_source(open_source(path))
