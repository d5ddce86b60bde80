"""Polynomials of the kernels against float64, at the errors that `vector_math` states."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from llmc.codegen.tvm.kernels import vector_math
from llmc.codegen.tvm.kernels.builder import LANES, Expr, Kernel, put, vec
from tvm.script.ir_builder import tirx as T

from .kernel_harness import blank, call, vector_levels

WIDTH = 1024
ROOT = 2 * math.sqrt(2 / math.pi)
CASES: dict[str, tuple[Callable[[Expr], Expr], Callable[..., Any], float, float, float]] = {
    "exp": (vector_math.exp, np.exp, -86, 86, 2e-7),
    "exp2": (vector_math.exp2, np.exp2, -124, 126, 2e-7),
    "exp2 to bfloat16": (lambda x: vector_math.exp2(x, rough=True), np.exp2, -124, 126, 1.1e-4),
    "tanh": (vector_math.tanh, np.tanh, -20, 20, 4.5e-7),
    "sigmoid": (vector_math.sigmoid, lambda x: 1 / (1 + np.exp(-x)), -85, 85, 5e-7),
    "silu": (vector_math.silu, lambda x: x / (1 + np.exp(-x)), -85, 85, 5e-7),
    "softplus": (vector_math.softplus, lambda x: np.log1p(np.exp(x)), -85, 85, 5e-7),
    # Further out their own argument, rounded, is what the exponential magnifies.
    "gelu": (vector_math.gelu, np.vectorize(lambda x: x / 2 * math.erfc(-x * math.sqrt(0.5))), -4, 9, 1e-6),
    "gelu_tanh": (
        vector_math.gelu_tanh,
        lambda x: x / (1 + np.exp(-ROOT * (x + 0.044715 * x**3))),
        -3,
        9,
        1e-6,
    ),
}


def make(function: Callable[[Expr], Expr], isa: str) -> Any:
    """out = function(x), float32 [T, WIDTH]."""
    kernel = Kernel("elementwise", isa)
    with kernel:
        rows = kernel.symbol("T")
        x, out = (kernel.argument(name, (rows, WIDTH), "float32") for name in ("x", "out"))
        with kernel.body(), T.serial(0, rows) as t, T.serial(0, WIDTH // LANES) as i:
            put(out, function(vec(x, t, i * LANES)), t, i * LANES)
    return kernel.function


@pytest.mark.parametrize("name", CASES)
@vector_levels
def test_functions_are_as_exact_as_they_say(name: str, isa: str) -> None:
    function, reference, low, high, tolerance = CASES[name]
    rng = np.random.default_rng(0)
    x = rng.uniform(low, high, (40, WIDTH)).astype(np.float32)
    x[:20] = np.clip(rng.normal(size=(20, WIDTH)), low, high)
    got = call(make, isa, {"function": function}, x, blank(*x.shape))
    expected = reference(x.astype(np.float64))
    assert (np.abs(got - expected) / np.abs(expected)).max() < tolerance


@vector_levels
def test_exponentials_of_what_is_no_number_and_of_0(isa: str) -> None:
    x = np.zeros((1, WIDTH), np.float32)
    x[0, :3] = np.nan, np.inf, -np.inf
    for name in ("exp", "silu", "tanh", "sigmoid", "gelu_tanh"):
        got = call(make, isa, {"function": CASES[name][0]}, x, blank(*x.shape))[0]
        assert np.isnan(got[0])
        at_zero, ends = {
            "exp": (1, (6.1e37, 2.5e-38)),  # held to e^87 and e^-86.6
            "silu": (0, (np.inf, -np.inf)),
            "tanh": (0, (1, -1)),
            "sigmoid": (0.5, (1, 1.7e-38)),
            "gelu_tanh": (0, (np.inf, -np.inf)),
        }[name]
        assert got[3] == at_zero
        assert got[1:3] == pytest.approx(ends, rel=0.05)
