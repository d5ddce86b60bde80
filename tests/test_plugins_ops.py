"""A package's op with emitters of its own and no decomposition: all that reads or compiles models."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llmc.codegen.artifact import ArtifactWriter
from llmc.codegen.driver import check_model, compile_model
from llmc.codegen.target import get_target
from llmc.frontend.aten_table import TABLE
from llmc.ir.define import OPS
from llmc.ir.errors import ArtifactError

from .models import ids_of, reference_logits, tiny_model
from .plugin_packages import SMALL, install, installed

OP = '''
"""SiLU as a package would bring it. The kernel compiler's process has no torch and no tracing."""
import sys
from llmc.plugins import Op, Operand, op

@op("own_silu")
class OwnSilu(Op):
    x: Operand
    emitters = {"tvm-cpu": "own_silu.tvm", "onnx-cpu": "own_silu.onnx"}

    def infer(self):
        return [self.x.type]

    def reference(self, dims, x):
        return x / (1 + (-x).exp())

if "llmc.frontend.aten" in sys.modules:
    from llmc.plugins import aten

    @aten("silu.default")
    def silu(importer, x):
        return importer.emit(OwnSilu(x))
'''
TVM = """
from llmc.plugins.tvm import emits, relax

@emits("own_silu")
def own_silu(low, op):
    return low.emit(relax.op.nn.silu(low.get(op.x)))
"""
ONNX = """
from llmc.plugins.onnx import emits

@emits("own_silu")
def own_silu(context, op):
    x = context.name(op.x)
    return context.scope.op("Mul", x, context.scope.op("Sigmoid", x))
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Path]:
    """Where the package is installed; the frontend has no SiLU of its own meanwhile."""
    import llmc.frontend.aten  # noqa: F401  (fills the table)
    from llmc.codegen.onnx.context import EMITTERS

    files = {"own_silu/__init__.py": OP, "own_silu/tvm.py": TVM, "own_silu/onnx.py": ONNX}
    folder = install(tmp_path / "site", "own-silu", files, {"llmc.ops": {"own-silu": "own_silu"}}, api="1.0")
    monkeypatch.delitem(TABLE, "silu.default")
    monkeypatch.setenv("PYTHONPATH", str(folder))  # for the kernel compiler's process
    with installed(folder):
        yield folder
    EMITTERS.pop("own_silu", None)


def test_check_takes_what_compile_takes(site: Path, tiny_folder: Any) -> None:
    folder = tiny_folder("llama")
    for target in ("tvm-cpu", "onnx-cpu", "onnx-cuda"):
        report = check_model(folder, targets=[target])
        assert report.ops > 0 and "own_silu" in OPS
    assert "own_silu" in get_target("onnx-cuda").emitted()


def test_emitters_for_onnx_serve_both_of_its_targets(site: Path, tiny_folder: Any, tmp_path: Path) -> None:
    import llmc

    targets = ["onnx-cpu", "onnx-cuda:fallback=cpu"]
    artifact = compile_model(tiny_folder("llama"), tmp_path / "a.llmc", targets=targets).artifact
    assert "own_silu" in artifact.read_text("ir.txt")
    ids = ids_of(12)
    found = llmc.load(artifact.root, target="onnx-cpu", kv_tokens=64).logits(ids)
    assert np.abs(found - reference_logits(tiny_model("llama"), ids)).max() < 1e-4


@pytest.mark.slow
def test_adapters_get_places_in_a_model_with_a_packages_op(
    site: Path, tiny_folder: Any, tmp_path: Path
) -> None:
    from llmc.codegen.tvm.placed import placed_kernels
    from llmc.codegen.tvm.stored import stored_graph

    target = "tvm-cpu:isa=generic"
    artifact = compile_model(tiny_folder("llama"), tmp_path / "a.llmc", targets=[target]).artifact
    assert any(op.opname == "own_silu" for op in stored_graph(artifact))
    with placed_kernels(artifact, "generic") as (entry, library):
        assert entry["adapters"] and library.stat().st_size > 0


def test_without_the_package_an_artifact_with_its_op_says_what_to_install(tmp_path: Path) -> None:
    from llmc.codegen.tvm.placed import placed_kernels

    with ArtifactWriter(tmp_path / "a.llmc") as writer:
        writer.path("ir.txt").write_text(SMALL.replace("relu", "own_silu"))
        artifact = writer.finish({"kind": "function", "model": {}, "targets": {"null": {}}})
    with (
        pytest.raises(
            ArtifactError, match=r"package that is not installed .*no op is named own_silu"
        ) as caught,
        placed_kernels(artifact, "generic"),
    ):
        pass
    assert caught.value.remedy == "install the package, or compile the model again, with --adapters"
