"""One request of the load: its body, the stream that answers it, the record of both."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from typing import Any

from .connection import RequestFailed
from .http import Client, Events
from .records import Failure, Record

PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}


def request_body(model: str, prompt: Mapping[str, Any], output_tokens: int) -> bytes:
    """JSON of a request for exactly `output_tokens` tokens; `prompt` has `messages` or `prompt`.

    Greedy, so that a run is the same again where the server is deterministic. `ignore_eos` is understood by
    llmc, llama.cpp and vLLM, and is what makes answers as long as was asked for.
    """
    body = {
        "model": model,
        **prompt,
        "max_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")


async def send(client: Client, endpoint: str, body: bytes, record: Record, *, timeout: float) -> None:
    """Sends one request and reads all of its answer into `record`; what goes wrong is its `failure`.

    The record grows as the answer comes, so that others may watch it.
    """
    answer = _Answer(record)
    record.started = time.perf_counter()
    try:
        async with asyncio.timeout(timeout):
            status = await client.stream("POST", PATHS[endpoint], body, answer.receive)
        answer.finish(status)
    except RequestFailed as error:
        record.failure = error.failure
    except TimeoutError:
        record.failure = Failure("timeout", f"no end after {timeout:g} s")
    record.ended = time.perf_counter()


class _Answer:
    """Reads a stream of chunks into a record."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._events = Events()
        self._refusal = b""  # the body of an answer that is no stream
        self._finished: float | None = None
        self._done = False

    def receive(self, status: int, data: bytes) -> None:
        now = time.perf_counter()
        if status != 200:
            self._refusal = (self._refusal + data)[:4096]
            return
        for payload in self._events.feed(data):
            if payload == b"[DONE]":
                self._done = True
                continue
            try:
                event = json.loads(payload)
            except (ValueError, RecursionError) as error:
                raise RequestFailed("malformed", f"an event is no JSON: {payload[:80]!r}") from error
            self._event(event, now)

    def finish(self, status: int) -> None:
        """The stream is over. Raises RequestFailed where something was missing."""
        record = self._record
        if status != 200:
            raise RequestFailed(f"http_{status}", error_message(self._refusal))
        if self._finished is None and not self._done:
            raise RequestFailed("disconnected", "the stream ended without finish_reason or [DONE]")
        if not record.chunks and self._finished is not None:
            record.chunks.append(self._finished)  # an answer of which no text can be shown
        if not record.chunks:
            raise RequestFailed("no_output", "the stream held no piece of an answer")
        if not record.output_tokens:
            record.output_tokens = len(record.chunks)

    def _event(self, event: Any, now: float) -> None:
        if not isinstance(event, dict):
            raise RequestFailed("malformed", "an event is no JSON object")
        if event.get("error"):
            raise RequestFailed("error_event", _error_text(event["error"]))
        choices = event.get("choices")
        if isinstance(choices, list) and choices and isinstance(choices[0], dict):
            self._choice(choices[0], now)
        usage = event.get("usage")
        if isinstance(usage, dict):
            prompt, output = usage.get("prompt_tokens"), usage.get("completion_tokens")
            if isinstance(prompt, int) and isinstance(output, int) and min(prompt, output) >= 0:
                self._record.prompt_tokens, self._record.output_tokens = prompt, output
                self._record.counted = True

    def _choice(self, choice: dict[str, Any], now: float) -> None:
        """A chunk is a piece of the answer unless it only opens (`role`) or closes (`finish_reason`) it.

        vLLM's client counts those two as well; its own server sends them with a token, others do not.
        """
        delta = choice.get("delta")
        closes = choice.get("finish_reason") is not None
        if isinstance(delta, dict):
            text = (
                delta.get("content")
                or delta.get("reasoning_content")
                or delta.get("reasoning")
                or delta.get("tool_calls")
            )
            opens = "role" in delta
        else:
            text, opens = choice.get("text"), False
        if text or not (opens or closes):
            self._record.chunks.append(now)
        if closes:
            self._finished = now


def error_message(body: bytes) -> str:
    """What a refusal says: its error's message where it has the usual form."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return body.decode("utf-8", "replace")
    return _error_text(value.get("error", value) if isinstance(value, dict) else value)


def _error_text(error: Any) -> str:
    return str(error.get("message", error) if isinstance(error, dict) else error)
