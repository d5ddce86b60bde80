"""The process of an MCP server, and the two streams through which the `mcp` package talks to it.

The package has such a transport itself. This one differs where a server may be broken or hostile: a message
has a largest size (the package's reads a line of any length into memory), and of what the server writes on
its standard error the end is kept, to say why it died.

The protocol over stdio is one JSON-RPC message a line
(https://modelcontextprotocol.io/specification/2025-11-25/basic/transports); ending it is closing its standard
input, then SIGTERM, then SIGKILL to its process group.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from .base import shortened

if TYPE_CHECKING:
    from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
    from mcp.client._transport import TransportStreams
    from mcp.shared.message import SessionMessage

MAX_MESSAGE = 32 << 20

_KEPT_ERRORS = 2000
_GRACE_SECONDS = 2.0


class ServerProcess:
    """One run of a server. `streams` starts it, and ends it."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = list(words)
        self._process: asyncio.subprocess.Process | None = None
        self._errors = b""
        self.closed = False
        """Whether nothing will come from it any more."""
        self.fault = ""
        """What the server did wrong, where that is why it is not spoken to any more."""

    @property
    def end(self) -> str:
        """Why it does not answer any more, for an error message."""
        code = self._process.returncode if self._process is not None else None
        how = f"ended by {_signal_name(-code)}" if code and code < 0 else f"ended with exit code {code}"
        how = self.fault or ("closed its output" if code is None else how)
        lines = self._errors.decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"{how}: {shortened(last, 300)}" if last else how

    @asynccontextmanager
    async def streams(self) -> AsyncGenerator[TransportStreams]:
        """Start the server; yields what `mcp.Client` takes as a transport. Raises OSError."""
        import anyio
        from mcp.client.stdio import get_default_environment

        pipe = asyncio.subprocess.PIPE
        self._process = process = await asyncio.create_subprocess_exec(
            *self._words,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            limit=MAX_MESSAGE,
            env=get_default_environment(),
            start_new_session=True,  # Ctrl-C is for us; and it and its children can be ended together
        )
        to_session, from_server = anyio.create_memory_object_stream[Any](0)
        to_server, from_session = anyio.create_memory_object_stream[Any](0)
        tasks = [
            asyncio.create_task(self._read(process, to_session)),
            asyncio.create_task(self._write(process, from_session, to_session)),
            asyncio.create_task(self._read_errors(process)),
        ]
        try:
            yield from_server, to_server
        finally:
            for stream in (from_server, to_server, to_session, from_session):
                stream.close()
            await _stop(process)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(
        self,
        process: asyncio.subprocess.Process,
        to_session: MemoryObjectSendStream[SessionMessage | Exception],
    ) -> None:
        import anyio
        from mcp.shared.message import SessionMessage
        from mcp.types import jsonrpc_message_adapter

        assert process.stdout is not None
        with to_session, contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
            while True:
                try:
                    line = await process.stdout.readline()
                except ValueError:
                    self.fault = f"sent a message of more than {MAX_MESSAGE >> 20} MB"
                    break
                if not line:
                    break
                try:
                    message = SessionMessage(jsonrpc_message_adapter.validate_json(line, by_name=False))
                except ValueError:
                    continue  # many a server prints something else there too
                await to_session.send(message)
            self.closed = True
        # The rest is read, so that a server that still writes can come to its end.
        while await process.stdout.read(1 << 16):
            pass

    async def _write(
        self,
        process: asyncio.subprocess.Process,
        from_session: MemoryObjectReceiveStream[SessionMessage],
        to_session: MemoryObjectSendStream[SessionMessage | Exception],
    ) -> None:
        assert process.stdin is not None
        try:
            async for item in from_session:
                text = item.message.model_dump_json(by_alias=True, exclude_unset=True)
                process.stdin.write(text.encode() + b"\n")
                await process.stdin.drain()
        except OSError:
            to_session.close()  # the session then knows that nothing will come any more

    async def _read_errors(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        while data := await process.stderr.read(1 << 16):
            self._errors = (self._errors + data)[-_KEPT_ERRORS:]


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.stdin is not None:
        process.stdin.close()
    # Its children may hold the pipes open: it is the process that is waited for, not the end of its output.
    for number in (None, signal.SIGTERM, signal.SIGKILL):
        if number is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, number)
        deadline = asyncio.get_running_loop().time() + _GRACE_SECONDS
        while process.returncode is None and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.01)
        if process.returncode is not None:
            break
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGTERM)  # what it left behind
    transport: Any = getattr(process, "_transport", None)
    if transport is not None:
        transport.close()  # closes the pipes even where a child still holds them


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
