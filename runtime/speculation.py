"""Speculative decoding: guesses of the next tokens, which the model checks in one step.

A step over a few rows takes little longer than one over a single row, since both read the same weights. So
where few sequences run, the tokens that probably follow are computed with the last one, and every row of
logits tells what really follows: guesses are kept up to the first that is wrong (Leviathan et al., "Fast
Inference from Transformers via Speculative Decoding", ICML 2023, section 2.1; here without their rule of
acceptance, since a token of ours depends on its logits, the seed and its place alone). The answer is the same
tokens as without guesses, for sampling with a seed too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .drafters import Drafter, PromptLookup
from .engine_options import Counters
from .generation import Generation
from .late_scaling import NEVER, LateScaling
from .sampler import Prepare, TokenLogprob, sample
from .scheduler import Chunk, Plan, Scheduler


@dataclass(slots=True)
class Checked:
    """A sequence's guesses after a step: its rows of the logits, how many guesses were right, and the tokens
    that follow, those among them.
    """

    rows: int
    kept: int
    tokens: list[int]
    logprobs: list[TokenLogprob | None]


# Rows up to which a step takes hardly longer than with one: guesses fill what sequences leave of them.
_GUESSING_ROWS = 16


class Speculator:
    """Guesses for the sequences of one engine. Between two steps no sequence has any."""

    def __init__(
        self,
        scheduler: Scheduler[Generation],
        counters: Counters,
        *,
        most: int,
        limit: int,
        prepare: Prepare | None,
        late: LateScaling = NEVER,
    ) -> None:
        """`most`: tokens guessed at a time at most, 0 for none; `limit`: tokens of a sequence at most;
        `prepare` as `sample` takes it; `late`: from which length on sequences are computed in another way.
        """
        self.drafter: Drafter = PromptLookup()
        self._scheduler = scheduler
        self._counters = counters
        self._most = most
        self._limit = limit
        self._prepare = prepare
        self._late = late

    def guess(self) -> list[Generation]:
        """Append guesses to sequences that decode, as far as rows are to spare; returns those sequences."""
        running, blocks = self._scheduler.running, self._scheduler.blocks
        if not self._most or not running or blocks.num_available < 2 * len(running):
            return []
        count = min(self._most, _GUESSING_ROWS // len(running) - 1)
        willing = [g for g in running if g.can_guess and g.patience.ready()] if count > 0 else []
        if not willing:
            return []
        guessing: list[Generation] = []
        for generation, guesses in zip(willing, self.drafter.propose(willing, count), strict=True):
            # Where pages are evicted, tokens are computed up to there and no further at once.
            end = min(self._limit, blocks.reach(generation))
            if not generation.first_position:
                end = min(end, self._late.original)
            room = min(generation.request.max_tokens - generation.num_generated, end - len(generation.tokens))
            del guesses[max(0, room - 1) :]
            if guesses:
                generation.add_draft(guesses)
                guessing.append(generation)
        return guessing

    def cut(self, guessing: list[Generation], plan: Plan[Generation]) -> None:
        """Take back the guesses for which the plan has no room."""
        planned = {id(chunk.sequence): chunk for chunk in plan.chunks} if guessing else {}
        for generation in guessing:
            chunk, known = planned.get(id(generation)), len(generation.tokens) - generation.drafted
            if chunk is None or chunk.start != known - 1:
                generation.cut_draft()
            else:
                generation.keep_draft(chunk.start + chunk.count - known)
            if chunk is not None:
                chunk.count = min(chunk.count, len(generation.tokens) - chunk.start)
            self._scheduler.blocks.forget_hashes(generation)

    def check(self, plan: Plan[Generation], logits: np.ndarray) -> dict[int, Checked]:
        """What follows the last token of each sequence with guesses, by identity; of its chunk only what was
        guessed rightly is left.
        """
        rows: list[int] = []
        guessed: list[Chunk[Generation]] = []
        row = 0
        for chunk in plan.chunks:
            end = row + len(chunk.scored) + chunk.is_last
            if chunk.sequence.drafted:
                guessed.append(chunk)
                rows += range(row, end)
            row = end
        if not guessed:
            return {}
        states = [chunk.sequence.sampler for chunk in guessed for _ in range(chunk.count)]
        indices = [chunk.sequence.num_guessed_from + i for chunk in guessed for i in range(chunk.count)]
        tokens, logprobs = sample(logits[rows], states, indices, prepare=self._prepare)
        checked: dict[int, Checked] = {}
        begin = 0
        for chunk in guessed:
            end = begin + chunk.count
            kept = chunk.sequence.check_draft(tokens[begin:end])
            self._counters.tokens_guessed += chunk.count - 1
            self._counters.guesses_accepted += kept
            self._scheduler.blocks.forget_hashes(chunk.sequence)
            checked[id(chunk.sequence)] = Checked(
                chunk.count, kept, tokens[begin : begin + kept + 1], logprobs[begin : begin + kept + 1]
            )
            chunk.count = 1 + kept
            begin = end
        return checked


__all__ = ["Checked", "Speculator"]
