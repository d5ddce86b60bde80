"""A calibrated compilation killed at any moment and resumed: the same bytes as an uninterrupted one."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
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
# Imports everything, and goes on as a copy of itself for every line (model, output, whether to resume): what
# is killed is a process of its own, and need not import torch again.
RUN = """
import json, os, sys
import torch.export, transformers.models.llama.modeling_llama
from llmc.codegen.calibrate import CalibrationOptions
from llmc.codegen.driver import compile_model
from llmc.codegen.request import NO_VERDICT

def compile(model, out, resume):
    compile_model(model, out, targets=["null"], quant="gptq-int4-g32", verdict=NO_VERDICT,
                  calibration=CalibrationOptions(tokens=2048, resume=resume),
                  progress=lambda what, share: what.startswith("quantizing") and print("begin", flush=True),
                  say=lambda text: print(text, flush=True))

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        compile(*json.loads(line))
        os._exit(0)
    print("process", child, flush=True)
    print("status", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Compiling:
    """Compilations in processes that can be killed, one after the other."""

    def __init__(self, server: subprocess.Popen[str]) -> None:
        assert server.stdin is not None and server.stdout is not None
        self._jobs, self._lines = server.stdin, server.stdout
        self.said: list[str] = []
        """What the compilation said, with its status at the end."""

    def start(self, model: Path, out: Path, *, resume: bool) -> None:
        self.said = []
        self._jobs.write(json.dumps([str(model), str(out), resume]) + "\n")
        self._jobs.flush()
        self._process = int(self._until("process ").split()[1])

    def wait_for_quantizing(self) -> None:
        self._until("begin")

    def status(self) -> int:
        """0, or a signal as negative number."""
        return int(self._until("status ").split()[1])

    def _until(self, beginning: str) -> str:
        while not (self.said and self.said[-1].startswith(("status ", beginning))):
            self.said.append(self._lines.readline())
            assert self.said[-1], "the server is gone"
        return self.said[-1]

    def runs(self) -> bool:
        try:
            os.kill(self._process, 0)
        except ProcessLookupError:
            return False
        return True

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process, signal.SIGKILL)


@pytest.fixture
def compiling() -> Iterator[Compiling]:
    command = [sys.executable, "-c", RUN]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        yield Compiling(server)


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
def test_killed_again_and_again_and_resumed(model: Path, tmp_path: Path, compiling: Compiling) -> None:
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
        compiling.start(model, out, resume=attempt > 0)
        compiling.wait_for_quantizing()
        before = pieces()
        # The first is killed wherever it is, the others when they have something to go on from.
        while 0 < killed < kills and compiling.runs() and pieces() == before:
            time.sleep(0.002)
        if killed < kills:
            time.sleep(moments.uniform(0, lasts / 8))
            compiling.kill()
        status = compiling.status()
        assert status in (0, -signal.SIGKILL), compiling.said
        killed += status != 0
        resumed += any(line.startswith("resumed: ") for line in compiling.said)
        if status == 0 and killed >= kills:
            break
    assert killed == kills and resumed > 0
    assert files_of(out) == files_of(whole)
    assert Artifact.open(out).manifest["quantization"]["scheme"] == SCHEME
    assert [p.name for p in out.parent.iterdir()] == [out.name]
