"""What every measured program shares; runs in the peers' environments, so nothing of llmc is imported.

    PYTHON run_<tool>.py ORDER.json

The order names a model and how it is to run. The program loads it and says so by a line of JSON on its
standard output, {"ready": true, "versions": …}; then it answers each line on its standard input:

    {"do": "generate", "prompts": [[ids]…], "tokens": N}   {"seconds": until all have N new tokens}
    {"do": "decode", "prompts": [[ids]…], "tokens": N}     {"seconds": a step that gives each a token, over N
                                                           steps after each has one}

A program whose system has a format of its own also makes it: PYTHON run_<tool>.py --prepare FOLDER OUT.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Order:
    """Attributes:
    model: what the program loads: an artifact, a GGUF file or a Hugging Face folder.
    threads: to compute with. context: longest sequence in tokens. sequences: most at once.
    tokens: most in the cache.
    """

    model: str
    threads: int
    context: int
    sequences: int
    tokens: int


class Runner(Protocol):
    """A loaded model. Decoding is greedy, and no answer ends before its time."""

    def generate(self, prompts: Prompts, tokens: int) -> float:
        """Seconds until all prompts, given at once, have `tokens` new tokens."""
        ...

    def decode(self, prompts: Prompts, tokens: int) -> float:
        """Seconds of a step that gives each answer a token, over `tokens` steps after the first ones."""
        ...


def serve(
    load: Callable[[Order], Runner],
    packages: Sequence[str],
    prepare: Callable[[Path, Path], None] | None = None,
) -> None:
    """Carry out the orders, or make what they load. What libraries print goes to standard error.

    prepare: converts a Hugging Face folder (first) to what `load` takes (second, a folder).
    """
    if prepare is not None and sys.argv[1] == "--prepare":
        prepare(Path(sys.argv[2]), Path(sys.argv[3]))
        return
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    order = Order(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

    def answer(record: object) -> None:
        print(json.dumps(record), file=answers, flush=True)

    runner = load(order)
    answer({"ready": True, "versions": {name: _version(name) for name in packages}})
    for line in sys.stdin:
        wanted = json.loads(line)
        what = runner.generate if wanted["do"] == "generate" else runner.decode
        answer({"seconds": what(wanted["prompts"], wanted["tokens"])})


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
