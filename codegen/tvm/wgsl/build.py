"""Graph → program and kernels in WGSL, in files; in a process of its own (`worker.py`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ....ir.core import Graph
from ..gpu.program import make_program
from ..webgpu import PROGRAM, SOURCE
from .lower import WGSL


def build_wgsl(graph: Graph, folder: Path) -> dict[str, Any]:
    """Write the text of the kernels and the program. Returns {"arguments", "symbols"}."""
    program = make_program(graph, WGSL)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SOURCE).write_text(program.text + "\n", encoding="utf-8")
    (folder / PROGRAM).write_text(json.dumps(program.entry) + "\n", encoding="utf-8")
    return {"arguments": program.arguments, "symbols": program.entry["symbols"]}
