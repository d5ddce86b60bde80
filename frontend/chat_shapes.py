"""Chat templates, tried at compile time on the message shapes that servers receive.

Templates are programs from strangers (jinja2). They are rendered by the runtime's own sandbox, which the
caller passes in: what the compile proves is what the server will do, and there is no second sandbox.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from ..ir.errors import LlmcError

_INTERNAL: Final = re.compile(r"__\w+__")

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
)


def pair_shape(pairs: Mapping[str, Any]) -> MessageShape:
    """A question and a passage, for a reranker that was made of a language model; `pairs` of the manifest.
    Where the template is told more, which is not tried here, it may fail.
    """
    said = [("query", "Where?"), ("document", "Here.")]
    if pairs["system"] is not None:
        said.insert(0, ("system", pairs["system"]))
    parts = [(role, [{"type": "text", "text": text}] if pairs["parts"] else text) for role, text in said]
    return MessageShape(
        "a question and a passage",
        tuple(_said(role, content) for role, content in parts),
        required=not pairs["variables"],
        add_generation_prompt=False,
    )


def render_shape(
    template: str, shape: MessageShape, special_tokens: Mapping[str, str], render: Renderer
) -> Problem | None:
    """Render one shape; None where it succeeded."""
    try:
        render(template, shape.messages, special_tokens, shape.add_generation_prompt, shape.tools)
    except Exception as error:  # noqa: BLE001  # a template can raise anything; what matters is which shape it refuses
        reason = error.message if isinstance(error, LlmcError) else str(error)
        return Problem(reason or type(error).__name__, dangerous=_stopped_by_sandbox(error))
    return None


def _stopped_by_sandbox(error: BaseException | None) -> bool:
    from jinja2.exceptions import SecurityError

    while error is not None and not isinstance(error, SecurityError):
        error = error.__cause__ or error.__context__
    return error is not None


def reaches_out(template: str) -> Problem | None:
    """The first name like `__class__` in a template's code, even in a branch that no shape takes."""
    import jinja2

    try:
        for line, kind, value in jinja2.Environment().lex(template):
            if kind in ("name", "string") and _INTERNAL.fullmatch(value.strip("'\"")):
                return Problem(f"it reaches for {value}, which only an attack needs", line, dangerous=True)
    except jinja2.TemplateSyntaxError as error:
        return Problem(f"it is no valid jinja2: {error.message}", error.lineno, dangerous=True)
    return None


@dataclass(frozen=True)
class TemplateCheck:
    """The first fault that forbids a template, and the shapes that it refuses by itself."""

    fault: tuple[str, Problem] | None = None
    refused: list[str] = field(default_factory=list[str])


def check_template(
    template: str,
    special_tokens: Mapping[str, str],
    render: Renderer | None,
    shapes: Sequence[MessageShape] = MESSAGE_SHAPES,
) -> TemplateCheck:
    """Try every shape. A fault is a template that is no jinja2, reaches out, or fails on a required shape.

    Without a renderer the template is only read, not tried.
    """
    problem = reaches_out(template)
    if problem is not None:
        return TemplateCheck(("any message", problem))
    refused: list[str] = []
    for shape in shapes if render is not None else ():
        assert render is not None
        problem = render_shape(template, shape, special_tokens, render)
        if problem is not None and (problem.dangerous or shape.required):
            return TemplateCheck((shape.name, problem), refused)
        if problem is not None:
            refused.append(shape.name)
    return TemplateCheck(None, refused)
