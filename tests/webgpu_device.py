"""WGSL kernels by themselves on whatever driver this machine has, a processor's (lavapipe) among them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from llmc.codegen.tvm.kernels import stored_dtype
from llmc.ir.dtypes import to_numpy
from llmc.runtime.executor import webgpu_driver
from llmc.runtime.executor.gpu_program import size_of
from llmc.runtime.executor.webgpu_driver import WebGpuDriver

if TYPE_CHECKING:
    from llmc.codegen.tvm.gpu.source import Code

GUARD = 64
"""Bytes behind each array that a kernel writes, which it must leave alone."""


def driver() -> WebGpuDriver:
    """The driver of this machine, of a processor too; skips the test where there is none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(webgpu_driver.ON_CPU, "1")
        if (why := webgpu_driver.why_absent()) is not None:
            pytest.skip(why)
        return WebGpuDriver()


class WebGpuDevice:
    """Kernels by name; a call takes their inputs by name and returns their outputs."""

    def __init__(self, codes: Mapping[str, Code], own: WebGpuDriver | None = None) -> None:
        from llmc.codegen.tvm.wgsl.text import wgsl_text

        self.codes, self.driver = codes, own or driver()
        self.module = self.driver.load("\n".join(wgsl_text(code, name) for name, code in codes.items()))
        self._pipelines: dict[str, Any] = {}

    def __call__(self, name: str, **given: np.ndarray) -> Any:
        code, driver = self.codes[name], self.driver
        sizes: dict[str, int] = {}
        arrays = {key: np.ascontiguousarray(array) for key, array in given.items()}
        for a in code.arguments:
            if a.name in arrays:
                found = arrays[a.name]
                assert stored_dtype(found.dtype.name) == a.dtype and found.ndim == len(a.shape), a
                for want, got in zip(a.shape, found.shape, strict=True):
                    assert got == (want if isinstance(want, int) else sizes.setdefault(want, got)), a
        where: dict[str, int] = {}
        length: dict[str, int] = {}

        def place(name: str, size: int, content: np.ndarray | None) -> None:
            raw = np.full(size + GUARD, 0xFF, np.uint8)  # NaN in every float
            if content is not None:
                raw[:size] = content.reshape(-1).view(np.uint8)
            where[name], length[name] = driver.allocate(len(raw)), size
            driver.upload(where[name], raw)

        for a in code.arguments:
            shape = [d if isinstance(d, int) else sizes[d] for d in a.shape]
            size = int(np.prod(shape)) * _width(a.dtype)
            place(a.name, size, arrays.get(a.name))
        for key, (_, size) in code.scratch.items():
            place(key, size_of(str(size))(sizes), None)
        for launch in code.launches:
            if launch.rows is not None:
                size, least, most = launch.rows
                if not least <= size_of(str(size))(sizes) <= most:
                    continue
            own = [
                ("address", where[a]) if a in where else ("int32", sizes[a.partition(":")[0]])
                for a in launch.arguments
                if a != "nullptr" and not a.isdigit()
            ]
            grid = [size_of(str(g))(sizes) for g in launch.grid]
            function = self._function(f"{name}_{launch.name}", launch.shared)
            driver.launch(driver.prepare(function, grid, launch.block, launch.shared, own))
        outputs: list[np.ndarray] = []
        for key, address in where.items():
            raw = np.zeros(length[key] + GUARD, np.uint8)
            driver.download(raw, address)
            driver.wait()
            assert (raw[length[key] :] == 0xFF).all(), f"{name} writes beyond {key}"
            driver.free(address)
            argument = next((a for a in code.arguments if a.name == key), None)
            if argument is not None and argument.written:
                shape = [d if isinstance(d, int) else sizes[d] for d in argument.shape]
                kind = arrays[key].dtype if key in arrays else to_numpy(argument.dtype)
                kind = np.dtype(np.int32) if kind in (np.int64, np.bool_) else kind
                outputs.append(raw[: length[key]].view(kind).reshape(shape))
        return outputs[0] if len(outputs) == 1 else outputs

    def _function(self, name: str, shared: int) -> Any:
        if name not in self._pipelines:
            self._pipelines[name] = self.driver.function(self.module, name, shared)
        return self._pipelines[name]


def _width(dtype: str) -> int:
    """Bytes of an element: whole numbers of 64 bits and truth values are kept as 32."""
    return 4 if dtype in ("int64", "bool") else to_numpy(dtype).itemsize
