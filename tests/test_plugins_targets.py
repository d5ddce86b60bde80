"""Plugins whose targets, executors or ops are broken: what is said of them; and what goes on without any."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from llmc.codegen.artifact import Artifact, ArtifactWriter
from llmc.codegen.extensions import load_ops, parse_graph
from llmc.codegen.target import emit_target, get_target, prepare_targets
from llmc.ir.define import OPS
from llmc.ir.errors import CompileError, InputError, UnsupportedError
from llmc.ir.printer import print_graph
from llmc.passes.registry import make_pass
from llmc.plugins.entries import blaming, package_of
from llmc.plugins.listing import installed as list_installed
from llmc.plugins.version import API_VERSION

from .plugin_packages import PASSES, QUANTIZERS, SMALL, Use, install, installed, small, use

__all__ = ["use"]  # a fixture


# Targets ---------------------------------------------------------------------------------------------------

TARGETS = {"llmc.targets": {"bad": "bad_plugin:Bad"}, "llmc.executors": {"bad": "bad_plugin:open_target"}}


def a_target(body: str, executor: str = "raise OSError('no device')") -> str:
    return f"""
from dataclasses import dataclass
from typing import ClassVar
import numpy as np
from llmc.plugins import Target

@dataclass(frozen=True)
class Bad(Target):
    name: ClassVar[str] = "bad"

    def compile(self, graph, writer, *, progress):
        {body}

class Executor:
    page_size, vocab_size, kv_bytes_per_page = 16, 8, 0
    max_pages, batch_invariant = None, True
    def allocate_kv(self, num_pages): pass
    def copy_pages(self, src, dst): pass
    def run(self, inputs): return dict(inputs)
    def step(self, inputs):
        {executor}

def open_target(artifact, *, isa, threads):
    return Executor()
"""


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "raise ValueError('chip')",
            "target bad of package bad-plugin raised ValueError: chip at bad_plugin.py:",
        ),
        ("return None", "target bad of package bad-plugin: its compile gave a NoneType, not a dict"),
        (
            "return {'size': np.float32(1)}",
            "target bad of package bad-plugin returned a manifest entry that is no J",
        ),
    ],
)
def test_a_target_that_goes_wrong_names_its_package_and_leaves_nothing(
    use: Use, tmp_path: Path, body: str, message: str
) -> None:
    use(a_target(body), TARGETS)
    with pytest.raises(CompileError, match=message), ArtifactWriter(tmp_path / "x.llmc") as writer:
        emit_target(get_target("bad"), None, small(), writer, progress=lambda what, share: None)  # type: ignore
    assert not list(tmp_path.glob("x.llmc*"))


@pytest.mark.parametrize("body", ["raise ValueError('chip')", "return 7"])
def test_what_a_target_begins_names_its_package_where_it_goes_wrong(use: Use, body: str) -> None:
    use(a_target(f"pass\n\n    def prepared(self):\n        {body}"), TARGETS)
    with (
        pytest.raises(CompileError, match="target bad of package bad-plugin raised "),
        ExitStack() as stack,
    ):
        prepare_targets([get_target("bad")], stack)


def test_a_target_that_refuses_an_instance_gets_what_it_is_made_of(use: Use) -> None:
    takes = "operations = frozenset({'relu', 'add'})\n\n    def supports(self, op):\n        return False"
    use(a_target(f"pass\n\n    {takes}"), TARGETS)
    with pytest.raises(UnsupportedError, match="cannot emit "):
        get_target("bad").legal(small())


def test_a_target_cannot_change_the_graph_for_those_after_it(use: Use, tmp_path: Path) -> None:
    use(a_target("graph.outputs.clear(); graph.drop_dead(); return {}"), TARGETS)
    graph = small()
    with ArtifactWriter(tmp_path / "x.llmc") as writer:
        entry = emit_target(get_target("bad"), None, graph, writer, progress=lambda what, share: None)  # type: ignore
    assert entry == {"options": {}, "batch_invariant": False}
    assert print_graph(graph) == print_graph(small())


def bad_artifact(tmp_path: Path, *targets: str) -> Artifact:
    manifest = {"kind": "causal_lm", "model": {"vocab_size": 8, "context_length": 16, "kv": []}}
    with ArtifactWriter(tmp_path / "bad.llmc") as writer:
        return writer.finish({**manifest, "targets": {name: {} for name in targets}})


def step_of(executor: Any) -> Any:
    import numpy as np
    from llmc.runtime.executor import StepInputs

    one, none = np.zeros(1, np.int32), np.array([0, 1], np.int32)
    executor.allocate_kv(2)
    return executor.step(StepInputs(one, one, one, none, none[1:], one[None], one))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "raise OSError('no device')",
            "executor bad of package bad-plugin raised OSError: no device at bad_plugin",
        ),
        (
            "return None",
            r"executor bad of package bad-plugin answered a step with NoneType\[\], not float32\[1, 8\]",
        ),
        ("return np.zeros((1, 8))", r"answered a step with float64\[1, 8\], not float32\[1, 8\]"),
        ("return np.zeros((2, 8), 'f4')", r"answered a step with float32\[2, 8\], not float32\[1, 8\]"),
    ],
)
def test_an_executor_that_goes_wrong_names_its_package(
    use: Use, tmp_path: Path, body: str, message: str
) -> None:
    from llmc.runtime.executor import choose_target, open_executor

    use(a_target("return {}", body), TARGETS)
    artifact = bad_artifact(tmp_path, "bad", "null")
    assert choose_target(artifact.targets) == "null", "llmc's own are preferred"
    with pytest.raises(CompileError, match=message):
        step_of(open_executor(artifact, "bad"))


def test_an_executor_of_a_plugin_is_found_by_its_targets_name(use: Use, tmp_path: Path) -> None:
    from llmc.runtime.executor import open_executor

    use(a_target("return {}", "return np.ones((1, 8), 'f4')"), TARGETS)
    executor = open_executor(bad_artifact(tmp_path, "bad"))
    assert step_of(executor).tolist() == [[1.0] * 8] and executor.batch_invariant


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("page_size = '16'", "has '16' as its page_size, where a number belongs"),
        ("vocab_size = -1", "has -1 as its vocab_size"),
        ("step = None", "has no method step"),
    ],
)
def test_an_executor_that_lacks_a_part_is_refused(
    use: Use, tmp_path: Path, change: str, message: str
) -> None:
    from llmc.runtime.executor import open_executor

    use(a_target("return {}") + f"\nExecutor.{change}\n", TARGETS)
    with pytest.raises(CompileError, match=f"executor bad of package bad-plugin {message}"):
        open_executor(bad_artifact(tmp_path, "bad"))


def test_without_its_package_a_target_is_not_run(tmp_path: Path) -> None:
    from llmc.runtime.executor import open_executor

    with pytest.raises(
        InputError, match=r"no executor for any of the targets bad; .* install the package that"
    ):
        open_executor(bad_artifact(tmp_path, "bad"))


# Ops -------------------------------------------------------------------------------------------------------

OP = """
from llmc.plugins import CompileError, Op, Operand, TensorType, aten, decomposes, op

@op("my_op")
class MyOp(Op):
    x: Operand
    def infer(self):
        return [self.x.type]
"""
OPS_ENTRY = {"llmc.ops": {"mine": "bad_plugin"}}


@pytest.mark.parametrize(
    ("further", "said"),
    [
        ("op('relu')(MyOp)", "CompileError: two ops are named relu: llmc.ir.ops.math and bad_plugin"),
        (
            "aten('add.Tensor')(print)",
            "CompileError: operator aten.add.Tensor has two handlers: in llmc.frontend",
        ),
        (
            "decomposes('silu')(print)",
            "CompileError: silu has two decompositions: in llmc.codegen.legalize and ",
        ),
        ("1 / 0", "ZeroDivisionError: division by zero at bad_plugin.py:9"),
    ],
)
def test_a_module_of_ops_that_fails_leaves_no_trace(
    use: Use, caplog: pytest.LogCaptureFixture, further: str, said: str
) -> None:
    import llmc.frontend.aten
    from llmc.codegen.legalize import DECOMPOSITIONS
    from llmc.frontend.aten_table import TABLE

    assert llmc.frontend.aten.TABLE is TABLE
    before = dict(OPS), dict(TABLE), dict(DECOMPOSITIONS)
    use(OP + further, OPS_ENTRY)
    with caplog.at_level(logging.WARNING, "llmc.plugins"):
        (failed,) = load_ops()
    assert failed.startswith("ops mine of package bad-plugin cannot be imported") and said in failed
    assert before == (OPS, TABLE, DECOMPOSITIONS)
    assert [record.message for record in caplog.records] == [failed]
    assert len(small().ops) == 1, "graphs without that op are read as ever"
    with pytest.raises(
        CompileError, match=r"no op is named my_op.*ops mine of package bad-plugin cannot be imported"
    ):
        parse_graph(SMALL.replace("relu", "my_op"))


def test_an_op_that_works_is_known_to_targets_by_its_emitters(use: Use) -> None:
    use(OP + "    emitters = {'tvm-cpu': 'no_such_module_of_kernels'}\n", OPS_ENTRY)
    assert load_ops() == () and package_of(OPS["my_op"]) == "bad-plugin"
    assert "my_op" in get_target("tvm-cpu").emitted() and "my_op" not in get_target("onnx-cpu").emitted()
    assert "my_op" in get_target("null").emitted()
    from llmc.codegen.extensions import extensions_key, import_emitters
    from llmc.codegen.legalize import legalize

    graph = parse_graph(SMALL.replace("relu", "my_op"))
    with pytest.raises(UnsupportedError, match=r"the target cannot emit my_op"):
        legalize(graph, get_target("onnx-cpu").emitted())
    with pytest.raises(
        CompileError, match=r"tvm-cpu's emitter of my_op of package bad-plugin raised ModuleNotFound"
    ):
        import_emitters(graph.ops[0], "tvm-cpu")
    assert extensions_key(graph, "tvm-cpu") and not extensions_key(small(), "tvm-cpu")


def test_the_hash_of_kernels_covers_the_packages_sources(use: Use, tmp_path: Path) -> None:
    from llmc.codegen.extensions import extensions_key

    site = use(OP, OPS_ENTRY)
    load_ops()
    graph = parse_graph(SMALL.replace("relu", "my_op"))
    first = extensions_key(graph, "tvm-cpu")
    assert first == extensions_key(graph, "tvm-cpu")
    (site / "bad_plugin.py").write_text(OP + "\n# changed\n")
    assert extensions_key(graph, "tvm-cpu") != first


def test_packages_that_share_a_namespace_are_told_apart(tmp_path: Path) -> None:
    """Folders without __init__.py, of several distributions."""
    from llmc.codegen.extensions import extensions_key

    plain = OP.replace("my_op", "plain_op")
    one = install(tmp_path / "a", "acme-a", {"acme/a.py": plain}, {}, api=API_VERSION)
    two = install(tmp_path / "b", "acme-b", {"acme/b.py": OP}, {"llmc.ops": {"b": "acme.b"}}, api=API_VERSION)
    with installed(one, two):
        assert load_ops() == () and package_of(OPS["my_op"]) == "acme-b"
        graph = parse_graph(SMALL.replace("relu", "my_op"))
        first = extensions_key(graph, "tvm-cpu")
        (two / "acme/b.py").write_text(OP + "\n# changed\n")
        assert extensions_key(graph, "tvm-cpu") != first


def test_a_function_with_arguments_given_is_of_the_functions_package(use: Use) -> None:
    use(OP + "def f(x, y): pass\n", OPS_ENTRY)
    load_ops()
    theirs = partial(partial(sys.modules["bad_plugin"].f, 1), 2)
    assert package_of(theirs) == "bad-plugin"
    assert package_of(partial(parse_graph, "")) is None
    with (
        pytest.raises(CompileError, match="it of package bad-plugin raised ValueError"),
        blaming("it", theirs),
    ):
        raise ValueError


# What needs no plugin --------------------------------------------------------------------------------------


def test_commands_that_need_no_plugin_import_none(use: Use, tmp_path: Path) -> None:
    everything = {
        group: {"bad": "bad_plugin:Bad"}
        for group in (
            "llmc.passes", "llmc.quantizers", "llmc.targets", "llmc.executors", "llmc.samplers", "llmc.tools",
            "llmc.tool_formats",
        )
    }  # fmt: skip
    use("raise SystemExit('imported')", everything)
    from llmc.codegen.request import Plan
    from llmc.runtime.executor import open_executor

    plan = Plan.make(["tvm-cpu", "onnx-cpu"], "int4-g64", None, ["fuse-rope"])
    assert len(plan.targets) == 2 and len(plan.extra) == 1
    assert open_executor(bad_artifact(tmp_path, "null")).page_size == 16
    assert "bad_plugin" not in sys.modules
    (plugin,) = list_installed()
    assert len(plugin.brings) == 7 and all(
        "SystemExit: imported" in (one.error or "") for one in plugin.brings
    )


def test_lists_of_passes_and_targets_go_on_past_a_broken_plugin(
    use: Use, capsys: pytest.CaptureFixture[str]
) -> None:
    from llmc.cli.main import main

    use("raise ValueError('no')", {**PASSES, **QUANTIZERS, "llmc.targets": {"bad": "bad_plugin:Bad"}})
    assert main(["passes", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [row["error"] for row in listed["passes"] if row["package"] == "bad-plugin"] == [
        "pass bad of package bad-plugin cannot be imported (ValueError: no at bad_plugin.py:1); upgrade or "
        "uninstall bad-plugin"
    ]
    assert len(listed["passes"]) > 20 and len(listed["quantizers"]) > 5
    assert main(["targets", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["targets"]}
    assert "error" in rows["bad"] and "error" not in rows["tvm-cpu"]
    assert main(["plugins"]) == 0
    assert "bad-plugin 1.0 (API 1.0)" in capsys.readouterr().out


def test_a_damaged_distribution_harms_nobody(use: Use) -> None:
    site = use("", PASSES)
    (info,) = site.glob("*.dist-info")
    (info / "METADATA").unlink()
    with installed(site):
        assert str(make_pass("fuse-rope")) == "fuse-rope"
        with pytest.raises(InputError, match=r"pass bad of package bad_plugin cannot be imported"):
            make_pass("bad")
        assert [(one.package, one.version) for one in list_installed()] == [("bad_plugin", None)]


def test_importing_the_api_loads_nothing_heavy_and_every_name_is_there() -> None:
    code = (
        "import sys, llmc.plugins as p\n"
        "heavy = {'torch', 'tvm', 'tvm_ffi', 'numpy', 'transformers', 'onnx'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "missing = [name for name in p.__all__ if not hasattr(p, name)]\n"
        "assert not missing, missing\n"
        "assert not (heavy - {'numpy'}) & set(sys.modules), heavy & set(sys.modules)\n"
        "assert set(p.__all__) == set(dir(p)) and len(p.__all__) > 60\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
