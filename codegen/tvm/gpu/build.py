"""Graph → program and machine code of a GPU's kernels, in files; in a process of its own (`worker.py`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ....ir.core import Graph
from ..cuda import PROGRAM, SOURCE
from .headers import headers
from .nvrtc import compile_text, resources
from .program import make_program

OLDEST = "compute_80"
"""What PTX is made for: the oldest GPUs that run it."""


def build_cuda(graph: Graph, folder: Path, architectures: Sequence[str]) -> dict[str, Any]:
    """Write the text of the kernels (without what stands before it, `headers.py`), the program, and the code
    for each architecture ("sm_80", …, "ptx").

    Returns {"arguments", "symbols", "images": [{"arch", "file", and of machine code "most_registers",
    "with_stack"}]}. Raises CompileError where there is no compiler, or it refuses.
    """
    program = make_program(graph)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SOURCE).write_text(program.text + "\n", encoding="utf-8")
    (folder / PROGRAM).write_text(json.dumps(program.entry) + "\n", encoding="utf-8")
    text = f"{headers()}\n{program.text}"
    with ThreadPoolExecutor(2) as pool:  # NVRTC and nvcc leave Python's lock alone
        codes = pool.map(lambda arch: compile_text(text, OLDEST if arch == "ptx" else arch), architectures)
        images = [_image(arch, code, folder) for arch, code in zip(architectures, codes, strict=True)]
    return {"arguments": program.arguments, "symbols": program.entry["symbols"], "images": images}


def _image(arch: str, code: bytes, folder: Path) -> dict[str, Any]:
    if arch == "ptx":
        (folder / f"{OLDEST}.ptx").write_bytes(code)
        return {"arch": arch, "file": f"{OLDEST}.ptx"}
    (folder / f"{arch}.cubin").write_bytes(code)
    taken = resources(code)
    return {
        "arch": arch,
        "file": f"{arch}.cubin",
        "most_registers": max((r.registers for r in taken.values()), default=0),
        "with_stack": [name for name, r in taken.items() if r.stack],
    }
