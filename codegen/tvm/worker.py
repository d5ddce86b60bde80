"""Compiles one kernel library, or searches for schedules, in a process of its own: `python -m
llmc.codegen.tvm.worker PARENT`, where PARENT is the id of the process that waits for it. Its input is one
JSON object, the job, with the graph as text.

A process of its own because LLVM ends the process where an instruction cannot be selected, which must become
an error; because TVM's memory must not add to torch's; and because a graph is text, which passes without
pickling. Prints a JSON object a line, the result last: the symbols and arguments of the library, or what was
found; or an error's kind, message and remedy.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

from ...ir import errors
from ...ir.errors import CompileError, LlmcError
from .kernels.schedule import Schedule

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_LOOK = 0.2  # seconds between two looks at what a worker says


class Worker:
    """A process with a job. `result` waits for it; leaving the `with` block ends it."""

    def __init__(self, job: Mapping[str, Any], **environment: str) -> None:
        # Closed by __exit__. Files and not pipes: nobody reads while the worker writes.
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        with tempfile.TemporaryFile() as given:
            given.write(json.dumps(job).encode())
            given.seek(0)
            # -P: a folder named like one of ours in the current directory must not be imported.
            command = [sys.executable, "-P", "-m", __name__, str(os.getpid())]
            self._process = subprocess.Popen(
                command,
                stdin=given,
                stdout=self._output,
                stderr=self._said,
                env={**os.environ, **environment},
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._output.close()
        self._said.close()

    def _last(self) -> dict[str, Any] | None:
        """What the worker printed last; None where that is nothing, or no whole line yet."""
        # The worker writes through the same open file: its place in it must not move.
        size = os.fstat(self._output.fileno()).st_size
        lines = os.pread(self._output.fileno(), size, 0).decode(errors="replace").split("\n")[:-1]
        with contextlib.suppress(ValueError, IndexError):
            return json.loads([line for line in lines if line.strip()][-1])
        return None

    def _result(self, what: str, remedy: str) -> dict[str, Any]:
        """What the worker printed. Raises what the worker raised, or CompileError where it died."""
        status = self._process.wait()
        last = self._last()
        if status == 0 and last is not None:
            return last
        if status == 1 and last is not None:
            _raise_again(last)
        said = " | ".join(_lines(self._said)[-3:]) or "it said nothing"
        raise CompileError(f"{what} ended with status {status}: {said}", remedy=remedy)


class Compilation(Worker):
    """A library that is being compiled; `schedules` as in `build`."""

    def __init__(
        self, graph_text: str, isa: str, out: Path, schedules: Mapping[str, Schedule] | None = None
    ) -> None:
        self.isa = isa
        given = {key: schedule.as_json() for key, schedule in (schedules or {}).items()}
        super().__init__({"graph": graph_text, "isa": isa, "out": str(out), "schedules": given})

    def result(self) -> dict[str, Any]:
        """What `build` returned, as JSON. Raises what it raised, or CompileError where the worker died."""
        remedy = "compile with another --target tvm-cpu:isa=…, and report the model"
        return self._result(f"the kernel compiler for {self.isa}", remedy)


class Tuning(Worker):
    """A search for schedules that is running (`tune.py`)."""

    def __init__(self, graph_text: str, levels: Sequence[str], seconds: float) -> None:
        job = {"graph": graph_text, "levels": list(levels), "seconds": seconds}
        super().__init__(job, TVM_NUM_THREADS="1")

    def result(self, progress: Callable[[str, float], None]) -> tuple[str, dict[str, Schedule], int]:
        """Level, schedules and number of kernels of what `tune` returned. Raises what it raised, or
        CompileError where the worker died.
        """
        while self._process.poll() is None:
            time.sleep(_LOOK)
            last = self._last()
            if last is not None and "share" in last:
                progress(last["what"], last["share"])
        found = self._result("the search for schedules", "compile without --tune, and report the model")
        parsed = {key: Schedule.parse(value) for key, value in found["schedules"].items()}
        schedules = {key: one for key, one in parsed.items() if one is not None}
        return found["isa"], schedules, found["kernels"]


def _lines(file: IO[bytes]) -> list[str]:
    file.seek(0)
    return [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]


def _raise_again(error: Mapping[str, Any]) -> None:
    """Raise the error that the worker printed; return where it printed something else."""
    try:
        kind, message, remedy = getattr(errors, error["kind"]), error["message"], error["remedy"]
    except (KeyError, TypeError, AttributeError):
        return
    raise kind(message, remedy=remedy)


def _end_with(parent: int) -> None:
    """End where `parent` does, however it ends: after a `kill -9` the next compilation clears the folder and
    fills it, and no earlier worker may write into it then.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:  # it ended before the kernel was asked
        sys.exit(1)


def main(arguments: list[str]) -> int:
    (parent,) = arguments
    _end_with(int(parent))
    # tvm_ffi imports torch where it is installed, for tensors that this process never sees. It is our own
    # process.
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        job = json.load(sys.stdin)
        result = _build(job) if "out" in job else _tune(job)
    except LlmcError as error:
        print(json.dumps({"kind": type(error).__name__, "message": error.message, "remedy": error.remedy}))
        return 1
    print(json.dumps(result))
    return 0


def _build(job: Mapping[str, Any]) -> dict[str, Any]:
    from ..extensions import parse_graph
    from .build import build
    from .kernels.isa import get_isa

    parsed = {key: Schedule.parse(value) for key, value in job["schedules"].items()}
    schedules = {key: one for key, one in parsed.items() if one is not None}
    built = build(parse_graph(job["graph"]), get_isa(job["isa"]), Path(job["out"]), schedules)
    return dataclasses.asdict(built)


def _tune(job: Mapping[str, Any]) -> dict[str, Any]:
    from ..extensions import parse_graph
    from .tune import tune

    def report(what: str, share: float) -> None:
        print(json.dumps({"what": what, "share": share}), flush=True)

    found = tune(parse_graph(job["graph"]), job["levels"], job["seconds"], report)
    schedules = {key: schedule.as_json() for key, schedule in found.schedules.items()}
    return {"isa": found.isa, "schedules": schedules, "kernels": found.kernels}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
