"""Kernel libraries of earlier compilations, `kernels/` in the cache folder.

A library depends on the graph's text, the level, the schedules and the compiler, and on no weight: a model
that is compiled again, or another that was tuned from the same base, finds its kernels here. The bytes are
those that compiling would give. The folder is never needed: what cannot be read or written is compiled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from ...runtime.cache_folder import cache_folder
from .kernels.schedule import Schedule

_LIMIT_BYTES = 512 << 20  # of all libraries; those that were not used for longest go first
_SOURCES = ("codegen/tvm", "ir")


@cache
def _compiler() -> str:
    """A hash of what turns graphs into libraries: our sources, and TVM's version."""
    root = Path(__file__).resolve().parents[2]
    found = hashlib.sha256()
    for package in ("apache-tvm", "apache-tvm-ffi"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.update(f"{package} {metadata.version(package)}\n".encode())
    for folder in _SOURCES:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".ll"):
                found.update(f"{path.relative_to(root)} {path.stat().st_size}\n".encode())
                found.update(path.read_bytes())
    return found.hexdigest()


class LibraryCache:
    """The libraries of one graph. `folder` as in the module's text; `others` as in `Libraries`."""

    def __init__(self, graph_text: str, folder: Path | None = None, *, others: str = "") -> None:
        self._text = hashlib.sha256(graph_text.encode()).hexdigest() + others
        self._folder = cache_folder() / "kernels" if folder is None else folder

    def _path(self, isa: str, schedules: Mapping[str, Schedule] | None) -> Path:
        chosen = {key: one.as_json() for key, one in sorted((schedules or {}).items())}
        parts = json.dumps([_compiler(), self._text, isa, chosen])
        return self._folder / f"{hashlib.sha256(parts.encode()).hexdigest()}.so"

    def take(self, isa: str, schedules: Mapping[str, Schedule] | None, out: Path) -> dict[str, Any] | None:
        """Write a library to `out` and return what its compilation returned; None where it is not here (or
        damaged).
        """
        path = self._path(isa, schedules)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            library = path.read_bytes()
            if hashlib.sha256(library).hexdigest() == record["sha256"]:
                out.write_bytes(library)
                os.utime(path)
                return dict(record["built"])
        return None

    def keep(
        self, isa: str, schedules: Mapping[str, Schedule] | None, library: Path, built: Mapping[str, Any]
    ) -> None:
        """Add a library; both files are written beside, then renamed."""
        path = self._path(isa, schedules)
        with contextlib.suppress(OSError):
            content = library.read_bytes()
            record = {"sha256": hashlib.sha256(content).hexdigest(), "isa": isa, "built": dict(built)}
            self._folder.mkdir(parents=True, exist_ok=True)
            _write(path, content)
            _write(path.with_suffix(".json"), json.dumps(record).encode())
            self._trim()

    def _trim(self) -> None:
        known = [
            (entry.stat(), Path(entry)) for entry in os.scandir(self._folder) if entry.name.endswith(".so")
        ]
        total = sum(stat.st_size for stat, _ in known)
        for stat, path in sorted(known, key=lambda one: one[0].st_mtime):
            if total <= _LIMIT_BYTES:
                return
            total -= stat.st_size
            path.unlink(missing_ok=True)
            path.with_suffix(".json").unlink(missing_ok=True)


def _write(path: Path, content: bytes) -> None:
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(content)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
