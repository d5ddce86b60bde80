"""Which of transformers' families become CUDA kernels: all that are compiled for any target."""

from __future__ import annotations

from pathlib import Path

import pytest
from llmc.codegen.target import get_target
from llmc.codegen.trace_cache import trace_once
from llmc.codegen.tvm.gpu.program import make_program
from llmc.frontend.source import open_source
from llmc.passes.quantize.scheme import weight_passes

from .conftest import LONG
from .families import save_family
from .family_configs import NOT_BUILT, families
from .graphs import lowered

if not LONG:
    pytest.skip("LLMC_LONG_TESTS=1: minutes of tracing", allow_module_level=True)


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in families() if name not in NOT_BUILT])
def test_family_becomes_cuda_kernels(family: str, tmp_path: Path) -> None:
    folder = tmp_path / family.replace(" ", "-")
    try:
        save_family(family, folder)
        graph, _ = lowered(trace_once(open_source(folder)), "paged", weight_passes("int4-g32"))
    except Exception as error:  # noqa: BLE001  (whatever transformers raises on a small configuration)
        pytest.skip(f"not compiled for any target: {error}"[:200])
    program = make_program(get_target("tvm-cuda").legal(graph))
    assert program.entry["calls"]
    assert "KERNEL" in program.text
