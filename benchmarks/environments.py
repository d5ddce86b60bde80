"""Environments of the peers: one venv each, filled from a file of pins, never ours."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import venv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Tools:
    """The peers of one benchmark.

    Attributes:
        requirements: a file with a section of pins under the line `# [tool]` for each of them.
        folder: where their programs lie, which run in the tools' environments.
        programs: file names of those, by tool.
    """

    requirements: Path
    folder: Path
    programs: Mapping[str, str]

    def program(self, tool: str) -> Path:
        """The program that carries out orders in the tool's environment."""
        return self.folder / self.programs[tool]

    def pins(self, tool: str, text: str | None = None) -> list[str]:
        """What pip is told to install: requirements, and options of pip's."""
        found = [line for line in self._section(tool, text) if not line.startswith("#")]
        if not found:
            raise ValueError(f"{self.requirements.name} has no section for {tool}")
        return found

    def unwanted(self, tool: str, text: str | None = None) -> list[str]:
        """Packages of the line `# without: …`: what the tool brings along and does not start with."""
        return self._marked("# without", tool, text)

    def alone(self, tool: str, text: str | None = None) -> list[str]:
        """Requirements of the line `# alone: …`: installed last, without what they ask for."""
        return self._marked("# alone", tool, text)

    def _marked(self, mark: str, tool: str, text: str | None) -> list[str]:
        lines = [line.partition(":") for line in self._section(tool, text)]
        return [name for head, _, names in lines if head == mark for name in names.split()]

    def _section(self, tool: str, text: str | None) -> list[str]:
        text = self.requirements.read_text(encoding="utf-8") if text is None else text
        found: list[str] = []
        section = ""
        for line in map(str.strip, text.splitlines()):
            head = re.fullmatch(r"# \[(.+)\]", line)
            if head:
                section = head[1]
            elif section == tool and line:
                found.append(line)
        return found

    def python_of(self, tool: str, given: Mapping[str, Path], cache: Path) -> Path:
        """The interpreter of a tool's environment: the one given, or a venv in `cache` that is made and
        filled now; CalledProcessError where pip fails.
        """
        if tool in given:
            return given[tool]
        folder = cache / "environments" / tool
        python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
        ready = folder / "pins.txt"
        alone = self.alone(tool)
        wanted = "\n".join([*self.pins(tool), *alone])
        if not ready.is_file() or ready.read_text(encoding="utf-8") != wanted:
            print(f"making an environment for {tool} in {folder}", file=sys.stderr, flush=True)
            venv.create(folder, with_pip=True, clear=True)
            pip = [str(python), "-m", "pip"]
            subprocess.run([*pip, "install", "--quiet", *self.pins(tool)], check=True)
            if alone:
                subprocess.run([*pip, "install", "--quiet", "--no-deps", *alone], check=True)
            if unwanted := self.unwanted(tool):
                subprocess.run([*pip, "uninstall", "--quiet", "--yes", *unwanted], check=True)
            ready.write_text(wanted, encoding="utf-8")
        return python

    def add_option(self, parser: argparse.ArgumentParser) -> None:
        """--peer-python NAME=PATH, as `named` reads it."""
        parser.add_argument(
            "--peer-python",
            action="append",
            default=[],
            metavar="NAME=PATH",
            help="environment of a peer; repeatable",
        )

    def named(self, text: str) -> tuple[str, Path]:
        """NAME=PATH of a command line; ends this program where that is none of the tools."""
        tool, _, path = text.partition("=")
        if tool not in self.programs or not path:
            sys.exit(f"error: --peer-python {text}: use NAME=PATH with {', '.join(self.programs)}")
        return tool, Path(path).absolute()  # not resolved: a venv's interpreter is a link


QUANTIZATION = Tools(
    HERE / "requirements-quantization.txt",
    HERE / "peers_quantization",
    {
        "llm-compressor": "run_llmcompressor.py",
        "autoround": "run_autoround.py",
        "gptqmodel": "run_gptqmodel.py",
        "hqq": "run_hqq.py",
        "llama.cpp": "run_llamacpp.py",
    },
)
SPEED = Tools(
    HERE / "requirements-speed.txt",
    HERE / "peers_speed",
    {
        "llama.cpp": "run_llamacpp.py",
        "vllm": "run_vllm.py",
        "onnxruntime-genai": "run_onnxruntime.py",
        "openvino": "run_openvino.py",
    },
)
RAG = Tools(
    HERE / "requirements-rag.txt",
    HERE / "peers_rag",
    {
        "hipporag": "run_hipporag.py",
        "lightrag": "run_lightrag.py",
        "sentence-transformers": "run_sentence_transformers.py",
    },
)
CLIENTS = Tools(
    HERE / "requirements-clients.txt",
    HERE / "clients_programs",
    {"langchain": "run_langchain.py", "llama-index": "run_llamaindex.py", "lm-eval": "run_lm_eval.py"},
)
