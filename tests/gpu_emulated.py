"""CUDA kernels run without a GPU: the same text, compiled by a C++ compiler behind other definitions of what
device.cuh says in PTX (`gpu_emulator/`), with as much of the driver's interface as the executor calls.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from llmc.codegen.tvm.gpu.layout import GpuLayout
from llmc.codegen.tvm.kernels import stored_dtype
from llmc.codegen.tvm.kernels.layout import QuantLayout
from llmc.ir.codebooks import codebook
from llmc.ir.dtypes import to_numpy
from llmc.runtime.executor.gpu_program import size_of

if TYPE_CHECKING:
    from llmc.codegen.tvm.gpu.source import Code

HERE = Path(__file__).parent / "gpu_emulator"
_KERNEL = re.compile(
    r"(?:KERNEL|extern \"C\" __global__ void)\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(([^;{]*)\)\s*\{"
)
_SHARED = re.compile(r"extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[\];")


def compiler() -> str:
    """The C++ compiler; skips the test where there is none."""
    found = shutil.which("g++") or shutil.which("clang++")
    if found is None:
        pytest.skip("no C++ compiler")
    return found


def build(text: str, folder: Path) -> Path:
    """The text of kernels (without device.cuh) as a library that is its own driver."""
    names = [m[1] for m in _KERNEL.finditer(text)]
    body = _SHARED.sub(r"\1* \2 = (\1*)emulated::dynamic_shared;", text)
    thunks = [f'extern "C" void {n}_thunk(void** p) {{ emulated::call({n}, p); }}' for n in names]
    finder = [f'if (!strcmp(name, "{n}")) {{ *f = (void*){n}_thunk; return 0; }}' for n in names]
    parts = [
        '#include "device.h"',
        "#include <utility>",
        body,
        '#include "driver.h"',
        *thunks,
        "API cuModuleGetFunction(void** f, void*, const char* name) {",
        *finder,
        "return 500; }",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    source, library = folder / "kernels.cpp", folder / "libcuda.so"
    source.write_text("\n".join(parts), encoding="utf-8")
    # Products and sums are not contracted: what is to be fused says so.
    flags = ["-std=c++20", "-O1", "-fno-strict-aliasing", "-ffp-contract=off", "-fPIC", "-shared", "-w"]
    subprocess.run([compiler(), *flags, f"-I{HERE}", str(source), "-o", str(library)], check=True)
    return library


GUARD = 64
"""Bytes behind each array that a kernel writes, which it must leave alone."""


def guarded(size: int) -> np.ndarray:
    return np.full(size + GUARD, 0xFF, np.uint8)  # NaN in every float


class Device:
    """Kernels by name, built together; a call takes their inputs by name and returns their outputs."""

    def __init__(self, codes: Mapping[str, Code], folder: Path) -> None:
        from llmc.codegen.tvm.gpu.headers import headers

        self.codes = codes
        text = "\n".join([headers(""), *(code.text(name) for name, code in codes.items())])
        self.library = ctypes.CDLL(str(build(text, folder)))

    def __call__(self, name: str, **given: np.ndarray) -> Any:
        code = self.codes[name]
        sizes: dict[str, int] = {}
        arrays = {key: np.ascontiguousarray(array) for key, array in given.items()}
        for a in code.arguments:
            if a.name in arrays:
                found = arrays[a.name]
                kind = stored_dtype(found.dtype.name)
                assert kind == a.dtype and found.ndim == len(a.shape), (a, found.dtype)
                for want, got in zip(a.shape, found.shape, strict=True):
                    assert got == (want if isinstance(want, int) else sizes.setdefault(want, got)), a
        memory: dict[str, np.ndarray] = {}
        for a in code.arguments:
            if a.written:
                shape = [d if isinstance(d, int) else sizes[d] for d in a.shape]
                kind = arrays[a.name].dtype if a.name in arrays else to_numpy(a.dtype)
                memory[a.name] = guarded(int(np.prod(shape)) * kind.itemsize)
                view = memory[a.name][:-GUARD].view(kind).reshape(shape)
                if a.name in arrays:
                    view[...] = arrays[a.name]
                arrays[a.name] = view
        memory |= {n: guarded(size_of(str(size))(sizes)) for n, (_, size) in code.scratch.items()}
        for launch in code.launches:
            if launch.rows is not None:
                size, least, most = launch.rows
                if not least <= size_of(str(size))(sizes) <= most:
                    continue
            own = [memory.get(a, arrays.get(a, sizes.get(a))) for a in launch.arguments if a.isidentifier()]
            grid = [size_of(str(g))(sizes) for g in launch.grid]
            self._launch(f"{name}_{launch.name}", grid, launch.block, launch.shared, own)
        for key, raw in memory.items():
            assert (raw[-GUARD:] == 0xFF).all(), f"{name} writes beyond {key}"
        outputs = [arrays[a.name] for a in code.arguments if a.written]
        return outputs[0] if len(outputs) == 1 else outputs

    def _launch(self, name: str, grid: list[int], block: int, shared: int, own: list[Any]) -> None:
        function = ctypes.c_void_p()
        assert self.library.cuModuleGetFunction(ctypes.byref(function), None, name.encode()) == 0, name
        held = [
            ctypes.c_void_p(one.ctypes.data) if isinstance(one, np.ndarray) else ctypes.c_int(one)
            for one in own
            if one is not None  # a null pointer stands in the text, and is no argument
        ]
        pointers = (ctypes.c_void_p * len(held))(*(ctypes.addressof(h) for h in held))
        assert self.library.cuLaunchKernel(function, *grid, block, 1, 1, shared, None, pointers, None) == 0, (
            name
        )


def generator(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


def weight(n: int, k: int, form: dict[str, Any], seed: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """A weight as float32, as `embedding` gives it, and its arrays in memory."""
    rng, quant = generator(seed), QuantLayout(n, k, **form) if form else None
    layout = GpuLayout(n, k, quant)
    assert layout.fits()
    if quant is None:
        w = rng.standard_normal((n, k)).astype(np.float16)
        return w.astype(np.float32), {"codes": layout.pack(w)}
    codes = rng.integers(0, 1 << quant.bits, (n, k)).astype(np.uint8)
    scales = (rng.random((n, layout.groups)) + 0.1).astype(to_numpy(quant.scale_dtype))
    arrays = {"codes": layout.pack(codes), "scales": layout.pack_groups(scales)}
    group = np.arange(k) // layout.group_size
    scale, c = scales.astype(np.float32)[:, group], codes.astype(np.float32)
    if quant.codebook is not None:
        return codebook(quant.codebook)[codes] * scale, arrays
    if quant.zero_point is None:
        return (c - (1 << quant.bits - 1)) * scale, arrays
    if quant.zero_point == "uint8":
        zeros = rng.integers(0, 1 << quant.bits, scales.shape).astype(np.uint8)
        w = (c - zeros[:, group]) * scale
    else:
        least = -rng.random(scales.shape) * scales.astype(np.float32)
        zeros = (least * (1 << quant.bits)).astype(quant.zero_point)
        w = c * scale + zeros.astype(np.float32)[:, group]
    return w, arrays | {"zeros": layout.pack_groups(zeros)}
