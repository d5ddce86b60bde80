"""`ToolBox`: the tools that a model may call, by name; where they come from, and how one is called.

Tools come from Python functions, from a file that the user names (`FILE.py`), from an MCP server that the
user names (`mcp:COMMAND`), and, by the name of an entry point in the group `llmc.tools`, from installed
packages. An entry point is a function or a list of functions. Installing a package gives its tools to no
model: they are named like everything else.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
import sys
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from ...ir.errors import InputError
from ...plugins.entries import Registered as Entry
from ...plugins.entries import collect as collect_entries
from ..tool_calls.base import MAX_TOOLS, Tool, ToolCall
from .base import MAX_NAME, ArgumentError, RunnableTool, ToolResult, check_name, one_line
from .calculate import calculate
from .function import function_tool, is_typed, marks_of
from .runner import Runner, parse_arguments

if TYPE_CHECKING:
    from .mcp import McpServer

GROUP = "llmc.tools"
MCP_PREFIX = "mcp:"

Allow = Callable[[RunnableTool, Mapping[str, Any]], bool]
"""(tool, arguments) → whether a call with effects may be made."""

_file_numbers = itertools.count(1)


class ToolBox:
    """Named tools, and the limits within which they run. Closing it ends the MCP servers that it started."""

    def __init__(
        self,
        tools: Iterable[RunnableTool | Callable[..., Any]] = (),
        *,
        timeout: float = 30.0,
        max_output: int = 16_384,
    ) -> None:
        """Args:
        tools: typed functions, or tools made of them.
        timeout: seconds that a call may take, where the tool says nothing itself.
        max_output: bytes of UTF-8 of a result that the model gets; the rest is cut, with a note.
        """
        self._timeout = timeout
        self._max_output = max_output
        self._tools: dict[str, RunnableTool] = {}
        self._servers: list[McpServer] = []
        self._runner = Runner()
        for tool in tools:
            self.add(tool)

    # Which there are -------------------------------------------------------------------------------------

    @property
    def specs(self) -> list[Tool]:
        """What the model is told of each, in the order in which they were added."""
        return [tool.spec for tool in self._tools.values()]

    def get(self, name: str) -> RunnableTool | None:
        """The tool of a name."""
        return self._tools.get(name)

    def __iter__(self) -> Iterator[RunnableTool]:
        return iter(self._tools.values())

    def __len__(self) -> int:
        return len(self._tools)

    def add(self, tool: RunnableTool | Callable[..., Any], *, origin: str | None = None) -> None:
        """Add a tool, or a typed function as one. The same function twice is one tool.

        Raises InputError where two share a name, naming where both come from, or where a function cannot be a
        tool.
        """
        is_tool = hasattr(tool, "bind")
        made = cast(RunnableTool, tool) if is_tool else function_tool(cast(Any, tool), origin=origin)
        name = check_name(made.spec.name, made.origin)
        other = self._tools.get(name)
        if other is not None and getattr(other, "function", other) != getattr(made, "function", None):
            raise InputError(
                f"two tools are named {name}: one of {other.origin} and one of {made.origin}",
                remedy="rename one of them, or leave one out",
            )
        if other is None and len(self._tools) >= MAX_TOOLS:
            raise InputError(f"more than {MAX_TOOLS} tools", remedy="leave some out")
        self._tools[name] = made

    def remove(self, name: str) -> None:
        """Take a tool out."""
        self._tools.pop(name, None)

    def add_builtin(self) -> None:
        """Add `calculate`."""
        self.add(calculate, origin="llmc")

    def load(self, spec: str) -> None:
        """Add tools from FILE.py, mcp:COMMAND, or the entry point of a name.

        Raises InputError, naming the file, command or package, where there are none to be had.
        """
        if spec.startswith(MCP_PREFIX):
            self._add_server(spec.removeprefix(MCP_PREFIX).strip())
        elif spec.endswith(".py"):
            for tool in tools_of_file(Path(spec)):
                self.add(tool)
        else:
            known = registered()
            if spec not in known:
                remedy = (
                    f"give FILE.py, {MCP_PREFIX}COMMAND, or one of: {', '.join(known) or 'none is installed'}"
                )
                raise InputError(f"no tools are named {spec[:80]!r}", remedy=remedy)
            for function in known[spec].load():
                self.add(function, origin=known[spec].package)

    def _add_server(self, command: str) -> None:
        from .mcp import McpServer

        server = McpServer(command)
        self._servers.append(server)
        for tool in server.tools:
            # Names that servers choose must not take those of other tools, nor make the box unusable.
            name = tool.spec.name
            numbered = (f"{server.name}_{name}"[: MAX_NAME - 4] + suffix for suffix in ("", "_2", "_3"))
            free = next((one for one in (name, *numbered) if one not in self._tools), name)
            self.add(replace(tool, spec=replace(tool.spec, name=free)))

    # Calling ---------------------------------------------------------------------------------------------

    def run(self, call: ToolCall, *, allow: Allow | None = None, seconds: float | None = None) -> ToolResult:
        """Make a call. Whatever goes wrong is a result too, for the model to read.

        Args:
            call: as the model wrote it.
            allow: asked before a tool with effects is called; None refuses all of those.
            seconds: what is left for it, where that is less than the tool's own limit.
        """
        tool = self._tools.get(call.name)
        if tool is None:
            known = ", ".join(self._tools) or "there are none"
            return ToolResult("unknown_tool", f"no tool is named {call.name[:MAX_NAME]!r}; tools: {known}")
        try:
            arguments = parse_arguments(call.arguments)
            invoke = tool.bind(arguments)
        except ArgumentError as error:
            return ToolResult("arguments", str(error))
        if tool.effects and (allow is None or not allow(tool, arguments)):
            return ToolResult("refused", "the user did not allow this call")
        limit = self._timeout if tool.timeout is None else tool.timeout
        limit = limit if seconds is None else min(limit, seconds)
        return self._runner.run(call.name, invoke, seconds=limit, max_bytes=self._max_output)

    # Lifetime --------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End the MCP servers."""
        while self._servers:
            self._servers.pop().close()

    def __enter__(self) -> ToolBox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# Files -----------------------------------------------------------------------------------------------------


def tools_of_file(path: Path) -> list[RunnableTool]:
    """The tools of a Python file, which is executed: the functions that it marks with `@tool`, or where it
    marks none, its public functions whose parameters all have types.

    Raises InputError, naming file and line, where it cannot be executed or has none.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file", remedy="give a Python file with typed functions")
    module = _execute(path)
    values = {id(value): value for value in vars(module).values()}.values()
    marked = [value for value in values if marks_of(value) is not None]
    own = [value for value in values if getattr(value, "__module__", None) == module.__name__]
    public = [value for value in own if is_typed(value) and not value.__name__.startswith("_")]
    if not marked and not public:
        raise InputError(
            f"{path} has no tools",
            remedy="define a function whose parameters have types, or mark one with @tool",
        )
    try:
        return [function_tool(value, origin=str(path)) for value in marked or public]
    except InputError as error:
        way_out = "" if marked else ", or mark the tools of this file with @tool"
        raise InputError(f"{path}: {error.message}", remedy=f"{error.remedy}{way_out}") from error


def _execute(path: Path) -> types.ModuleType:
    # A number of its own: the file must not take the place of an installed module, nor of another such file.
    name = f"llmc_tools_{next(_file_numbers)}_{re.sub(r'[^A-Za-z0-9_]', '_', path.stem)}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "the name ends in .py"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the file may raise anything
        del sys.modules[name]
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        where = f"{path}, line {line}" if line else str(path)
        raise InputError(f"{where}: {one_line(error)}", remedy="correct the file") from error
    return module


# Entry points ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Registered:
    """One entry point of the group `llmc.tools`; `package` is the distribution that brings it."""

    item: Entry

    @property
    def name(self) -> str:
        return self.item.name

    @property
    def package(self) -> str:
        return self.item.origin

    def load(self) -> list[Callable[..., Any] | RunnableTool]:
        """Its functions. Raises InputError, naming the package, where they cannot be had."""
        value = self.item.load()
        found = list(value) if isinstance(value, list | tuple) else [value]
        if not found or not all(callable(one) or hasattr(one, "bind") for one in found):
            raise self.item.wrong("is neither a function nor a list of them")
        return found


def registered() -> dict[str, Registered]:
    """Every entry point of tools by name; imports none."""
    return collect(entry_points(group=GROUP))


def collect(points: Iterable[EntryPoint]) -> dict[str, Registered]:
    """Entries by name. One whose name two packages claim raises when it is loaded."""
    return {name: Registered(item) for name, item in collect_entries(GROUP, points).items()}
