"""What every measured program shares; runs in the peers' environments, so nothing of llmc is imported.

    PYTHON run_<tool>.py ORDER.json ANSWER.json

The order names passages, questions and where vectors come from (`embed`, an address of OpenAI's API); the
answer says what was found for each question, as indices of passages, and what it took.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Order:
    """Attributes:
    passages: (title, text) each. extracted: what was extracted of each passage, where something was:
    {"entities": [...], "triples": [[subject, predicate, object]…]}. url, model: of the embeddings. folder:
    an empty one to work in. top: passages wanted. threads: to compute with. mode: what the program offers.
    """

    folder: str
    passages: list[list[str]]
    questions: list[str] = field(default_factory=list)
    extracted: list[dict[str, Any]] | None = None
    url: str = ""
    model: str = ""
    top: int = 10
    threads: int = 1
    mode: str = ""


@dataclass
class Answer:
    """Attributes:
    found: passages for each question, best first. seconds, cpu_seconds: of each question; the latter of this
    process, without the embedder's. index_seconds and index_cpu_seconds: to make what is searched, likewise.
    peak_bytes, bytes: resident memory at most, and after the last question. versions: of packages. note: what
    was run.
    """

    found: list[list[int]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    index_seconds: float = 0.0
    index_cpu_seconds: float = 0.0
    peak_bytes: int = 0
    bytes: int = 0
    versions: dict[str, str | None] = field(default_factory=dict)
    note: str = ""

    def add_time(self, watch: Watch) -> None:
        """Of one question, from the watch's beginning to now."""
        self.seconds.append(watch.seconds)
        self.cpu_seconds.append(watch.cpu_seconds)


def serve(run: Callable[[Order], Answer], packages: Sequence[str]) -> None:
    """Carry out the order of the command line."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OPENAI_API_KEY": "none",
    }
    order = Order(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    answer = run(order)
    answer.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    answer.bytes = resident_bytes()
    answer.versions = {name: _version(name) for name in packages}
    Path(sys.argv[2]).write_text(json.dumps(asdict(answer)), encoding="utf-8")


def embed(order: Order, texts: Sequence[str]) -> list[list[float]]:
    """Vectors of texts, from the order's address."""
    body = json.dumps({"model": order.model, "input": list(texts)}).encode()
    request = urllib.request.Request(f"{order.url}/embeddings", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        return [row["embedding"] for row in json.load(response)["data"]]


def resident_bytes() -> int:
    """Resident memory now; 0 where /proc is not there."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if path.exists() else 0


class Watch:
    """Seconds, and CPU seconds of this process, since it was made."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._cpu = time.process_time()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    @property
    def cpu_seconds(self) -> float:
        return time.process_time() - self._cpu


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
