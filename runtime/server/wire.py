"""Pieces of answers that several endpoints share: usage, log probabilities, identifiers, finish reasons."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Mapping
from typing import Any

from ...ir.errors import InputError
from ..chat import Turn, TurnReader
from ..generation import StepOutput
from ..sampler import TokenLogprob
from ..tokenizer import Tokenizer
from ..tool_calls import CallArguments, CallBegin, Content, Event
from .schema import StreamOptions
from .service import Running, Service


def new_id(prefix: str) -> str:
    """An identifier that nobody can guess."""
    return f"{prefix}{secrets.token_hex(12)}"


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())


class Usage:
    """Tokens of one HTTP request."""

    def __init__(self) -> None:
        self._prompts: dict[str, tuple[int, int]] = {}
        self._generated: dict[tuple[str, int], int] = {}

    def clear(self) -> None:
        """Count anew."""
        self._prompts.clear()
        self._generated.clear()

    def note(self, outputs: Iterable[StepOutput]) -> None:
        """Take up outputs that have come."""
        for output in outputs:
            if output.prompt_tokens:
                self._prompts[output.request_id] = (output.prompt_tokens, output.cached_tokens)
                self._generated[output.request_id, output.index] = output.generated_tokens

    @property
    def prompt(self) -> int:
        """Tokens of the prompts."""
        return sum(tokens for tokens, _ in self._prompts.values())

    @property
    def cached(self) -> int:
        """Those that came from the prefix cache."""
        return sum(cached for _, cached in self._prompts.values())

    @property
    def generated(self) -> int:
        """Tokens of all choices."""
        return sum(self._generated.values())

    def body(self) -> dict[str, Any]:
        """As chat and completions answer it."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.generated,
            "total_tokens": self.prompt + self.generated,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


async def ask_for_prose(
    service: Service, running: Running, turn: Turn, reader: TurnReader, usage: Usage, keep: int | None
) -> None:
    """Start again for text where a reader wants that; tokens of the call that was dropped do not count."""
    if not reader.wants_prose or turn.prose is None:
        return
    again: Turn = await service.prepare(turn.prose)
    usage.clear()
    reader.into_prose()
    running.restart(truncated(again.prompt_ids, keep), again.params)


def wants_usage(stream: bool | None, options: StreamOptions | None) -> bool:
    """Whether a stream ends with an event of usage. Raises InputError for options without a stream."""
    if options is not None and not stream:
        raise InputError(
            "stream_options is given without stream", remedy="set stream to true, or leave it out"
        )
    return bool(options is not None and options.include_usage)


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """A token as text; one that is part of a character as `bytes:\\xe2`, so that no two look alike."""
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def chat_logprobs(tokenizer: Tokenizer, entries: Iterable[TokenLogprob]) -> list[dict[str, Any]]:
    """`choices[].logprobs.content` of chat completions."""

    def one(token_id: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token_id)
        return {"token": token_text(tokenizer, token_id), "logprob": _finite(logprob), "bytes": list(data)}

    return [
        one(entry.token_id, entry.logprob) | {"top_logprobs": [one(*top) for top in entry.top]}
        for entry in entries
    ]


def completion_logprobs(
    tokenizer: Tokenizer, entries: Iterable[tuple[int, TokenLogprob | None]], offset: int
) -> dict[str, Any]:
    """`choices[].logprobs` of completions, from (token, its log probability or None); `offset`: characters
    before.
    """
    result: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token_id, entry in entries:
        text = token_text(tokenizer, token_id)
        result["tokens"].append(text)
        result["token_logprobs"].append(None if entry is None else _finite(entry.logprob))
        top = None if entry is None else {token_text(tokenizer, i): _finite(p) for i, p in entry.top}
        result["top_logprobs"].append(top)
        result["text_offset"].append(offset)
        offset += len(text)
    return result


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI's API answers -9999 for what cannot be."""
    return max(logprob, -9999.0)


def chat_delta(events: Iterable[Event]) -> dict[str, Any]:
    """`choices[].delta` of a chunk."""
    delta: dict[str, Any] = {}
    calls: dict[int, dict[str, Any]] = {}
    for event in events:
        match event:
            case Content(text):
                delta["content"] = delta.get("content", "") + text
            case CallBegin(index, call_id, name):
                calls[index] = {
                    "index": index,
                    "id": call_id,
                    "type": "function",
                    "function": {"name": name, "arguments": ""},
                }
            case CallArguments(index, text):
                call = calls.setdefault(index, {"index": index, "function": {"arguments": ""}})
                call["function"]["arguments"] += text
    if calls:
        delta["tool_calls"] = list(calls.values())
    return delta


def tool_choice_of(given: str | Mapping[str, Any] | None) -> str:
    """`tool_choice` as `ChatModel.prepare` takes it: {"type": "function", "function": {"name": …}}, also
    without the inner object, as /v1/responses has it.
    """
    if given is None or isinstance(given, str):
        return given or "auto"
    inner = given.get("function")
    name = inner.get("name") if isinstance(inner, Mapping) else given.get("name")
    if given.get("type") != "function" or not isinstance(name, str):
        raise InputError(
            "tool_choice is no choice",
            remedy='allowed: "auto", "none", "required", {"type": "function", "function": {"name": …}}',
        )
    if name in ("auto", "none", "required"):
        raise InputError(f"tool_choice names {name!r}", remedy="give the tool another name")
    return name


def truncated(ids: list[int], keep: int | None) -> list[int]:
    """The last `keep` tokens of a prompt, where the request asked for that."""
    return ids if keep is None else ids[-keep:]
