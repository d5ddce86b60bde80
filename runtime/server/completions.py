"""POST /v1/completions: texts and token ids continued, with log probabilities of the prompt where asked."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ...ir.errors import InputError
from ..generation import StepOutput
from ..sampler import TokenLogprob
from ..sampling_params import SamplingParams
from .constraints import constraint
from .errors import AsciiJsonResponse
from .schema import MAX_PROMPTS, CompletionRequest
from .service import Running, ServedModel, Service, unless_gone
from .streams import DONE, ChoiceEvents, EventStream, event
from .wire import Usage, completion_logprobs, new_id, now, truncated, wants_usage


def completions_router(service: Service) -> APIRouter:
    """The endpoint, for one server."""
    router = APIRouter()

    @router.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continuations of prompts."""
        model = service.model(body.model)
        usage = wants_usage(body.stream, body.stream_options)
        prompts, params = await service.prepare(_prepare, model, body)
        running = Running(service, model)
        running.start(prompts, [params] * len(prompts))
        answer = _Answer(model, running, prompts, params, echo=bool(body.echo))
        if body.stream:
            return EventStream(answer.stream(usage=usage))
        return AsciiJsonResponse(await unless_gone(request, answer.whole()))

    return router


def _prepare(model: ServedModel, body: CompletionRequest) -> tuple[list[list[int]], SamplingParams]:
    """Check and tokenize; outside the event loop."""
    if body.suffix:
        raise InputError("suffix is not supported", remedy="leave it out")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise InputError(f"best_of is {body.best_of}", remedy="leave it out, or set it to n")
    if body.echo and body.stream and body.logprobs is not None:
        raise InputError("echo with logprobs cannot be streamed", remedy="set stream to false")
    further: dict[str, Any] = {
        "logprobs": body.logprobs,
        "grammar": constraint(model, body.structured_outputs),
    }
    if body.echo and body.logprobs is not None:
        further["prompt_logprobs"] = body.logprobs
    most = body.max_tokens
    if most == 0 and body.echo and body.logprobs is None:
        further["prompt_logprobs"] = 0  # nothing to generate: the engine computes the prompt, and that is all
    params = model.sampling(body, most, **further)
    prompts = [
        truncated(model.llm.prompt_ids(prompt), body.truncate_prompt_tokens) for prompt in listed(body.prompt)
    ]
    return prompts, params


def listed(given: str | Sequence[Any], name: str = "prompt") -> list[Any]:
    """One prompt or several → a list of texts or of lists of ids. Raises InputError for none, or too many."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise InputError(f"{name} is empty", remedy="give at least one")
    if isinstance(given[0], int):
        return [given]
    if len(given) > MAX_PROMPTS:
        raise InputError(f"{name} holds {len(given)} entries", remedy=f"allowed: up to {MAX_PROMPTS}")
    return list(given)


@dataclass(slots=True)
class _Choice:
    """One choice as it grows."""

    text: str = ""
    entries: list[tuple[int, TokenLogprob | None]] = field(default_factory=list)
    finish_reason: str | None = None
    begun: bool = False


class _Answer:
    """The answer to one request: choice p * n + c is choice c of prompt p."""

    def __init__(
        self,
        model: ServedModel,
        running: Running,
        prompts: list[list[int]],
        params: SamplingParams,
        *,
        echo: bool,
    ) -> None:
        self._tokenizer = model.llm.tokenizer
        self._running = running
        self._prompts = prompts
        self._params = params
        self._echo = echo
        self._choices = [_Choice() for _ in range(len(prompts) * params.n)]
        self._head: dict[str, Any] = {
            "id": new_id("cmpl-"),
            "object": "text_completion",
            "created": now(),
            "model": model.name,
        }

    def _take(self, output: StepOutput) -> tuple[int, str, list[tuple[int, TokenLogprob | None]]]:
        """Take up an output: (number of the choice, its new text, its new tokens)."""
        place = self._running.place(output)
        number = place * self._params.n + output.index
        choice = self._choices[number]
        text, entries = output.text, list[tuple[int, TokenLogprob | None]]()
        if not choice.begun:
            choice.begun = True
            if self._echo:
                prompt = self._prompts[place]
                text = self._tokenizer.decode(prompt, skip_special_tokens=False) + text
                if output.prompt_logprobs:
                    entries += zip(prompt, output.prompt_logprobs, strict=True)
        if self._params.logprobs is not None:
            entries += [(entry.token_id, entry) for entry in output.logprobs]
        choice.finish_reason = output.finish_reason or choice.finish_reason
        return number, text, entries

    async def whole(self) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        usage = Usage()
        with self._running as running:
            while outputs := await running.take():
                usage.note(outputs)
                for output in outputs:
                    number, text, entries = self._take(output)
                    self._choices[number].text += text
                    self._choices[number].entries += entries
        choices = [
            self._body(number, choice.text, choice.entries, 0, choice.finish_reason)
            for number, choice in enumerate(self._choices)
        ]
        return {**self._head, "choices": choices, "usage": usage.body()}

    def _body(
        self,
        number: int,
        text: str,
        entries: list[tuple[int, TokenLogprob | None]],
        offset: int,
        reason: str | None,
    ) -> dict[str, Any]:
        wanted = self._params.logprobs is not None
        logprobs = completion_logprobs(self._tokenizer, entries, offset) if wanted else None
        return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": reason}

    async def stream(self, *, usage: bool) -> AsyncGenerator[str, None]:
        """The chunks of an answer, as events."""
        counted = Usage()
        made = ChoiceEvents(self._head, '"text":%s', usage=usage)
        with self._running as running:
            while outputs := await running.take():
                counted.note(outputs)
                events = "".join([self._event(output, made) for output in outputs])
                if events:
                    yield events
        if usage:
            yield event({**self._head, "choices": [], "usage": counted.body()})
        yield DONE

    def _event(self, output: StepOutput, made: ChoiceEvents) -> str:
        number, text, entries = self._take(output)
        if not text and not entries and output.finish_reason is None:
            return ""
        choice = self._choices[number]
        if self._params.logprobs is None and output.finish_reason is None:
            rendered = made.text(number, text)
        else:
            rendered = made.event(self._body(number, text, entries, len(choice.text), output.finish_reason))
        choice.text += text
        return rendered
