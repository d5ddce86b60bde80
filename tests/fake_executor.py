"""An executor for tests of the engine: its "model" is a hash of the context, read back through pages and
block tables.

A page stores the token and the position of each of its slots. A step writes the new tokens to their slots and
then, for every row whose logits are wanted, collects the context from the sequence's pages. The logits are a
hash of exactly that context, so one wrong page, slot, copy or stale prefix changes every later token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from llmc.runtime.executor import StepInputs

_ALWAYS = (
    "token_ids",
    "positions",
    "slot_mapping",
    "query_start",
    "context_len",
    "block_table",
    "output_index",
)
_MIX = np.uint64(0x9E3779B97F4A7C15)


class FakeExecutor:
    """Deterministic and batch invariant. Checks the step interface's promises on every call."""

    batch_invariant = True

    def __init__(self, *, page_size: int = 4, vocab_size: int = 97, kv_bytes_per_page: int = 64):
        self.page_size = page_size
        self.vocab_size = vocab_size
        self.kv_bytes_per_page = kv_bytes_per_page
        self.max_pages: int | None = None
        self.tokens = np.zeros((0, page_size), np.int64)
        self.positions = np.zeros((0, page_size), np.int64)
        self.steps: list[StepInputs] = []
        self.keep_steps = False
        self.fail_next: Exception | None = None
        self.nan_tokens: frozenset[int] = frozenset()

    def allocate_kv(self, num_pages: int) -> None:
        self.tokens = np.full((num_pages, self.page_size), -1, np.int64)
        self.positions = np.full((num_pages, self.page_size), -1, np.int64)

    def copy_pages(self, src: Sequence[int], dst: Sequence[int]) -> None:
        for source, destination in zip(src, dst, strict=True):
            self.tokens[destination] = self.tokens[source]
            self.positions[destination] = self.positions[source]

    def rotate_keys(self, pages: Sequence[int], shift: int, window: int | None = None) -> None:
        assert window is None and len(set(pages)) == len(pages)
        assert (self.positions[pages] >= shift).all(), "a key before the first position"
        self.positions[pages] -= shift

    def step(self, inputs: StepInputs) -> np.ndarray:
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error
        self._check(inputs)
        if self.keep_steps:
            self.steps.append(inputs)
        page, offset = np.divmod(inputs.slot_mapping, self.page_size)
        self.tokens[page, offset] = inputs.token_ids
        self.positions[page, offset] = inputs.positions
        sequence_of = np.repeat(np.arange(len(inputs.context_len)), np.diff(inputs.query_start))
        return np.array(
            [self._row(inputs, int(sequence_of[i]), int(inputs.positions[i])) for i in inputs.output_index],
            np.float32,
        ).reshape(len(inputs.output_index), self.vocab_size)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {f"{name}_doubled": value * 2 for name, value in inputs.items()}

    def _row(self, inputs: StepInputs, sequence: int, position: int) -> np.ndarray:
        """Logits [vocab] at a position, from the context 0 .. position as the pages hold it."""
        count = position + 1
        pages = inputs.block_table[sequence, : -(-count // self.page_size)]
        context = self.tokens[pages].reshape(-1)[:count]
        places = self.positions[pages].reshape(-1)[:count]
        return reference_logits(context, places, self.vocab_size, self.nan_tokens)

    def _check(self, inputs: StepInputs) -> None:
        for name in StepInputs.__slots__:
            array = getattr(inputs, name)
            if array is None and name not in _ALWAYS:
                continue
            assert array.dtype == np.int32, name
            assert array.flags.c_contiguous, name
        total = len(inputs.token_ids)
        assert inputs.query_start[0] == 0
        assert inputs.query_start[-1] == total == len(inputs.positions) == len(inputs.slot_mapping)
        counts = np.diff(inputs.query_start)
        assert (counts > 0).all()
        assert len(np.unique(inputs.slot_mapping)) == total, "two tokens write one slot"
        for b, count in enumerate(counts):
            rows = slice(inputs.query_start[b], inputs.query_start[b + 1])
            end = inputs.context_len[b]
            assert np.array_equal(inputs.positions[rows], np.arange(end - count, end))
            page, offset = np.divmod(inputs.positions[rows], self.page_size)
            expected = inputs.block_table[b, page] * self.page_size + offset
            assert np.array_equal(inputs.slot_mapping[rows], expected)
            unused = inputs.block_table[b, -(-int(end) // self.page_size) :]
            assert not unused.any(), "entries past the last page are 0"


def reference_logits(
    context: np.ndarray, places: np.ndarray, vocab_size: int, nan_tokens: frozenset[int] = frozenset()
) -> np.ndarray:
    """[vocab] float32 from a context's tokens and positions; NaN where it holds one of `nan_tokens`."""
    if nan_tokens and nan_tokens & set(context.tolist()):
        return np.full(vocab_size, np.nan, np.float32)
    with np.errstate(over="ignore"):
        mixed = (context.astype(np.uint64) + np.uint64(1)) * _MIX
        mixed ^= (places.astype(np.uint64) + np.uint64(7)) * np.uint64(0xC2B2AE3D27D4EB4F)
        mixed ^= mixed >> np.uint64(29)
        mixed *= np.uint64(0xBF58476D1CE4E5B9)
        state = np.bitwise_xor.reduce(mixed ^ (mixed >> np.uint64(32)))
        values = (np.arange(vocab_size, dtype=np.uint64) + np.uint64(1)) * (state | np.uint64(1)) + state
        values ^= values >> np.uint64(31)
        values *= _MIX
    return ((values >> np.uint64(40)).astype(np.float32) / np.float32(2**21)) - np.float32(4)


def generate_alone(
    prompt: Sequence[int], count: int, *, vocab_size: int = 97, stop: frozenset[int] = frozenset()
) -> list[int]:
    """Greedy tokens of the fake model without any cache: what the engine has to give in every case."""
    tokens = list(prompt)
    for _ in range(count):
        places = np.arange(len(tokens))
        tokens.append(int(np.argmax(reference_logits(np.array(tokens), places, vocab_size))))
        if tokens[-1] in stop:
            break
    return tokens[len(prompt) :]


def stream_alone(prompt: Sequence[int], count: int, *, capacity: int, sinks: int, page: int = 4) -> list[int]:
    """Greedy tokens of the fake model that goes on when `capacity` tokens are in its cache: the first `sinks`
    stay and the newest half of the rest, in whole pages, and positions are those in the cache. Numbers of
    tokens, all of them multiples of a page.
    """
    tokens, cache = list(prompt), list[tuple[int, int]]()
    kept = (capacity - sinks) // page // 2 * page
    for index in range(len(prompt) + count - 1):
        if len(cache) == capacity:
            moved = capacity - sinks - kept
            cache = cache[:sinks] + [(token, place - moved) for token, place in cache[capacity - kept :]]
        cache.append((tokens[index], len(cache)))
        if index == len(tokens) - 1:
            context, places = np.array(cache).T
            tokens.append(int(np.argmax(reference_logits(context, places, 97))))
    return tokens[len(prompt) :]
