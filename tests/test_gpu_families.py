"""Which of transformers' families become kernels for GPUs: all that are compiled for any target."""

from __future__ import annotations

from pathlib import Path

import pytest
from llmc.codegen.target import get_target
from llmc.codegen.trace_cache import trace_once
from llmc.codegen.tvm.gpu.program import CUDA, make_program
from llmc.codegen.tvm.wgsl.lower import WGSL
from llmc.frontend.source import open_source
from llmc.passes.quantize.scheme import weight_passes
from llmc.runtime.executor.webgpu_driver import WebGpuDriver

from .conftest import LONG
from .families import save_family
from .family_configs import NOT_BUILT, families
from .graphs import lowered
from .webgpu_device import driver as any_driver

if not LONG:
    pytest.skip("LLMC_LONG_TESTS=1: minutes of tracing", allow_module_level=True)


@pytest.fixture(scope="module")
def driver() -> WebGpuDriver:
    return any_driver()


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in families() if name not in NOT_BUILT])
def test_family_becomes_kernels(family: str, driver: WebGpuDriver, tmp_path: Path) -> None:
    """WGSL to the end: the driver makes its own code of it."""
    folder = tmp_path / family.replace(" ", "-")
    try:
        save_family(family, folder)
        graph, _ = lowered(trace_once(open_source(folder)), "paged", weight_passes("int4-g32"))
    except Exception as error:  # noqa: BLE001  (whatever transformers raises on a small configuration)
        pytest.skip(f"not compiled for any target: {error}"[:200])
    program = make_program(get_target("tvm-cuda").legal(graph), CUDA)
    assert program.entry["calls"]
    assert "KERNEL" in program.text
    program = make_program(get_target("tvm-webgpu").legal(graph), WGSL)
    module = driver.load(program.text)
    launches = [launch for kernel in program.entry["kernels"] for launch in kernel["launches"]]
    assert {launch["function"] for launch in launches} == set(module)
    for name in module:
        driver.function(module, name, 0)
