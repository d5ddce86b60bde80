"""Sequences that outgrow what a model was made for, where only those have their rotary embeddings scaled
(frontend/rope_by_length.py).

A sequence of at most `original` tokens is computed with the published frequencies. One that grows beyond is
computed again from its first token with the scaled ones, once: cached keys were turned by the others, and
hidden states saw those. That depends on nothing but the count of its tokens, so they are the same alone, in a
batch, cut in any way, and computed again.

No tensor library here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .scheduler import S, Scheduler
from .sequence import Sequence


@dataclass(frozen=True, slots=True)
class LateScaling:
    """`model.rope_scaling` of an artifact that was compiled for it."""

    original: int
    """Tokens that a sequence may have without scaling."""
    offset: int
    """What positions are counted from where it is scaled; no sequence is as long."""

    @staticmethod
    def read(model: Mapping[str, Any]) -> LateScaling:
        """`NEVER` where all sequences of the model, or none, are scaled. Raises ValueError for facts that
        make no sense.
        """
        facts = model.get("rope_scaling")
        if not isinstance(facts, Mapping) or facts.get("when") != "needed":
            return NEVER
        found = LateScaling(int(facts["original"]), int(facts["offset"]))
        if found.original < 1 or found.offset < int(model["context_length"]):
            raise ValueError("rope_scaling")
        return found

    def begin(self, sequence: Sequence, tokens: int | None = None) -> None:
        """Settle how a sequence is computed that holds no pages, and will have `tokens` if not those that it
        has.
        """
        if self.outgrown(sequence, len(sequence.tokens) if tokens is None else tokens):
            sequence.count_from(self.offset)

    def send_back(self, scheduler: Scheduler[S]) -> None:
        """Let running sequences that have outgrown the published frequencies be computed again."""
        if self is NEVER:
            return
        for sequence in [s for s in scheduler.running if self.outgrown(s, len(s.tokens))]:
            scheduler.preempt(sequence)
            self.begin(sequence)

    def outgrown(self, sequence: Sequence, tokens: int) -> bool:
        """Whether with so many tokens it can no longer be computed as it is."""
        return tokens > self.original and not sequence.first_position


NEVER = LateScaling(original=(1 << 31) - 1, offset=0)
"""Of a model whose sequences are all of one kind."""

__all__ = ["NEVER", "LateScaling"]
