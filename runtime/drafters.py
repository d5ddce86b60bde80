"""Who guesses the next tokens: the text itself, or a smaller model. speculation.py checks what they guess.

`PromptLookup` guesses that what followed the last words before follows them again (Saxena, "Prompt Lookup
Decoding", 2023): code that is edited, texts that are quoted or summarised. `DraftModel` asks a smaller model
of the same vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..ir.errors import InputError
from .sequence import Sequence

if TYPE_CHECKING:
    from .engine import Engine

_LONGEST, _SHORTEST = 3, 2
"""Lengths of what is looked for; one token alone is found everywhere."""
_MOST_PATIENCE = 32


class Drafter(Protocol):
    """Guesses tokens."""

    def propose(self, sequences: Seq[Sequence], count: int) -> list[list[int]]:
        """For each sequence at most `count` tokens that may follow its last one; an empty list: no idea."""
        ...


class PromptLookup:
    """See the module."""

    def propose(self, sequences: Seq[Sequence], count: int) -> list[list[int]]:
        """As `Drafter.propose`; the latest place counts, since texts repeat what is near."""
        return [_followers(sequence, count) for sequence in sequences]


def _followers(sequence: Sequence, count: int) -> list[int]:
    tokens = np.frombuffer(sequence.tokens, np.int32)  # a view: it must be gone before the sequence grows
    for length in range(min(_LONGEST, len(tokens) - 1), _SHORTEST - 1, -1):
        end = tokens[-length:]
        # Places after which something follows and where the last token is the same; then the ones before.
        places = np.flatnonzero(tokens[length - 1 : -1] == end[-1])
        for back in range(2, length + 1):
            places = places[tokens[places + (length - back)] == end[-back]]
        if len(places):
            start = int(places[-1]) + length
            return tokens[start : start + count].tolist()
    return []


class DraftModel:
    """A smaller model with a cache of its own. It computes anew what its prefix cache does not have: less
    than a page of a sequence each time.
    """

    def __init__(self, engine: Engine, vocab_size: int) -> None:
        """Raises InputError where its tokens are not those of the model that it guesses for."""
        if engine.facts.vocab_size != vocab_size:
            raise InputError(
                f"the draft model has {engine.facts.vocab_size} tokens, the model {vocab_size}",
                remedy="take a draft of the same family, with the same tokenizer",
            )
        self._engine = engine

    def propose(self, sequences: Seq[Sequence], count: int) -> list[list[int]]:
        """As `Drafter.propose`: greedy, all sequences together."""
        from .sampling_params import SamplingParams

        params = SamplingParams(max_tokens=count, ignore_eos=True)
        guesses: dict[str, list[int]] = {}
        for number, sequence in enumerate(sequences):
            guesses[str(number)] = []
            if len(sequence.tokens) + count <= self._engine.limit:
                self._engine.add_request(sequence.tokens, params, str(number))
        while self._engine.has_work:
            for output in self._engine.step():
                guesses[output.request_id] += output.token_ids
        return [guesses[str(number)] for number in range(len(sequences))]


class Patience:
    """How long a sequence whose guesses were wrong goes without."""

    __slots__ = ("_left", "_pause")

    def __init__(self) -> None:
        self._pause = 1
        self._left = 0

    def ready(self) -> bool:
        """Whether to guess now; asked once a step."""
        if self._left:
            self._left -= 1
            return False
        return True

    def note(self, accepted: int) -> None:
        """Of a guess, so many tokens were right."""
        self._pause = 1 if accepted else min(2 * self._pause, _MOST_PATIENCE)
        self._left = 0 if accepted else self._pause


__all__ = ["DraftModel", "Drafter", "Patience", "PromptLookup"]
