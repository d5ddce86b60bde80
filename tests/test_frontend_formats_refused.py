"""What formats of quantized folders may hold and is not read, by name; and what is odd and read as it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from llmc.frontend.quantized import open_quantized
from llmc.ir.errors import InputError, UnsupportedError
from llmc.ir.weights import ArrayTensor, quantized_of

from .test_frontend_quantized_refusals import (
    BITNET,
    F16,
    LAYER,
    MLX,
    QUARK,
    ROWS,
    TORCHAO,
    Tensors,
    mlx,
    quark,
    rows,
    torchao,
)


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (np.array([[0, 0b11000000]], np.uint8), "holds the code 3"),
        (np.full((4, 2), 0.5, F16), "holds other numbers"),
    ],
)
def test_weights_that_are_not_ternary_are_named_when_read(weight: np.ndarray, reason: str) -> None:
    tensors = {f"{LAYER}.weight": weight, f"{LAYER}.weight_scale": np.ones(1, F16)}
    opened = open_quantized({n: ArrayTensor(a, f"f:{n}") for n, a in tensors.items()}, BITNET, "folder")
    with pytest.raises(InputError, match=rf"f:model.*up_proj\.weight {reason}"):
        opened[f"{LAYER}.weight"].read()


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"mode": "x"}, "MLX's mode 'x'"),
        ({"mode": ["affine"]}, "MLX's mode .*affine"),
        ({LAYER: {"mode": {}}}, "MLX's mode"),
        ({"bits": 1}, "codes of 1 bits"),
        ({"group_size": -1}, "groups of -1"),
    ],
)
def test_what_mlx_may_have_and_is_not_read_is_named(config: dict[str, Any], reason: str) -> None:
    tensors = {n: ArrayTensor(a, f"f:{n}") for n, a in mlx().items()}
    with pytest.raises(UnsupportedError, match=reason):
        open_quantized(tensors, {**MLX, **config}, "folder")


@pytest.mark.parametrize(
    "config",
    [
        {"bits": "4", "group_size": 16},
        {"bits": True, "group_size": 16},
        {"bits": 4.0, "group_size": None},
        {"bits": 4, "group_size": 16, "desc_act": False, "sym": True},
    ],
)
def test_configurations_without_a_method_that_are_not_mlx(config: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="names no quant_method"):
        open_quantized({}, config, "folder")


def test_sizes_of_a_module_that_are_none_are_refused() -> None:
    tensors = {n: ArrayTensor(a, f"f:{n}") for n, a in mlx().items()}
    with pytest.raises(InputError, match="bits is '4', no integer"):
        open_quantized(tensors, {**MLX, LAYER: {"bits": "4"}}, "folder")


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"weight": np.ones((16, 32), np.int8)}, r"weight_scale has the shape \[2, 16\], of int8\[16, 32\]"),
        ({"weight_scale": np.ones(16, F16)}, r"weight_scale has the shape \[16\], of int32\[32, 2\]"),
        (
            {
                "weight": np.ones((16, 32), np.int8),
                "weight_scale": np.ones(16, F16),
                "weight_zero_point": np.ones(16, np.int8),
            },
            "that moves weights of 8 bits",
        ),
    ],
)
def test_other_forms_of_quark_are_refused(parts: Tensors, reason: str) -> None:
    made = quark() | {f"{LAYER}.{name}": part for name, part in parts.items()}
    with pytest.raises(UnsupportedError, match=reason):
        open_quantized({n: ArrayTensor(a, f"f:{n}") for n, a in made.items()}, QUARK, "folder")


def test_rows_of_quark_that_fill_no_word() -> None:
    made = quark(n=16) | {f"{LAYER}.weight_scale": np.ones((2, 12), np.float16)}
    made[f"{LAYER}.weight"] = np.full((32, 2), 0x11111111, np.int32)
    opened = open_quantized({n: ArrayTensor(a, f"f:{n}") for n, a in made.items()}, QUARK, "folder")
    assert np.array_equal(opened[f"{LAYER}.weight"].read(), np.ones((12, 32)))


def test_columns_that_torchao_scales_are_refused() -> None:
    made = torchao() | {f"{LAYER}._weight_act_pre_scale": np.ones(32, F16)}
    with pytest.raises(UnsupportedError, match="_weight_act_pre_scale is a part of a weight that llmc"):
        open_quantized({n: ArrayTensor(a, f"f:{n}") for n, a in made.items()}, TORCHAO, "folder")


def test_one_scale_of_a_whole_weight_of_torchao() -> None:
    made = torchao() | {f"{LAYER}._weight_scale": np.full((1, 1), 0.5, F16)}
    made[f"{LAYER}._weight_zero_point"] = np.full((1, 1), 2, np.int8)
    opened = open_quantized({n: ArrayTensor(a, f"f:{n}") for n, a in made.items()}, TORCHAO, "folder")
    assert np.array_equal(opened[f"{LAYER}.weight"].read(), np.full((16, 32), -5))


@pytest.mark.parametrize(
    "parts",
    [
        {"_weight_qdata": np.zeros((16, 16), np.uint8)},
        {"_weight_scale": np.ones((2, 16), np.float16)},  # as of four bits, two in a byte
        {"_weight_scale": np.ones((), np.float16)},
    ],
)
def test_other_packings_of_torchao_are_refused(parts: Tensors) -> None:
    made = torchao() | {f"{LAYER}.{name}": part for name, part in parts.items()}
    with pytest.raises(UnsupportedError, match=r"_weight_qdata is u?int8.*packed as llmc does not read"):
        open_quantized({n: ArrayTensor(a, f"f:{n}") for n, a in made.items()}, TORCHAO, "folder")


def test_bits_of_a_module_by_its_name() -> None:
    def types(dtype: Any) -> dict[str, Any]:
        return {"_data": {"weight_dtype": {"_data": dtype}}, "_type": "IntxWeightOnlyConfig"}

    def bits(by_name: dict[str, Any]) -> int:
        config = {**TORCHAO, "quant_type": {"default": {"_data": {"module_fqn_to_config": by_name}}}}
        made = {n: ArrayTensor(a, f"f:{n}") for n, a in torchao().items()}
        parts = quantized_of(open_quantized(made, config, "folder")[f"{LAYER}.weight"])
        assert parts is not None
        return parts.quant.bits

    assert bits({"_default": types("int4"), "model.embed_tokens": types("int8")}) == 4
    assert bits({"_default": types("int4"), LAYER: types("int8")}) == 8
    assert bits({"_default": types("int4"), f"{LAYER}.weight": types("int3"), LAYER: types("int8")}) == 3
    assert bits({LAYER.replace("model.", "model.language_model."): types("int4")}) == 4
    assert bits({"_default": types("int4"), r"re:.*embed.*": {}}) == 8
    assert bits({"_default": types(["int4"])}) == bits({"model.embed_tokens": types("int4")}) == 8


def test_integers_beyond_the_bits_that_are_said_are_named_when_read() -> None:
    config = {**TORCHAO, "quant_type": {"default": {"_data": {"weight_dtype": {"_data": "int3"}}}}}
    made = {n: ArrayTensor(a, f"f:{n}") for n, a in torchao().items()}
    with pytest.raises(InputError, match="_weight_qdata holds numbers of more than the 3 bits"):
        open_quantized(made, config, "folder")[f"{LAYER}.weight"].read()


def test_bytes_of_modules_that_the_model_has_not_stay() -> None:
    """Layers that take keys and values from others may be stored with their own."""
    tensors = {n: ArrayTensor(a, f"f:{n}") for n, a in rows().items()}
    other = {n.replace("up", "down"): tensor for n, tensor in tensors.items()}
    found = open_quantized({**tensors, **other}, ROWS, "folder", lambda name: 32 if "up" in name else None)
    assert found[f"{LAYER}.weight"].shape == (16, 32)
    assert all(found[name] is tensor for name, tensor in other.items())
