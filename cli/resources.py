"""What a command used: peak memory of this process and of those it started."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path


def peak_rss_bytes() -> int:
    """The largest resident set so far, of this process or of any finished child, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): kilobytes, except on macOS
    own, child = (
        unit * resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return max(_program_peak() or own, child)


def _program_peak() -> int | None:
    """Linux's VmHWM, which begins with the program; ru_maxrss begins with what the process had that started
    it, so that a program started by a large one would seem as large. None elsewhere.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return None
