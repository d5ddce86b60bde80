"""From logits to tokens, a row of a step after the other.

A row's token depends on that row alone: every operation is elementwise or reduces along the row in an order
fixed by its length, and the random number comes from the request's seed, the choice and the token's index,
not from a shared generator. So a seeded request gives the same tokens alone and in any batch, and after
preemption.
"""

from __future__ import annotations

import math
import struct
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from .custom_sampler import SequenceSampler
from .executor.base import Prepared
from .probabilities import Probabilities, largest, pick
from .sampling_params import SamplingParams

_DENSE = 8  # where fewer than one token in 8 is allowed, moving those is faster than masking the others
_FEW_ROWS = 4
_LOG2E = math.log2(math.e)
_GREEDY = 1e-5  # temperatures below are greedy: float32 logits differ by more than this or are equal


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log probability of a token and of the most likely alternatives, (id, logprob) best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


Prepare = Callable[[np.ndarray, np.ndarray], Prepared | None]
"""`PreparesSampling.prepare_sampling`."""


class SamplerRow:
    """What the sampler remembers of one sequence."""

    __slots__ = (
        "adjusts",
        "blocked",
        "choice",
        "counts",
        "custom",
        "forbidden",
        "is_greedy",
        "known",
        "params",
        "repeated",
        "seed",
    )

    def __init__(
        self, params: SamplingParams, prompt: array[int], *, seed: int, choice: int, stops: Sequence[int]
    ):
        """`stops`: tokens that `min_tokens` keeps away. `seed`: 64 bits."""
        self.params = params
        self.seed = seed
        self.choice = choice
        self.forbidden = np.array(sorted(stops), np.int64)
        self.blocked = params.min_tokens > 0 and len(self.forbidden) > 0
        self.counts: Counter[int] = Counter()
        # Each token of the prompt and of the answer once, for the repetition penalty.
        self.known = set(prompt) if params.repetition_penalty != 1.0 else set[int]()
        self.repeated = array("i", self.known)
        self.custom: SequenceSampler | None = None
        """The sampler that the request named, at work on the sequence of this row."""
        self.adjusts = (
            self.has_penalties or bool(params.logit_bias) or self.blocked or params.sampler is not None
        )
        self.is_greedy = params.temperature < _GREEDY

    @property
    def has_penalties(self) -> bool:
        """Whether the output so far changes the logits."""
        p = self.params
        return p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0

    def fork(self, choice: int) -> SamplerRow:
        """The same state for another choice of the request."""
        other = object.__new__(SamplerRow)
        for name in self.__slots__:
            setattr(other, name, getattr(self, name))
        other.choice = choice
        other.counts = Counter(self.counts)
        other.known, other.repeated = set(self.known), self.repeated[:]
        return other

    def note(self, token: int) -> None:
        """Remember a generated token."""
        if self.has_penalties:
            self.counts[token] += 1
            if self.params.repetition_penalty != 1.0 and token not in self.known:
                self.known.add(token)
                self.repeated.append(token)


def uniform(seed: int, choice: int, index: int) -> float:
    """A number in [0, 1), 53 bits, from a keyed hash used as a counter-based generator.

    The same idea as Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), at a
    tenth of the cost of making one of numpy's generators for a single number.
    """
    key = struct.pack("<QQQ", seed % 2**64, choice, index)
    return (int.from_bytes(blake2b(key, digest_size=8).digest(), "little") >> 11) * 2.0**-53


Allowed = np.ndarray | int | None
"""What a grammar allows: [ceil(vocab / 32)] int32 with a bit a token, lowest first; one token; or anything.
"""


def sample(
    logits: np.ndarray,
    rows: Sequence[SamplerRow],
    indices: Sequence[int],
    allowed: Sequence[Allowed] | None = None,
    prepare: Prepare | None = None,
) -> tuple[list[int], list[TokenLogprob | None]]:
    """Choose a token for each row.

    Args:
        logits: [R, vocab] float32; changed in place.
        rows: R states.
        indices: R numbers of tokens generated before this one, for the random numbers and `min_tokens`.
        allowed: R constraints; None where no row has one.
        prepare: the help of the executor, if it has some; tokens are the same for the same executor.

    Returns:
        R token ids, and R log probabilities (None where the request asked for none). The id is -1 where the
        row holds NaN or no finite logit, which means that the model is broken.
    """
    raw: dict[int, np.ndarray] = {}
    for i, row in enumerate(rows):
        if row.params.logprobs is not None:
            raw[i] = logits[i].copy()
        constraint = allowed[i] if allowed is not None else None
        if row.adjusts or constraint is not None:
            with np.errstate(over="ignore"):  # an infinite logit is found below
                _adjust(logits[i], row, indices[i], constraint)
    chosen = _choose(logits, rows, indices, prepare)
    logprobs: list[TokenLogprob | None] = [None] * len(rows)
    for i, row in enumerate(rows):
        if row.params.logprobs is not None and chosen[i] >= 0:
            logprobs[i] = token_logprob(raw[i], chosen[i], row.params.logprobs)
    return chosen, logprobs


def _adjust(logits: np.ndarray, row: SamplerRow, index: int, allowed: Allowed) -> None:
    """Apply penalties, bias, the request's own sampler, a grammar and `min_tokens` to one row [vocab], in
    place.
    """
    p = row.params
    if row.has_penalties:
        if p.repetition_penalty != 1.0:
            ids = np.array(row.repeated, np.int32)
            ids = ids[ids < len(logits)]
            values = logits[ids]
            logits[ids] = np.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
        if row.counts and (p.presence_penalty or p.frequency_penalty):
            seen = np.fromiter(row.counts.keys(), np.int64, len(row.counts))
            counts = np.fromiter(row.counts.values(), np.float32, len(row.counts))
            logits[seen] -= np.float32(p.presence_penalty) + np.float32(p.frequency_penalty) * counts
    if p.logit_bias:
        logits[np.fromiter(p.logit_bias.keys(), np.int64)] += np.fromiter(p.logit_bias.values(), np.float32)
    if row.custom is not None:
        row.custom.apply(logits)
    if allowed is not None:
        _constrain(logits, allowed)
    if row.blocked and index < p.min_tokens:
        kept = logits[row.forbidden]
        logits[row.forbidden] = -np.inf
        if allowed is not None and logits.max() == -np.inf:
            logits[row.forbidden] = kept  # a grammar that allows nothing else wins


def _constrain(logits: np.ndarray, allowed: np.ndarray | int) -> None:
    """Put every token out of reach that is not allowed, in place. A row with NaN is left as it is: it is
    found broken, whatever the grammar leaves of it.
    """
    if np.isnan(logits.max()):
        return
    if isinstance(allowed, int):
        logits.fill(-np.inf)
        logits[allowed] = 0.0
        return
    bits = np.unpackbits(allowed.view(np.uint8), bitorder="little")[: len(logits)]
    if int(np.count_nonzero(bits)) * _DENSE > len(bits):
        logits[: len(bits)][bits == 0] = -np.inf
        logits[len(bits) :] = -np.inf
    else:
        ids = np.flatnonzero(bits)
        kept = logits[ids]
        logits.fill(-np.inf)
        logits[ids] = kept


def _choose(
    logits: np.ndarray, rows: Sequence[SamplerRow], indices: Sequence[int], prepare: Prepare | None
) -> list[int]:
    """The tokens of rows that are adjusted; -1 for a broken one."""
    # A few rows that are only searched take numpy less than the call does; the tokens are the same.
    if prepare is not None and (len(rows) > _FEW_ROWS or not all(row.is_greedy for row in rows)):
        scales = [0.0 if row.is_greedy else _LOG2E / row.params.temperature for row in rows]
        if (prepared := prepare(logits, np.array(scales, np.float32))) is not None:
            chosen = prepared.best.tolist()
            for i, row in enumerate(rows):
                if not row.is_greedy and chosen[i] >= 0:
                    chosen[i] = _draw(Probabilities.prepared(logits[i], i, prepared), row, indices[i])
            return chosen
    return [
        _best(logits[i])
        if row.is_greedy
        else _draw(Probabilities.of(logits[i], row.params.temperature), row, indices[i])
        for i, row in enumerate(rows)
    ]


def _best(logits: np.ndarray) -> int:
    """The most likely token of one row [vocab], the first among equals; -1 for a broken row."""
    token = int(logits.argmax())  # of NaN, the first
    return token if math.isfinite(logits[token]) else -1


def _draw(weights: Probabilities | None, row: SamplerRow, index: int) -> int:
    """Sample from one row by inverting its cumulative distribution over the ids that are kept; -1 for a
    broken row.
    """
    if weights is None:
        return -1
    u, p = uniform(row.seed, row.choice, index), row.params
    ids = weights.kept(p.top_k, p.top_p, p.min_p)
    return weights.draw(u) if ids is None else int(ids[pick(weights.weights[ids], u)])


def token_logprob(logits: np.ndarray, token: int, top: int) -> TokenLogprob:
    """Log-softmax of one row [vocab] at the chosen token and at the `top` most likely ones, best first."""
    peak = logits.max()
    norm = float(peak) + float(np.log(np.sum(np.exp(logits - peak), dtype=np.float64)))
    ids = largest(logits, top) if top else np.zeros(0, np.int64)
    ids = ids[np.argsort(-logits[ids], kind="stable")]
    best = tuple((int(i), float(logits[i]) - norm) for i in ids)
    return TokenLogprob(token, float(logits[token]) - norm, best)
