"""What the engine asks of an executor: one step over a ragged batch. See docs/architecture.md, "The paged
step".

An executor module (`llmc.runtime.executor.tvm`, `.onnx`, `.null`) offers

    def open_target(artifact: Artifact, *, isa: str | None, threads: int | None) -> Executor

`isa` is the kernel's ISA level chosen from the target's "kernels" list (None where the target has no such
list), and `threads` the number of threads to compute with (None: choose).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ...codegen.artifact import Artifact
from ...ir.errors import InputError
from .indices import divides, within
from .windows import WindowTables

Kernels = tuple[Mapping[str, Any], Path]
"""Kernels beside an artifact's own: an entry as its manifest has for a target, and the library."""

STEP_INPUTS = (
    "token_ids",
    "positions",
    "slot_mapping",
    "query_start",
    "context_len",
    "block_table",
    "output_index",
    "token_type_ids",
    "adapter",
    "state_slot",
)
"""The fields of `StepInputs`, which are the names of a compiled step's inputs."""


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One ragged batch: T tokens of B sequences back to back, all arrays int32 and C-contiguous.

    The new tokens of a sequence are always the last ones of its context: sequence b computes the tokens
    `query_start[b]:query_start[b + 1]`, at positions `context_len[b] - count .. context_len[b] - 1`.
    """

    token_ids: np.ndarray
    """[T] the tokens to compute."""
    positions: np.ndarray
    """[T] position of each token in its sequence."""
    slot_mapping: np.ndarray
    """[T] cache slot that each token writes: page * page_size + offset in the page."""
    query_start: np.ndarray
    """[B + 1] first token of each sequence; the last entry is T."""
    context_len: np.ndarray
    """[B] tokens of each sequence in the cache after this step."""
    block_table: np.ndarray
    """[B, P] pages of each sequence in order; entries past its last page are 0 and mean nothing."""
    output_index: np.ndarray
    """[R] rows of T whose logits are wanted; R may be 0."""
    token_type_ids: np.ndarray | None = None
    """[T] which text of a pair each token is of, for classifiers that take it."""
    adapter: np.ndarray | None = None
    """[T] slot of the adapter that each token is computed with, -1 for none; None where no token has one."""
    windows: Sequence[WindowTables] | None = None
    """Tables for the layers of each window, where those have pages of their own."""
    state_slot: np.ndarray | None = None
    """[B] row of the state cache that each sequence owns, for models with recurrent layers."""

    def given(self) -> dict[str, np.ndarray]:
        """The arrays by name, without those that this step has not."""
        arrays = {name: getattr(self, name) for name in STEP_INPUTS}
        return {name: array for name, array in arrays.items() if array is not None}


def scaled_from(model: Mapping[str, Any]) -> int:
    """What positions of scaled sequences are counted from, by the facts of a manifest; 0 where no such thing
    is (docs/architecture.md, `model.rope_scaling`).
    """
    return int((model.get("rope_scaling") or {}).get("offset") or 0)


def check_step(
    inputs: StepInputs,
    *,
    num_pages: int,
    page_size: int,
    vocabulary: int | None,
    types: int = 0,
    states: int | None = None,
    scaled_from: int = 0,
) -> None:
    """Raise InputError where the arrays do not describe a step, or hold an index that leads out of the cache.

    For executors whose kernels follow every index unchecked. `vocabulary`: rows of the embedding, None where
    the executor checks ids itself. `types`: rows of the embedding of token types, 0 where there is none.
    `states`: rows of the state cache, None for a model without one. `scaled_from`: what positions of scaled
    sequences are counted from (`model.rope_scaling.offset`), 0 where there is no such thing.
    """
    tokens, sequences = len(inputs.token_ids), len(inputs.context_len)
    if (
        len(inputs.positions) != tokens
        or len(inputs.slot_mapping) != tokens
        or len(inputs.query_start) != sequences + 1
        or len(inputs.block_table) != sequences
    ):
        raise InputError(
            f"a step of {tokens} tokens and {sequences} sequences has arrays of other lengths",
            remedy="see StepInputs",
        )
    if not divides(inputs.query_start, inputs.context_len, tokens):
        raise InputError("query_start or context_len does not describe the step", remedy="see StepInputs")
    room = inputs.block_table.shape[1] * page_size
    bounds = (
        ("token_ids", inputs.token_ids, 1 << 31 if vocabulary is None else vocabulary),
        ("positions", inputs.positions, scaled_from + room),
        ("slot_mapping", inputs.slot_mapping, num_pages * page_size),
        ("block_table", inputs.block_table, num_pages),
        ("context_len", inputs.context_len, room + 1),
        ("output_index", inputs.output_index, tokens),
        *_type_bounds(inputs, types),
        *_state_bounds(inputs, states),
    )
    for name, array, limit in bounds:
        if not within(array, limit):
            raise InputError(f"{name} holds a value outside of 0 .. {limit - 1}", remedy="check the request")


def _type_bounds(inputs: StepInputs, types: int) -> list[tuple[str, np.ndarray, int]]:
    given = inputs.token_type_ids
    if not types:
        return []
    if given is None or len(given) != len(inputs.token_ids):
        raise InputError("this model wants a token type for each token", remedy="see StepInputs")
    return [("token_type_ids", given, types)]


def adapter_slots(inputs: StepInputs, slots: int) -> np.ndarray:
    """[T] int32 slot of each token's adapter, for kernels that take them; raises InputError for a slot that
    there is not.
    """
    tokens, given = len(inputs.token_ids), inputs.adapter
    if given is None:
        return np.full(tokens, -1, np.int32)
    if len(given) != tokens or (tokens and not -1 <= int(given.min()) <= int(given.max()) < slots):
        raise InputError(
            f"adapter holds no slot for a token, or one outside of -1 .. {slots - 1}", remedy="see StepInputs"
        )
    return given


def _state_bounds(inputs: StepInputs, states: int | None) -> list[tuple[str, np.ndarray, int]]:
    given = inputs.state_slot
    if states is None:
        return []
    if given is None or len(given) != len(inputs.context_len) or len(set(given.tolist())) != len(given):
        raise InputError(
            "this model wants a row of the state cache for each sequence", remedy="see StepInputs"
        )
    return [("state_slot", given, states)]


def columns(artifact: Artifact) -> int:
    """Columns of a step's result, by the manifest: hidden size, labels or vocabulary; 0 for a function."""
    model = artifact.model
    if artifact.kind == "classifier":
        return len(model["labels"])
    return int(model.get("hidden_size" if artifact.kind == "encoder" else "vocab_size") or 0)


class Executor(Protocol):
    """Runs a compiled model. Used by one thread at a time."""

    page_size: int
    """Tokens in a page."""
    vocab_size: int
    """Columns of the logits (hidden size for encoders, labels for classifiers)."""
    kv_bytes_per_page: int
    """Bytes of one page over all layers, K and V; 0 where nothing is cached."""
    max_pages: int | None
    """Most pages that its kernels can count; None without a bound of their own."""
    batch_invariant: bool
    """Whether a row's result depends on its own sequence only, bit for bit, however steps are cut."""

    def allocate_kv(self, num_pages: int) -> None:
        """Make the cache: pages 0 .. num_pages - 1. A second call replaces the first cache."""
        ...

    def copy_pages(self, src: Sequence[int], dst: Sequence[int]) -> None:
        """Copy page src[i] to page dst[i] in all layers, as if in order.

        No page is a destination twice, or a source after it was a destination; it may be a destination after
        it was a source, so reading all sources before writing gives the same.
        """
        ...

    def step(self, inputs: StepInputs) -> np.ndarray:
        """Write the batch's keys and values to their slots, attend, and return logits [R, vocab_size]
        float32.

        The array belongs to the caller until the next call of `step`.
        """
        ...

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Artifacts of kind "function": named inputs → named outputs. Others raise InputError."""
        ...


@runtime_checkable
class KeepsStates(Protocol):
    """An executor whose model may have recurrent layers, with a state for each sequence beside its pages."""

    state_bytes: int
    """Bytes of one sequence's states over all layers; 0 for a model without."""

    def allocate_states(self, count: int) -> None:
        """Make the state cache: rows 0 .. count - 1. A second call replaces the first cache."""
        ...

    def copy_state(self, src: int, dst: int) -> None:
        """Copy row src to row dst in all layers, between two steps."""
        ...


@runtime_checkable
class MovesPages(Protocol):
    """An executor whose pages can be kept elsewhere and come back."""

    kv_bytes_per_page: int

    def identity(self) -> dict[str, str]:
        """What the bits of a page depend on, beside the artifact's files and the tokens."""
        ...

    def read_pages(self, pages: Sequence[int]) -> np.ndarray:
        """uint8 [pages, kv_bytes_per_page], a copy: what all layers have in these pages."""
        ...

    def write_pages(self, pages: Sequence[int], contents: np.ndarray) -> None:
        """Make those pages what `read_pages` once gave."""
        ...


@runtime_checkable
class RotatesKeys(Protocol):
    """An executor that can move keys to earlier positions, for sequences that outlive their cache."""

    def rotate_keys(self, pages: Sequence[int], shift: int, window: int | None = None) -> None:
        """Turn the keys in these pages, of all layers whose pages `copy_pages` copies, back by `shift`
        positions (`rotation.py`); values stay. With `window` in the layers of window number `window` instead,
        whose pages `copy_window_pages` copies. Between two steps; no page is there twice.

        Raises InputError where the artifact does not say how its keys turn.
        """
        ...


@runtime_checkable
class PreparesSampling(Protocol):
    """An executor that reads logits on all its threads, for whoever draws tokens from them."""

    def prepare_sampling(self, logits: np.ndarray, scale: np.ndarray) -> Prepared | None:
        """Where scale[r] > 0 (float32 [R]), turn row r of logits (float32 [R, vocab_size], those of a step or
        a copy) into unnormalised probabilities 2^((logit - the largest) · scale[r]), in place. Bit for bit
        the same for a row, whatever others there are. None where it cannot: then nothing is changed.
        """
        ...


@runtime_checkable
class OwnMemory(Protocol):
    """An executor whose cache lies in other memory than this machine's."""

    def free_bytes(self) -> int:
        """Bytes there that nobody uses, before the cache is made."""
        ...


@dataclass(frozen=True, slots=True)
class Prepared:
    """What `prepare_sampling` found."""

    best: np.ndarray
    """int32 [R]: the first place of each row's largest logit; -1 where that is no finite number, or one is
    NaN: the row is as it was.
    """
    sums: np.ndarray
    """float32 [R, blocks]: of each whole block of the probabilities, where scale[r] > 0."""
    tops: np.ndarray
    """float32 [R, blocks]: the largest of each."""
    block: int
    """Tokens of a block."""


@dataclass(slots=True)
class CallTimes:
    """What an executor's steps spent their time on."""

    calls: Sequence[tuple[str, str | None]]
    """Kernel and, where it reads one, weight of each call of a step, in order."""
    cycles: np.ndarray
    """[calls] int64: cycles of each, over all steps."""
    seconds: float = 0.0
    """Of all steps, by the clock."""

    def seconds_of_calls(self) -> np.ndarray:
        """[calls] float64: the clock's seconds, shared out by cycles."""
        return self.cycles * (self.seconds / max(1, int(self.cycles.sum())))


@runtime_checkable
class Profiles(Protocol):
    """An executor that can tell where its time goes."""

    def profile(self) -> AbstractContextManager[CallTimes]:
        """Measures all steps inside of the `with` block; what it gives is complete when the block ends."""
        ...
