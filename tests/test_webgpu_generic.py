"""Tensor operations that TVM writes in WGSL, with functions of ours in it, on this machine's driver."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from llmc.codegen.tvm.untyped import te, tirx, tvm
from llmc.codegen.tvm.wgsl.generic import wgsl_generic
from llmc.codegen.tvm.wgsl.lower import WGSL
from llmc.ir.errors import CompileError

from .webgpu_device import WebGpuDevice, driver

X = np.array([0.0, -0.0, 1e-3, -1.5, 2.0, 3.7, -20.0, 90.0, 512.3, -4095.7, 32768.4, 131071.9], np.float32)


def code_of(function: Callable[..., Any], *dtypes: str) -> Any:
    """y[i] = function(x[i], …) over arrays of symbolic length."""
    n = tirx.Var("n", "int64")
    given = [te.placeholder((n,), dtype, name=f"x{i}") for i, dtype in enumerate(dtypes)]
    result = te.compute((n,), lambda i: function(*(x[i] for x in given)), name="y")
    target = tvm.target.Target(dict(WGSL.target), host={"kind": "llvm"})
    return wgsl_generic(te.create_prim_func([*given, result]), target)


def run(function: Callable[..., Any], *arrays: np.ndarray) -> np.ndarray:
    code = code_of(function, *(array.dtype.name for array in arrays))
    inputs = {a.name: array for a, array in zip(code.arguments, arrays, strict=False)}
    outputs = WebGpuDevice({"f": code}, driver())("f", **inputs)
    return outputs[-1] if isinstance(outputs, list) else outputs


FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any], float]] = {
    "sin": (tirx.sin, np.sin, 2e-7),
    "cos": (tirx.cos, np.cos, 2e-7),
    "tanh": (tirx.tanh, np.tanh, 3e-7),
    "erf": (tirx.erf, np.vectorize(__import__("math").erf), 3e-7),
    "pow3": (lambda x: tirx.power(x, tirx.const(3.0, "float32")), lambda x: x**3, 1e-5),
    "pow2": (lambda x: tirx.power(x, tirx.const(2.0, "float32")), lambda x: x**2, 1e-5),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_every_size_and_sign(name: str) -> None:
    """Angles of a whole context; powers of negative numbers. Relative to the larger of the result and 1."""
    ours, exact, tolerance = FUNCTIONS[name]
    wanted = exact(X.astype(np.float64))
    assert (np.abs(run(ours, X) - wanted) <= tolerance * np.maximum(1, np.abs(wanted))).all()


def test_whole_numbers_of_64_bits_are_kept_as_32() -> None:
    x = np.array([3, -7, 2**30, -(2**31)], np.int32)
    found = run(
        lambda a: tirx.floordiv(a.astype("int64") * tirx.IntImm("int64", 1), tirx.IntImm("int64", 2)), x
    )
    assert found.dtype == np.int32 and found.tolist() == (x // 2).tolist()


def test_truth_values_are_numbers_between_kernels() -> None:
    x = np.array([1, 0, 1, 1], np.int32)
    y = np.array([2.0, 2.0, -1.0, np.inf], np.float32)
    above = run(lambda a, b: tirx.all(a != 0, b > 1.0), x, y)
    assert above.dtype == np.int32 and above.tolist() == [1, 0, 0, 1]


def test_numbers_are_written_to_the_last_bit_and_within_32_bits() -> None:
    x = np.array([1.0, 3.0], np.float32)
    exact = np.float32(0.08838834764)
    found = run(lambda a: a * tirx.const(float(exact), "float32"), x)
    assert found.tolist() == [exact, np.float32(3) * exact]
    far = run(
        lambda a: tirx.min(a.astype("int64"), tirx.IntImm("int64", 1 << 40)), np.array([7, -7], np.int32)
    )
    assert far.tolist() == [7, -7]


def test_what_is_no_number_is_found() -> None:
    x = np.array([1.0, np.nan, -np.inf, 0.0], np.float32)
    assert run(lambda a: tirx.isnan(a).astype("int32"), x).tolist() == [0, 1, 0, 0]


def test_what_is_not_finite_is_written() -> None:
    x = np.array([1.0, -1.0], np.float32)
    infinite = tirx.const(float("inf"), "float32")
    found = run(lambda a: tirx.Select(a > 0.0, a, -infinite), x)
    assert found.tolist() == [1.0, -np.inf]


def test_what_wgsl_cannot_express_is_refused() -> None:
    with pytest.raises(CompileError, match="compile for tvm-cpu") as refused:
        code_of(lambda a: a + a, "float64")
    assert "WGSL" in refused.value.message or "tvm-webgpu" in refused.value.message
    with pytest.raises(CompileError, match="tvm-webgpu has no tensor operations over int8"):
        code_of(lambda a: a.astype("float32"), "int8")
