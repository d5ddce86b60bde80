"""What a command used: peak memory of this process and of those it started."""

from __future__ import annotations

import resource
import sys


def peak_rss_bytes() -> int:
    """The largest resident set so far, of this process or of any finished child, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): kilobytes, except on macOS
    return unit * max(
        resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
