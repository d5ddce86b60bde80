"""Compiles one kernel library in a process of its own: `python -m llmc.codegen.tvm.worker ISA OUT PARENT`,
graph text on stdin; PARENT is the id of the process that waits for it.

A process of its own because LLVM ends the process where an instruction cannot be selected, which must become
an error; because TVM's memory must not add to torch's; and because a graph is text, which passes without
pickling. Prints one JSON object: the symbols and arguments of the library, or an error's kind, message and
remedy.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

from ...ir import errors
from ...ir.errors import CompileError, LlmcError

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class Compilation:
    """A worker that has been started. `result` waits for it; leaving the `with` block ends it."""

    def __init__(self, graph_text: str, isa: str, out: Path) -> None:
        self.isa = isa
        # Closed by __exit__. Files and not pipes: nobody reads while the worker writes.
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        with tempfile.TemporaryFile() as given:
            given.write(graph_text.encode())
            given.seek(0)
            # -P: a folder named like one of ours in the current directory must not be imported.
            command = [sys.executable, "-P", "-m", __name__, isa, str(out), str(os.getpid())]
            self._process = subprocess.Popen(command, stdin=given, stdout=self._output, stderr=self._said)

    def __enter__(self) -> Compilation:
        return self

    def __exit__(self, *error: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._output.close()
        self._said.close()

    def result(self) -> dict[str, Any]:
        """What the worker printed. Raises what the worker raised, or CompileError where it died."""
        status = self._process.wait()
        lines = _lines(self._output)
        if status == 0 and lines:
            return json.loads(lines[-1])
        if status == 1 and lines:
            _raise_again(lines[-1])
        said = " | ".join(_lines(self._said)[-3:]) or "it said nothing"
        raise CompileError(
            f"the kernel compiler for {self.isa} ended with status {status}: {said}",
            remedy="compile with another --target tvm-cpu:isa=…, and report the model",
        )


def _lines(file: IO[bytes]) -> list[str]:
    file.seek(0)
    return [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]


def _raise_again(text: str) -> None:
    """Raise the error that the worker printed; return where it printed something else."""
    try:
        error = json.loads(text)
        kind, message, remedy = getattr(errors, error["kind"]), error["message"], error["remedy"]
    except (ValueError, KeyError, TypeError, AttributeError):
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
    isa, out, parent = arguments
    _end_with(int(parent))
    # tvm_ffi imports torch where it is installed, for tensors that this process never sees. It is our own
    # process.
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        from ...ir.parser import parse
        from .build import build
        from .kernels.isa import get_isa

        built = build(parse(sys.stdin.read()), get_isa(isa), Path(out))
    except LlmcError as error:
        print(json.dumps({"kind": type(error).__name__, "message": error.message, "remedy": error.remedy}))
        return 1
    print(json.dumps(dataclasses.asdict(built)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
