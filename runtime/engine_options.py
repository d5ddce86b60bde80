"""What an engine is told, and what it tells: facts of the model, sizes, counts, and the error of a prompt
that does not fit.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.errors import InputError
from .late_scaling import NEVER, LateScaling


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the engine must know of the model."""

    vocab_size: int
    context_length: int
    eos_token_ids: tuple[int, ...] = ()
    moves_keys: bool = True
    """Whether keys hold their position, so that one that moves in the cache must be turned."""
    late_scaling: LateScaling = NEVER
    """Which sequences have their rotary embeddings scaled, where not all or none have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Sizes of the engine."""

    max_batch_tokens: int = 512
    """Tokens computed in a step at most: what a decoding sequence waits for beside a long prompt."""
    max_sequences: int = 64
    """Sequences that run at the same time at most."""
    context: int | None = None
    """Tokens of a sequence at most; None: the model's context length, which it cannot exceed."""
    kv_tokens: int | None = None
    """Size of the KV cache in tokens; None: from `kv_cache_bytes`, or from the free memory."""
    kv_cache_bytes: int | None = None
    """Size of the KV cache in bytes."""
    speculate: int = 0
    """Tokens guessed at a time at most (speculation.py); the tokens of an answer do not depend on it."""
    prefix_cache: bool = True
    """Keep the pages of finished sequences for prompts that begin in the same way."""
    sinks: int | None = None
    """Tokens at the beginning that stay (rounded up to whole pages) when others are evicted, so that an
    answer can go on beyond the context (eviction.py). None: nothing is evicted, and it ends there.
    """

    def check(self) -> None:
        """Raise InputError where sizes contradict each other."""
        if not 0 < self.max_sequences <= self.max_batch_tokens:
            raise InputError(
                f"max_sequences is {self.max_sequences} and max_batch_tokens {self.max_batch_tokens}",
                remedy="allowed: 1 <= max_sequences <= max_batch_tokens",
            )


@dataclass(slots=True)
class EngineStats:
    """The state of the cache and what was done so far."""

    pages_total: int = 0
    pages_used: int = 0
    pages_free: int = 0
    pages_cached: int = 0
    slots_allocated: int = 0
    """Slots of the pages that sequences hold, a page shared by several counted once."""
    slots_filled: int = 0
    """Those with a token's keys and values in them."""
    running: int = 0
    waiting: int = 0
    steps: int = 0
    tokens_computed: int = 0
    tokens_generated: int = 0
    tokens_from_cache: int = 0
    preemptions: int = 0

    @property
    def waste(self) -> float:
        """Share of allocated slots without a token."""
        return 1 - self.slots_filled / self.slots_allocated if self.slots_allocated else 0.0


class ContextLengthError(InputError):
    """The prompt does not fit. `prompt_tokens` and `limit` are counts of tokens."""

    code = "context_length_exceeded"

    def __init__(self, message: str, *, remedy: str = "", prompt_tokens: int = 0, limit: int = 0) -> None:
        super().__init__(message, remedy=remedy)
        self.prompt_tokens = prompt_tokens
        self.limit = limit


@dataclass(slots=True)
class Counters:
    """What was done so far. Single numbers, which any thread may read while the engine works."""

    steps: int = 0
    tokens_computed: int = 0
    tokens_generated: int = 0
    tokens_looked_up: int = 0
    """Prompt tokens for which the prefix cache was asked."""
    tokens_from_cache: int = 0
    tokens_from_disk: int = 0
    """Prompt tokens that were read into the cache from the folder of prefixes."""
    preemptions: int = 0
    tokens_guessed: int = 0
    guesses_accepted: int = 0
