"""Published quantized checkpoints: every value, the codes themselves, logits of the kept model, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llmc.codegen.trace_cache import trace_once
from llmc.frontend.quantized import open_quantized
from llmc.frontend.quantized.packing import unpack_stream, words_for
from llmc.frontend.source import ModelSource, describe, open_source
from llmc.ir.ops.quant import QuantizedLinear
from llmc.ir.weights import ArrayTensor, quantized_of
from llmc.passes.registry import quantization_passes
from llmc.runtime.executor import Executor, StepInputs, open_executor
from safetensors.numpy import load_file

from .conftest import only_long
from .graphs import PagedRun, logits_of, lowered, worst
from .models import ids_of, reference_logits, save_tiny
from .quantized_files import (
    Values,
    change_tensors,
    pack_rows,
    save_awq,
    save_bnb,
    save_compressed,
    save_gptq,
    set_config,
)
from .quantized_formats import MLX_MODES, save_bitnet, save_mlx, save_quark, save_rows, save_torchao
from .tvm_graphs import ISA

AUTOROUND: dict[str, Any] = {
    "quant_method": "auto-round",
    "extra_config": {"lm_head": {"bits": 16}, "model.layers.0": None},
}
MADE: dict[str, Callable[[Path], Values]] = {
    "gptq 4 bits": lambda f: save_gptq(f),
    "gptq 4 bits, symmetric": lambda f: save_gptq(f, sym=True, group=32),
    "gptq 2 bits, v2": lambda f: save_gptq(f, bits=2, version="gptq_v2"),
    "gptq 3 bits": lambda f: save_gptq(f, bits=3, group=32),
    "gptq 3 bits, act-order, v2": lambda f: save_gptq(f, bits=3, desc_act=True, version="gptq_v2"),
    "gptq 8 bits, rows": lambda f: save_gptq(f, bits=8, group=-1),
    "gptq act-order": lambda f: save_gptq(f, desc_act=True),
    "gptq act-order, orders differ": lambda f: save_gptq(f, desc_act=True, sym=True, keep_order=False),
    "gptq larger groups than rows": lambda f: save_gptq(f, group=128, sym=True),
    "awq": lambda f: save_awq(f),
    "awq rows": lambda f: save_awq(f, group=-1),
    "awq gemv": lambda f: save_awq(f, group=32, version="gemv"),
    "auto-round": lambda f: save_gptq(f, **AUTOROUND, packing_format="auto_round:auto_gptq"),
    "auto-round, its own": lambda f: save_gptq(
        f, version="gptq_v2", **AUTOROUND, packing_format="auto_round", checkpoint_format=None
    ),
    "auto-round as awq": lambda f: save_awq(f, **AUTOROUND, packing_format="auto_round:auto_awq"),
    "compressed int4": lambda f: save_compressed(f),
    "compressed int4, zero points": lambda f: save_compressed(f, symmetric=False),
    "compressed int3, a row": lambda f: save_compressed(f, bits=3, group=None, strategy="channel"),
    "compressed int8 packed": lambda f: save_compressed(f, bits=8, group=32),
    "compressed act-order": lambda f: save_compressed(f, g_idx=True),
    "compressed int8": lambda f: save_compressed(f, bits=8, strategy="channel", group=None, packed=False),
    "compressed int8, zero points": lambda f: save_compressed(f, bits=8, packed=False, symmetric=False),
    "compressed int8, a tensor": lambda f: save_compressed(
        f, bits=8, group=None, strategy="tensor", packed=False, symmetric=False
    ),
    "bnb": lambda f: save_bnb(f),
    "bnb, one level": lambda f: save_bnb(f, nested=False),
    "bnb in floats": lambda f: save_bnb(f, storage="float32"),
    "bnb int8": lambda f: save_bnb(f, int8=True),
    "bitnet": lambda f: save_bitnet(f),
    "bitnet, multiplied": lambda f: save_bitnet(f, kind="autobitlinear"),
    "bitnet in floats": lambda f: save_bitnet(f, kind="autobitlinear", packed=False),
    "rows": lambda f: save_rows(f),
    "rows, embeddings": lambda f: save_rows(f, embeddings=2),
    "mlx": lambda f: save_mlx(f),
    "mlx 2 bits, by its first key": lambda f: save_mlx(f, bits=2, key="quantization"),
    "mlx 3 bits": lambda f: save_mlx(f, bits=3),
    "mlx 5 bits": lambda f: save_mlx(f, bits=5, group=16),
    "mlx 6 bits": lambda f: save_mlx(f, bits=6),
    "quark int8": lambda f: save_quark(f, "int8"),
    "quark int4": lambda f: save_quark(f, "int4", symmetric=True),
    "quark int4, in order, zero points": lambda f: save_quark(f, "int4", pack="order"),
    "quark uint4": lambda f: save_quark(f, "uint4"),
    "quark mxfp4": lambda f: save_quark(f, "mxfp4"),
    "quark nvfp4": lambda f: save_quark(f, "nvfp4"),
    "torchao int4": lambda f: save_torchao(f, "int4"),
    "torchao int3, zero points": lambda f: save_torchao(f, "int3", zeros=True),
    "torchao int8, rows": lambda f: save_torchao(f, "int8", group=-1, said=False),
    "mlx mxfp4": lambda f: save_mlx(f, mode="mxfp4"),
    "mlx nvfp4": lambda f: save_mlx(f, mode="nvfp4"),
}


def made(name: str, folder: Path) -> tuple[ModelSource, Values]:
    if name.startswith("bnb"):
        pytest.importorskip("bitsandbytes")
    values = MADE[name](save_tiny("llama", folder))
    return open_source(folder), values


@pytest.mark.parametrize("name", MADE)
def test_every_value(name: str, tmp_path: Path) -> None:
    source, values = made(name, tmp_path)
    assert len(values) in (12, 14, 15)
    for label, wanted in values.items():
        got = source.weights[label]
        parts = quantized_of(got)
        assert got.dtype == "float32" and got.shape == wanted.shape and parts is not None
        # One rounding of a product of small integers and a scale (and of NF4's absmax) to float32.
        np.testing.assert_allclose(got.read(), wanted, rtol=3e-7, atol=1e-9)
        rows = np.concatenate([got.read(0, 5), got.read(5, 6), got.read(6, 6), got.read(6)])
        np.testing.assert_array_equal(rows, got.read())
        assert parts.codes.read().max() < 1 << parts.quant.bits


@pytest.mark.parametrize("name", MADE)
def test_kept_model_says_what_the_dequantized_one_says(name: str, tmp_path: Path) -> None:
    source, values = made(name, tmp_path)
    model = source.build_model()
    weights: Any = {label: torch.from_numpy(source.weights[label].read()) for label in model.state_dict()}
    for label, value in values.items():
        weights[label] = torch.from_numpy(value.astype(np.float32))
    model.load_state_dict(weights, assign=True)
    ids = ids_of(23)
    graph, _ = lowered(trace_once(source), "paged", quantization_passes("keep"))
    (got,) = PagedRun(graph).step([("a", ids)])
    assert worst(got, reference_logits(model, ids)) < 2e-5
    kept = [op.q.type.quant for op in graph if isinstance(op, QuantizedLinear)]
    assert len(kept) >= 2 * (3 if "compressed" in name else 4)
    book = "mxfp4" if "fp4" in name else "nf4" if name in NF4 else None
    assert {quant.codebook for quant in kept if quant} == {book}


NF4 = ("bnb", "bnb, one level", "bnb in floats")


def test_codes_are_those_of_the_file(tmp_path: Path) -> None:
    save_gptq(save_tiny("llama", tmp_path), bits=3, desc_act=True, version="gptq_v2")
    source = open_source(tmp_path)
    label = "model.layers.1.mlp.up_proj"
    stored: dict[str, np.ndarray] = {}
    change_tensors(tmp_path, lambda tensors: stored.update(tensors))
    parts = quantized_of(source.weights[f"{label}.weight"])
    assert parts is not None and parts.columns is not None and parts.zero_point is not None
    in_file = np.empty((96, 64), np.int64)
    in_file[:, parts.columns] = parts.codes.read()
    np.testing.assert_array_equal(pack_rows(in_file, 3), stored[f"{label}.qweight"].T)
    np.testing.assert_array_equal(
        pack_rows(parts.zero_point.read().T.astype(int), 3), stored[f"{label}.qzeros"]
    )
    np.testing.assert_array_equal(parts.scale.read().T, stored[f"{label}.scales"])
    assert (np.diff(stored[f"{label}.g_idx"][parts.columns]) >= 0).all()


def test_layers_of_one_order_stay_merged(tmp_path: Path) -> None:
    source, _ = made("gptq act-order", tmp_path)
    graph, _ = lowered(trace_once(source), "paged", quantization_passes("keep"))
    assert sum(isinstance(op, QuantizedLinear) for op in graph) == 2 * 4  # qkv, o, gate and up, down


def test_requantizing_reads_dequantized_values(tmp_path: Path) -> None:
    source, values = made("gptq 3 bits", tmp_path)
    graph, _ = lowered(trace_once(source), "paged", quantization_passes("int8"))
    (down,) = [v for n, v in graph.weights.items() if n == "model.layers.0.mlp.down_proj.weight.q"]
    assert down.type.quant is not None and down.type.quant.bits == 8 and down.weight is not None
    wanted = values["model.layers.0.mlp.down_proj.weight"]
    scale = graph.weights["model.layers.0.mlp.down_proj.weight.scale"].weight
    assert scale is not None
    step = np.repeat(scale.read().astype(np.float64), 64, 1)[:, :96]
    assert (abs((down.weight.read().astype(int) - 128) * step - wanted) <= 0.51 * step).all()


def test_modules_with_bits_of_their_own(tmp_path: Path) -> None:
    """AutoRound's `extra_config`: two modules of 8 bits among those of 4."""
    special = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    values = save_gptq(save_tiny("llama", tmp_path / "a"), sym=True)
    other = save_gptq(save_tiny("llama", tmp_path / "b"), sym=True, bits=8, group=32)
    eight = load_file(tmp_path / "b" / "model.safetensors")

    def change(tensors: dict[str, np.ndarray]) -> None:
        for name in tensors:
            tensors[name] = eight[name] if name.rpartition(".")[0] in special else tensors[name]

    change_tensors(tmp_path / "a", change)
    config: dict[str, Any] = {"bits": 4, "group_size": 16, "sym": True, **AUTOROUND}
    config["extra_config"] = {name: {"bits": 8, "group_size": 32} for name in special}
    set_config(tmp_path / "a", config)
    weights = open_source(tmp_path / "a").weights
    for name in values:
        wanted = other if name.removesuffix(".weight") in special else values
        np.testing.assert_allclose(weights[name].read(), wanted[name], rtol=3e-7, atol=1e-9)


def test_mlx_beside_a_configuration_that_is_left_over(tmp_path: Path) -> None:
    """MLX goes by its own key."""
    name = "model.layers.1.mlp.down_proj.weight"
    values = save_mlx(save_tiny("llama", tmp_path), key="quantization")
    path = tmp_path / "config.json"
    for other in (None, {"group_size": 64, "bits": 8}):
        path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": other}))
        weights = open_source(tmp_path).weights
        np.testing.assert_allclose(weights[name].read(), values[name], rtol=3e-7, atol=1e-9)


def test_rows_of_a_checkpoint_of_the_base_model(tmp_path: Path) -> None:
    values = save_rows(save_tiny("llama", tmp_path))

    def strip(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if name.startswith("model.")]:
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    change_tensors(tmp_path, strip)
    weights = open_source(tmp_path).weights
    for name, wanted in values.items():
        np.testing.assert_allclose(weights[name].read(), wanted, rtol=3e-7, atol=1e-9)


def test_what_is_said_of_it(tmp_path: Path) -> None:
    source, _ = made("gptq 3 bits", tmp_path)
    assert source.quantization_of_source == "gptq 3-bit g32"
    assert describe(source)["parameters"] == sum(p.numel() for p in source.build_model().parameters())
    assert not source.unused_tensors


def test_bfloat16_scales_that_float16_cannot_hold_are_float32(tmp_path: Path) -> None:
    import ml_dtypes

    save_compressed(save_tiny("llama", tmp_path))
    label = "model.layers.0.mlp.up_proj.weight"

    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[f"{label}_scale"] = np.full_like(tensors[f"{label}_scale"], 1e-7).astype(ml_dtypes.bfloat16)

    change_tensors(tmp_path, change)
    weights = open_source(tmp_path).weights
    parts, other = quantized_of(weights[label]), quantized_of(weights[label.replace("up", "gate")])
    assert parts is not None and parts.quant.scale_dtype == parts.scale.dtype == "float32"
    assert other is not None and other.quant.scale_dtype == other.scale.dtype == "float16"
    assert (parts.scale.read() == np.float32(ml_dtypes.bfloat16(1e-7))).all()


@settings(max_examples=80, deadline=None)
@given(st.integers(2, 8), st.integers(1, 3), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_streams_round_trip(bits: int, rows: int, count: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (rows, count))
    words = pack_rows(codes, bits)
    assert words.shape == (rows, words_for(count, bits))
    np.testing.assert_array_equal(unpack_stream(words, bits, count), codes)


def test_zero_points_that_gptqmodel_wrote_come_back(tmp_path: Path) -> None:
    """It subtracts from whole words, so that a zero point of 0 borrows from its neighbour."""
    rng = np.random.default_rng(0)
    wanted = rng.integers(0, 16, (4, 96))
    save_gptq(save_tiny("llama", tmp_path), version="gptq", meta={"quantizer": "gptqmodel:2.2.0"})
    label = "model.layers.0.mlp.up_proj"

    def change(tensors: dict[str, np.ndarray]) -> None:
        words = pack_rows(wanted, 4).view(np.uint32) - np.uint32(0x11111111)
        tensors[f"{label}.qzeros"] = words.view(np.int32)

    change_tensors(tmp_path, change)
    parts = quantized_of(open_source(tmp_path).weights[f"{label}.weight"])
    assert parts is not None and parts.zero_point is not None
    np.testing.assert_array_equal(parts.zero_point.read().T, wanted)


@pytest.mark.parametrize("strategy", ["group", "channel"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_compressed_tensors_own_compressor(bits: int, symmetric: bool, strategy: str) -> None:
    """Packed by the package, opened here: what its decompressor says, to the last bit in float32."""
    pack_quantized = pytest.importorskip("compressed_tensors.compressors.pack_quantized")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    weights = {
        "num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy,
        "group_size": 16 if strategy == "group" else None,
    }  # fmt: skip
    scheme = quantization.QuantizationScheme(
        targets=["Linear"], weights=quantization.QuantizationArgs(**weights)
    )
    rng = np.random.default_rng(bits)
    shape = (24, 4 if strategy == "group" else 1)
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    zero = np.zeros(shape) if symmetric else rng.integers(low, high, shape)
    state = {
        "weight": torch.from_numpy(rng.normal(0, 0.5, (24, 64)).astype(np.float32)),
        "weight_scale": torch.from_numpy(rng.uniform(0.01, 0.2, shape).astype(np.float32)),
        "weight_zero_point": torch.from_numpy(zero.astype(np.int8)),
    }
    compressor = pack_quantized.PackedQuantizationCompressor
    packed = compressor.compress(state, scheme)
    wanted = compressor.decompress(packed, scheme)["weight"].numpy()
    tensors = {f"m.{name}": ArrayTensor(tensor.numpy(), name) for name, tensor in packed.items()}
    config = {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }  # fmt: skip
    got = open_quantized(tensors, config, "folder")
    assert list(got) == ["m.weight"]
    np.testing.assert_array_equal(got["m.weight"].read(), wanted)


@pytest.mark.parametrize(
    ("mode", "group", "bits"),
    [
        *(("affine", 32 << bits % 3, bits) for bits in (2, 3, 4, 5, 6, 8)),
        *((mode, *MLX_MODES[mode]) for mode in MLX_MODES),
    ],
)
def test_mlx_own_quantizer(mode: str, group: int, bits: int) -> None:
    """Quantized by the package, opened here: what it says itself, but for one rounding in float32."""
    mx: Any = pytest.importorskip("mlx.core")
    weight = np.random.default_rng(bits).normal(0, 0.5, (24, 256)).astype(np.float32)
    parts = mx.quantize(mx.array(weight), group_size=group, bits=bits, mode=mode)
    wanted = np.array(mx.dequantize(*parts, group_size=group, bits=bits, mode=mode, dtype=mx.float32))
    names = ("weight", "scales", "biases")
    tensors = {
        f"m.{name}": ArrayTensor(np.array(part), name) for name, part in zip(names, parts, strict=False)
    }
    got = open_quantized(tensors, {"group_size": group, "bits": bits, "mode": mode}, "folder")
    assert list(got) == ["m.weight"]
    np.testing.assert_allclose(got["m.weight"].read(), wanted, rtol=3e-7, atol=3e-7)


def first_step(executor: Executor, ids: list[int]) -> np.ndarray:
    """Logits of every row of one sequence, computed in one step."""
    executor.allocate_kv(4)
    rows = np.arange(len(ids), dtype=np.int32)
    count = np.array([0, len(ids)], np.int32)
    pages = np.arange(-(-len(ids) // executor.page_size), dtype=np.int32)[None]
    tokens = np.array(ids, np.int32)
    return executor.step(StepInputs(tokens, rows, rows, count, count[1:], pages, rows))


@pytest.mark.slow
@pytest.mark.parametrize("target", [f"tvm-cpu:isa={ISA}", "onnx-cpu:accuracy_level=1"])
@pytest.mark.parametrize(
    "name",
    [
        *("gptq 3 bits, act-order, v2", "bnb"),
        *(pytest.param(name, marks=only_long) for name in ("gptq 8 bits, rows", "compressed int8")),
    ],
)
def test_kept_checkpoint_from_end_to_end(
    name: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled and run. onnx-cpu computes in float32 when asked; tvm-cpu rounds activations to 8 bits, which
    is what the reference does here too (random weights amplify it to several percent).
    """
    import llmc

    source, _ = made(name, tmp_path / "model")
    artifact = llmc.compile(
        tmp_path / "model", tmp_path / "out.llmc", targets=[target], quant="keep", kv_dtype="float32"
    )
    assert artifact.manifest["quantization"]["source"] == source.quantization_of_source
    ids = ids_of(23)
    got = first_step(open_executor(artifact), ids)
    if target.startswith("tvm-cpu"):
        kept = lowered(trace_once(source), "fused", quantization_passes("keep"))[0]
        monkeypatch.setattr(QuantizedLinear, "reference", eight_bit_activations(QuantizedLinear.reference))
        assert worst(got, logits_of(kept, ids)) < 1e-3
        return
    model = source.build_model()
    weights: Any = {label: torch.from_numpy(source.weights[label].read()) for label in model.state_dict()}
    model.load_state_dict(weights, assign=True)
    assert worst(got, reference_logits(model, ids)) < 2e-5


def eight_bit_activations(exact: Any) -> Any:
    """The meaning of quantized_linear with x in int8 per token and group, unless a codebook decodes."""

    def reference(self: Any, dims: Any, x: Any, *rest: Any) -> Any:
        quant = self.q.type.quant
        if quant.codebook == "nf4":
            return exact(self, dims, x, *rest)
        k = x.shape[-1]
        group = min(quant.group_size, k)
        padded = torch.nn.functional.pad(x, (0, -k % group)).reshape(*x.shape[:-1], -1, group)
        scale = padded.abs().amax(-1, keepdim=True) / 127
        rounded = torch.where(scale > 0, (padded / scale).round() * scale, padded)
        return exact(self, dims, rounded.reshape(*x.shape[:-1], -1)[..., :k], *rest)

    return reference


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of accelerate and bitsandbytes, on a machine without a GPU
def test_nf4_that_transformers_saved(tmp_path: Path) -> None:
    """Quantized and saved by transformers itself; the values are those of NF4 of the float weights."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    import transformers
    from llmc.passes.quantize.nf4 import dequantize_nf4, quantize_nf4

    plain = open_source(save_tiny("llama", tmp_path / "float")).weights
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(tmp_path / "float"), quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    model.save_pretrained(str(tmp_path / "four"))
    source = open_source(tmp_path / "four")
    assert source.quantization_of_source == "bitsandbytes"
    stored = {name: data for name, data in source.weights.items() if quantized_of(data)}
    assert len(stored) == 14
    for name, data in stored.items():
        np.testing.assert_array_equal(data.read(), dequantize_nf4(*quantize_nf4(plain[name].read())))
