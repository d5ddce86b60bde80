"""The packages in examples/plugins, built as wheels and installed with llmc's own into a clean
environment: each is listed, its tests pass there, and a model compiles with it.

"Clean": nothing of this checkout is in reach. Third-party packages are linked from the environment that runs
the tests, so that nothing is fetched (torch alone is 200 MB).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .conftest import ROOT
from .models import reference_logits, save_tiny, tiny_model

pytestmark = pytest.mark.slow
pytest.importorskip("torch")

EXAMPLES = ROOT / "examples" / "plugins"
PACKAGES = ("drop-layers", "half-quadratic", "numpy-target")
LAYERS = 4
IDS = [5, 17, 33, 2, 90, 41, 8, 12, 77, 60, 3, 19]


def build(source: Path, work: Path, wheels: Path) -> None:
    """A wheel of a copy of `source`: setuptools leaves its build folder where it builds."""
    leave = shutil.ignore_patterns(".*", "build", "*.egg-info", "*.llmc", "__pycache__")
    shutil.copytree(source, work / source.name, ignore=leave)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    command += ["--disable-pip-version-check", "-w", str(wheels), str(work / source.name)]
    subprocess.run(command, check=True)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment with llmc and the three packages, from their wheels."""
    folder = tmp_path_factory.mktemp("clean")
    wheels = folder / "wheels"
    for source in (ROOT, *(EXAMPLES / name for name in PACKAGES)):
        build(source, folder, wheels)
    assert len(list(wheels.glob("*.whl"))) == 1 + len(PACKAGES)
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv/bin/python"
    (site,) = (folder / "venv/lib").glob("python*/site-packages")
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        ours = entry.name.startswith(("llmc", "__editable__", "_distutils_hack")) or entry.suffix == ".pth"
        if not ours and not (site / entry.name).exists():
            (site / entry.name).symlink_to(entry)
    install = [str(python), "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    install += ["--disable-pip-version-check"]
    subprocess.run([*install, *map(str, wheels.glob("*.whl"))], check=True)
    return python


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=LAYERS)


def python(clean: Path, *words: str | Path) -> str:
    """Output of a command in the clean environment, run from where no source tree is in reach."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(clean), *map(str, words)], capture_output=True, text=True, cwd=clean.parent, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def llmc(clean: Path, *words: str | Path) -> dict[str, Any]:
    return json.loads(python(clean, "-m", "llmc.cli.main", *words, "--json"))


def logits(clean: Path, artifact: Path, target: str) -> np.ndarray:
    """float32 [tokens, vocabulary] by the runtime alone, which must load no torch."""
    out = artifact.with_suffix(f".{target}.npy")
    python(
        clean,
        "-c",
        "import llmc, numpy, sys\n"
        f"found = llmc.load({str(artifact)!r}, target={target!r}, kv_tokens=64).logits({IDS})\n"
        f"numpy.save({str(out)!r}, found)\n"
        "assert not {'torch', 'transformers', 'tvm'} & set(sys.modules)\n",
    )
    return np.load(out)


def test_all_three_are_installed_from_their_wheels(clean: Path) -> None:
    where = python(clean, "-c", "import llmc, llmc_drop_layers as d; print(llmc.__file__); print(d.__file__)")
    assert all(str(clean.parent.parent) in line for line in where.splitlines()) and str(ROOT) not in where
    listed = llmc(clean, "plugins")["plugins"]
    assert [(row["package"], row["version"], row["api"]) for row in listed] == [
        (f"llmc-{name}", "1.0", ["1.0"]) for name in PACKAGES
    ]
    assert [(one["kind"], one["name"]) for row in listed for one in row["brings"] if "error" not in one] == [
        ("pass", "drop-idle-layers"),
        ("pass", "drop-layers"),
        ("pass", "quantize-half-quadratic"),
        ("quantizer", "half-quadratic"),
        ("target", "numpy-cpu"),
        ("executor", "numpy-cpu"),
    ]
    passes = {row["name"]: row["package"] for row in llmc(clean, "passes")["passes"]}
    assert passes["drop-layers"] == "llmc-drop-layers" and passes["fuse-rope"] == "llmc"
    targets = {row["name"]: row["package"] for row in llmc(clean, "targets")["targets"]}
    assert targets["numpy-cpu"] == "llmc-numpy-target" and targets["tvm-cpu"] == "llmc"


@pytest.mark.parametrize("name", PACKAGES)
def test_its_own_tests_pass_there(clean: Path, name: str) -> None:
    tests = EXAMPLES / name / "tests"
    words = ("-q", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", tests)
    assert " passed" in python(clean, "-m", "pytest", *words, tests)


def test_the_pass_leaves_the_layer_out(clean: Path, model: Path, tmp_path: Path) -> None:
    """The oracle: transformers, with that layer taken out of the list."""
    artifact = tmp_path / "shallow.llmc"
    words = (
        "compile",
        model,
        "-o",
        artifact,
        "--target",
        "onnx-cpu",
        "--pass",
        "drop-layers{first=1,count=1}",
    )
    llmc(clean, *words)
    shown = llmc(clean, "inspect", artifact)
    assert (
        shown["model"]["num_layers"] == LAYERS - 1 and shown["command"][-1] == "drop-layers{first=1,count=1}"
    )
    whole = tiny_model("llama", num_hidden_layers=LAYERS)
    assert len(whole.model.layers) == LAYERS
    del whole.model.layers[1]
    for number, layer in enumerate(whole.model.layers):
        layer.self_attn.layer_idx = number
    whole.config.num_hidden_layers = LAYERS - 1
    wanted = reference_logits(whole, IDS)
    found = logits(clean, artifact, "onnx-cpu")
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * max(1.0, float(np.abs(wanted).max())))


def test_the_calibrated_pass_says_which_layers(clean: Path, model: Path, tmp_path: Path) -> None:
    words = ("compile", model, "-o", tmp_path / "idle.llmc", "--target", "null", "--calib-tokens", "2048")
    done = llmc(clean, *words, "--pass", "drop-idle-layers{count=2}")
    assert any("left out layers" in note and "of 4, by their influence" in note for note in done["notes"]), (
        done
    )
    assert llmc(clean, "inspect", tmp_path / "idle.llmc")["model"]["num_layers"] == LAYERS - 2


def test_the_quantizer_loses_less_than_round_to_nearest_on_its_grid(
    clean: Path, model: Path, tmp_path: Path
) -> None:
    """The verdict is measured by the compiler on held-out text; the logits come from kernels of tvm-cpu's
    kind.
    """
    lost: dict[str, float] = {}
    for scheme in ("hqq-int3-g32", "minmax-int3-g32"):
        artifact = tmp_path / f"{scheme}.llmc"
        llmc(clean, "compile", model, "-o", artifact, "--target", "onnx-cpu", "--quant", scheme)
        shown = llmc(clean, "inspect", artifact)
        assert shown["quantization"]["scheme"] == scheme
        lost[scheme] = float(np.mean([layer["error"] for layer in shown["quality"]["layers"]]))
    assert lost["hqq-int3-g32"] < lost["minmax-int3-g32"], lost


@pytest.mark.parametrize("quant", ["none", "int4-g32"])
def test_the_target_computes_what_onnx_does(clean: Path, model: Path, tmp_path: Path, quant: str) -> None:
    artifact = tmp_path / "two.llmc"
    words = (
        "compile",
        model,
        "-o",
        artifact,
        "--target",
        "numpy-cpu:rows=5",
        "--quant",
        quant,
        "--no-verdict",
    )
    llmc(clean, *words, "--target", "onnx-cpu:accuracy_level=1", "--kv-dtype", "float32")
    found, wanted = (logits(clean, artifact, target) for target in ("numpy-cpu", "onnx-cpu"))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-4 * max(1.0, float(np.abs(wanted).max())))
    options = ("--max-tokens", "8", "--ignore-eos", "--temperature", "0")
    texts = [
        llmc(clean, "run", artifact, "The river", *options, "--target", t) for t in ("numpy-cpu", "onnx-cpu")
    ]
    assert texts[0]["text"] == texts[1]["text"] and texts[0]["generated_tokens"] == 8
