"""Compiles kernel libraries, makes programs for GPUs, or searches for schedules, in processes of their own:
`python -m llmc.codegen.tvm.worker PARENT`, where PARENT is the id of the process that waits for it. Its input
is one JSON object a line, a job each, with the graph as text; it ends with its input.

A process of its own because LLVM ends the process where an instruction cannot be selected, which must become
an error; because TVM's memory must not add to torch's; and because a graph is text, which passes without
pickling. Prints a JSON object a line, the last of a job its result: the symbols and arguments of the library,
or what was found; or an error's kind, message and remedy, and then it ends.

Importing TVM takes a second, in which a compilation that reads its model leaves other processors idle: within
`ready_workers` processes are started at once, and go from one job to the next, and where the block stands
around several compilations, from one to the next.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from threading import Thread, current_thread
from typing import Any, Self

from ...ir import errors
from ...ir.errors import CompileError, LlmcError
from .kernels.schedule import Schedule

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def _imports() -> dict[str, str]:
    """What of the environment decides what a process imports: packages of ops among it."""
    return {name: value for name, value in os.environ.items() if name.startswith(("PYTHON", "TVM_"))}


class _Process:
    """A process that does one job after the other."""

    def __init__(self, **environment: str) -> None:
        self.imports = _imports()
        self.thread = current_thread()  # which the system has it end with (`_end_with`)
        # Closed by `close`. A file and not a pipe: nobody reads while the worker writes.
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        # -P: a folder named like one of ours in the current directory must not be imported.
        self.popen = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env={**os.environ, **environment},
        )

    def begin(self, job: Mapping[str, Any]) -> None:
        """Give it a job; `answers` says what became of it."""

        def write(text: bytes) -> None:
            assert self.popen.stdin is not None
            # A process that has died says so where its answer is asked for.
            with contextlib.suppress(OSError, ValueError):
                self.popen.stdin.write(text)
                self.popen.stdin.flush()

        # A thread, since the process reads nothing before it has imported TVM.
        Thread(target=write, args=(json.dumps(job).encode() + b"\n",), daemon=True).start()

    def answers(self) -> Generator[dict[str, Any]]:
        """The JSON objects that it prints, until it ends; whatever else stands between them is left out."""
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            with contextlib.suppress(ValueError):
                answer = json.loads(line)
                if isinstance(answer, dict):
                    yield answer

    def said(self) -> str:
        """The last lines of its standard error."""
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").splitlines()
        return " | ".join([line for line in lines if line.strip()][-3:]) or "it said nothing"

    def close(self) -> None:
        """End it, whatever it is doing."""
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait()
        for stream in (self.popen.stdin, self.popen.stdout, self._said):
            with contextlib.suppress(OSError):  # what was still to be written to a process that has ended
                if stream is not None:
                    stream.close()


class _Ready:
    """Processes that wait for jobs. Those of this block, `count`, stay when a compilation within it ends."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.thread = current_thread()
        self.waiting: list[_Process] = []

    def fill(self, count: int) -> None:
        """Start what is missing from `count`."""
        self._keep([process for process in self.waiting if self._fits(process)])
        self.waiting += [_Process() for _ in range(count - len(self.waiting))]

    def take(self) -> _Process:
        """One that waits and will not end under its job, or a new one."""
        for process in list(self.waiting):
            if process.thread in (self.thread, current_thread()) and self._fits(process):
                with contextlib.suppress(ValueError):  # another thread was first
                    self.waiting.remove(process)
                    return process
        return _Process()

    @staticmethod
    def _fits(process: _Process) -> bool:
        """Whether it lives, and began as one would now."""
        return process.popen.poll() is None and process.imports == _imports()

    def keep(self, count: int) -> None:
        """End those beyond `count`, and those that another thread started: they would end with it."""
        self._keep([process for process in self.waiting if process.thread is current_thread()][:count])

    def _keep(self, kept: list[_Process]) -> None:
        for process in self.waiting:
            if process not in kept:
                process.close()
        self.waiting = kept


_ready: ContextVar[_Ready | None] = ContextVar("ready", default=None)


@contextmanager
def ready_workers(count: int, *, at_once: bool = True) -> Generator[None]:
    """`count` processes that import TVM meanwhile and then wait; jobs within take them, and leave them for
    the next. Each compilation has such a block; one around several has them use the same processes, which are
    started with the first of them where it is not `at_once`.
    """
    outer = _ready.get()
    ready = outer or _Ready(count)
    if at_once:
        ready.fill(max(count, ready.count))
    token = _ready.set(ready)
    try:
        yield
    finally:
        _ready.reset(token)
        ready.keep(0 if outer is None else outer.count)


class Worker:
    """A job in a process. `result` waits for it; leaving the `with` block before ends the process."""

    def __init__(self, job: Mapping[str, Any], process: _Process | None = None) -> None:
        """In a process that is ready, where there is one and no other is given."""
        ready = _ready.get()
        if process is None:
            process = _Process() if ready is None else ready.take()
        self._process: _Process | None = process
        process.begin(job)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            self._process.close()
            self._process = None

    def kill(self) -> None:
        """End the process from another thread than the one that waits for its result, which gets an error."""
        process = self._process
        if process is not None:
            process.popen.kill()

    def _result(
        self, what: str, remedy: str, partial: Callable[[dict[str, Any]], bool] = lambda answer: False
    ) -> dict[str, Any]:
        """What the worker printed, once `partial` does not take it. Raises what the worker raised, or
        CompileError where it died.
        """
        assert self._process is not None, "a result is asked for once"
        for answer in self._process.answers():
            if not partial(answer):
                _raise_again(answer)
                return answer
        status = self._process.popen.wait()
        raise CompileError(f"{what} ended with status {status}: {self._process.said()}", remedy=remedy)

    def _leave_ready(self) -> None:
        """Its job is done: the process waits for the next one, where `ready_workers` keeps any."""
        ready = _ready.get()
        if ready is not None and self._process is not None:
            ready.waiting.append(self._process)
            self._process = None


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
        built = self._result(f"the kernel compiler for {self.isa}", remedy)
        self._leave_ready()
        return built


class Programming(Worker):
    """The program and the kernels of a step on a GPU that are being made (`gpu/build.py`)."""

    def __init__(self, graph_text: str, folder: Path, architectures: Sequence[str] | None) -> None:
        """`architectures` of CUDA; None for kernels in WGSL (`wgsl/build.py`)."""
        job: dict[str, Any] = {"graph": graph_text, "folder": str(folder)}
        super().__init__(job if architectures is None else {**job, "architectures": list(architectures)})

    def result(self) -> dict[str, Any]:
        """What `build_cuda` or `build_wgsl` returned. Raises what it raised, or CompileError where the worker
        died.
        """
        built = self._result("the maker of kernels for GPUs", "report the model")
        self._leave_ready()
        return built


class Tuning(Worker):
    """A search for schedules that is running (`tune.py`)."""

    def __init__(self, graph_text: str, levels: Sequence[str], seconds: float) -> None:
        job = {"graph": graph_text, "levels": list(levels), "seconds": seconds}
        super().__init__(job, _Process(TVM_NUM_THREADS="1"))

    def result(self, progress: Callable[[str, float], None]) -> tuple[str, dict[str, Schedule], int]:
        """Level, schedules and number of kernels of what `tune` returned. Raises what it raised, or
        CompileError where the worker died.
        """

        def told(answer: dict[str, Any]) -> bool:
            if "share" not in answer:
                return False
            progress(answer["what"], answer["share"])
            return True

        remedy = "compile without --tune, and report the model"
        found = self._result("the search for schedules", remedy, told)
        parsed = {key: Schedule.parse(value) for key, value in found["schedules"].items()}
        schedules = {key: one for key, one in parsed.items() if one is not None}
        return found["isa"], schedules, found["kernels"]


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
    # A job makes many objects and throws away few: looking for cycles among them took up to a quarter of its
    # time.
    gc.disable()
    from . import build as _imported  # noqa: F401  # pyright: ignore[reportUnusedImport]

    for line in sys.stdin:
        job = json.loads(line)
        try:
            result = _job_of(job)(job)
        except LlmcError as error:
            failed = {"kind": type(error).__name__, "message": error.message, "remedy": error.remedy}
            print(json.dumps(failed), flush=True)
            return 1
        print(json.dumps(result), flush=True)
        gc.collect()
    return 0


def _job_of(job: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    if "out" in job:
        return _build
    return _build_gpu if "folder" in job else _tune


def _build(job: Mapping[str, Any]) -> dict[str, Any]:
    from ..extensions import parse_graph
    from .build import build
    from .kernels.isa import get_isa

    parsed = {key: Schedule.parse(value) for key, value in job["schedules"].items()}
    schedules = {key: one for key, one in parsed.items() if one is not None}
    built = build(parse_graph(job["graph"]), get_isa(job["isa"]), Path(job["out"]), schedules)
    return dataclasses.asdict(built)


def _build_gpu(job: Mapping[str, Any]) -> dict[str, Any]:
    from ..extensions import parse_graph
    from .gpu.build import build_cuda
    from .wgsl.build import build_wgsl

    graph, folder = parse_graph(job["graph"]), Path(job["folder"])
    if "architectures" in job:
        return build_cuda(graph, folder, job["architectures"])
    return build_wgsl(graph, folder)


def _tune(job: Mapping[str, Any]) -> dict[str, Any]:
    from ..extensions import parse_graph
    from .tune import tune

    def report(what: str, share: float) -> None:
        gc.collect()
        print(json.dumps({"what": what, "share": share}), flush=True)

    found = tune(parse_graph(job["graph"]), job["levels"], job["seconds"], report)
    schedules = {key: schedule.as_json() for key, schedule in found.schedules.items()}
    return {"isa": found.isa, "schedules": schedules, "kernels": found.kernels}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
