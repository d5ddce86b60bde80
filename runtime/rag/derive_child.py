"""The process that derives the snapshot of a large store, and how its parent speaks to it.

In: the store's address. Out: a line of JSON, the facts of the snapshot that then lies in the store's cache
folder. After that line it goes on with the communities, where somebody has asked for those of an earlier
state.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

from ...ir.errors import LlmcError
from .communities import FILE, communities_of
from .snapshot import Snapshot
from .store import open_store

_TOLD = 2000
"""Characters of its errors that are told, the last ones."""


class ChildError(Exception):
    """The process ended without a snapshot; why."""


class Child:
    """The process, as its parent sees it. `close` waits for its end, and is always to be called."""

    def __init__(self, process: subprocess.Popen[bytes], errors: IO[bytes]) -> None:
        self._process = process
        self._errors = errors

    @classmethod
    def start(cls) -> Child | None:
        """The process, which waits for its task; None where none can be started."""
        if not sys.executable:
            return None
        # Without -P it would import what lies in the server's current directory, be it among the documents.
        command = [sys.executable, "-P", "-m", __name__]
        try:
            # Not a pipe: one that nobody reads would fill and stop the process.
            errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed in `close`)
        except OSError:
            return None
        try:
            pipe = subprocess.PIPE
            return cls(subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors), errors)
        except OSError:
            errors.close()
            return None

    def derive(self, address: str) -> dict[str, str]:
        """The facts of the snapshot that it has written. Raises ChildError."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            with self._process.stdin as pipe:
                pipe.write(os.fsencode(address))  # not an argument: it may hold a password
        except OSError:  # it has ended already; its errors say why
            pass
        try:
            return json.loads(self._process.stdout.readline())
        except ValueError:
            self._process.wait()
            raise ChildError(self.reason()) from None

    def kill(self) -> None:
        """End it now. Any thread may."""
        self._process.kill()

    def close(self) -> str:
        """Wait for its end; why it failed, "" where it did not."""
        assert self._process.stdout is not None
        self._process.stdout.close()
        failure = self.reason() if self._process.wait() else ""
        self._errors.close()
        return failure

    def reason(self) -> str:
        """Why it ended as it did: the last of what it wrote as errors."""
        status = self._process.returncode
        how = f"signal {-status}" if status is not None and status < 0 else f"exit status {status}"
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip()[-_TOLD:]
        return f"{how}: {said}" if said else how


def main() -> int:
    """Derives the snapshot of the store whose address stands in standard input."""
    os.nice(5)  # searches go first
    try:
        store = open_store(os.fsdecode(sys.stdin.buffer.read()), read_only=True)
        snapshot = Snapshot.of(store)
        print(json.dumps(snapshot.facts), flush=True)
        if (Path(store.cache_folder) / FILE).exists():
            communities_of(store, snapshot)
    except LlmcError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
