"""Formats of tool calls that other packages bring: entry-point group `llmc.tool_formats`, name → a class
without arguments (or an object) under the protocol `ToolFormat`.

They are tried on a chat template after ours, and only then: a package cannot change how a model's calls are
read that llmc reads itself. What one raises, in the middle of an answer too, names its package.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cache
from typing import Any

from ...ir.errors import InputError
from ...plugins.entries import Registered, blaming, check_returned, registered, usable
from .base import CallParser, Event, TokenIds, Tool, ToolCall, ToolFormat

GROUP = "llmc.tool_formats"
_PARTS = ("name", "markers", "bare_key", "is_marked", "grammar", "parser", "instructions", "write")


def plugin_formats(taken: Collection[str]) -> dict[str, ToolFormat]:
    """Those that can be loaded, by name; a warning names each that cannot. `taken`: names of ours."""
    others = [item for item in registered(GROUP).values() if item.name not in taken]
    return {item.name: found for item, found in usable(others, load_format)}


def plugin_format(name: str) -> ToolFormat:
    """The one of a name. Raises InputError where it is not installed, or its package is broken."""
    known = registered(GROUP)
    if name not in known:
        raise InputError(
            f"no installed package has the tool format {name[:80]!r}",
            remedy="install the package that brings it",
        )
    return load_format(known[name])


@cache
def load_format(item: Registered) -> ToolFormat:
    found: Any = item.load()
    with blaming(f"tool format {item.name}", found):
        made = found() if isinstance(found, type) else found
        missing = [part for part in _PARTS if not hasattr(made, part)]
    if missing:
        raise item.wrong(f"is no ToolFormat: it has no {missing[0]}")
    if made.name != item.name:
        raise item.wrong(f"is a tool format that calls itself {made.name!r}")
    return _Format(made)


class _Format:
    """A format of another package; its errors name it."""

    def __init__(self, inner: ToolFormat) -> None:
        self._inner = inner
        self._what = f"tool format {inner.name}"
        self.name: str = inner.name
        self.markers: tuple[str, ...] = tuple(inner.markers)
        self.bare_key: str | None = inner.bare_key
        self.is_marked: bool = bool(inner.is_marked)

    def grammar(
        self, tools: Sequence[Tool], *, required: bool, parallel: bool, token_id: TokenIds | None = None
    ) -> str:
        with blaming(self._what, self._inner):
            found = self._inner.grammar(tools, required=required, parallel=parallel, token_id=token_id)
            return check_returned(f"its grammar for {len(tools)} tools", self._inner, found, str)

    def parser(self, tools: Sequence[Tool]) -> CallParser:
        with blaming(self._what, self._inner):
            return _Parser(self._inner.parser(tools), self._what)

    def instructions(self, tools: Sequence[Tool]) -> str | None:
        with blaming(self._what, self._inner):
            return self._inner.instructions(tools)

    def write(self, calls: Sequence[ToolCall]) -> str:
        with blaming(self._what, self._inner):
            return check_returned("what it writes", self._inner, self._inner.write(calls), str)


class _Parser:
    """A parser of another package."""

    def __init__(self, inner: CallParser, what: str) -> None:
        self._inner, self._what = inner, what

    def push(self, text: str) -> list[Event]:
        with blaming(self._what, self._inner):
            return list(self._inner.push(text))

    def finish(self) -> list[Event]:
        with blaming(self._what, self._inner):
            return list(self._inner.finish())
