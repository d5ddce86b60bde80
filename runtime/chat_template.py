"""Chat templates: Jinja text from a model's publisher, which is data from a stranger, rendered in a sandbox.

The language is what transformers' `apply_chat_template` offers (its documentation, "Writing a chat
template"): `raise_exception`, `strftime_now`, a `tojson` that leaves HTML characters alone, loop controls,
`{% generation %}` blocks, and trimmed blocks. The sandbox and its limits are in template_sandbox.py.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from ..codegen.artifact import Artifact
from ..ir.errors import InputError
from .template_sandbox import MAX_OUTPUT, LimitError, SandboxEnvironment, rendering

MAX_TEMPLATE = 1 << 20

Message = Mapping[str, Any]

_FAULTS = (
    jinja2.TemplateError,
    LimitError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


class ChatTemplate:
    """A compiled chat template. Safe to use from several threads."""

    def __init__(
        self, source: str, special_tokens: Mapping[str, Any] | None = None, *, name: str = "chat template"
    ):
        """`special_tokens`: bos_token, eos_token, …, which templates refer to by these names.

        Raises InputError, with the line, where the source is no template.
        """
        self.name = name
        self._specials = dict(special_tokens or {})
        if len(source) > MAX_TEMPLATE:
            raise InputError(
                f"{name} has {len(source)} characters", remedy=f"at most {MAX_TEMPLATE} are read"
            )
        try:
            self._template = SandboxEnvironment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise InputError(
                f"{name}, line {error.lineno}: {error.message}",
                remedy="correct the template and compile again",
            ) from None
        except (RecursionError, MemoryError, SyntaxError, ValueError, OverflowError) as error:
            raise InputError(
                f"{name} cannot be compiled ({type(error).__name__})", remedy="use another template"
            ) from None

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt for a conversation, special tokens included as text.

        Args:
            messages: mappings with "role" and, mostly, "content".
            tools: JSON schemas of the functions that the model may call.
            documents: mappings with "title" and "text", for templates that cite.
            add_generation_prompt: end with the opening of the assistant's turn.
            variables: whatever else the template knows (`enable_thinking`).

        Raises InputError where a message is malformed, where the template refuses the conversation (with its
        own words and the line), reaches for what it must not, or exceeds a limit.
        """
        check_messages(messages)
        values: dict[str, Any] = {**self._specials, **variables, "messages": list(messages)}
        values |= {"tools": tools, "documents": documents, "add_generation_prompt": add_generation_prompt}
        parts: list[str] = []
        size = 0
        try:
            with rendering():
                for part in self._template.generate(values):
                    parts.append(part)
                    size += len(part)
                    if size > MAX_OUTPUT:
                        raise LimitError(f"a prompt of more than {MAX_OUTPUT} characters")
        except _FAULTS as error:
            raise self._refusal(error) from None
        return "".join(parts)

    def _refusal(self, error: BaseException) -> InputError:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == "<template>"]
        where = f", line {lines[-1]}" if lines else ""
        what = str(error) or type(error).__name__
        return InputError(
            f"{self.name}{where}: {what[:500]}",
            remedy="send messages in the form that this model's template accepts",
        )


def check_messages(messages: Any) -> None:
    """Raise InputError unless `messages` is a non-empty list of mappings with a role and a usable content."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise InputError("messages is no list, or empty", remedy='give [{"role": "user", "content": "…"}, …]')
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(
                f"messages[{number}] has no role", remedy='each is {"role": "user", "content": "…"}'
            )
        content = message.get("content")
        if content is not None and not isinstance(content, str | list | tuple):
            raise InputError(
                f"messages[{number}].content is a {type(content).__name__}",
                remedy="give a text or a list of parts",
            )


def render_once(
    source: str,
    messages: Sequence[Message],
    special_tokens: Mapping[str, str],
    add_generation_prompt: bool,
    tools: Sequence[Any] | None,
) -> str:
    """Compile and render in one call: what the compiler tries a template with before it ships it."""
    template = ChatTemplate(source, special_tokens)
    return template.render(messages, tools=tools, add_generation_prompt=add_generation_prompt)


def template_of(artifact: Artifact) -> ChatTemplate | None:
    """An artifact's chat template; None where it has none."""
    entry: Mapping[str, Any] = artifact.manifest.get("tokenizer") or {}
    rel = entry.get("chat_template")
    if rel is None:
        return None
    return ChatTemplate(artifact.read_text(rel), entry.get("special_tokens") or {}, name=rel)
