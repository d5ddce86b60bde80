"""Compiles one kernel library in a process of its own: `python -m llmc.codegen.tvm.worker ISA OUT`, graph
text on stdin.

A process of its own because LLVM ends the process where an instruction cannot be selected, which must become
an error; because TVM's memory must not add to torch's; and because a graph is text, which passes without
pickling. Prints one JSON object: the symbols and arguments of the library, or an error's kind, message and
remedy.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from ...ir import errors
from ...ir.errors import CompileError, LlmcError


def compile_library(graph_text: str, isa: str, out: Path) -> dict[str, Any]:
    """Start a worker and wait for it. Raises what the worker raised, or CompileError where it died."""
    # -P: a folder named like one of ours in the current directory must not be imported.
    command = [sys.executable, "-P", "-m", __name__, isa, str(out)]
    done = subprocess.run(
        command, input=graph_text, capture_output=True, text=True, encoding="utf-8", check=False
    )
    lines = done.stdout.splitlines()
    if done.returncode == 0 and lines:
        return json.loads(lines[-1])
    if done.returncode == 1 and lines:
        try:
            error = json.loads(lines[-1])
            kind = getattr(errors, error["kind"], CompileError)
            raise kind(error["message"], remedy=error["remedy"])
        except (ValueError, KeyError):
            pass
    last = [line for line in done.stderr.strip().splitlines() if line.strip()][-3:]
    said = " | ".join(last) or "it said nothing"
    raise CompileError(
        f"the kernel compiler for {isa} ended with status {done.returncode}: {said}",
        remedy="compile with another --target tvm-cpu:isa=…, and report the model",
    )


def main(arguments: list[str]) -> int:
    isa, out = arguments
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
