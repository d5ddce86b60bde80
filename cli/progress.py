"""Progress of long work: a bar where stderr is a terminal, one line a phase where it is not."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

_LINE_SECONDS = 0.5  # between two lines where stderr is no terminal: logs want phases, not every pass


class Progress:
    """Call it with (what is being done, share of the work that is done, 0 to 1); use it as a context manager.

    The same phase may be reported as often as the work likes.
    """

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._phase = ""
        self._began = time.perf_counter()
        self._printed = 0.0

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as RichProgress

            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
            self._bar = RichProgress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """A sentence that stays on the screen, on a line of its own."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def __call__(self, phase: str, share: float = 0.0) -> None:
        """The work is in `phase`, and `share` of all of it is done."""
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task(phase, total=1.0)
            self._bar.update(self._task, description=phase, completed=share)
        elif phase != self._phase and time.perf_counter() - self._printed > _LINE_SECONDS:
            self._printed = time.perf_counter()
            print(f"[{self._printed - self._began:6.1f} s] {phase}", file=sys.stderr, flush=True)
        self._phase = phase
