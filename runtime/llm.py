"""The public object that `llmc.load` returns: a model ready to answer."""

from __future__ import annotations

import copy
import os
import weakref
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import TracebackType
from typing import Any, TypedDict, Unpack

import numpy as np

from ..codegen.artifact import Artifact
from ..ir.errors import InputError
from .async_engine import AsyncEngine, Stream
from .chat_template import ChatTemplate, Message
from .custom_sampler import Sampler, make_sampler
from .encoder import check_pairs, reads_alone, relevance, run_whole, scored_row, token_types
from .engine import Engine, EngineStats
from .executor.base import Executor
from .function_inputs import checked_inputs
from .generation import StepOutput
from .grammar import Grammar, GrammarCompiler
from .memory import KvPlan
from .sampler import TokenLogprob
from .sampling_params import SamplingParams
from .text_encoding import TextTokenizer, longest_text
from .tokenizer import Tokenizer

_CHUNK_BYTES = 64 << 20

Prompt = str | Sequence[int] | Sequence[Message]
"""Text (encoded with the tokenizer's own special tokens), token ids, or messages for the chat template."""


class SamplingOptions(TypedDict, total=False):
    """Fields of `SamplingParams` as keyword arguments."""

    n: int
    max_tokens: int | None
    min_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int | None
    stop: tuple[str, ...] | str
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    logprobs: int | None
    prompt_logprobs: int | None
    sampler: Sampler | str | None
    grammar: Grammar | None
    skip_special_tokens: bool
    adapter: str | None


@dataclass(slots=True)
class Choice:
    """One answer."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    """"stop", "length" or "cancelled"."""
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass(slots=True)
class Completion:
    """The answers to one prompt; the properties are those of the first."""

    choices: list[Choice]
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Tokens of the prompt that came from the prefix cache."""
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    """One for each token of the prompt, the first None, where they were asked for."""

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.choices[0].text

    @property
    def token_ids(self) -> list[int]:
        """Tokens of the first choice."""
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> str | None:
        """Why the first choice ended."""
        return self.choices[0].finish_reason

    @property
    def generated_tokens(self) -> int:
        """Tokens of all choices."""
        return sum(len(choice.token_ids) for choice in self.choices)

    def add(self, output: StepOutput) -> None:
        """Take up one output of a stream."""
        choice = self.choices[output.index]
        choice.text += output.text
        choice.token_ids += output.token_ids
        choice.logprobs += output.logprobs
        if output.finish_reason is not None:
            choice.finish_reason, choice.stop_reason = output.finish_reason, output.stop_reason
        self.prompt_tokens = output.prompt_tokens or self.prompt_tokens
        self.cached_tokens = output.cached_tokens or self.cached_tokens
        self.prompt_logprobs = output.prompt_logprobs or self.prompt_logprobs


class LLM:
    """A loaded artifact.

    Its methods may be called from several threads; `close` it, or use it in a `with` block.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        artifact: Artifact | None = None,
        engine: Engine | None = None,
        template: ChatTemplate | None = None,
        defaults: Mapping[str, Any] | None = None,
        max_waiting: int | None = None,
    ):
        """See `llmc.runtime.loader.load`. `engine` is None for artifacts of kind "function".

        `defaults`: the model's own sampling settings, as in transformers' generation_config.json.
        """
        self.executor = executor
        self.artifact = artifact
        self.template = template
        self._engine = AsyncEngine(engine, max_waiting=max_waiting) if engine is not None else None
        self._defaults = _sampling_defaults(defaults or {})
        self._original: LLM | None = None  # whose view with an adapter this is
        if self._engine is not None:
            weakref.finalize(self, self._engine.close)

    # Text and tokens -------------------------------------------------------------------------------------

    @property
    def engine(self) -> AsyncEngine:
        """The engine behind it. Raises InputError for an artifact that has none."""
        if self._engine is None:
            raise InputError(
                "this artifact is a function, not a language model", remedy="call run(name=array, …)"
            )
        return self._engine

    @property
    def tokenizer(self) -> Tokenizer:
        """The artifact's tokenizer. Raises InputError where it has none."""
        tokenizer = self.engine.engine.tokenizer
        if tokenizer is None:
            raise InputError("this artifact has no tokenizer", remedy="give token ids instead of text")
        return tokenizer

    @cached_property
    def grammars(self) -> GrammarCompiler:
        """Makes what `SamplingParams.grammar` takes. Raises InputError where there is no tokenizer."""
        if self._original is not None:
            return self._original.grammars
        facts = self.engine.engine.facts
        return GrammarCompiler(self.tokenizer, facts.vocab_size, facts.eos_token_ids)

    @property
    def kind(self) -> str:
        """ "causal_lm", "encoder", "classifier" or "function"."""
        return self.artifact.kind if self.artifact is not None else "causal_lm"

    @property
    def context_length(self) -> int:
        """Tokens of a sequence at most, prompt and answer together; with `sinks`, those in the cache."""
        return self.engine.engine.limit

    @property
    def kv_cache(self) -> KvPlan:
        """Size of the KV cache; `str` of it is the line to show: "kv cache: N pages = T tokens, X MB"."""
        return self.engine.engine.kv

    @property
    def stats(self) -> EngineStats:
        """Pages of the cache, running and waiting sequences, counts of work done."""
        with self.engine.paused() as engine:
            return engine.stats

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def chat_prompt(self, messages: Sequence[Message], **variables: Any) -> str:
        """The text that the model's chat template makes of a conversation; `variables` as in
        `ChatTemplate.render`.
        """
        if self.template is None:
            raise InputError("this artifact has no chat template", remedy="give the prompt as text")
        return self.template.render(messages, **variables)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt in any of its forms. Raises InputError for an empty one, or none of them."""
        if isinstance(prompt, str):
            ids = self.encode(prompt)
        elif not isinstance(prompt, Sequence | np.ndarray):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(
                f"the prompt is of type {type(prompt).__name__}", remedy="give a text, messages, or token ids"
            )
        else:
            messages = [m for m in prompt if isinstance(m, Mapping)]
            ids = [i for i in prompt if not isinstance(i, Mapping)]
            if messages and ids:
                raise InputError("the prompt mixes messages with other things", remedy="give messages alone")
            if messages:
                ids = self.encode(self.chat_prompt(messages), add_special_tokens=False)
        if not ids:
            raise InputError("the prompt is empty", remedy="give at least one token")
        return ids

    # Generation ------------------------------------------------------------------------------------------

    def sampling(self, **options: Unpack[SamplingOptions]) -> SamplingParams:
        """Sampling parameters: the model's own defaults with `options` over them.

        A model that does not ask for sampling is decoded greedily. Raises InputError for an unknown name.
        """
        unknown = set(options) - set(SamplingOptions.__annotations__)
        if unknown:
            raise InputError(
                f"unknown sampling option {sorted(unknown)[0]!r}",
                remedy=f"known: {', '.join(SamplingOptions.__annotations__)}",
            )
        merged: dict[str, Any] = {"stop": (), **self._defaults, **options}
        if isinstance(merged["stop"], str):
            merged["stop"] = (merged["stop"],)
        if isinstance(merged.get("sampler"), str):
            merged["sampler"] = make_sampler(merged["sampler"])
        return replace(SamplingParams(), **merged)

    def prefer(self, **options: Unpack[SamplingOptions]) -> None:
        """Take `options` for what later calls of `sampling` do not say. Raises as `sampling` does."""
        self.sampling(**options)
        self._defaults = {**self._defaults, **options}

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Unpack[SamplingOptions]
    ) -> Stream:
        """Outputs as they come, one a token and choice. Closing the stream cancels the request.

        `params` decides alone where given; otherwise `sampling(**options)` does. Raises InputError where
        prompt or options are wrong, before anything runs.
        """
        self._refuse_encoder()
        stream = self.engine.stream_sync(self.prompt_ids(prompt), params or self.sampling(**options))
        stream.owner = self
        return stream

    async def astream(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Unpack[SamplingOptions]
    ) -> AsyncGenerator[StepOutput, None]:
        """As `stream`, for event loops. A task that is cancelled cancels its request."""
        self._refuse_encoder()
        outputs = self.engine.stream(self.prompt_ids(prompt), params or self.sampling(**options))
        try:
            async for output in outputs:
                yield output
        finally:
            await outputs.aclose()

    def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Unpack[SamplingOptions]
    ) -> Completion:
        """The whole answer to a prompt; as many choices as `n` asks for."""
        return self.generate_batch([prompt], params, **options)[0]

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | None = None,
        **options: Unpack[SamplingOptions],
    ) -> list[Completion]:
        """Answers to several prompts, computed together, in the order of the prompts."""
        self._refuse_encoder()
        params = params or self.sampling(**options)
        streams = [self.engine.stream_sync(self.prompt_ids(prompt), params) for prompt in prompts]
        results: list[Completion] = []
        try:
            for stream in streams:
                completion = Completion([Choice(index) for index in range(params.n)])
                for output in stream:
                    completion.add(output)
                results.append(completion)
        finally:
            for stream in streams:
                stream.close()
        return results

    def _refuse_encoder(self) -> None:
        if self.kind in ("encoder", "classifier"):
            encoder = self.kind == "encoder"
            raise InputError(
                f"this artifact is {'an encoder' if encoder else 'a classifier'} and generates nothing",
                remedy="use embed or logits" if encoder else "use rank",
            )

    # Adapters --------------------------------------------------------------------------------------------

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters that requests may choose (`generate(…, adapter=name)`)."""
        return self.engine.engine.adapters.names()

    def with_adapter(self, name: str) -> LLM:
        """The same model that answers with a loaded adapter where nothing else is said. It shares the engine:
        closing one closes both.
        """
        self.engine.engine.adapters.get(name)
        view = copy.copy(self)
        view.__dict__.pop("grammars", None)
        view._original = self._original or self
        view.prefer(adapter=name)
        return view

    def load_adapter(self, name: str, path: str | os.PathLike[str]) -> None:
        """Take up a LoRA adapter's folder (PEFT), or GGUF file, under a name, while requests run.

        Raises InputError where it is damaged, of another model, or the name is taken, UnsupportedError where
        it can only be merged, or these kernels take none.
        """
        adapter = self.engine.engine.adapters.read(name, path)
        with self.engine.paused() as engine:
            engine.adapters.put(adapter)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. Raises AdapterInUseError while requests use it."""
        with self.engine.paused() as engine:
            engine.remove_adapter(name)

    # Numbers ---------------------------------------------------------------------------------------------

    def iter_logits(
        self, ids: Sequence[int], chunk: int | None = None, adapter: str | None = None
    ) -> Iterator[np.ndarray]:
        """Logits of every token, [c, vocab] float32 at a time; other requests wait until the iterator is
        done.

        `chunk` None: as many rows as make 64 MB. Each array is valid until the next one. An encoder sees the
        whole text at once and gives hidden states [T, hidden] in one piece. `adapter`: name of a loaded one.
        """
        if chunk is not None and chunk < 1:
            raise InputError(f"chunk is {chunk}", remedy="allowed: a whole number from 1")
        with self.engine.paused() as engine:
            if self.kind == "encoder":
                chunk = len(ids)
            elif chunk is None:
                chunk = max(16, _CHUNK_BYTES // (4 * max(1, self.executor.vocab_size)))
                chunk = min(chunk, engine.options.max_batch_tokens)
            preferred: Any = self._defaults.get("adapter")
            yield from engine.score(ids, chunk, adapter or preferred)

    def logits(self, ids: Sequence[int], adapter: str | None = None) -> np.ndarray:
        """Logits of every token of a text, [T, vocab] float32 (hidden states [T, hidden] for an encoder).

        Row t says what follows token t. For long texts of large vocabularies use `token_logprobs` or
        `iter_logits`.
        """
        result: np.ndarray | None = None
        start = 0
        for part in self.iter_logits(ids, adapter=adapter):
            if result is None:
                result = np.empty((len(ids), part.shape[1]), np.float32)
            result[start : start + len(part)] = part
            start += len(part)
        assert result is not None
        return result

    def token_logprobs(self, ids: Sequence[int], chunk: int | None = None) -> np.ndarray:
        """log p(token t + 1 | tokens 0 … t) for t = 0 … T - 2: [T - 1] float64; memory is one chunk of
        logits.

        Perplexity of the text is exp(-mean).
        """
        following = np.asarray(ids, np.int64)[1:]
        found = np.empty(len(following))
        start = 0
        for part in self.iter_logits(ids, chunk):
            for offset, row in enumerate(part[: len(following) - start]):
                peak = row.max()
                total = np.sum(np.exp(row - peak), dtype=np.float64)
                found[start + offset] = float(row[following[start + offset]]) - float(peak) - np.log(total)
            start += len(part)
        return found

    def embed(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Hidden states [T, hidden] float32 of each text, for an encoder; how to pool them is the caller's
        choice.
        """
        if self.kind != "encoder":
            raise InputError("this artifact is no encoder", remedy="compile an encoder model")
        return [self.logits(self.prompt_ids(text)) for text in texts]

    def embeddings(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """One vector of length 1 for each text, [N, hidden] float32, for an encoder.

        The hidden states are pooled as the model's publisher says (`1_Pooling/config.json` of
        sentence-transformers), or by their mean where he says nothing.
        """
        if self.kind != "encoder":
            raise InputError("this artifact is no encoder", remedy="compile an encoder model")
        facts = self.artifact.model if self.artifact is not None else {}
        way, alone = facts.get("pooling") or "mean", reads_alone(facts)
        ids = [self.prompt_ids(prompt) for prompt in prompts]
        with self.engine.paused() as engine:
            return run_whole(engine, ids, lambda whole, part: whole.vectors(ids[part], way), alone=alone)

    def rank(self, query: str, documents: Sequence[str]) -> np.ndarray:
        """How well each document answers a query, [N] float32, by a cross-encoder that reads both: logits, of
        which a sigmoid makes probabilities. What is too long of a pair is cut.

        Raises InputError where this is no classifier, or one of more than two labels.
        """
        return self.rank_counted(query, documents)[0]

    def rank_counted(self, query: str, documents: Sequence[str]) -> tuple[np.ndarray, int]:
        """As `rank`, and how many tokens were read."""
        if self.artifact is None or self.kind != "classifier":
            raise InputError("this artifact is no cross-encoder", remedy="compile a cross-encoder model")
        check_pairs(self.artifact)
        pairs = self._pairs.encode_pairs(query, documents)
        ids, types = [ids for ids, _ in pairs], [kinds for _, kinds in pairs]
        told, row = token_types(self.artifact.model), scored_row(self.artifact.model)
        with self.engine.paused() as engine:
            scores = run_whole(
                engine,
                ids,
                lambda whole, part: relevance(whole.step(ids[part], row, types[part] if told else None)),
                alone=reads_alone(self.artifact.model),
            )
        return scores, sum(map(len, ids))

    @cached_property
    def _pairs(self) -> TextTokenizer:
        assert self.artifact is not None
        return TextTokenizer(self.artifact, min(self.context_length, longest_text(self.artifact)))

    def run(self, **arrays: np.ndarray) -> dict[str, np.ndarray]:
        """Outputs by name of an artifact of kind "function", from inputs by name.

        Raises InputError where a name, dtype or shape is not what the artifact lists.
        """
        if self.artifact is None or self.kind != "function":
            raise InputError("this artifact is no function", remedy="use generate or logits")
        return self.executor.run(checked_inputs(self.artifact.manifest.get("inputs", []), arrays))

    # Lifetime --------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Cancel what runs and end the engine's thread."""
        if self._engine is not None:
            self._engine.close()
            if (prefixes := self._engine.engine.scheduler.prefixes) is not None:
                prefixes.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _sampling_defaults(generation: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a generation_config.json that the sampler has; without `do_sample` they mean greedy."""
    names = ["repetition_penalty"]
    if generation.get("do_sample"):
        names += ["temperature", "top_k", "top_p", "min_p"]
    found = {name: generation[name] for name in names if generation.get(name) is not None}
    if generation.get("do_sample"):
        found.setdefault("temperature", 1.0)
    return found
