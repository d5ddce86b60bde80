"""Artifacts whose hashes were found right on this machine, so that they are not computed at every start.

Where a processor has no instructions for SHA-256, hashing takes longer than everything else that a start
does (benchmarks/README.md). So what was verified is written down: for each file its device, inode, size and
times. A file that changes gets a new time of change from the kernel, which no program can set back. A record
that is missing, old or unreadable costs the hashing and nothing else; one that cannot be written is left out.
What rots on the disk while no file is written is found by `llmc inspect`, which always hashes.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from ..codegen.artifact import MANIFEST, Artifact
from .cache_folder import cache_folder

_SETTLED_SECONDS = 2.0
"""A file may change twice within the resolution of its time. Until it is older than this, nothing is written
down.
"""


def verify_once(artifact: Artifact) -> None:
    """Check the sha256 of every file, unless that was done before and no file has changed since.

    Raises ArtifactError where one differs.
    """
    record = _record(artifact)
    path = _records() / f"{_digest(str(artifact.root.resolve()).encode())}.json"
    if record is not None and _read(path) == record:
        return
    artifact.verify()
    if record is not None and time.time() - record["changed"] > _SETTLED_SECONDS:
        _write(path, record)


def _records() -> Path:
    return cache_folder() / "verified"


def _record(artifact: Artifact) -> dict[str, Any] | None:
    """What tells this state of the artifact from any other; None where a file cannot be looked at."""
    files: dict[str, list[int]] = {}
    changed = 0.0
    try:
        manifest = _digest((artifact.root / MANIFEST).read_bytes())
        for rel in sorted(artifact.manifest["files"]):
            found = artifact.path(rel).stat()
            files[rel] = [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
            changed = max(changed, found.st_ctime)
    except OSError:
        return None
    return {"manifest": manifest, "files": files, "changed": changed}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _write(path: Path, record: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            file.write(json.dumps(record))
        os.replace(file.name, path)
    except OSError:
        return
