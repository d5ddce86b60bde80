"""From logits to tokens, vectorised over the rows of a step.

A row's token depends on that row alone: every operation is elementwise or reduces along the row in an order
fixed by its length, and the random number comes from the request's seed, the choice and the token's index,
not from a shared generator. So a seeded request gives the same tokens alone and in any batch, and after
preemption.
"""

from __future__ import annotations

import struct
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from .custom_sampler import SequenceSampler
from .sampling_params import SamplingParams

# top_p looks at this many of the most likely tokens before it looks at more.
_CANDIDATES = 1024
_BLOCK = 256
_DENSE = 8  # where fewer than one token in 8 is allowed, moving those is faster than masking the others
_GREEDY = 1e-5  # temperatures below are greedy: float32 logits differ by more than this or are equal


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log probability of a token and of the most likely alternatives, (id, logprob) best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


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
        "params",
        "prompt_ids",
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
        uses_prompt = params.repetition_penalty != 1.0
        self.prompt_ids = np.unique(np.frombuffer(prompt, np.int32)) if uses_prompt else np.zeros(0, np.int32)
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
        return other

    def note(self, token: int) -> None:
        """Remember a generated token."""
        if self.has_penalties:
            self.counts[token] += 1


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
) -> tuple[list[int], list[TokenLogprob | None]]:
    """Choose a token for each row.

    Args:
        logits: [R, vocab] float32; changed in place.
        rows: R states.
        indices: R numbers of tokens generated before this one, for the random numbers and `min_tokens`.
        allowed: R constraints; None where no row has one.

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
    tokens = np.argmax(logits, axis=1)
    # argmax finds a NaN first, so the chosen logit tells whether the row is sound.
    sound = np.isfinite(logits[np.arange(len(rows)), tokens])
    for i, row in enumerate(rows):
        if not row.is_greedy and sound[i]:
            tokens[i] = _draw(logits[i], row, indices[i])
    chosen = np.where(sound, tokens, -1).tolist()
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
        seen = np.fromiter(row.counts.keys(), np.int64, len(row.counts))
        if p.repetition_penalty != 1.0:
            ids = np.union1d(seen, row.prompt_ids)
            ids = ids[ids < len(logits)]
            values = logits[ids]
            logits[ids] = np.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
        if len(seen):
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


def _draw(logits: np.ndarray, row: SamplerRow, index: int) -> int:
    """Sample from one row [vocab] by inverting its cumulative distribution over the ids that are kept."""
    p = row.params
    weight = logits - logits.max()
    weight *= np.float32(1.0 / p.temperature)
    np.exp(weight, out=weight)
    u = uniform(row.seed, row.choice, index)
    ids = _keep(logits, weight, p)
    return _invert(weight, u) if ids is None else int(ids[_invert(weight[ids], u)])


def _invert(weight: np.ndarray, u: float) -> int:
    """The place where the running sum of `weight` passes the share `u` of its total, in float64.

    Sums of blocks first, then the running sum within one block: a tenth of the time of one long running sum.
    """
    head = len(weight) // _BLOCK * _BLOCK
    sums = weight[:head].reshape(-1, _BLOCK).sum(axis=1, dtype=np.float64)
    ends = np.cumsum(np.append(sums, np.sum(weight[head:], dtype=np.float64)))
    target = u * ends[-1]
    block = min(int(np.searchsorted(ends, target, side="right")), len(ends) - 1)
    begin = float(ends[block - 1]) if block else 0.0
    inside = weight[block * _BLOCK : (block + 1) * _BLOCK]
    place = int(np.searchsorted(np.cumsum(inside, dtype=np.float64), target - begin, side="right"))
    # Rounding may put the target at the very end, where weights are perhaps 0.
    last = int(np.flatnonzero(inside)[-1]) if inside.any() else 0
    return block * _BLOCK + min(place, last)


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Ids of the `count` largest values, in the order of ids; among equals the lower ids are taken."""
    if count >= len(values):
        return np.arange(len(values))
    threshold = np.partition(values, len(values) - count)[len(values) - count]
    ids = np.flatnonzero(values >= threshold)
    if len(ids) > count:
        tied = np.flatnonzero(values[ids] == threshold)
        ids = np.delete(ids, tied[len(tied) - (len(ids) - count) :])
    return ids


def _keep(logits: np.ndarray, weight: np.ndarray, p: SamplingParams) -> np.ndarray | None:
    """Ids that top_k, then top_p, then min_p leave, in the order of ids; None for the whole vocabulary.

    `weight`: [vocab] unnormalised probabilities, the largest 1. Nothing sorts more than a few candidates
    unless the distribution is flat.
    """
    ids: np.ndarray | None = None
    if 0 < p.top_k < len(logits):
        ids = _largest(logits, p.top_k)
    if p.top_p < 1.0:
        values, weights = (logits, weight) if ids is None else (logits[ids], weight[ids])
        kept = _largest(values, _count_for(weights, p.top_p))
        ids = kept if ids is None else ids[kept]
    if p.min_p > 0.0:
        likely = np.flatnonzero(weight >= p.min_p) if ids is None else ids[weight[ids] >= p.min_p]
        ids = likely
    return ids


def _count_for(weight: np.ndarray, top_p: float) -> int:
    """How many of the largest weights it takes to reach the share `top_p` of their total; at least 1."""
    limit = top_p * float(np.sum(weight, dtype=np.float64))
    count = _CANDIDATES
    while True:
        top = (
            np.partition(weight, len(weight) - count)[len(weight) - count :]
            if count < len(weight)
            else weight
        )
        falling = np.sort(top)[::-1]
        sums = np.cumsum(falling, dtype=np.float64)
        if count >= len(weight) or sums[-1] >= limit:
            return min(int(np.searchsorted(sums, limit, side="left")) + 1, len(weight))
        count *= 8


def token_logprob(logits: np.ndarray, token: int, top: int) -> TokenLogprob:
    """Log-softmax of one row [vocab] at the chosen token and at the `top` most likely ones, best first."""
    peak = logits.max()
    norm = float(peak) + float(np.log(np.sum(np.exp(logits - peak), dtype=np.float64)))
    ids = _largest(logits, top) if top else np.zeros(0, np.int64)
    ids = ids[np.argsort(-logits[ids], kind="stable")]
    best = tuple((int(i), float(logits[i]) - norm) for i in ids)
    return TokenLogprob(token, float(logits[token]) - norm, best)
