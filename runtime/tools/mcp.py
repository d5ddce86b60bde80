"""MCP servers over stdio: their tools, called through the `mcp` package (an optional dependency).

The server is a program that the user named, so it runs with the user's rights; what it *says* is still not
trusted further than it must be:

- Its list of tools is read once, at the start. A server that announces others later is not listened to, and
  what a call returns is text for the model, never a tool, an instruction to us or a file to fetch.
- Names are brought into the allowed form and cannot take another tool's (`ToolBox`); descriptions and schemas
  have largest sizes; a tool beyond them is left out, with a line in the log.
- A tool counts as having effects, so that a person is asked, unless the server annotates it `readOnlyHint:
  true` and not `destructiveHint: true`. The specification says not to rely on hints of servers that one does
  not trust. Asking protects from the model's mistakes, though, and not from the server, which could do at
  once whatever it likes; and a person who is asked about every search stops reading what is asked.
  `trust_hints=False` asks for all.
- Of the environment it gets the few variables that the `mcp` package considers safe. Anything else is given
  in the command: `mcp:env TOKEN=… server`.

All talk runs in an event loop in a thread of the server's own; a call waits for it at most its time.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import logging
import re
import shlex
import shutil
import threading
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from ...ir.errors import InputError, LlmcError
from ..tool_calls.base import MAX_TOOLS, Tool
from .base import MAX_DESCRIPTION, MAX_NAME, Invocation, ToolError, one_line, shortened
from .mcp_process import ServerProcess
from .runner import CallTimeoutError

if TYPE_CHECKING:
    from mcp import Client
    from mcp.types import CallToolResult
    from mcp.types import Tool as Listed

_log = logging.getLogger("llmc.runtime.tools")

_MAX_PAGES = 32
_CLOSE_SECONDS = 10.0


class McpError(LlmcError):
    """An MCP server cannot be started, or does not do what the protocol says."""


class ServerEndedError(McpError, ToolError):
    """An MCP server has ended, or cannot be spoken to any more."""


@dataclass(frozen=True)
class McpTool:
    """A tool of an MCP server."""

    spec: Tool
    effects: bool
    origin: str
    server: McpServer
    remote_name: str
    """What the server calls it."""
    timeout: float | None = None

    def bind(self, arguments: Mapping[str, Any]) -> Invocation:
        """See `RunnableTool.bind`. The server itself checks the arguments against its schema."""
        given = dict(arguments)
        return lambda seconds: self.server.call(self.remote_name, given, seconds)


class McpServer:
    """A running server. Its methods may be called from several threads; `close` it."""

    def __init__(self, command: str, *, start_seconds: float = 60.0, trust_hints: bool = True) -> None:
        """Start the server and read its list of tools.

        Args:
            command: a program and its arguments, as in a shell.
            start_seconds: until it must have told its tools.
            trust_hints: see the module's text.

        Raises InputError where there is no such program, and McpError where it does not behave as a server.
        """
        try:
            import mcp  # noqa: F401  # pyright: ignore[reportUnusedImport]  (whether it is there, before a thread starts)
        except ModuleNotFoundError:
            raise InputError("MCP servers need the package mcp", remedy="pip install 'llmc[tools]'") from None
        self.command = command
        words = _words(command)
        self.name = _allowed(PurePath(words[0]).stem)
        self._trust_hints = trust_hints
        self._process = ServerProcess(words)
        self._loop = asyncio.new_event_loop()
        self._ready: concurrent.futures.Future[list[Listed]] = concurrent.futures.Future()
        self._stop = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._client: Client | None = None
        self._thread = threading.Thread(target=self._run, name=f"llmc-mcp-{self.name}", daemon=True)
        self._thread.start()
        try:
            listed = self._ready.result(start_seconds)
        except concurrent.futures.TimeoutError:
            self.close()
            raise McpError(
                f"mcp:{command}: it has not told its tools after {start_seconds:g} s",
                remedy="see whether it is an MCP server over stdio",
            ) from None
        except BaseException:
            self.close()
            raise
        self.tools = self._read_tools(listed)

    # In its thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        failure: BaseException | None = None
        asyncio.set_event_loop(self._loop)
        self._task = self._loop.create_task(self._talk())
        try:
            self._loop.run_until_complete(self._task)
        except BaseException as error:  # noqa: BLE001  (it reaches whoever waits for the start)
            failure = error
        self._client = None
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()
        if failure is not None and not self._ready.done():
            self._ready.set_exception(self._start_error(failure))

    async def _talk(self) -> None:
        from mcp import Client

        async with Client(self._process.streams(), cache=None) as client:
            found: list[Listed] = []
            cursor: str | None = None
            for _ in range(_MAX_PAGES):
                page = await client.list_tools(cursor=cursor)
                found += page.tools
                cursor = page.next_cursor
                if cursor is None or len(found) > MAX_TOOLS:
                    break
            self._client = client
            self._ready.set_result(found)
            await self._stop.wait()

    def _start_error(self, error: BaseException) -> LlmcError:
        from mcp import MCPError
        from mcp.types import CONNECTION_CLOSED

        inner = error
        while isinstance(inner, BaseExceptionGroup) and inner.exceptions:
            inner = inner.exceptions[0]
        if isinstance(inner, OSError) and inner.strerror:
            return InputError(f"mcp:{self.command}: {inner.strerror.lower()}", remedy="correct the command")
        closed = isinstance(inner, MCPError) and inner.code == CONNECTION_CLOSED
        why = self._process.end if closed else one_line(inner)[:300]
        return McpError(f"mcp:{self.command}: {why}", remedy="see whether it is an MCP server over stdio")

    # Outside ---------------------------------------------------------------------------------------------

    def call(self, name: str, arguments: dict[str, Any], seconds: float) -> str:
        """The text of a tool's result.

        Raises ToolError with the server's words where the tool failed, CallTimeoutError where it took longer
        than `seconds`, ServerEndedError where the server is not there any more.
        """
        client = self._client
        if client is None or not self._thread.is_alive():
            raise self._ended()
        future = self._submit(self._call(client, name, arguments, seconds))
        try:
            result = future.result(seconds + 1)
        except (concurrent.futures.TimeoutError, concurrent.futures.CancelledError):
            future.cancel()  # it waits for a server that does not even read
            raise CallTimeoutError(f"{name} of mcp:{self.command} took longer than {seconds:g} s") from None
        text = text_of(result)
        if result.is_error:
            raise ToolError(text or "the tool failed and did not say why")
        return text

    async def _call(
        self, client: Client, name: str, arguments: dict[str, Any], seconds: float
    ) -> CallToolResult:
        from mcp import MCPError
        from mcp.types import (
            CONNECTION_CLOSED,
            REQUEST_TIMEOUT,
            CallToolRequest,
            CallToolRequestParams,
            CallToolResult,
        )

        # Not `client.call_tool`: that checks the result against a schema of the server's, with regular
        # expressions of the server's, for which a text has no use.
        request = CallToolRequest(params=CallToolRequestParams(name=name, arguments=arguments))
        try:
            return await client.session.send_request(
                request, CallToolResult, request_read_timeout_seconds=seconds
            )
        except MCPError as error:
            if self._process.closed and error.code == CONNECTION_CLOSED:
                # The exit code is there a moment after the end of the output.
                await asyncio.sleep(0.1)
                raise self._ended() from None
            if error.code == REQUEST_TIMEOUT:
                raise CallTimeoutError(
                    f"{name} of mcp:{self.command} took longer than {seconds:g} s"
                ) from None
            raise ToolError(f"the server refused the call: {shortened(error.message, 500)}") from None
        except ValueError as error:  # pydantic's ValidationError among them
            raise ToolError(
                f"the server's answer is not one of the protocol: {one_line(error)[:300]}"
            ) from None

    def _submit(
        self, coroutine: Coroutine[Any, Any, CallToolResult]
    ) -> concurrent.futures.Future[CallToolResult]:
        try:
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except RuntimeError:  # the loop has just been closed
            coroutine.close()
            raise self._ended() from None

    def _ended(self) -> ServerEndedError:
        return ServerEndedError(
            f"the MCP server mcp:{self.command} {self._process.end}",
            remedy="its tools cannot be called any more",
        )

    def _read_tools(self, listed: list[Listed]) -> list[McpTool]:
        """The tools as ours; what cannot be one is left out, and logged."""
        tools: dict[str, McpTool] = {}
        for one in listed[:MAX_TOOLS]:
            raw = {
                "name": _allowed(one.name),
                "description": shortened(one.description or "", MAX_DESCRIPTION),
                "parameters": one.input_schema,
            }
            try:
                spec = Tool.from_openai(
                    {"function": raw}, f"mcp:{self.command}, tool {one.name[:MAX_NAME]!r}"
                )
            except InputError as error:
                _log.info("left out: %s", error)
                continue
            if spec.name in tools:
                _log.info("left out: mcp:%s has two tools named %s", self.command, spec.name)
                continue
            hints = one.annotations
            harmless = (
                hints is not None and hints.read_only_hint is True and hints.destructive_hint is not True
            )
            effects = not (self._trust_hints and harmless)
            tools[spec.name] = McpTool(spec, effects, f"mcp:{self.command}", self, one.name)
        if len(listed) > MAX_TOOLS:
            _log.info("left out: the tools of mcp:%s after the first %d", self.command, MAX_TOOLS)
        return list(tools.values())

    def close(self) -> None:
        """End the server: it is asked to, and made to after some seconds."""
        if self._thread.is_alive() and not self._loop.is_closed():
            try:
                self._loop.call_soon_threadsafe(self._finish)
            except RuntimeError:
                return  # the loop has just ended by itself
            self._thread.join(_CLOSE_SECONDS)

    def _finish(self) -> None:
        self._stop.set()
        if self._client is None and self._task is not None:
            self._task.cancel()  # it still starts, and may never come to wait for the event


def text_of(result: CallToolResult) -> str:
    """A result's text; of what is none, a note that it was left out."""
    parts: list[str] = []
    for block in result.content:
        match block.type:
            case "text":
                parts.append(block.text)
            case "resource":
                held: Any = block.resource
                parts.append(
                    getattr(held, "text", None) or f"[a resource of type {held.mime_type}, left out]"
                )
            case "resource_link":
                parts.append(f"[a link, not followed: {block.uri}]")
            case _:
                parts.append(f"[{block.type} of type {block.mime_type}, left out]")
    if not parts and result.structured_content is not None:
        parts.append(json.dumps(result.structured_content, ensure_ascii=False))
    return "\n".join(parts)


def _words(command: str) -> list[str]:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise InputError(f"mcp:{command}: {str(error).lower()}", remedy="quote it as in a shell") from None
    if not words:
        raise InputError("mcp: names no command", remedy="write mcp:COMMAND, for example mcp:my-server")
    if shutil.which(words[0]) is None:
        raise InputError(
            f"mcp:{command}: there is no program {words[0]!r}", remedy="install it, or give its path"
        )
    return words


def _allowed(name: str) -> str:
    """A name in the form that tools may have."""
    return re.sub(r"[^a-zA-Z0-9_-]", "_", name)[:MAX_NAME] or "_"
