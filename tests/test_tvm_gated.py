"""`quantized_gated_mlp` has the bits of `quantized_linear`, then `gated_mlp`, however many rows there are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from llmc.codegen.tvm.kernels.activation import (
    activation_layout,
    reference_quantize_activation,
    whole_groups,
)
from llmc.codegen.tvm.kernels.elementwise import make_gated_mlp
from llmc.codegen.tvm.kernels.gated import fits_gated, make_quantized_gated_mlp
from llmc.codegen.tvm.kernels.layout import QuantLayout
from llmc.codegen.tvm.kernels.quantized import make_quantized_linear

from .kernel_harness import blank, call, levels, normal

FORMS = [
    {"width": 128, "k": 192, "group_size": 64},
    {"width": 128, "k": 192, "group_size": 64, "zero_point": "uint8", "bias": True},
    {"width": 96, "k": 96, "group_size": 32, "quantize": (32, 8)},
    {"width": 256, "k": 192, "bits": 3, "group_size": 64, "quantize": (128, 16), "activation": "gelu"},
    {"width": 128, "k": 192, "bits": 8, "group_size": 64, "activation": "relu"},
    {"width": 384, "k": 192, "bits": 8, "group_size": 192, "quantize": (192, 8), "rotate": 64},
    {"width": 384, "k": 576, "bits": 8, "group_size": 576, "quantize": (192, 8), "rotate": 192},
    {"width": 896, "k": 640, "bits": 8, "group_size": 640, "quantize": (448, 8), "rotate": 448},
    {"width": 256, "k": 640, "bits": 8, "group_size": 128, "quantize": (256, 8), "rotate": 64, "bias": True},
    {"width": 512, "k": 2176, "group_size": 128, "zero_point": "uint8", "quantize": (256, 8), "bias": True},
]


def run(isa: str, rows: int, form: dict[str, Any]) -> None:
    options: dict[str, Any] = {"bits": 4, "zero_point": None, "bias": False, **form}
    activation, quantize = options.pop("activation", "silu"), options.pop("quantize", (64, 8))
    width, bits, groups = options.pop("width"), options["bits"], options["group_size"]
    rotate = options.pop("rotate", 0)
    lay = QuantLayout(2 * width, options["k"], bits, groups, None, "float16", options["zero_point"])
    rng = np.random.default_rng(0)
    q = rng.integers(0, 1 << bits, (2 * width, lay.k)).astype(np.uint8)
    scale = (rng.random((2 * width, lay.groups)) * 0.02).astype(np.float16)
    options["apart"] = int(whole_groups(lay))
    given = [*reference_quantize_activation(normal(rows, lay.k), groups, lay.align, options["apart"])]
    given += [lay.pack(q), lay.pack_scales(scale)]
    if lay.zero_point is not None:
        zeros = rng.integers(0, 1 << bits, (2 * width, lay.groups)).astype(np.uint8)
        given.append(lay.pack_zero_points(zeros))
    if options["bias"]:
        given.append(normal(2 * width, seed=5))
    product = call(make_quantized_linear, isa, {"n": 2 * width, **options}, *given, blank(rows, 2 * width))
    made = {"width": width, "activation": activation, "quantize": quantize, "rotate": rotate}
    out = activation_layout(width, *quantize)
    results = [np.full((rows, out.k_padded), 77, np.int8), blank(rows, out.groups), blank(rows, out.groups)]
    expected = call(make_gated_mlp, isa, made, product, *results, outputs=3)
    actual = call(make_quantized_gated_mlp, isa, {**options, **made}, *given, *results, outputs=3)
    for one, other in zip(actual, expected, strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("rows", [1, 5, 15, 16, 23, 24, 33, 257])
@levels
def test_rows(rows: int, isa: str) -> None:
    """Few, as many as make tiles pay, a tile that is not full, and more than are held at once."""
    run(isa, rows, FORMS[0])


@pytest.mark.parametrize(("width", "group"), [(384, 192), (256, 256)])
@levels
def test_wide_groups_hold_fewer_rows(width: int, group: int, isa: str) -> None:
    run(isa, 133, {"width": width, "k": 2 * group, "bits": 8, "group_size": group, "quantize": (group, 8)})


@pytest.mark.parametrize("form", FORMS[1:], ids=str)
@levels
def test_forms(form: dict[str, Any], isa: str) -> None:
    run(isa, 70, form)


@pytest.mark.parametrize("rows", [16, 17, 40, 300, 1800])
@levels
def test_rows_of_weights_as_they_lie(rows: int, isa: str) -> None:
    """Of 1,800 rows the last share has 8."""
    run(isa, rows, FORMS[5])


@pytest.mark.parametrize("form", FORMS[6:], ids=str)
@levels
def test_more_rows_than_are_held(form: dict[str, Any], isa: str) -> None:
    run(isa, 300, form)


def test_groups_must_divide_the_result_and_be_whole_vectors() -> None:
    assert fits_gated(1536, activation_layout(1536, 64, 8))
    assert fits_gated(1536, activation_layout(1536, 256, 8))
    assert fits_gated(1536, activation_layout(1536, 512, 8))
    assert not fits_gated(1536, activation_layout(1536, 640, 8))
    assert not fits_gated(1536, activation_layout(1536, 768, 8))
    assert not fits_gated(1500, activation_layout(1500, 64, 8))
    assert not fits_gated(96, activation_layout(96, 24, 8))
