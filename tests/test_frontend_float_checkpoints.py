"""Published checkpoints in floats of 8 and 4 bits, each beside what another implementation makes of it:
transformers (fp8, mxfp4), compressed-tensors' own compressors, and the definition (NVFP4 of ModelOpt).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from llmc.frontend.quantized import open_quantized
from llmc.frontend.quantized.floats import ScaledFloat8
from llmc.frontend.skeleton import model_class
from llmc.frontend.source import open_source
from llmc.frontend.trace import trace_source
from llmc.ir.errors import InputError, UnsupportedError
from llmc.ir.weights import ArrayTensor, LazyTensor, quantized_of
from llmc.passes.quantize.keep import KeepQuantized

from .family_configs import random_model, small_config
from .graphs import logits_of, lowered, worst
from .models import ids_of, save_tiny
from .quantized_files import save_fp8, save_mxfp4, save_nvfp4
from .quantized_formats import save_mlx, save_quark, save_torchao
from .test_frontend_quantized_refusals import compressed_config

Array = np.ndarray[Any, Any]
F8 = ml_dtypes.float8_e4m3fn


def lazy(tensors: dict[str, Any]) -> dict[str, LazyTensor]:
    return {name: ArrayTensor(np.asarray(array), f"f:{name}") for name, array in tensors.items()}


def numpy_of(tensor: torch.Tensor) -> Array:
    kinds = {torch.float8_e4m3fn: F8, torch.bfloat16: ml_dtypes.bfloat16}
    if tensor.dtype in kinds:
        bits = tensor.view(torch.uint8 if tensor.itemsize == 1 else torch.uint16)
        return bits.numpy().view(kinds[tensor.dtype])
    return tensor.numpy()


def in_pieces(tensor: LazyTensor) -> Array:
    """All rows, read in pieces that end within blocks."""
    cuts = [0, *range(5, tensor.shape[0], 7), tensor.shape[0]]
    return np.concatenate([tensor.read(a, b) for a, b in itertools.pairwise(cuts)])


@pytest.mark.parametrize("scale", [(3, 2), (150, 1), (150, 2), (1,), (), (1, 1)])
def test_fp8_beside_transformers(scale: tuple[int, ...]) -> None:
    """Blocks that end within the matrix are ours alone: transformers refuses them."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    rng = np.random.default_rng(0)
    weight = torch.from_numpy(rng.normal(0, 40, (150, 128)).astype(np.float32)).to(torch.float8_e4m3fn)
    scales = torch.from_numpy(rng.uniform(1e-3, 2e-2, scale).astype(np.float32))
    tensors = {"m.weight": numpy_of(weight), "m.weight_scale_inv": scales.numpy(), "m.activation_scale": 1.0}
    got = open_quantized(lazy(tensors), {"quant_method": "fp8", "weight_block_size": [64, 64]}, "folder")
    assert list(got) == ["m.weight"] and got["m.weight"].dtype == "float32"
    if scale == (3, 2):
        grid = np.repeat(np.repeat(scales.numpy(), 64, 0)[:150], 64, 1)
        wanted = numpy_of(weight).astype(np.float32) * grid
    else:
        dequantized = Fp8Dequantize(None)._dequantize_one(weight, scales, torch.float32)
        wanted = dequantized.numpy()
    np.testing.assert_array_equal(got["m.weight"].read(), wanted)
    np.testing.assert_array_equal(in_pieces(got["m.weight"]), wanted)
    # Experts that are stacked, each with its own scales.
    if len(scale) == 2 and scale != (1, 1):
        stacked = {
            "m.experts.up": np.stack([numpy_of(weight)] * 3),
            "m.experts.up_scale_inv": np.stack([scales.numpy(), 2 * scales.numpy(), scales.numpy()]),
        }
        got = open_quantized(lazy(stacked), {"quant_method": "fp8", "weight_block_size": [64, 64]}, "folder")
        np.testing.assert_array_equal(got["m.experts.up"].read(1, 3), np.stack([2 * wanted, wanted]))


def test_exponents_in_bytes() -> None:
    tensors = {
        "m.weight": np.full((2, 64), 3, F8),
        "m.weight_scale": np.array([[127, 120], [130, 0]], np.uint8),
    }
    got = open_quantized(lazy(tensors), {"quant_method": "fp8"}, "folder")["m.weight"].read()
    wanted = np.ldexp(3.0, [[0, -7], [3, -127]]).astype(np.float32)
    np.testing.assert_array_equal(got, np.repeat(wanted, 32, axis=1))


@pytest.mark.parametrize(
    ("layout", "strategy", "weights"),
    [
        ("float-quantized", "tensor", {}),
        ("float-quantized", "channel", {}),
        ("float-quantized", "block", {"block_structure": [16, 32]}),
        ("float-quantized", "group", {"group_size": 32}),
        ("nvfp4-pack-quantized", "tensor_group", {"num_bits": 4, "group_size": 16}),
        ("mxfp4-pack-quantized", "group", {"num_bits": 4, "group_size": 32}),
    ],
)
def test_compressed_floats_beside_their_own_compressor(
    layout: str, strategy: str, weights: dict[str, Any]
) -> None:
    """Compressed by the package, opened here: what its decompressor says. NVFP4's within a rounding: it
    divides values by the whole's scale, scales are divided here.
    """
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    arguments = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, **weights}
    scheme = quantization.QuantizationScheme(
        targets=["Linear"], weights=quantization.QuantizationArgs(**arguments)
    )
    n, k = 48, 128
    shapes = {"tensor": (1,), "channel": (n, 1), "block": (3, 4), "group": (n, 4), "tensor_group": (n, 8)}
    rng = np.random.default_rng(1)
    state = {"weight": torch.from_numpy(rng.normal(0, 0.5, (n, k)).astype(np.float32))}
    spread = rng.uniform(0.05, 0.3, shapes[strategy]).astype(np.float32)
    if layout.startswith("mxfp4"):
        spread = np.exp2(np.floor(np.log2(spread))).astype(np.float32)
    state["weight_scale"] = torch.from_numpy(spread)
    if layout.startswith("nvfp4"):
        state["weight_scale"] = (state["weight_scale"] * 300).to(torch.float8_e4m3fn).float()
        state["weight_global_scale"] = torch.tensor([301.0])
    compressor = compressors.BaseCompressor.get_value_from_registry(layout)
    packed = compressor.compress(state, scheme)
    wanted = compressor.decompress(packed, scheme)["weight"].float().numpy()
    tensors = {f"m.{name}": numpy_of(tensor) for name, tensor in packed.items()}
    config = {**compressed_config(**arguments), "format": layout}
    got = open_quantized(lazy(tensors), config, "folder")
    assert list(got) == ["m.weight"]
    # What is decompressed of four bits is bfloat16 there.
    tolerance = 2**-8 if "fp4" in layout else 0
    np.testing.assert_allclose(got["m.weight"].read(), wanted, rtol=tolerance)
    np.testing.assert_array_equal(in_pieces(got["m.weight"]), got["m.weight"].read())
    parts = quantized_of(got["m.weight"])
    assert (parts is not None) == ("fp4" in layout)
    if parts is not None:
        assert parts.quant.codebook == "mxfp4" and parts.quant.group_size == weights["group_size"]


@pytest.mark.parametrize("beside", [False, True])
def test_nvfp4_of_modelopt(beside: bool, tmp_path: Path) -> None:
    """The configuration in config.json, or in a file of its own."""
    values = save_nvfp4(save_tiny("llama", tmp_path))
    if beside:
        config = json.loads((tmp_path / "config.json").read_text())
        own = config.pop("quantization_config")
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": own}))
    source = open_source(tmp_path)
    assert source.quantization_of_source == "modelopt g16" and not source.unused_tensors
    for name, wanted in values.items():
        assert quantized_of(source.weights[name]) is not None
        np.testing.assert_allclose(source.weights[name].read(), wanted, rtol=3e-7, atol=0)


def test_fp8_of_modelopt_by_blocks_and_rows() -> None:
    """FP8_PB_WO has its scales' axes with others of length 1 between, FP8_PER_CHANNEL_PER_TOKEN one axis."""
    rng = np.random.default_rng(2)
    weight = rng.normal(0, 40, (256, 384)).astype(F8)
    blocks, rows = (rng.uniform(1e-3, 2e-2, shape).astype(np.float32) for shape in ((2, 1, 3, 1), (256,)))
    for scale, spread in (
        (blocks, np.repeat(np.repeat(blocks[:, 0, :, 0], 128, 0), 128, 1)),
        (rows, rows[:, None]),
    ):
        tensors = lazy({"m.weight": weight, "m.weight_scale": scale})
        got = open_quantized(tensors, {"quant_method": "modelopt"}, "folder")["m.weight"]
        np.testing.assert_array_equal(in_pieces(got), weight.astype(np.float32) * spread)


def test_a_cache_in_fewer_bits_leaves_weights_alone(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    own = {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(own))
    assert open_source(tmp_path).quantization_of_source is None


def test_experts_in_mxfp4_beside_transformers(tmp_path: Path) -> None:
    """gpt-oss as it is published, read by transformers on a processor: its own dequantized model."""
    from transformers import AutoModelForCausalLM, Mxfp4Config

    pytest.importorskip("accelerate")
    config = small_config("gpt_oss")
    random_model(config, model_class(config)[0]).save_pretrained(tmp_path)
    save_mxfp4(tmp_path)
    source = open_source(tmp_path)
    reference: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.float32
    )
    state, found = reference.state_dict(), 0
    for name, weight in source.weights.items():
        assert np.array_equal(weight.read(), state[name].float().numpy())
        found += name.endswith("_proj") and "experts" in name
    assert found == 4
    ids = ids_of(20)
    with torch.inference_mode():
        wanted = reference(input_ids=torch.tensor([ids])).logits[0].numpy()
    assert worst(logits_of(trace_source(source), ids), torch.from_numpy(wanted)) < 1e-4


WRONG: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"m.weight": np.zeros((8, 32), F8)}, {"quant_method": "fp8"}, "is float8_e4m3fn and has no scales"),
    (
        {"m.weight": np.zeros((8, 32), F8), "m.weight_scale_inv": np.ones((3, 5), np.float32)},
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        r"has the shape \[3, 5\], which fits no \[8, 32\] in blocks of \[128, 128\]",
    ),
    (
        {"m.weight": np.zeros((8, 32), F8), "m.weight_scale_inv": np.ones((1, 1), np.int64)},
        {"quant_method": "fp8", "weight_block_size": "x"},
        "is int64, not float32",
    ),
    (
        {"m.experts.up_blocks": np.zeros((2, 8, 1, 16), np.uint8)},
        {"quant_method": "mxfp4"},
        r"m\.experts\.up_scales is missing",
    ),
    (
        {
            "m.experts.up_blocks": np.zeros((2, 8, 1, 8), np.uint8),
            "m.experts.up_scales": np.zeros((2, 8, 1), np.uint8),
        },
        {"quant_method": "mxfp4"},
        "has blocks of 16 values, not 32",
    ),
    (
        {
            "m.weight": np.zeros((8, 16), np.uint8),
            "m.weight_scale": np.ones((8, 3), F8),
            "m.weight_scale_2": np.float32(1),
        },
        {"quant_method": "modelopt"},
        r"has the shape \[8, 3\], groups of 16 columns asks for \[8, 2\]",
    ),
    (
        {
            "m.weight": np.zeros((8, 16), np.uint8),
            "m.weight_scale": np.ones((8, 2), F8),
            "m.weight_scale_2": np.float32(np.nan),
        },
        {"quant_method": "modelopt"},
        "has the factor nan",
    ),
    (
        {
            "m.weight_packed": np.zeros((8, 16), np.uint8),
            "m.weight_scale": np.ones((8, 2), F8),
            "m.weight_global_scale": np.zeros(1, np.float32),
        },
        {**compressed_config(type="float", num_bits=4), "format": "nvfp4-pack-quantized"},
        "divided by 0.0",
    ),
    (
        {"m.weight_packed": np.zeros((8, 16), np.uint8), "m.weight_scale": np.ones((8, 2), F8)},
        {**compressed_config(type="float", num_bits=4), "format": "nvfp4-pack-quantized"},
        "is float8_e4m3fn without a weight_global_scale",
    ),
    (
        {"m.weight_packed": np.zeros((8, 16), np.uint8), "m.weight_scale": np.uint8(1)},
        {**compressed_config(type="float", num_bits=4), "format": "nvfp4-pack-quantized"},
        r"has the shape \[\], groups of 32",
    ),
    (
        {"m.weight": np.zeros((8, 32), F8), "m.weight_scale_inv": np.ones((0, 4), np.float32)},
        {"quant_method": "fp8"},
        r"has the shape \[0, 4\], which fits no",
    ),
    (
        {"m.weight": np.zeros((8, 16), F8), "m.weight_scale": np.ones(1, np.float32)},
        {**compressed_config(type="float", num_bits=4), "format": "nvfp4-pack-quantized"},
        "holds floats of 8 bits, of which quantization_config has no group",
    ),
]


@pytest.mark.parametrize(("tensors", "config", "reason"), WRONG)
def test_parts_that_do_not_fit_are_named(
    tensors: dict[str, Any], config: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        open_quantized(lazy(tensors), config, "folder")


@pytest.mark.parametrize("broken", [np.uint8(255), np.float32(np.inf), F8(np.nan)])
def test_scales_that_are_no_numbers(broken: Any) -> None:
    tensors = {"m.weight": np.ones((8, 32), F8), "m.weight_scale": np.full((8, 1), broken)}
    got = open_quantized(lazy(tensors), {"quant_method": "fbgemm_fp8"}, "folder")["m.weight"]
    with pytest.raises(InputError, match=r"f:m\.weight_scale holds NaN or infinite scales"):
        got.read(2, 3)


def test_weights_that_are_scaled_by_columns_too_are_refused() -> None:
    for tensors, config in (
        ({"m.pre_quant_scale": np.ones(4, np.float32)}, {"quant_algo": "NVFP4_AWQ"}),
        ({}, {"quant_algo": "W4A8_INT4_AWQ"}),
    ):
        with pytest.raises(UnsupportedError, match="which llmc does not read"):
            open_quantized(lazy(tensors), {"quant_method": "modelopt", **config}, "folder")


def test_names_of_formats_that_are_none() -> None:
    floats = compressed_config(type="float", num_bits=8)
    weight = lazy({"m.weight": np.ones((8, 32), F8), "m.weight_scale": np.float32(1)})
    got = open_quantized(weight, {**floats, "format": "float-quantized"}, "folder")["m.weight"]
    assert got.read().sum() == 8 * 32
    grouped = {**compressed_config(type="float", num_bits=8, group_size=32), "format": "float-quantized"}
    assert open_quantized(weight, grouped, "folder")["m.weight"].read().sum() == 8 * 32
    for config in (
        {**floats, "format": ["float-quantized"]},
        {**floats, "format": "float-quantized", "sparsity_config": [1]},
        {"quant_method": "auto-round", "packing_format": ["x"]},
    ):
        with pytest.raises(UnsupportedError):
            open_quantized(weight, config, "folder")


@pytest.mark.parametrize(
    "save",
    [
        lambda f: save_mlx(f, mode="mxfp8"),
        lambda f: save_quark(f, "mxfp8"),
        lambda f: save_quark(f, "fp8"),
        lambda f: save_torchao(f, "fp8"),
    ],
)
def test_floats_of_eight_bits_of_others(save: Callable[[Path], dict[str, Array]], tmp_path: Path) -> None:
    values = save(save_tiny("llama", tmp_path))
    source = open_source(tmp_path)
    for label, wanted in values.items():
        np.testing.assert_allclose(source.weights[label].read(), wanted, rtol=3e-7)
    assert len(values) == 14 and not source.unused_tensors


def test_floats_of_eight_bits_have_nothing_to_keep(tmp_path: Path) -> None:
    save_fp8(save_tiny("llama", tmp_path))
    source = open_source(tmp_path)
    weight = source.weights["model.layers.0.mlp.up_proj.weight"]
    assert isinstance(weight, ScaledFloat8) and source.quantization_of_source == "fp8"
    with pytest.raises(InputError, match="none of its weights has codes to keep") as raised:
        lowered(trace_source(source), "fused", [KeepQuantized()])
    assert "--quant int8" in str(raised.value.remedy)


def test_floats_of_eight_bits_without_a_word_of_it_are_refused(tmp_path: Path) -> None:
    save_fp8(save_tiny("llama", tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"float8_e4m3fn, and no quantization_config in config\.json"):
        open_source(tmp_path)
