"""A typed Python function becomes a tool.

    @tool(effects=True)
    def send(to: str, text: str, urgent: bool = False) -> str:
        '''Send a message.

        Args:
            to: Whom to send it to.
            text: What it says.
        '''

The schema of its arguments comes from the signature (`schema.py`): one with a default is not required. What
the model reads about it comes from the docstring (`docstring.py`) or from `Annotated[str, "…"]`. The function
itself stays what it was: it can be called and tested as before.
"""

from __future__ import annotations

import asyncio
import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, overload

from ...ir.errors import InputError
from ..tool_calls.base import Tool
from .base import MAX_DESCRIPTION, Invocation, check_name, shortened
from .docstring import read_docstring
from .runner import CallTimeoutError
from .schema import Field, Fields, described, kind_of, resolved_hints

F = TypeVar("F", bound=Callable[..., Any])

_MARK = "__llmc_tool__"
_MAX_ARGUMENT_TEXT = 300


@dataclass(frozen=True)
class Marks:
    """What `@tool` says about a function."""

    name: str | None = None
    description: str | None = None
    effects: bool = False
    timeout: float | None = None


@overload
def tool(function: F, /) -> F: ...
@overload
def tool(
    *,
    name: str | None = None,
    description: str | None = None,
    effects: bool = False,
    timeout: float | None = None,
) -> Callable[[F], F]: ...
def tool(
    function: Any = None,
    /,
    *,
    name: str | None = None,
    description: str | None = None,
    effects: bool = False,
    timeout: float | None = None,
) -> Any:
    """Mark a function, sync or async, as a tool; returns the function.

    Args:
        function: the function, where the decorator stands without parentheses.
        name: what the model calls it; the function's own name otherwise.
        description: what the model reads about it; the docstring's otherwise.
        effects: a call changes something (sends, writes, deletes, pays): a person is asked before each.
        timeout: seconds that a call may take; the tool box's limit otherwise.
    """
    marks = Marks(name, description, effects, timeout)

    def mark(marked: F) -> F:
        setattr(marked, _MARK, marks)
        return marked

    return mark if function is None else mark(function)


def marks_of(function: Any) -> Marks | None:
    """What `@tool` said about it; None where it is not marked."""
    marks = getattr(function, _MARK, None)
    return marks if isinstance(marks, Marks) else None


@dataclass(frozen=True)
class FunctionTool:
    """A Python function as a tool. Made by `function_tool`."""

    spec: Tool
    effects: bool
    origin: str
    timeout: float | None
    function: Callable[..., Any]
    arguments: Fields
    positional: tuple[str, ...] = ()
    """Parameters that cannot be given by name."""

    def bind(self, arguments: Mapping[str, Any]) -> Invocation:
        """See `RunnableTool.bind`."""
        values = self.arguments.convert(arguments, "argument ")
        given = [values.pop(name) for name in self.positional if name in values]

        def invoke(seconds: float) -> Any:
            result = self.function(*given, **values)
            return _await(result, seconds) if inspect.isawaitable(result) else result

        return invoke


def function_tool(function: Callable[..., Any], *, origin: str | None = None) -> FunctionTool:
    """The tool of a function.

    Raises InputError, naming function and parameter, for a parameter without a type or of a type that has no
    JSON form, for `*args` and `**kwargs`, and for a name that a tool may not have.
    """
    if not isinstance(function, types.FunctionType | types.MethodType):
        raise InputError(f"{function!r} is no function"[:200], remedy="give a function with typed parameters")
    marks = marks_of(function) or Marks()
    origin = origin or str(getattr(function, "__module__", "") or "a function")
    name = check_name(marks.name if marks.name is not None else function.__name__, origin)
    if marks.timeout is not None and not marks.timeout > 0:
        raise InputError(f"tool {name}: timeout is {marks.timeout}", remedy="give seconds, above 0")
    said = read_docstring(function.__doc__)
    fields, positional = _parameters(function, f"tool {name}", said.arguments)
    description = said.description if marks.description is None else marks.description
    return FunctionTool(
        Tool(name, shortened(description, MAX_DESCRIPTION), fields.schema()),
        marks.effects,
        origin,
        marks.timeout,
        function,
        fields,
        positional,
    )


def is_typed(function: Any) -> bool:
    """Whether a function can become a tool: every parameter has a type."""
    if not isinstance(function, types.FunctionType):
        return False
    annotations = function.__annotations__
    return all(name in annotations for name in inspect.signature(function).parameters)


def _parameters(
    function: types.FunctionType | types.MethodType, where: str, said: Mapping[str, str]
) -> tuple[Fields, tuple[str, ...]]:
    annotations = dict(function.__annotations__)
    annotations.pop("return", None)  # may name what is only imported for type checkers
    innermost: Any = inspect.unwrap(function)
    hints = resolved_hints(
        types.SimpleNamespace(__annotations__=annotations), where, getattr(innermost, "__globals__", {})
    )
    fields: dict[str, Field] = {}
    positional: list[str] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise InputError(f"{where} takes any number of arguments ({name})", remedy="name each of them")
        if name not in hints:
            raise InputError(
                f"{where}: parameter {name} has no type", remedy=f"write {name}: str, for example"
            )
        if parameter.kind is parameter.POSITIONAL_ONLY:
            positional.append(name)
        _, description = described(hints[name])
        required = parameter.default is parameter.empty
        fields[name] = Field(
            kind_of(hints[name], f"{where}: parameter {name}"),
            required,
            shortened(description or said.get(name, ""), _MAX_ARGUMENT_TEXT),
            None if required else parameter.default,
        )
    return Fields(fields), tuple(positional)


def _await(result: Any, seconds: float) -> Any:
    """What an async function returns. Each call has an event loop of its own: one that blocks its loop then
    holds up no other. After `seconds` the call is cancelled, and raises CallTimeoutError; a TimeoutError is
    the function's own.
    """

    async def bounded() -> Any:
        limit = asyncio.timeout(seconds)
        try:
            async with limit:
                return await result
        except TimeoutError:
            if not limit.expired():
                raise
            raise CallTimeoutError(f"the call took longer than {seconds:g} s and was given up") from None

    return asyncio.run(bounded())
