"""Where llmc keeps what only saves time: schedules, kernel libraries, encoders, records of verified files."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$LLMC_CACHE`, by default `llmc` in `$XDG_CACHE_HOME` or `~/.cache`; may not exist yet."""
    given, base = os.environ.get("LLMC_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(given or Path(base or "~/.cache", "llmc")).expanduser()
