"""Environments of the peers: one venv each, of `benchmarks/requirements-quantization.txt`, never ours."""

from __future__ import annotations

import re
import subprocess
import sys
import venv
from pathlib import Path

PINS = Path(__file__).resolve().parent.parent / "requirements-quantization.txt"
PROGRAMS = {
    "llm-compressor": "run_llmcompressor.py",
    "autoround": "run_autoround.py",
    "gptqmodel": "run_gptqmodel.py",
    "hqq": "run_hqq.py",
    "llama.cpp": "run_llamacpp.py",
}


def program(tool: str) -> Path:
    """The program that carries out orders in the tool's environment."""
    return Path(__file__).resolve().parent / PROGRAMS[tool]


def pins(tool: str, text: str | None = None) -> list[str]:
    """Requirements below the line `# [tool]` of the pins' file."""
    text = PINS.read_text(encoding="utf-8") if text is None else text
    found: list[str] = []
    section = ""
    for line in text.splitlines():
        head = re.fullmatch(r"# \[(.+)\]", line.strip())
        if head:
            section = head[1]
        elif section == tool and line.strip() and not line.startswith("#"):
            found.append(line.strip())
    if not found:
        raise ValueError(f"{PINS.name} has no section for {tool}")
    return found


def python_of(tool: str, given: dict[str, Path], cache: Path) -> Path:
    """The interpreter of a tool's environment: the one given, or a venv in `cache` that is made and filled
    now; CalledProcessError where pip fails.
    """
    if tool in given:
        return given[tool]
    folder = cache / "environments" / tool
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    ready = folder / "pins.txt"
    wanted = "\n".join(pins(tool))
    if not ready.is_file() or ready.read_text(encoding="utf-8") != wanted:
        print(f"making an environment for {tool} in {folder}", file=sys.stderr, flush=True)
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *pins(tool)], check=True)
        ready.write_text(wanted, encoding="utf-8")
    return python
