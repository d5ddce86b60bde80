"""A calibrated compilation killed at any moment and resumed: the same bytes as an uninterrupted one."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from llmc.codegen.artifact import Artifact
from llmc.codegen.calibrate import CalibrationOptions, work_path
from llmc.codegen.driver import compile_model
from llmc.codegen.request import NO_VERDICT
from llmc.ir.errors import InputError
from llmc.passes.work import WorkFolder

from .conftest import LONG
from .models import save_tiny

pytest.importorskip("torch")

SCHEME = "gptq-int4-g32"
# In a process of its own: what it says goes to stdout line by line, "begin" when quantizing begins.
RUN = """
import sys
from llmc.codegen.calibrate import CalibrationOptions
from llmc.codegen.driver import compile_model
from llmc.codegen.request import NO_VERDICT
model, out, resume = sys.argv[1:]
options = CalibrationOptions(tokens=2048, resume=resume == "True")
compile_model(model, out, targets=["null"], quant="gptq-int4-g32", calibration=options, verdict=NO_VERDICT,
              progress=lambda what, share: what.startswith("quantizing") and print("begin", flush=True),
              say=lambda text: print(text, flush=True))
"""


def files_of(artifact: Path) -> dict[str, bytes]:
    return {str(p.relative_to(artifact)): p.read_bytes() for p in sorted(artifact.rglob("*")) if p.is_file()}


def compile_here(
    model: Path, out: Path, *, resume: bool = False, tokens: int = 2048
) -> tuple[Path, list[str]]:
    said: list[str] = []
    options = CalibrationOptions(tokens=tokens, resume=resume)
    compile_model(
        model, out, targets=["null"], quant=SCHEME, calibration=options, verdict=NO_VERDICT, say=said.append
    )
    return out, said


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six layers: enough moments to be killed at."""
    return save_tiny("llama", tmp_path_factory.mktemp("model") / "llama", num_hidden_layers=6)


@pytest.mark.slow
def test_an_interrupted_run_is_resumed_to_the_same_bytes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, said = compile_here(model, tmp_path / "whole.llmc")
    assert said[0].startswith("predicted peak of memory: ") and not work_path(whole).exists()
    save, saved = WorkFolder.save, list[str]()

    def save_three(self: WorkFolder, name: str, arrays: Any) -> None:
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(name)
        save(self, name, arrays)

    out = tmp_path / "out" / "whole.llmc"
    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "save", save_three)
        with pytest.raises(KeyboardInterrupt):
            compile_here(model, out)
    assert not out.exists() and work_path(out).is_dir()
    with pytest.raises(InputError, match=r"holds work of another compilation: calibration tokens differs"):
        compile_here(model, out, resume=True, tokens=4096)
    _, said = compile_here(model, out, resume=True)
    assert f"resumed: 3 finished parts of an earlier run are in {work_path(out).name}" in said
    assert files_of(out) == files_of(whole)
    assert [p.name for p in out.parent.iterdir()] == [out.name]  # neither work nor partial folder is left


@pytest.mark.slow
def test_without_resume_old_work_is_started_over(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.llmc"
    stale = WorkFolder.open(work_path(out), {"scheme": "another"}, resume=False)
    stale.save("codes-1", {})
    _, said = compile_here(model, out)
    assert not any("resumed" in text for text in said) and not work_path(out).exists()
    _, said = compile_here(model, out, resume=True)
    assert "nothing to resume: starting from the beginning" in said


def test_a_folder_of_the_users_is_not_touched(model: Path, tmp_path: Path) -> None:
    work = work_path(tmp_path / "m.llmc")
    work.mkdir()
    (work / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match=r"m\.llmc\.work is not a work folder of llmc"):
        compile_here(model, tmp_path / "m.llmc")
    assert [p.name for p in tmp_path.iterdir()] == [work.name] and (work / "letter.txt").read_text() == "dear"


@pytest.mark.slow
def test_killed_again_and_again_and_resumed(model: Path, tmp_path: Path) -> None:
    kills = 10 if LONG else 4
    began = time.perf_counter()
    whole, _ = compile_here(model, tmp_path / "whole.llmc")
    lasts = time.perf_counter() - began
    moments = random.Random(20)
    out = tmp_path / "out" / "whole.llmc"
    killed, resumed = 0, 0

    def pieces() -> int:
        return sum(1 for _ in out.with_name(f"{out.name}.work").glob("*.piece"))

    for attempt in range(200):
        command = [sys.executable, "-c", RUN, str(model), str(out), str(attempt > 0)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ})
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        said = []
        for line in lines:
            said.append(line)
            if line == "begin\n":
                break
        before = pieces()
        # The first is killed wherever it is, the others when they have something to go on from.
        while 0 < killed < kills and process.poll() is None and pieces() == before:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, lasts / 8) if killed < kills else 0)
        if killed < kills and process.poll() is None:
            process.kill()
            killed += 1
        said += list(lines)
        status = process.wait()
        process.stdout.close()
        resumed += any(line.startswith("resumed: ") for line in said)
        assert status in (0, -9), said
        if status == 0 and killed >= kills:
            break
    assert killed == kills and resumed > 0
    assert files_of(out) == files_of(whole)
    assert Artifact.open(out).manifest["quantization"]["scheme"] == SCHEME
    assert [p.name for p in out.parent.iterdir()] == [out.name]
