"""A model behind the server, and one request's way through its engine."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request

from ...ir.errors import InputError
from ..async_engine import QueueFullError
from ..chat import ChatModel
from ..custom_sampler import sampler_of_request
from ..generation import StepOutput
from ..llm import LLM
from ..sampling_params import SamplingParams
from .errors import ApiError, as_api_error
from .metrics import Metrics, Timing
from .schema import Sampling
from .settings import ServerSettings

T = TypeVar("T")

_MOST_WAITING = 64
"""Requests to encoders, which are computed one after the other."""

_AS_THEY_ARE = (
    "n", "temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "top_k", "min_p",
    "repetition_penalty", "min_tokens", "ignore_eos", "skip_special_tokens",
)  # fmt: skip


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


@dataclass(slots=True)
class ServedModel:
    """An artifact under the name that requests use."""

    name: str
    llm: LLM
    created: int = field(default_factory=lambda: int(time.time()))
    base: ServedModel | None = None
    """The model that this is an adapter of."""
    chat: ChatModel = field(init=False)

    def __post_init__(self) -> None:
        self.chat = ChatModel(self.llm)

    @property
    def generates(self) -> bool:
        """Whether it is a language model, not an encoder."""
        return self.llm.kind == "causal_lm"

    def describe(self) -> dict[str, Any]:
        """Its entry of /v1/models."""
        entry: dict[str, Any] = {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "llmc",
        }
        if self.base is not None:
            entry |= {"parent": self.base.name, "root": self.base.name}
        entry["max_model_len"] = self.llm.context_length
        entry["llmc"] = self._facts()
        return entry

    def _facts(self) -> dict[str, Any]:
        manifest = self.llm.artifact.manifest if self.llm.artifact is not None else {}
        facts: dict[str, Any] = {
            "kind": self.llm.kind,
            "context_length": self.llm.context_length,
            "kv_cache_tokens": self.llm.kv_cache.tokens,
            "chat": self.llm.template is not None,
        }
        quantization = manifest.get("quantization")
        if isinstance(quantization, Mapping):
            facts["quantization"] = quantization.get("scheme")
            for key in ("weight_bytes", "bits_per_weight"):
                if key in quantization:
                    facts[key] = quantization[key]
        facts["target"] = getattr(self.llm.executor, "target_name", None)
        facts["isa"] = getattr(self.llm.executor, "isa", None)
        quality = self.llm.artifact.quality if self.llm.artifact is not None else None
        if quality:
            names = ("kl", "top1_agreement", "ppl", "ppl_source", "ppl_increase_percent")
            facts["quality"] = {name: quality[name] for name in names if quality.get(name) is not None}
        return {name: value for name, value in facts.items() if value is not None}

    def sampling(self, body: Sampling, max_tokens: int | None, **further: Any) -> SamplingParams:
        """The request's sampling parameters over the model's own defaults. Raises InputError."""
        options: dict[str, Any] = {name: getattr(body, name) for name in _AS_THEY_ARE}
        options = {name: value for name, value in options.items() if value is not None}
        if body.stop is not None:
            options["stop"] = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
        if body.stop_token_ids is not None:
            options["stop_token_ids"] = tuple(body.stop_token_ids)
        if body.logit_bias:
            options["logit_bias"] = _biases(body.logit_bias)
        if body.llmc_sampler is not None:
            options["sampler"] = sampler_of_request(body.llmc_sampler)
        params = self.llm.sampling(max_tokens=max_tokens, **options, **further)
        params.validate(self.llm.executor.vocab_size)
        return params


def _biases(given: Mapping[str, float]) -> dict[int, float]:
    if len(given) > 1024:
        raise InputError(f"logit_bias has {len(given)} entries", remedy="allowed: up to 1024")
    try:
        return {int(token[:20]): bias for token, bias in given.items()}
    except ValueError:
        raise InputError(
            "logit_bias has a key that is no token id", remedy='for example {"42": -100}'
        ) from None


class Service:
    """The models of one server, its limits, and threads for work that would hold up the event loop."""

    def __init__(self, models: Mapping[str, LLM], settings: ServerSettings) -> None:
        if not models:
            raise InputError("there is no model to serve", remedy="give at least one artifact")
        for name, llm in models.items():
            if llm.kind == "function":
                raise InputError(
                    f"{name} is a function, not a language model", remedy="use llmc.load in Python"
                )
        self.models = {name: ServedModel(name, llm) for name, llm in models.items()}
        for model in list(self.models.values()):
            for name in model.llm.adapters:
                self.add_adapter(model, name)
        self.settings = settings
        self.metrics = Metrics()
        self.metrics.watch({name: llm.engine.engine for name, llm in models.items()})
        self.draining = False
        self.active = 0
        """Requests being answered, apart from those that only ask how the server is."""
        self._keys = tuple(hashlib.sha256(key.encode()).digest() for key in settings.api_keys)
        # Rendering, tokenizing and compiling of schemas are bounded, but not short enough for an event loop.
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="llmc-prepare")
        self._computer = ThreadPoolExecutor(1, thread_name_prefix="llmc-compute")
        self._waiting = 0

    def accepts(self, authorization: str | None) -> bool:
        """Whether a request with this Authorization header may pass; in a time that tells nothing of the
        keys.
        """
        if not self._keys:
            return True
        given = (authorization or "").partition(" ")
        digest = hashlib.sha256(given[2].strip().encode("utf-8", "surrogateescape")).digest()
        found = False
        for key in self._keys:
            found |= hmac.compare_digest(digest, key)
        return found and given[0].lower() == "bearer"

    def model(self, name: str | None, *, generates: bool | None = True) -> ServedModel:
        """The model of a request. Raises ApiError: 404 with those there are, 400 for one of another kind."""
        bases = [model for model in self.models.values() if model.base is None]
        if name is None and len(bases) == 1:
            found = bases[0]
        elif name is None:
            raise ApiError(
                400,
                f"model is missing; served here: {', '.join(self.models)}",
                param="model",
                code="missing_required_parameter",
            )
        elif name not in self.models:
            raise ApiError(
                404,
                f"model {name[:200]!r} is not served here; there are: {', '.join(self.models)}",
                param="model",
                code="model_not_found",
            )
        else:
            found = self.models[name]
        if generates is not None and found.generates is not generates:
            kind = "generates no text: it is an encoder" if generates else "is no encoder"
            raise ApiError(400, f"model {found.name!r} {kind}", param="model", code="unsupported_model")
        return found

    def add_adapter(self, base: ServedModel, name: str) -> ServedModel:
        """Serve an adapter that `base` has loaded, under its name. Raises InputError where that is taken."""
        if name in self.models:
            raise InputError(f"{name!r} is served here already", remedy="choose another name")
        self.models[name] = ServedModel(name, base.llm.with_adapter(name), base=base)
        return self.models[name]

    async def prepare(self, work: Any, *arguments: Any) -> Any:
        """Run a function of bounded length outside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)

    def warm_up(self) -> None:
        """Make what the first request with a grammar would wait for seconds: tables of the tokenizers."""
        for model in self.models.values():
            if model.generates and model.base is None:
                self._pool.submit(model.llm.grammars.json_object)

    def retry_after(self, model: ServedModel) -> int:
        """Seconds after which a full queue may have room: a running sequence's end is that far away, on the
        mean of the last requests; 1 to 60.
        """
        mean = self.metrics.mean_seconds.get(model.name, 1.0)
        return max(1, min(60, round(mean / model.llm.engine.engine.options.max_sequences)))

    async def compute(self, work: Callable[[Callable[[], bool]], T]) -> T:
        """Run work of any length, one at a time, beside what is prepared. It gets a function that says
        whether to go on. Raises ApiError where too much waits or the deadline passes.
        """
        if self._waiting >= _MOST_WAITING:
            headers = {"Retry-After": "1"}
            raise ApiError(429, f"{self._waiting} requests wait", code="queue_full", headers=headers)
        wanted = threading.Event()
        wanted.set()
        self._waiting += 1
        try:
            async with asyncio.timeout(self.settings.request_seconds):
                loop = asyncio.get_running_loop()
                return await loop.run_in_executor(self._computer, work, wanted.is_set)
        except TimeoutError:
            raise self.too_late() from None
        finally:
            wanted.clear()
            self._waiting -= 1

    def too_late(self) -> ApiError:
        """The answer to a request whose deadline has passed."""
        message = f"the request took longer than {self.settings.request_seconds:g} s"
        return ApiError(504, message, code="deadline_exceeded")

    def close(self) -> None:
        """End the threads; the models stay open."""
        for pool in (self._pool, self._computer):
            pool.shutdown(wait=False, cancel_futures=True)


class Running:
    """The generations of one HTTP request: several where it has several prompts."""

    def __init__(self, service: Service, model: ServedModel) -> None:
        self.model = model
        self.timing = Timing(service.metrics, model.name)
        self._service = service
        self._stream = model.llm.engine.open_stream()
        self._place: dict[str, int] = {}
        self._ended = False
        self._reason = "error"  # unless it ends otherwise
        seconds = service.settings.request_seconds
        self._timer = (
            None if seconds is None else asyncio.get_running_loop().call_later(seconds, self._expire)
        )

    def start(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> None:
        """Queue all of them, or none. Raises ApiError."""
        try:
            for prompt, param in zip(prompts, params, strict=True):
                ticket = self._stream.add(prompt, param)
                self._place[ticket.id] = len(self._place)
        except Exception as error:
            self._stream.close()
            if isinstance(error, QueueFullError):
                raise as_api_error(error, retry_after=self._service.retry_after(self.model)) from None
            raise

    def restart(self, prompt: Sequence[int], params: SamplingParams) -> None:
        """Go on with another prompt: what the first one still gives is dropped."""
        self._stream.close()
        self._stream = self.model.llm.engine.open_stream()
        self.start([prompt], [params])

    def place(self, output: StepOutput) -> int:
        """Which of the prompts an output belongs to."""
        return self._place[output.request_id]

    def __enter__(self) -> Running:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Closes it, whether the answer is complete, failed, or nobody waits for it any more."""
        gone = kind is not None and issubclass(kind, GeneratorExit | asyncio.CancelledError)
        self.close("abort" if gone else self._reason)

    async def take(self) -> list[StepOutput]:
        """The next outputs of the prompts, at least one, and none behind the last.

        Raises ApiError where one fails or the deadline passes. Inside `with` only.
        """
        outputs = await self._stream.take()
        if outputs:
            self._reason = "error"
            self.timing.note(outputs)
            for output in outputs:
                if output.finish_reason is not None:
                    _check(output)
            self._reason = outputs[-1].finish_reason or "error"
        return outputs

    def _expire(self) -> None:
        self._stream.interrupt(self._service.too_late())

    def finish(self, reason: str | None) -> None:
        """The answer is complete, whatever the engine would add."""
        self.close("stop" if reason in (None, "tool_calls") else reason)

    def close(self, reason: str = "abort") -> None:
        """Cancel what is not over, and count the request once."""
        self._stream.close()
        if not self._ended:
            self._ended = True
            if self._timer is not None:
                self._timer.cancel()
            self.timing.end(reason)


def _check(output: StepOutput) -> None:
    """Raise what an output tells of a failure."""
    if output.error is not None:
        raise as_api_error(output.error)
    if output.finish_reason == "cancelled":
        raise ApiError(503, "the server is shutting down", code="shutting_down")


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client closes its connection.

    Raises ClientGoneError then.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(gone(request.receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        for waiting in (task, watcher):
            if not waiting.done():
                waiting.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def gone(receive: Any) -> None:
    """Waits until the client has closed its connection; the body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
