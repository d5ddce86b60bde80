"""Those who are measured, each in a process of its own that stands still while another is measured."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .protocol import Order

_SETTLE_SECONDS = 0.2
"""After a process has been let go on: its threads may have work that waited for them."""


@dataclass(frozen=True)
class Measure:
    """One figure: tokens a second of `streams` prompts of `prompt` tokens, given at once.

    what: "prefill" counts the prompts' tokens until each answer has its first; "decode" those of the answers
    after that; "answers" those of the answers, over the whole time.
    """

    name: str
    what: str
    streams: int
    prompt: int
    tokens: int

    def order(self, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
        do = "decode" if self.what == "decode" else "generate"
        return {"do": do, "prompts": prompts, "tokens": 1 if self.what == "prefill" else self.tokens}

    def rate(self, seconds: float, streams: int) -> float:
        """Tokens a second, where `streams` were computed."""
        each = {"prefill": self.prompt, "decode": 1, "answers": self.tokens}[self.what]
        return streams * each / seconds


@dataclass
class System:
    """A program in its environment with a model.

    Attributes:
        name: in the tables. python, program: what is run. model: what it loads.
        alone: whether it computes one prompt after the other, so that one of several is enough to measure.
        bits: bits a weight, for the tables.
    """

    name: str
    python: Path
    program: Path
    model: Path
    alone: bool = False
    bits: float | None = None
    versions: dict[str, str | None] = field(default_factory=dict)
    rates: dict[str, list[float]] = field(default_factory=dict)
    _process: Any = None

    def start(self, order: Order, folder: Path) -> None:
        """Load the model. Raises RuntimeError with the end of what the system said where that fails."""
        path = folder / f"{self.name.replace(' ', '-').replace(':', '-')}.json"
        path.write_text(json.dumps(asdict(order)), encoding="utf-8")
        self._log = path.with_suffix(".log")
        print(f"$ {self.python} {self.program.name} {path}", file=sys.stderr, flush=True)
        with self._log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [str(self.python), str(self.program), str(path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
                cwd=folder,
            )
        self.versions = self._answer()["versions"]
        self._signal(signal.SIGSTOP)

    @property
    def pid(self) -> int:
        return int(self._process.pid)

    def measure(self, measure: Measure, prompts: Sequence[Sequence[int]]) -> float:
        """Tokens a second. Raises RuntimeError where the system ends."""
        prompts = prompts[:1] if self.alone else prompts
        self._signal(signal.SIGCONT)
        time.sleep(_SETTLE_SECONDS)
        self._process.stdin.write(json.dumps(measure.order(prompts)) + "\n")
        self._process.stdin.flush()
        seconds = float(self._answer()["seconds"])
        self._signal(signal.SIGSTOP)
        return measure.rate(seconds, len(prompts))

    def stop(self) -> None:
        if self._process is None:
            return
        if self._process.poll() is None:
            self._signal(signal.SIGKILL)
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()

    def _signal(self, number: int) -> None:
        os.killpg(self._process.pid, number)

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            end = self._log.read_text(encoding="utf-8", errors="replace").strip()[-800:]
            raise RuntimeError(f"{self.name} ended: …{end}")
        return json.loads(line)
