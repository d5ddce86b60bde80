"""Runs a TIR kernel on numpy arrays, for tests; and what those tests share."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from llmc.codegen.tvm.build import compile_kernel
from llmc.codegen.tvm.kernels import stored_dtype
from llmc.codegen.tvm.kernels.isa import LEVELS, get_isa
from llmc.ir.core import Value
from llmc.ir.dtypes import to_numpy
from llmc.ir.types import Quantization, TensorType
from llmc.runtime import cpu

from .conftest import only_long

tvm = pytest.importorskip("tvm")

HERE = cpu.supported_isas()


def _levels(names: Sequence[str], *between: pytest.MarkDecorator) -> Any:
    """Levels between the least and the best of them that this CPU runs are left to the slow tests, and have
    the marks `between` too: compiling takes the time.
    """
    here = [name for name in names if name in HERE]
    params: list[Any] = []
    for name in names:
        marks = [pytest.mark.skipif(name not in HERE, reason=f"this CPU does not run {name}")]
        if name not in (here[0], here[-1]):
            marks += [pytest.mark.slow, *between]
        params.append(pytest.param(name, marks=marks))
    return pytest.mark.parametrize("isa", params)


# Those of this machine's architecture; the other one's run emulated (test_isa_emulated.py).
_OURS = [name for name, isa in LEVELS.items() if isa.machine == platform.machine()]
levels = _levels(_OURS)
# One level for each width of vectors: the others differ in how bytes are multiplied, and in nothing else.
_VECTORS = [n for n in _OURS if n in ("generic", "avx2", "avx512vnni", "neon")]
vector_levels = _levels(_VECTORS)
# And tiles, where there are any.
_TILES = [n for n in _OURS if n in (*_VECTORS, "amx")]
tile_levels = _levels(_TILES)
# Where cases are many.
few_vector_levels, few_tile_levels = _levels(_VECTORS, only_long), _levels(_TILES, only_long)


def compiled(function: Any, isa: str) -> Any:
    return compile_kernel(function, get_isa(isa))


@cache
def _build(maker: Callable[..., Any], isa: str, parameters: tuple[tuple[str, Any], ...]) -> Any:
    return compiled(maker(**dict(parameters), isa=isa), isa)["f"]


def call(
    maker: Callable[..., Any], isa: str, parameters: dict[str, Any], *arrays: np.ndarray, outputs: int = 1
) -> Any:
    """Run a kernel; its last `outputs` arrays are written and returned."""
    tensors = [tvm.runtime.tensor(np.ascontiguousarray(a).view(stored_dtype(a.dtype.name))) for a in arrays]
    _build(maker, isa, tuple(sorted(parameters.items())))(*tensors)
    written = zip(tensors[-outputs:], arrays[-outputs:], strict=True)
    results = [tensor.numpy().view(array.dtype) for tensor, array in written]
    return results[0] if outputs == 1 else results


def value(array: np.ndarray, quantization: Quantization | None = None) -> Value:
    return Value(TensorType(str(array.dtype), array.shape, quantization))


def meaning(op: Any, *arrays: np.ndarray | None) -> np.ndarray:
    """The op's reference on numpy arrays."""
    result = op.reference({}, *(None if a is None else _tensor(a) for a in arrays))
    if result.dtype in (torch.bfloat16, torch.float8_e4m3fn):
        kind = str(result.dtype).removeprefix("torch.")
        return result.view(torch.uint8).numpy().view(to_numpy(kind))
    return result.numpy()


def _tensor(array: np.ndarray) -> torch.Tensor:
    if array.dtype in (to_numpy("bfloat16"), to_numpy("float8_e4m3fn")):
        return torch.from_numpy(array.view(np.uint8)).view(getattr(torch, array.dtype.name))
    return torch.from_numpy(array)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def blank(*shape: int) -> np.ndarray:
    """An output that a kernel must overwrite."""
    return np.full(shape, np.nan, np.float32)


def close(actual: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """|difference| ≤ tolerance · largest |expected|."""
    scale = max(float(np.abs(expected).max(initial=0)), 1e-30)
    worst = float(np.abs(actual.astype(np.float64) - expected).max(initial=0))
    assert worst <= tolerance * scale, f"off by {worst / scale:.2e} of the largest value"
