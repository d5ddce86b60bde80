"""What a request may ask of the sampler, and the check of every value before anything runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..ir.errors import InputError
from .custom_sampler import Sampler
from .grammar import Grammar

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_STOPS = 64
MAX_STOP_LENGTH = 1024


def _refuse(name: str, value: object, allowed: str) -> InputError:
    return InputError(f"{name} is {str(value)[:60]}", remedy=f"allowed: {allowed}")


def _is_a(value: Any, *kinds: type) -> bool:
    """The type as it is at run time: values come from JSON, whatever the annotations say."""
    return isinstance(value, kinds)


def _check_number(
    name: str, value: Any, low: float, high: float, allowed: str, *, above: bool = False
) -> None:
    """Refuse what is no finite number in [low, high], or in (low, high] with `above`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _refuse(name, value, allowed)
    if value > high or value < low or (above and value == low):
        raise _refuse(name, value, allowed)


def _check_integer(name: str, value: Any, low: int, high: int, allowed: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _refuse(name, value, allowed)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens and when to stop. All values are checked by `validate`.

    The steps, in order: penalties, `logit_bias`, `sampler`, `grammar`, `min_tokens`, `temperature`, `top_k`,
    `top_p`, `min_p`.
    """

    n: int = 1
    """Choices to generate from one prompt, which is computed once."""
    max_tokens: int | None = 256
    """Tokens to generate at most; None: as many as the context holds. 0 only scores the prompt."""
    min_tokens: int = 0
    """No end-of-text token, stop token or stop string counts before this many tokens, unless `grammar` allows
    nothing else.
    """
    temperature: float = 0.0
    """0 (or below 1e-5) is greedy: the most likely token, the lowest id among equals."""
    top_k: int = 0
    """Keep the k most likely tokens (the lower id among equals); 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest tokens whose probabilities reach this sum (Holtzman et al. 2020, section 3.1)."""
    min_p: float = 0.0
    """Keep tokens at least this likely relative to the most likely one (Nguyen et al. 2024, section 3)."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or output (CTRL, section 4.1)."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens in the output."""
    frequency_penalty: float = 0.0
    """Subtracted from the logits of tokens in the output, once for each time they occur."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids."""
    seed: int | None = None
    """With a seed the tokens depend on the request alone, not on what runs beside it; None draws one."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the answer, besides the model's end-of-text tokens."""
    ignore_eos: bool = False
    """Go on past the model's end-of-text tokens; a `grammar` decides alone where the answer ends."""
    logprobs: int | None = None
    """Log probabilities (before all the steps above) of the chosen token and of this many most likely ones.
    """
    prompt_logprobs: int | None = None
    """The same of every token of the prompt but the first, with this many most likely ones in its place."""
    sampler: Sampler | None = None
    """Another package's say in the logits (`make_sampler` makes one from its name)."""
    grammar: Grammar | None = None
    """What the answer must match, made by `LLM.grammars` of the same model."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    adapter: str | None = None
    """Name of the loaded adapter to answer with; None: the one that the model was opened with, if any."""

    def validate(self, vocab_size: int) -> None:
        """Raise InputError, naming the field and what is allowed, for the first value that makes no sense."""
        _check_integer("n", self.n, 1, MAX_CHOICES, f"1 to {MAX_CHOICES}")
        if self.max_tokens is not None:
            if self.prompt_logprobs is None:
                _check_integer("max_tokens", self.max_tokens, 1, 2**31, "a whole number from 1")
            _check_integer("max_tokens", self.max_tokens, 0, 2**31, "a whole number from 0")
        _check_integer("min_tokens", self.min_tokens, 0, 2**31, "a whole number from 0")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _refuse("min_tokens", self.min_tokens, f"0 to max_tokens ({self.max_tokens})")
        _check_number("temperature", self.temperature, 0, 100, "0 (greedy) to 100")
        _check_integer("top_k", self.top_k, 0, 2**31, "a whole number from 0 (0 keeps all tokens)")
        _check_number("top_p", self.top_p, 0, 1, "above 0, up to 1", above=True)
        _check_number("min_p", self.min_p, 0, 1, "0 to 1")
        _check_number("repetition_penalty", self.repetition_penalty, 0.01, 100, "from 0.01 to 100")
        _check_number("presence_penalty", self.presence_penalty, -2, 2, "-2 to 2")
        _check_number("frequency_penalty", self.frequency_penalty, -2, 2, "-2 to 2")
        if self.seed is not None:
            _check_integer("seed", self.seed, -(2**63), 2**64 - 1, "a 64-bit whole number")
        if self.logprobs is not None:
            _check_integer("logprobs", self.logprobs, 0, MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}")
        if self.prompt_logprobs is not None:
            _check_integer("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}")
        self._validate_output(vocab_size)
        self._validate_tokens(vocab_size)
        self._validate_stops()

    def _validate_output(self, vocab_size: int) -> None:
        for name in ("ignore_eos", "skip_special_tokens"):
            if not _is_a(getattr(self, name), bool):
                raise _refuse(name, getattr(self, name), "true or false")
        if self.adapter is not None and not _is_a(self.adapter, str):
            raise _refuse("adapter", self.adapter, "the name of a loaded adapter")
        if self.sampler is not None and not _is_a(self.sampler, Sampler):
            raise _refuse("sampler", self.sampler, "what `make_sampler` made")
        if self.grammar is None:
            return
        if not _is_a(self.grammar, Grammar):
            raise _refuse("grammar", self.grammar, "what `LLM.grammars` made")
        if self.grammar.vocab_size != vocab_size:
            raise _refuse(
                "grammar", f"made for {self.grammar.vocab_size} ids", f"one for {vocab_size}, from this model"
            )

    def _validate_tokens(self, vocab_size: int) -> None:
        ids = f"token ids from 0 to {vocab_size - 1}"
        if not _is_a(self.logit_bias, Mapping):
            raise _refuse("logit_bias", self.logit_bias, "a mapping from token id to number")
        for token, bias in self.logit_bias.items():
            _check_integer("logit_bias", token, 0, vocab_size - 1, ids)
            _check_number(f"logit_bias[{token}]", bias, -100, 100, "-100 to 100")
        if not _is_a(self.stop_token_ids, list, tuple):
            raise _refuse("stop_token_ids", self.stop_token_ids, f"a list of {ids}")
        for token in self.stop_token_ids:
            _check_integer("stop_token_ids", token, 0, vocab_size - 1, ids)

    def _validate_stops(self) -> None:
        if not _is_a(self.stop, list, tuple) or len(self.stop) > MAX_STOPS:
            raise _refuse("stop", self.stop, f"a list of up to {MAX_STOPS} texts")
        for text in self.stop:
            if not _is_a(text, str) or not 0 < len(text) <= MAX_STOP_LENGTH:
                raise _refuse("stop", repr(text), f"texts of 1 to {MAX_STOP_LENGTH} characters")
