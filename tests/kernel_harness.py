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

from .conftest import LONG

tvm = pytest.importorskip("tvm")

HERE = cpu.supported_isas()


def _levels(names: Sequence[str]) -> Any:
    """Levels between the least and the best of them that this CPU runs are left to the slow tests: compiling
    takes the time.
    """
    here = [name for name in names if name in HERE]
    params: list[Any] = []
    for name in names:
        marks = [pytest.mark.skipif(name not in HERE, reason=f"this CPU does not run {name}")]
        if name not in (here[0], here[-1]):
            marks.append(pytest.mark.slow)
        params.append(pytest.param(name, marks=marks))
    return pytest.mark.parametrize("isa", params)


# Those of this machine's architecture; the other one's run emulated (test_isa_emulated.py).
_OURS = [name for name, isa in LEVELS.items() if isa.machine == platform.machine()]
levels = _levels(_OURS)
# One level for each width of vectors, and the one whose attention multiplies pairs: the others differ in how
# bytes are multiplied, and in nothing else.
_VECTORS = [n for n in _OURS if n in ("generic", "avx2", "avx512vnni", "zen4", "neon")]
vector_levels = _levels(_VECTORS)
# And tiles, where there are any.
_TILES = [n for n in _OURS if n in (*_VECTORS, "amx")]
tile_levels = _levels(_TILES)


def _cases(names: str, cases: Sequence[Any], levels: Sequence[str]) -> Any:
    """Parametrizes `names`, and `isa`, where cases are many: all on the best level that this CPU runs, every
    third on the least, every third on those between in the slow tests; all where tests may be long.
    """
    here = [name for name in levels if name in HERE]
    params: list[Any] = []
    for isa in here:
        between = isa not in (here[0], here[-1])
        first, step = (0, 1) if LONG or isa == here[-1] else (int(between), 3)
        for case in cases[first::step]:
            values = case if "," in names else (case,)
            name = "-".join(map(str, (*values, isa)))
            params.append(pytest.param(*values, isa, id=name, marks=[pytest.mark.slow] if between else []))
    return pytest.mark.parametrize(f"{names},isa", params)


def vector_cases(names: str, cases: Sequence[Any]) -> Any:
    """`_cases`, one level for each width of vectors."""
    return _cases(names, cases, _VECTORS)


def tile_cases(names: str, cases: Sequence[Any]) -> Any:
    """`_cases`, one level for each width of vectors, and tiles."""
    return _cases(names, cases, _TILES)


def level_cases(names: str, cases: Sequence[Any]) -> Any:
    """`_cases`, every level of this machine's architecture."""
    return _cases(names, cases, _OURS)


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
