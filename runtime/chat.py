"""One turn of a conversation: messages, tools and a wanted form of answer become a prompt and a constraint,
and what the model then says becomes text and tool calls. The server and the agent both stand on this.

    turn = ChatModel(llm).prepare(messages, params, tools=tools)
    reader = turn.reader()
    for output in llm.stream(turn.prompt_ids, turn.params):
        events = reader.push(output)
    reader.content, reader.calls, reader.finish_reason
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from ..ir.errors import InputError
from .chat_template import Message
from .generation import StepOutput
from .grammar import Grammar
from .llm import LLM
from .response_format import wanted_schema
from .sampling_params import SamplingParams
from .tool_calls import (
    CallArguments,
    CallBegin,
    CallParser,
    Content,
    Detected,
    Event,
    Tool,
    ToolCall,
    ToolFormat,
    calls_or_json,
    detect,
    find_format,
    recorded,
)

ToolChoice = Literal["auto", "none", "required"] | str
"""Whether tools are called: as the model likes, not at all, at least one, or the one of this name."""

_ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(slots=True)
class TurnReader:
    """What one choice has said so far, from its outputs.

    Small models repeat a call until they run out of tokens. The same call twice in one answer is never meant,
    so it is left out and the answer ends there: `finish_reason` is set before the engine's own, and what the
    engine still computes for this choice can be cancelled.
    """

    parser: CallParser | None
    answered: tuple[ToolCall, ...] = ()
    """Calls of this conversation whose results the model has just been given."""
    markers: tuple[str, ...] = ()
    """Texts that calls of this model's own form hold."""
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    finish_reason: str | None = None
    """As in StepOutput, or "tool_calls" where the answer ended by calling."""
    wants_prose: bool = False
    """The model asks again what was just answered, and not in its own form: it is to be asked for text, by
    `Turn.prose`. Nothing of this answer was given out.
    """
    _said: str = ""
    _held: list[Event] = field(default_factory=list)
    _doubtful: ToolCall | None = None  # the call in `_held`: so far, it is one of `calls` again

    def push(self, output: StepOutput) -> list[Event]:
        """Take up an output; returns the text and the pieces of calls that it added."""
        if self.finish_reason is not None or self.wants_prose:
            return []
        found: list[Event]
        self._said += output.text
        if self.parser is None:
            found = [Content(output.text)] if output.text else []
        else:
            found = self.parser.push(output.text) if output.text else []
            if output.finish_reason is not None:
                found += self.parser.finish()
        events: list[Event] = []
        for event in found:
            events += self._without_repeats(event)
            if self._doubtful is not None and _among(self._doubtful, self.answered):
                self.wants_prose = True
                return []
            if self._doubtful is not None and _among(self._doubtful, self.calls):
                self.finish_reason = "tool_calls"
                break
        else:
            if output.finish_reason is not None:
                events += self._release()
                called = self.calls and output.finish_reason == "stop"
                self.finish_reason = "tool_calls" if called else output.finish_reason
        return events

    def _without_repeats(self, event: Event) -> list[Event]:
        """Take up an event; it is held back while its call may turn out to be a repetition."""
        match event:
            case CallBegin(_, call_id, name) if any(call.name == name for call in self._earlier()):
                released = self._release()
                self._doubtful, self._held = ToolCall(call_id, name, ""), [event]
                return released
            case CallArguments(_, text) if self._doubtful is not None:
                so_far = replace(self._doubtful, arguments=self._doubtful.arguments + text)
                self._doubtful = so_far
                self._held.append(event)
                same = (c for c in self._earlier() if c.name == so_far.name)
                begun = _compact(so_far.arguments)
                return [] if any(_compact(c.arguments).startswith(begun) for c in same) else self._release()
            case _:
                return [*self._release(), *self._note(event)]

    def _earlier(self) -> list[ToolCall]:
        """Calls that one more would repeat. Those that are answered count only for a model that does not
        write calls in its own form: others may mean to ask again (whether something is done by now).
        """
        own_form = not self.markers or any(marker in self._said for marker in self.markers)
        return [*self.calls, *(() if own_form or self.calls or self.content else self.answered)]

    def into_prose(self) -> None:
        """Read on from the outputs of `Turn.prose`."""
        self.parser, self.wants_prose, self._said = None, False, ""
        self._held, self._doubtful = [], None

    def _release(self) -> list[Event]:
        held, self._held, self._doubtful = self._held, [], None
        return [one for event in held for one in self._note(event)]

    def _note(self, event: Event) -> list[Event]:
        match event:
            case Content(text):
                self.content += text
            case CallBegin(_, call_id, name):
                self.calls.append(ToolCall(call_id, name, ""))
            case CallArguments(index, text):
                call = self.calls[index]
                self.calls[index] = replace(call, arguments=call.arguments + text)
        return [event]


@dataclass(frozen=True, slots=True)
class Turn:
    """A prepared turn: what to generate from, and how to read what comes."""

    prompt_ids: list[int]
    params: SamplingParams
    format: ToolFormat | None = None
    tools: tuple[Tool, ...] = ()
    answered: tuple[ToolCall, ...] = ()
    prose: Callable[[], Turn] | None = None
    """Makes the turn that asks for text, where a reader `wants_prose`."""

    def reader(self) -> TurnReader:
        """A reader for one choice."""
        if self.format is None:
            return TurnReader(None)
        answered = self.answered if self.prose is not None else ()
        return TurnReader(self.format.parser(self.tools), answered, self.format.markers)


class ChatModel:
    """A model with a chat template, and the way in which it calls tools. Safe to use from several threads."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm

    @cached_property
    def _control(self) -> re.Pattern[str]:
        """Finds the texts of special tokens, which the tokenizer would read as such wherever they stand."""
        tokenizer = self.llm.tokenizer
        texts = {tokenizer.token(token_id) or "" for token_id in tokenizer.special_ids}
        longest_first = sorted((text for text in texts if len(text.strip()) > 1), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def _as_data(self, text: str) -> str:
        """Text that a stranger wrote (a tool's result) must not end the message that it stands in: special
        tokens in it are broken up.
        """
        return self._control.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)

    @cached_property
    def detected(self) -> Detected:
        """How this model's template writes tool calls: as found when it was compiled, or found now."""
        assert self.llm.template is not None, "only asked for where there is one"
        manifest = self.llm.artifact.manifest if self.llm.artifact is not None else {}
        entry = (manifest.get("tokenizer") or {}).get("tool_calls")
        return recorded(entry) or detect(self.llm.template)

    def prepare(
        self,
        messages: Sequence[Message],
        params: SamplingParams,
        *,
        tools: Sequence[Tool] = (),
        tool_choice: ToolChoice = "auto",
        parallel: bool = True,
        response_format: Mapping[str, Any] | None = None,
        template: Mapping[str, Any] | None = None,
    ) -> Turn:
        """Render and constrain one turn.

        Args:
            messages: in the form of OpenAI's API; texts may come as lists of text parts, arguments of calls
                as JSON text.
            params: how to sample; its `grammar` is used where neither tools nor `response_format` make one.
            tools: functions that may be called, of different names (`tools_from_openai` and `ToolBox` see to
                that).
            tool_choice: see `ToolChoice`. With "none" the tools are not shown to the model either.
            parallel: whether one answer may hold several calls.
            response_format: {"type": "text"}, {"type": "json_object"}, or {"type": "json_schema",
                "json_schema": {"name": …, "schema": …}}; beside tools, of answers that call none.
            template: what else the chat template knows (`enable_thinking`, `add_generation_prompt`).

        Raises InputError, naming the field, where something is wrong, not supported, or refused by the
        template; GrammarError for a schema that cannot be kept to.
        """
        if self.llm.template is None:
            raise InputError(
                "this artifact has no chat template", remedy="use completions, which continue a text"
            )
        variables = dict(template or {})
        schema = wanted_schema(response_format)
        answer = None if schema is None else self.llm.grammars.json_schema(schema)
        used, required = self._choose(tools, tool_choice)
        if not used:
            prompt = self._render(messages, None, variables)
            return Turn(prompt, replace(params, grammar=answer or params.grammar))
        format = find_format(self.detected.format)
        several, token_id = parallel and self.detected.parallel, self.llm.tokenizer.token_id
        if schema is None or required:
            source = format.grammar(used, required=required, parallel=several, token_id=token_id)
        else:
            source = calls_or_json(format, used, schema, parallel=several, token_id=token_id)
        return self._tool_turn(messages, params, used, variables, source, answer, required=required)

    def _tool_turn(
        self,
        messages: Sequence[Message],
        params: SamplingParams,
        tools: tuple[Tool, ...],
        variables: dict[str, Any],
        source: str,
        answer: Grammar | None,
        *,
        required: bool,
    ) -> Turn:
        """A turn in which `tools` may be called; `source`: the grammar of what may be said, `answer`: that of
        an answer without calls, where it is not any text.
        """
        format = find_format(self.detected.format)

        def prose() -> Turn:
            text = replace(params, grammar=answer or self.llm.grammars.lark(_PROSE))
            return Turn(self._render(_told(messages), None, variables), text)

        answered = _answered(messages)
        # What is asked again must leave no trace in the answer: other choices and log probabilities would.
        may_ask_again = answered and not required and params.n == 1 and params.logprobs is None
        return Turn(
            self._render(messages, tools, variables),
            replace(params, grammar=self.llm.grammars.lark(source), skip_special_tokens=False),
            format,
            tools,
            answered,
            prose if may_ask_again else None,
        )

    def _choose(self, tools: Sequence[Tool], choice: ToolChoice) -> tuple[tuple[Tool, ...], bool]:
        """(the tools that may be called, whether one must be); raises InputError for a schema or a choice
        that cannot be honoured.
        """
        names = [tool.name for tool in tools]
        if choice == "none":
            return (), False
        if choice == "required" and not tools:
            raise InputError("tool_choice is required, but there are no tools", remedy="give tools")
        if choice not in ("auto", "required"):
            if choice not in names:
                raise InputError(
                    f"tool_choice names {choice[:80]!r}",
                    remedy=f"tools: {', '.join(names)[:400] or 'none were given'}",
                )
            tools = [tool for tool in tools if tool.name == choice]
        for index, tool in enumerate(tools):
            try:
                self.llm.grammars.json_schema(tool.parameters)
            except InputError as error:
                raise InputError(
                    f"tools[{index}].function.parameters ({tool.name}): {error.message}", remedy=error.remedy
                ) from None
        return tuple(tools), choice != "auto"

    def _render(
        self, messages: Sequence[Message], tools: tuple[Tool, ...] | None, variables: dict[str, Any]
    ) -> list[int]:
        plain = self._plain(messages)
        shown: list[dict[str, Any]] | None = None
        if tools:
            if self.detected.in_template:
                shown = [tool.as_openai() for tool in tools]
            else:
                plain = _with_instructions(plain, find_format(self.detected.format).instructions(tools))
        text = self.llm.chat_prompt(plain, tools=shown, **variables)
        ids = self.llm.encode(text, add_special_tokens=False)
        if not ids:
            raise InputError("the chat template made an empty prompt", remedy="give a message with content")
        return ids

    def _plain(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """The messages as templates expect them: texts in one piece, arguments as this one reads them."""
        result: list[dict[str, Any]] = []
        for number, message in enumerate(messages):
            where = f"messages[{number}]"
            plain = dict(message)
            role = plain.get("role")
            if role not in _ROLES:
                raise InputError(
                    f"{where}.role is {str(role)[:40]!r}", remedy=f"allowed: {', '.join(_ROLES)}"
                )
            if (
                role == "developer"
            ):  # OpenAI's newer name of the same thing, which no published template knows
                plain["role"] = "system"
            plain["content"] = _text_of(plain.get("content"), f"{where}.content")
            if role == "tool":
                plain["content"] = self._as_data(plain["content"])
                if plain.get("tool_call_id"):
                    plain["tool_call_id"] = self.detected.template_id(str(plain["tool_call_id"]))
            calls = plain.pop("tool_calls", None)
            if calls:
                plain["tool_calls"] = [
                    self._plain_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)
                ]
            result.append(plain)
        return self._without_native_calls(result) if self._speaks_json(result) else result

    def _speaks_json(self, messages: Sequence[Message]) -> bool:
        used = any("tool_calls" in m or m["role"] == "tool" for m in messages)
        return used and not self.detected.in_template

    def _without_native_calls(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Calls and their results as plain text, for a template that would leave them out."""
        result: list[dict[str, Any]] = []
        for message in messages:
            if message["role"] == "tool":
                result.append({"role": "user", "content": f"Tool result: {message['content']}"})
            elif "tool_calls" in message:
                calls = [
                    ToolCall(call["id"], call["function"]["name"], _as_text(call["function"]["arguments"]))
                    for call in message["tool_calls"]
                ]
                said = find_format(self.detected.format).write(calls)
                result.append({"role": "assistant", "content": f"{message['content']}{said}"})
            else:
                result.append(dict(message))
        return result

    def _plain_call(self, call: Any, where: str) -> dict[str, Any]:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise InputError(f"{where}.function.name is missing", remedy="give the call as it was answered")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                value = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                raise InputError(
                    f"{where}.function.arguments is not JSON", remedy="give them as they were answered"
                ) from None
        else:
            value = arguments if arguments is not None else {}
        if not isinstance(value, Mapping):
            raise InputError(f"{where}.function.arguments is no object", remedy='for example "{}"')
        as_text = self.detected.arguments == "text"
        given = json.dumps(value, ensure_ascii=False) if as_text else value
        return {
            "id": self.detected.template_id(str(call.get("id") or "")),
            "type": "function",
            "function": {"name": function["name"], "arguments": given},
        }


def _answered(messages: Sequence[Message]) -> tuple[ToolCall, ...]:
    """The calls since the user last spoke whose results are there."""
    calls: dict[Any, ToolCall] = {}
    found: list[ToolCall] = []
    for message in messages:
        if message.get("role") == "user":
            calls, found = {}, []
        for call in message.get("tool_calls") or ():
            function = call.get("function") or {}
            calls[call.get("id")] = ToolCall(
                str(call.get("id")), str(function.get("name")), _as_text(function.get("arguments"))
            )
        if message.get("role") == "tool" and message.get("tool_call_id") in calls:
            found.append(calls[message["tool_call_id"]])
    return tuple(found)


def _told(messages: Sequence[Message]) -> list[Message]:
    """The conversation up to what the user last said, and the results since then told with it. A model that
    repeats calls would go on doing so after a history of calls.
    """
    last = max((i for i, m in enumerate(messages) if m.get("role") == "user"), default=-1)
    if last < 0:
        return list(messages)
    results = {m.get("tool_call_id"): m.get("content") for m in messages[last:] if m.get("role") == "tool"}
    lines: list[str] = []
    for call in _answered(messages):
        content = _text_of(results[call.id], f"the result of {call.name}")
        line = f"{call.name}({call.arguments}): {content}"
        if line not in lines:
            lines.append(line)
    question = _text_of(messages[last].get("content"), f"messages[{last}].content")
    told = "\n".join([question, "", "These results are known:", *lines, "", "Answer in plain text."])
    return [*messages[:last], {**messages[last], "content": told}]


def _among(call: ToolCall, others: Iterable[ToolCall]) -> bool:
    same = _compact(call.arguments)
    return any(call.name == other.name and same == _compact(other.arguments) for other in others)


def _compact(text: str) -> str:
    """JSON text, or the beginning of one, without the spaces between its parts."""
    return _JSON_SPACE.sub(lambda found: found[1] or "", text)


_JSON_SPACE = re.compile(r'("(?:[^"\\]|\\.)*"?)|[ \t\r\n]+')

# Text that does not begin as a call in any form.
_PROSE = r"""%llguidance {}
start: TEXT
TEXT: /[^{}\[\]()`<\s](.|\n)*/
"""


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _text_of(content: Any, where: str) -> str:
    """The text of a message, whose parts are joined by line feeds, as vLLM does for models of text."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise InputError(f"{where} is a {type(content).__name__}", remedy="give a text or a list of parts")
    texts: list[str] = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, Mapping) else None
        if kind not in ("text", "input_text", "output_text", "refusal") or not isinstance(text, str):
            raise InputError(
                f"{where}[{number}] is of type {str(kind)[:40]!r}",
                remedy="this model reads parts of type text only",
            )
        texts.append(text)
    return "\n".join(texts)


def _with_instructions(messages: list[dict[str, Any]], text: str | None) -> list[dict[str, Any]]:
    """`text` in the system message, for a template that does not show tools itself."""
    if text is None:
        return messages
    if messages and messages[0]["role"] == "system":
        first = {**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}
        return [first, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


__all__ = ["ChatModel", "ToolChoice", "Turn", "TurnReader"]
