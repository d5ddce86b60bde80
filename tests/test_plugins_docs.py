"""The package that docs/plugins.md makes, block by block: it is installed, listed, tested and used."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from .conftest import ROOT
from .plugin_packages import install

pytest.importorskip("torch")
BLOCK = re.compile(r"^```(\w+)\n# (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the page's package is installed."""
    files = {name: text for _, name, text in BLOCK.findall((ROOT / "docs/plugins.md").read_text())}
    project = tomllib.loads(files.pop("pyproject.toml"))["project"]
    assert len(files) == 10, sorted(files)
    return install(
        tmp_path_factory.mktemp("docs") / "site",
        project["name"],
        {"my_plugin/__init__.py": "", **files},
        project["entry-points"],
        version=project["version"],
    )


def python(site: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **environment},
        cwd=site,
    )


def llmc(site: Path, *words: str) -> dict[str, Any]:
    done = python(site, "-m", "llmc.cli.main", *words, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_everything_that_it_brings_is_listed_without_an_error(site: Path) -> None:
    listed = llmc(site, "plugins")
    (plugin,) = listed["plugins"]
    assert (plugin["package"], plugin["version"], plugin["api"]) == ("my-plugin", "0.1", ["1.0"])
    assert [row for row in plugin["brings"] if "error" in row] == []
    assert sorted((row["kind"], row["name"]) for row in plugin["brings"]) == [
        ("executor", "reference"),
        ("ops", "my-ops"),
        ("pass", "scale-logits"),
        ("pass", "simplify-relu"),
        ("quantizer", "power-of-two"),
        ("sampler", "no-repeat"),
        ("target", "reference"),
        ("tool format", "arrow"),
        ("tools", "roll"),
    ]
    text = python(site, "-m", "llmc.cli.main", "plugins").stdout
    assert "my-plugin 0.1 (API 1.0)" in text and "Multiply the logits by a number" in text


@pytest.mark.slow
def test_the_tests_of_the_page_pass(site: Path) -> None:
    done = python(site, "-m", "pytest", "-q", "-p", "no:cacheprovider", "my_plugin/test_my_plugin.py")
    assert done.returncode == 0 and "4 passed" in done.stdout, done.stdout + done.stderr


MODULE = """
import sys, torch, llmc, numpy as np

@torch.library.custom_op("my_plugin::softcap", mutates_args=())
def softcap(x: torch.Tensor, cap: float) -> torch.Tensor:
    return cap * torch.tanh(x / cap)

@softcap.register_fake
def _(x, cap):
    return torch.empty_like(x)

class Capped(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(24, 40)

    def forward(self, x):
        return softcap(self.linear(x), 2.0) * 3.0

torch.manual_seed(0)
module, x = Capped().eval(), torch.randn(5, 24) * 4
for target in sys.argv[1:]:
    llmc.compile(module, f"capped-{target.partition(':')[0]}.llmc", targets=[target], example_inputs={"x": x})
    text = llmc.Artifact.open(f"capped-{target.partition(':')[0]}.llmc").read_text("ir.txt")
    assert " = my_softcap(" in text and "cap = 2.0" in text, text
    with llmc.load(f"capped-{target.partition(':')[0]}.llmc") as found:
        (y,) = found.run(x=x.numpy()).values()
    error = np.abs(y - module(x).detach().numpy()).max()
    assert error < 1e-4, error
print("same")
"""


def test_the_op_is_traced_compiled_and_run(site: Path) -> None:
    """tvm-cpu: its own kernel, made in another process; onnx-cpu: decomposed."""
    pytest.importorskip("tvm")
    done = python(site, "-c", MODULE, "tvm-cpu:isa=avx2", "onnx-cpu")
    assert done.returncode == 0 and done.stdout.strip() == "same", done.stdout + done.stderr
    shown = llmc(site, "inspect", "capped-tvm-cpu.llmc")
    assert shown["artifact_kind"] == "function" and shown["targets"]["tvm-cpu"]["isas"] == ["avx2"]


def test_without_the_package_the_op_is_unknown_and_the_artifact_still_runs(
    site: Path, tmp_path: Path
) -> None:
    """What is compiled needs the plugin no more; its text can be read as text."""
    pytest.importorskip("tvm")
    artifact = site / "capped-tvm-cpu.llmc"
    if not artifact.exists():
        pytest.skip("the test that compiles it did not run")
    done = python(tmp_path, "-m", "llmc.cli.main", "inspect", str(artifact), "--json")
    assert done.returncode == 0, done.stderr
    use = f"import llmc, numpy as np; print(llmc.load({str(artifact)!r}).run(x=np.ones((5, 24), 'f4')))"
    assert python(tmp_path, "-c", use).returncode == 0


def test_the_grammar_of_the_format_holds() -> None:
    """The page's grammar is one that llguidance takes (`check_tool_format` asks only that there is one)."""
    from llguidance import LLMatcher

    text = (ROOT / "docs/plugins.md").read_text()
    (source,) = [body for _, name, body in BLOCK.findall(text) if name == "my_plugin/format.py"]
    scope: dict[str, Any] = {}
    exec(source, scope)  # the page's own code
    from llmc.runtime.tool_calls import Tool

    tools = [
        Tool("now", "The time."),
        Tool("say", "", {"type": "object", "properties": {"it": {"type": "string"}}}),
    ]
    for required in (True, False):
        for parallel in (True, False):
            grammar = scope["Arrow"]().grammar(tools, required=required, parallel=parallel)
            assert not LLMatcher.validate_grammar(LLMatcher.grammar_from_lark(grammar)), grammar
