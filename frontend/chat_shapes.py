"""Chat templates, tried at compile time: message shapes that servers receive, rendered in a sandbox.

Templates are programs from strangers (jinja2). They run with jinja2's immutable sandbox only, in the
environment that transformers defines for them (whitespace trimming, loop controls, `tojson`,
`raise_exception`, `strftime_now`).
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, NoReturn

Message = Mapping[str, Any]
# template, messages, special tokens by name, add_generation_prompt, tools → text
Renderer = Callable[[str, Sequence[Message], Mapping[str, str], bool, Sequence[Any] | None], str]


@dataclass(frozen=True)
class MessageShape:
    """One request: `required` shapes must render, others may be refused by the template itself."""

    name: str
    messages: tuple[Message, ...]
    required: bool = False
    add_generation_prompt: bool = True
    tools: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class Problem:
    """Why a shape did not render: the reason, the template's line (0: unknown), whether the sandbox stopped
    it.
    """

    reason: str
    line: int = 0
    dangerous: bool = False


def _said(role: str, content: Any, **more: Any) -> Message:
    return {"role": role, "content": content, **more}


_CALL: Final = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Graz"}},
}
_TOOL: Final = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
_ASK: Final = _said("user", "What is the weather in Graz?")
_HELLO: Final = _said("user", "Hello")
_BRIEF: Final = _said("system", "Be brief.")

MESSAGE_SHAPES: Final = (
    MessageShape("a user message", (_HELLO,), required=True),
    MessageShape(
        "alternating turns", (_HELLO, _said("assistant", "Yes?"), _said("user", "Go on")), required=True
    ),
    MessageShape("no generation prompt", (_HELLO,), required=True, add_generation_prompt=False),
    MessageShape("an assistant message last", (_HELLO, _said("assistant", "I"))),
    MessageShape("a system message first", (_BRIEF, _HELLO)),
    MessageShape("a late system message", (_HELLO, _BRIEF, _HELLO)),
    MessageShape("two user messages in a row", (_said("user", "One"), _said("user", "Two"))),
    MessageShape("empty content", (_said("user", ""),)),
    MessageShape("content in parts", (_said("user", [{"type": "text", "text": "Hello"}]),)),
    MessageShape("tools offered", (_ASK,), tools=(_TOOL,)),
    MessageShape(
        "a tool call and its result",
        (_ASK, _said("assistant", "", tool_calls=[_CALL]), _said("tool", "Sunny", tool_call_id="call_1")),
        tools=(_TOOL,),
    ),
    MessageShape("an empty list of tool calls", (_ASK, _said("assistant", "Sunny", tool_calls=[]), _ASK)),
    MessageShape("no messages", ()),
)


def render_shape(
    template: str, shape: MessageShape, special_tokens: Mapping[str, str], render: Renderer | None = None
) -> Problem | None:
    """Render one shape; None where it succeeded."""
    import jinja2
    from jinja2.exceptions import SecurityError

    try:
        (render or sandboxed)(
            template, shape.messages, special_tokens, shape.add_generation_prompt, shape.tools
        )
    except jinja2.TemplateSyntaxError as error:
        return Problem(f"it is no valid jinja2: {error.message}", error.lineno, dangerous=True)
    except SecurityError as error:
        return Problem(f"the sandbox refuses it: {error}", _line(error), dangerous=True)
    except Exception as error:  # noqa: BLE001  # a template can raise anything; what matters is the shape it refuses
        return Problem(str(error) or type(error).__name__, _line(error))
    return None


def reaches_out(template: str) -> Problem | None:
    """The first attribute named `__…` that a template mentions, even in a branch that no shape takes."""
    import jinja2
    from jinja2 import nodes

    try:
        tree = _environment().parse(template)
    except jinja2.TemplateSyntaxError as error:
        return Problem(f"it is no valid jinja2: {error.message}", error.lineno, dangerous=True)
    except RecursionError:
        return Problem("it is nested too deeply", dangerous=True)
    for node in tree.find_all((nodes.Getattr, nodes.Getitem, nodes.Filter)):
        name: Any = None
        if isinstance(node, nodes.Getattr):
            name = node.attr
        elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
            name = node.arg.value
        elif isinstance(node, nodes.Filter) and node.name in ("attr", "map") and node.args:
            first = node.args[0]
            name = first.value if isinstance(first, nodes.Const) else None
        if isinstance(name, str) and name.startswith("__"):
            return Problem(f"it reaches for the attribute {name}", node.lineno, dangerous=True)
    return None


def sandboxed(
    template: str,
    messages: Sequence[Message],
    special_tokens: Mapping[str, str],
    add_generation_prompt: bool,
    tools: Sequence[Any] | None,
) -> str:
    """A template's text for messages, in the sandbox."""
    compiled = _environment().from_string(template)
    return compiled.render(
        messages=[dict(one) for one in messages],
        tools=None if tools is None else list(tools),
        documents=None,
        add_generation_prompt=add_generation_prompt,
        **special_tokens,
    )


def _environment() -> Any:
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.now().astimezone().strftime(form)

    def tojson(value: Any, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, **options)

    env: Any = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = strftime_now
    return env


def _line(error: BaseException) -> int:
    """The template's line of an error, by the frames that jinja2 marks."""
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"
    ]
    return (lines[-1] or 0) if lines else 0


@dataclass(frozen=True)
class TemplateCheck:
    """Outcome of trying a template: the first fault that forbids it, and the shapes that it refuses by
    itself.
    """

    fault: tuple[str, Problem] | None = None
    refused: list[str] = field(default_factory=list[str])


def check_template(
    template: str, special_tokens: Mapping[str, str], render: Renderer | None = None
) -> TemplateCheck:
    """Try every shape. A fault is a template that is no jinja2, reaches out, or fails on a required shape."""
    problem = reaches_out(template)
    if problem is not None:
        return TemplateCheck(("any message", problem))
    refused: list[str] = []
    for shape in MESSAGE_SHAPES:
        problem = render_shape(template, shape, special_tokens, render)
        if problem is not None and (problem.dangerous or shape.required):
            return TemplateCheck((shape.name, problem), refused)
        if problem is not None:
            refused.append(shape.name)
    return TemplateCheck(None, refused)
