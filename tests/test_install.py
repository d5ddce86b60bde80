"""The wheel in a clean environment: artifacts run where neither torch nor transformers is installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest

from .conftest import ROOT
from .models import CONTEXT, ids_of, reference_logits, tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.network]
pytest.importorskip("torch")


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment that holds the wheel and what it depends on, nothing else."""
    folder = tmp_path_factory.mktemp("clean")
    wheels = folder / "wheels"
    source = folder / "source"
    leave = shutil.ignore_patterns(".*", "build", "*.egg-info", "*.llmc")
    shutil.copytree(ROOT, source, ignore=leave)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "-w", str(wheels), str(source)], check=True)
    (wheel,) = wheels.glob("*.whl")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv/bin/python"
    install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*install, str(wheel)], check=True)
    return python


def llmc(python: Path, *words: str | Path, **environment: str) -> dict[str, Any]:
    """The JSON of a command in the clean environment, run from where no source tree is in reach."""
    command = [str(python), "-m", "llmc.cli.main", *map(str, words), "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=python.parent, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_base_install_holds_no_torch(clean: Path) -> None:
    listed = subprocess.run(
        [clean, "-m", "pip", "list", "--format=json"], capture_output=True, text=True, check=True
    )
    names = {package["name"].lower() for package in json.loads(listed.stdout)}
    assert "llmc" in names
    assert not names & {"torch", "transformers", "gguf", "onnx", "apache-tvm", "apache-tvm-ffi"}
    report = llmc(clean, "doctor")
    assert report["can"] == {"run": True, "compile": False, "wrong_packages": report["can"]["wrong_packages"]}
    assert any(package.startswith("torch") for package in report["can"]["wrong_packages"])


def test_compiling_says_what_is_missing(clean: Path, tmp_path: Path, tiny_folder: Any) -> None:
    words = [clean, "-m", "llmc.cli.main", "compile", tiny_folder("llama"), "-o", tmp_path / "x.llmc"]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: Python package ")
    assert "pip install 'llmc[compile]'" in done.stderr


@pytest.mark.parametrize("target", ["tvm-cpu", "onnx-cpu"])
def test_artifacts_run_there(clean: Path, tmp_path: Path, tiny_folder: Any, target: str) -> None:
    artifact = tmp_path / "tiny.llmc"
    # No compiler in reach while compiling: PATH holds an empty folder.
    (tmp_path / "empty").mkdir()
    here = Path(sys.executable)
    llmc(
        here,
        "compile",
        tiny_folder("llama"),
        "-o",
        artifact,
        "--target",
        target,
        PATH=str(tmp_path / "empty"),
    )
    answer = llmc(clean, "run", artifact, "The river", "--max-tokens", "8", "--ignore-eos", PATH="")
    assert answer["generated_tokens"] == 8
    ids = ids_of(min(40, CONTEXT))
    script = (
        "import llmc, sys, numpy\n"
        f"logits = llmc.load({str(artifact)!r}, kv_tokens=64).logits({ids})\n"
        f"numpy.save({str(tmp_path / 'logits.npy')!r}, logits)\n"
        "assert not {'torch', 'transformers', 'tvm'} & {m for m, v in sys.modules.items() if v is not None}\n"
    )
    subprocess.run([clean, "-c", script], check=True, cwd=tmp_path)
    import numpy as np

    expected = reference_logits(tiny_model("llama"), ids)
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, rtol=0, atol=1e-4 * scale)
