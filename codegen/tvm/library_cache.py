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
from pathlib import Path
from typing import Any

from ...runtime.cache_folder import cache_folder, fingerprint, trim, write_whole
from .kernels.schedule import Schedule

_LIMIT_BYTES = 512 << 20  # of all libraries; those that were not used for longest go first
_SOURCES = ("codegen/tvm", "ir")
_PACKAGES = ("apache-tvm", "apache-tvm-ffi")


class LibraryCache:
    """The libraries of one graph. `folder` as in the module's text; `others` as in `Libraries`."""

    def __init__(self, graph_text: str, folder: Path | None = None, *, others: str = "") -> None:
        self._text = hashlib.sha256(graph_text.encode()).hexdigest() + others
        self._folder = cache_folder() / "kernels" if folder is None else folder

    def _path(self, isa: str, schedules: Mapping[str, Schedule] | None) -> Path:
        chosen = {key: one.as_json() for key, one in sorted((schedules or {}).items())}
        parts = json.dumps([fingerprint(_SOURCES, _PACKAGES), self._text, isa, chosen])
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
            write_whole(path, content)
            write_whole(path.with_suffix(".json"), json.dumps(record).encode())
            for old in trim(self._folder, path.suffix, _LIMIT_BYTES):
                old.with_suffix(".json").unlink(missing_ok=True)
