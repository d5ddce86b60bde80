"""Where llmc keeps what only saves time: schedules, graphs, kernel libraries, encoders, records of verified
files.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from threading import get_native_id


def cache_folder() -> Path:
    """`$LLMC_CACHE`, by default `llmc` in `$XDG_CACHE_HOME` or `~/.cache`; may not exist yet."""
    given, base = os.environ.get("LLMC_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(given or Path(base or "~/.cache", "llmc")).expanduser()


@cache
def fingerprint(folders: Sequence[str], packages: Sequence[str]) -> str:
    """A hash of our own sources in some folders ("ir"), and of the versions of packages: of what makes a file
    that is kept.
    """
    from importlib import metadata  # takes longer than all else that opens a small model

    root = Path(__file__).resolve().parents[1]
    found = hashlib.sha256()
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.update(f"{package} {metadata.version(package)}\n".encode())
    for folder in folders:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".ll"):
                found.update(f"{path.relative_to(root)} {path.stat().st_size}\n".encode())
                found.update(path.read_bytes())
    return found.hexdigest()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside, whatever other threads and processes do, then rename it. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}-{get_native_id()}")
    try:
        beside.write_bytes(content)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def trim(folder: Path, suffix: str, limit_bytes: int) -> list[Path]:
    """Remove files of that suffix, those that were not used for longest first, until the others have at most
    `limit_bytes`; the removed. Raises OSError.
    """
    known = [(entry.stat(), Path(entry)) for entry in os.scandir(folder) if entry.name.endswith(suffix)]
    total = sum(stat.st_size for stat, _ in known)
    removed: list[Path] = []
    for stat, path in sorted(known, key=lambda one: one[0].st_mtime):
        if total <= limit_bytes:
            break
        total -= stat.st_size
        path.unlink(missing_ok=True)
        removed.append(path)
    return removed
