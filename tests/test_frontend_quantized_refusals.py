"""Quantized checkpoints whose configuration and tensors disagree: the tensor is named, nothing is made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llmc.frontend.quantized import open_quantized
from llmc.frontend.source import open_source
from llmc.ir.errors import InputError, LlmcError, UnsupportedError
from llmc.ir.weights import ArrayTensor

LAYER = "model.layers.0.mlp.up_proj"
Tensors = dict[str, Any]
Change = Callable[[Tensors], None]


def gptq(n: int = 16, k: int = 32, bits: int = 4, group: int = 16) -> Tensors:
    groups = k // group
    return {
        f"{LAYER}.qweight": np.zeros((k * bits // 32, n), np.int32),
        f"{LAYER}.qzeros": np.zeros((groups, n * bits // 32), np.int32),
        f"{LAYER}.scales": np.ones((groups, n), np.float16),
        f"{LAYER}.g_idx": (np.arange(k) // group).astype(np.int32),
    }


def awq(n: int = 16, k: int = 32, group: int = 16) -> Tensors:
    return {
        f"{LAYER}.qweight": np.zeros((k, n // 8), np.int32),
        f"{LAYER}.qzeros": np.zeros((k // group, n // 8), np.int32),
        f"{LAYER}.scales": np.ones((k // group, n), np.float16),
    }


def compressed(n: int = 16, k: int = 32, group: int = 16) -> Tensors:
    return {
        f"{LAYER}.weight_packed": np.zeros((n, k // 8), np.int32),
        f"{LAYER}.weight_scale": np.ones((n, k // group), np.float16),
        f"{LAYER}.weight_shape": np.array([n, k], np.int64),
    }


def bnb(n: int = 16, k: int = 64, **state: Any) -> Tensors:
    import json

    from llmc.ir.codebooks import codebook

    described = {
        "quant_type": "nf4", "blocksize": 64, "shape": [n, k], "dtype": "float16", "nested_blocksize": 256,
        "nested_offset": 0.1, **state,
    }  # fmt: skip
    blob = json.dumps(described).encode()
    return {
        f"{LAYER}.weight": np.zeros((n * k // 2, 1), np.uint8),
        f"{LAYER}.weight.absmax": np.zeros(n * k // 64, np.uint8),
        f"{LAYER}.weight.quant_map": codebook("nf4"),
        f"{LAYER}.weight.nested_absmax": np.ones(-(-n * k // 64 // 256), np.float32),
        f"{LAYER}.weight.nested_quant_map": np.zeros(256, np.float32),
        f"{LAYER}.weight.quant_state.bitsandbytes__nf4": np.frombuffer(blob, np.uint8),
    }


def bitnet(n: int = 16, k: int = 32) -> Tensors:
    return {
        f"{LAYER}.weight": np.full((n // 4, k), 0b10010010, np.uint8),
        f"{LAYER}.weight_scale": np.ones(1, np.float16),
    }


def rows(n: int = 16, k: int = 32) -> Tensors:
    return {
        f"{LAYER}.weight": np.zeros((n, k // 2), np.uint8),
        f"{LAYER}.weight_scale": np.ones((n, 1), np.float32),
    }


def quark(n: int = 16, k: int = 32, group: int = 16) -> Tensors:
    return {
        f"{LAYER}.weight": np.zeros((k, n // 8), np.int32),
        f"{LAYER}.weight_scale": np.ones((k // group, n), np.float16),
    }


def torchao(n: int = 16, k: int = 32) -> Tensors:
    return {
        f"{LAYER}._weight_qdata": np.full((n, k), -8, np.int8),
        f"{LAYER}._weight_scale": np.ones((n, 2), np.float16),
    }


def mlx(n: int = 16, k: int = 32, group: int = 16) -> Tensors:
    return {
        f"{LAYER}.weight": np.zeros((n, k // 8), np.uint32),
        f"{LAYER}.scales": np.ones((n, k // group), np.float16),
        f"{LAYER}.biases": np.ones((n, k // group), np.float16),
    }


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}
BITNET = {"quant_method": "bitnet"}
ROWS = {"quant_method": "gemma", "num_bits": 4}
QUARK: dict[str, Any] = {"quant_method": "quark"}
ASYMMETRIC = {**QUARK, "global_quant_config": {"weight": {"dtype": "uint4"}}}
TORCHAO: dict[str, Any] = {"quant_method": "torchao"}
MLX = {"group_size": 16, "bits": 4}


def compressed_config(**weights: Any) -> dict[str, Any]:
    scheme = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 16,
        **weights,
    }
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme}},
    }  # fmt: skip


def put(name: str, value: Any) -> Change:
    return lambda t: t.update({f"{LAYER}.{name}": np.asarray(value)})


def drop(name: str) -> Change:
    def change(t: Tensors) -> None:
        del t[f"{LAYER}.{name}"]

    return change


I32, F16 = np.int32, np.float16


def same(tensors: Tensors) -> None:
    """No change: the configuration is what differs."""


WRONG: list[tuple[str, Tensors, dict[str, Any], Change, str]] = [
    ("bits", gptq(), {**GPTQ, "bits": 8}, same, r"qweight has the shape \[4, 16\], 8 bits and 32 col"),
    ("no bits", gptq(), {"quant_method": "gptq", "group_size": 16}, same, "bits is None, no integer"),
    ("odd bits", gptq(), {**GPTQ, "bits": 5}, same, "codes of 5 bits by quantization_config"),
    ("huge bits", gptq(), {**GPTQ, "bits": 10**30}, same, "GPTQ has 2, 3, 4 or 8"),
    ("group", gptq(), {**GPTQ, "group_size": 8}, same, r"scales has the shape \[2, 16\], groups of 8"),
    ("group of 0", gptq(), {**GPTQ, "group_size": 0}, same, "groups of 0 by quantization_config"),
    ("group in words", gptq(), {**GPTQ, "group_size": "x"}, same, "group_size is 'x', no integer"),
    ("no scales", gptq(), GPTQ, drop("scales"), r"up_proj\.scales is missing"),
    ("no zeros", gptq(), GPTQ, drop("qzeros"), r"up_proj\.qzeros is missing"),
    (
        "scales of ints",
        gptq(),
        GPTQ,
        put("scales", np.ones((2, 16), I32)),
        r"scales is int32\[2, 16\], not float16",
    ),
    ("qweight of floats", gptq(), GPTQ, put("qweight", np.ones((4, 16), F16)), "qweight is float16"),
    (
        "zeros of another width",
        gptq(),
        GPTQ,
        put("qzeros", np.zeros((2, 3), I32)),
        r"qzeros has the shape \[2, 3\]",
    ),
    ("empty", gptq(), GPTQ, put("qweight", np.zeros((0, 16), I32)), r"qweight is empty: \[0, 16\]"),
    ("order out of range", gptq(), GPTQ, put("g_idx", np.full(32, 7, I32)), "g_idx names group 7 of 2"),
    ("negative order", gptq(), GPTQ, put("g_idx", np.full(32, -2, I32)), "g_idx names group -2 of 2"),
    ("uneven order", gptq(), GPTQ, put("g_idx", np.zeros(32, I32)), "groups of other sizes than 16 columns"),
    (
        "short order",
        gptq(),
        GPTQ,
        put("g_idx", np.zeros(8, I32)),
        r"qweight has the shape \[4, 16\], 4 bits and 8",
    ),
    ("symmetric", gptq(), {**GPTQ, "sym": True}, same, "qzeros has zero points beside the middle"),
    ("awq bits", awq(), {**AWQ, "bits": 8}, same, "codes of 8 bits by quantization_config; AWQ has 4"),
    ("awq group", awq(), {**AWQ, "group_size": 32}, same, r"scales has the shape \[2, 16\], groups of 32"),
    ("awq no zeros", awq(), AWQ, drop("qzeros"), r"qzeros is missing"),
    ("ct bits", compressed(), compressed_config(num_bits=8), same, "fits no group.*8 bits, hence 8 words"),
    ("ct group", compressed(), compressed_config(group_size=8), same, "fits no group.*4 groups a row"),
    ("ct no scale", compressed(), compressed_config(), drop("weight_scale"), "has no weight_scale beside it"),
    (
        "ct shape",
        compressed(),
        compressed_config(),
        put("weight_shape", np.array([16, 400])),
        r"says \[16, 400\]",
    ),
    ("ct rows", compressed(), compressed_config(), put("weight_shape", np.array([8, 32])), r"says \[8, 32\]"),
    (
        "ct no zeros",
        compressed(),
        compressed_config(symmetric=False),
        same,
        "zero points, and there are none",
    ),
    (
        "ct zeros",
        compressed(),
        compressed_config(),
        put("weight_zero_point", np.ones((16, 2), np.int8)),
        "weight_zero_point is not zero, though quantization_config says symmetric",
    ),
    (
        "ct format",
        compressed(),
        {**compressed_config(), "format": "int-quantized"},
        same,
        r"\(pack-quantized\) fits no group of quantization_config: the format int-quantized",
    ),
    ("ct ignored", compressed(), {**compressed_config(), "ignore": [LAYER]}, same, "config ignores"),
    ("ct no groups", compressed(), {"quant_method": "compressed-tensors"}, same, "has no config_groups"),
    ("bnb no bytes", bnb(), BNB, drop("weight"), r"up_proj\.weight is missing"),
    (
        "bnb fewer bytes",
        bnb(),
        BNB,
        put("weight", np.zeros((9, 1), np.uint8)),
        r"has 9 bytes, \[16, 64\] of 4 bits takes 512",
    ),
    ("bnb shape", bnb(shape=[10**9, 10**9]), BNB, same, "of 4 bits takes 5000000000"),
    ("bnb shape of text", bnb(shape=["a", 1]), BNB, same, "describes a weight of shape"),
    ("bnb blocks", bnb(blocksize=48), BNB, same, "has blocks of 48"),
    ("bnb absmax", bnb(), BNB, put("weight.absmax", np.zeros(3, np.uint8)), r"absmax has the shape \[3\]"),
    ("bnb offset", bnb(nested_offset="x"), BNB, same, "the offset 'x'"),
    (
        "bnb map",
        bnb(),
        BNB,
        put("weight.quant_map", np.zeros(16, np.float32)),
        "holds other values than NF4 has",
    ),
    (
        "bnb state",
        bnb(),
        BNB,
        put("weight.quant_state.bitsandbytes__nf4", np.zeros(5, np.uint8)),
        "is no JSON",
    ),
    ("bitnet no scale", bitnet(), BITNET, drop("weight_scale"), "is uint8 and has no weight_scale"),
    ("bitnet no weight", bitnet(), BITNET, drop("weight"), r"up_proj\.weight is missing"),
    ("bitnet scales", bitnet(), BITNET, put("weight_scale", np.ones(16, F16)), r"has the shape \[16\]"),
    ("bitnet scale 0", bitnet(), BITNET, put("weight_scale", np.zeros(1, F16)), "NaN or infinite scales"),
    ("bitnet scale inf", bitnet(), BITNET, put("weight_scale", np.full(1, np.inf, F16)), "NaN or infinite"),
    ("bitnet tiny", bitnet(), BITNET, put("weight_scale", np.full(1, 1e-45, np.float32)), "NaN or infinite"),
    ("bitnet words", bitnet(), BITNET, put("weight", np.ones((4, 32), I32)), r"weight is int32\[4, 32\]"),
    (
        "bitnet stack",
        bitnet(),
        BITNET,
        put("weight", np.ones((2, 4, 32), np.uint8)),
        "not uint8 .* of 2 axes",
    ),
    ("rows no scale", rows(), ROWS, drop("weight_scale"), "is uint8 and has no scales beside it"),
    ("rows no weight", rows(), ROWS, drop("weight"), r"up_proj\.weight is missing"),
    ("rows width", rows(k=30), ROWS, same, "has 15 bytes a row, the model's weight has 32 columns"),
    ("rows scales", rows(), ROWS, put("weight_scale", np.ones((8, 1), np.float32)), r"the shape \[8, 1\]"),
    ("rows groups", rows(), ROWS, put("weight_scale", np.ones((16, 3), np.float32)), "3 scales a row, of 32"),
    ("rows floats", rows(), ROWS, put("weight", np.ones((16, 32), F16)), "is float16.*not uint8 or int8"),
    (
        "quark scales",
        quark(),
        QUARK,
        put("weight_scale", np.ones((2, 8), F16)),
        r"weight has the shape \[32, 2\], 8 rows",
    ),
    ("quark groups", quark(), QUARK, put("weight_scale", np.ones((3, 16), F16)), "3 scales a row, of 32 col"),
    ("quark no weight", quark(), QUARK, drop("weight"), r"up_proj\.weight is missing"),
    ("quark no zeros", quark(), ASYMMETRIC, same, r"up_proj\.weight_zero_point is missing"),
    (
        "quark zeros",
        quark(),
        QUARK,
        put("weight_zero_point", np.ones((2, 3), I32)),
        r"weight_zero_point has the shape \[2, 3\]",
    ),
    ("quark floats", quark(), QUARK, put("weight", np.ones((16, 32), F16)), "is float16.*not float8"),
    (
        "torchao groups",
        torchao(),
        TORCHAO,
        put("_weight_scale", np.ones((16, 3), F16)),
        "3 scales a row, of 32",
    ),
    (
        "torchao zeros",
        torchao(),
        TORCHAO,
        put("_weight_zero_point", np.ones((16, 3), np.int8)),
        "zero_point has",
    ),
    ("torchao scales", torchao(), TORCHAO, put("_weight_scale", np.ones((16, 2), I32)), "scale is int32"),
    ("mlx bits", mlx(), {**MLX, "bits": 8}, same, r"has the shape \[16, 4\], 2 groups of 16 of 8 bits"),
    ("mlx groups", mlx(), {**MLX, "group_size": 32}, same, "2 groups of 32 of 4 bits asks for"),
    (
        "mlx own bits",
        mlx(),
        {**MLX, LAYER: {"bits": 3}},
        same,
        r"2 groups of 16 of 3 bits asks for \[16, 3\]",
    ),
    ("mlx no biases", mlx(), MLX, drop("biases"), r"up_proj\.biases is missing"),
    ("mlx biases", mlx(), MLX, put("biases", np.ones((16, 1), F16)), r"biases has the shape \[16, 1\]"),
    ("mlx no weight", mlx(), MLX, drop("weight"), r"up_proj\.weight is missing"),
    ("mlx floats", mlx(), MLX, put("weight", np.ones((16, 4), F16)), "is float16.*not uint32"),
    ("mlx group of mxfp4", mlx(), {**MLX, "mode": "mxfp4"}, same, "groups of 16, which mxfp4 is not"),
]


@pytest.mark.parametrize(
    ("tensors", "config", "change", "reason"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG]
)
def test_disagreement_names_the_tensor(
    tensors: Tensors, config: dict[str, Any], change: Change, reason: str
) -> None:
    tensors = dict(tensors)
    change(tensors)
    lazy = {n: ArrayTensor(a, f"f:{n}") for n, a in tensors.items()}
    with pytest.raises(InputError, match=reason) as raised:
        open_quantized(lazy, config, "folder", lambda name: 32)
    assert raised.value.remedy and "\n" not in str(raised.value)


OTHER: list[tuple[dict[str, Any], str]] = [
    ({**GPTQ, "checkpoint_format": "marlin"}, "packed as 'marlin'"),
    ({**GPTQ, "pack_dtype": "int8"}, "packed in int8"),
    ({**AWQ, "version": "gemv_fast"}, "packed as 'gemv_fast'"),
    ({**compressed_config(), "format": "float-quantized"}, "format 'float-quantized'"),
    (compressed_config(type="float", num_bits=6), "has float weights of 6 bits"),
    ({"quant_method": "auto-round", "packing_format": "itrex"}, "packed as 'itrex'"),
    ({**compressed_config(), "transform_config": {"config_groups": {"a": 1}}}, "has a transform_config"),
    ({**BITNET, "linear_class": "x"}, "layers of class 'x'"),
    ({**BITNET, "linear_class": "autobitlinear", "quantization_mode": "online"}, "is 'online'"),
    ({**BITNET, "use_rms_norm": True}, r"norms inside of its layers \(use_rms_norm\)"),
    ({**QUARK, "export": {"pack_method": ["x"]}}, "packed as .*x"),
    ({"quant_method": "aqlm"}, "quantized with 'aqlm'"),
    ({"quant_method": "x" * 99}, "quantized with 'x{40}', which"),
]


@pytest.mark.parametrize(("config", "reason"), OTHER)
def test_other_formats_are_refused_by_name(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        open_quantized({}, config, "folder")


def test_fp4_is_refused_by_name() -> None:
    tensors = {"a.weight.quant_state.bitsandbytes__fp4": ArrayTensor(np.zeros(4, np.uint8), "f:a")}
    with pytest.raises(UnsupportedError, match="FP4 codes of bitsandbytes"):
        open_quantized(tensors, BNB, "folder")


def test_nan_scales_are_named_when_read() -> None:
    tensors = awq()
    tensors[f"{LAYER}.scales"][0, 3] = np.nan
    opened = open_quantized({n: ArrayTensor(a, f"f:{n}") for n, a in tensors.items()}, AWQ, "folder")
    with pytest.raises(InputError, match=r"f:model.*up_proj\.scales holds NaN or infinite scales"):
        opened[f"{LAYER}.weight"].read()


def test_nothing_is_written_where_it_disagrees(tmp_path: Path) -> None:
    from llmc.codegen.driver import compile_model

    from .models import save_tiny
    from .quantized_files import change_tensors, save_gptq

    save_gptq(save_tiny("llama", tmp_path / "model"))
    change_tensors(tmp_path / "model", lambda t: t.pop(f"{LAYER}.scales"))
    with pytest.raises(LlmcError, match=r"up_proj\.scales is missing"):
        compile_model(tmp_path / "model", tmp_path / "out.llmc", targets=["null"], quant="keep")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    with pytest.raises(LlmcError):
        open_source(tmp_path / "model")
