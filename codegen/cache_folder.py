"""Where compilations keep what the next one can use."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$LLMC_CACHE`, by default `llmc` in `$XDG_CACHE_HOME` or `~/.cache`; may not exist yet."""
    given, base = os.environ.get("LLMC_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(given) if given else (Path(base) if base else Path.home() / ".cache") / "llmc"
