"""Whole sequences through an encoder or classifier, many in a step: a ragged batch without padding.

Such a model sees each sequence in one call and keeps nothing, so the pages of the "cache" are scratch memory
of one step, given out from the first page again each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..codegen.artifact import Artifact
from ..ir.errors import InputError
from .executor.base import Executor, StepInputs

if TYPE_CHECKING:
    from .engine import Engine

Rows = Literal["all", "first", "last"]
"""Whose results are wanted: every token's, or the first or last one's of each sequence."""

_ROWS: Mapping[str, Rows] = {"mean": "all", "max": "all", "cls": "first", "last": "last"}
"""Way of pooling → the hidden states that it looks at."""

STEP_TOKENS = 1024
"""Tokens of a step, where no single sequence is longer. More gains nothing and takes memory."""


class WholeSequences:
    """Steps over an executor whose cache nobody else uses meanwhile."""

    def __init__(
        self, executor: Executor, pages: int, tokens: int = STEP_TOKENS, *, alone: bool = False
    ) -> None:
        """`pages`: how many were allocated; `tokens` of a step; `alone`: a step takes one sequence."""
        self._alone = alone
        self._executor = executor
        self._pages = pages
        self._tokens = tokens

    @staticmethod
    def pages_for(executor: Executor, tokens: int) -> int:
        """Pages for steps of so many tokens. Short sequences leave most of a page unused: twice the pages
        hold sequences of half a page.
        """
        return 2 * -(-tokens // executor.page_size)

    def batches(self, lengths: Sequence[int]) -> Iterator[slice]:
        """Consecutive sequences that fit in a step together."""
        start = tokens = pages = 0
        for i, length in enumerate(lengths):
            needed = -(-length // self._executor.page_size)
            if i > start and (self._alone or tokens + length > self._tokens or pages + needed > self._pages):
                yield slice(start, i)
                start, tokens, pages = i, 0, 0
            tokens, pages = tokens + length, pages + needed
        if start < len(lengths):
            yield slice(start, len(lengths))

    def step(
        self, sequences: Sequence[Sequence[int]], rows: Rows, types: Sequence[Sequence[int]] | None = None
    ) -> np.ndarray:
        """Results [R, columns] float32 of sequences that fit in a step, each of at least one token; valid
        until the next step.

        `types`: the token types of each sequence, for a model that tells a pair's texts apart by them.
        """
        return self._executor.step(_inputs(sequences, self._executor.page_size, rows, types))

    def vectors(self, sequences: Sequence[Sequence[int]], pooling: str) -> np.ndarray:
        """[B, hidden] float32 of length 1: the pooled hidden states of sequences that fit in a step. Each is
        summed by itself, so that its vector does not depend on its neighbours.
        """
        states = self.step(sequences, _ROWS[pooling])
        if _ROWS[pooling] == "all":
            ends = np.cumsum([len(one) for one in sequences]).tolist()
            reduce: Callable[..., np.ndarray] = np.mean if pooling == "mean" else np.max
            starts = [0, *ends[:-1]]
            states = np.stack(
                [reduce(states[start:end], axis=0) for start, end in zip(starts, ends, strict=True)]
            )
        return states / np.maximum(np.linalg.norm(states, axis=1, keepdims=True), 1e-12)


def _inputs(
    sequences: Sequence[Sequence[int]], page_size: int, rows: Rows, types: Sequence[Sequence[int]] | None
) -> StepInputs:
    lengths = np.array([len(one) for one in sequences], np.int32)
    ends = np.cumsum(lengths, dtype=np.int32)
    starts = ends - lengths
    pages = -(-lengths // page_size)
    first_page = np.cumsum(pages, dtype=np.int32) - pages
    positions = np.arange(ends[-1], dtype=np.int32) - np.repeat(starts, lengths)
    column = np.arange(pages.max(), dtype=np.int32)[None, :]
    table = np.where(column < pages[:, None], first_page[:, None] + column, 0)
    wanted = {"all": np.arange(ends[-1], dtype=np.int32), "first": starts, "last": ends - 1}[rows]
    return StepInputs(
        token_ids=_joined(sequences),
        positions=positions,
        slot_mapping=np.repeat(first_page * page_size, lengths) + positions,
        query_start=np.concatenate([[0], ends]).astype(np.int32),
        context_len=lengths,
        block_table=np.ascontiguousarray(table, np.int32),
        output_index=np.ascontiguousarray(wanted, np.int32),
        token_type_ids=None if types is None else _joined(types),
    )


def _joined(parts: Sequence[Sequence[int]]) -> np.ndarray:
    return np.concatenate([np.asarray(part, np.int32) for part in parts])


def run_whole(
    engine: Engine,
    sequences: Sequence[Sequence[int]],
    work: Callable[[WholeSequences, slice], np.ndarray],
    *,
    alone: bool = False,
) -> np.ndarray:
    """What `work` makes of each step's sequences, joined along the first axis, over an engine that nobody
    steps meanwhile; `alone`: a step takes one sequence. Raises ContextLengthError for one that is too long.
    """
    checked = [engine.scorable(one) for one in sequences]
    whole = WholeSequences(engine.executor, engine.kv.pages, max(STEP_TOKENS, engine.limit), alone=alone)
    parts = whole.batches([len(one) for one in checked])
    done = [work(whole, part).copy() for part in parts]
    return np.concatenate(done) if done else np.zeros(0, np.float32)


def check_pairs(artifact: Artifact) -> None:
    """Raise InputError where a classifier's labels do not say whether two texts belong together."""
    labels: Sequence[str] = artifact.model["labels"]
    if len(labels) > 2:
        raise InputError(
            f"{artifact.root} tells {len(labels)} kinds of texts apart ({', '.join(labels)[:80]}), and does "
            "not say how well a passage answers a question",
            remedy="give a cross-encoder, such as cross-encoder/ms-marco-MiniLM-L6-v2",
        )


def relevance(scores: np.ndarray) -> np.ndarray:
    """[B] float32 of a cross-encoder's scores [B, labels]: its one score, or by how much it says yes rather
    than no.
    """
    return scores[:, 0].copy() if scores.shape[1] == 1 else scores[:, 1] - scores[:, 0]


def reads_alone(model: Mapping[str, object]) -> bool:
    """Whether a model, by its manifest, takes one sequence a step: its tokens meet in ways that would have
    those of several meet too.
    """
    return bool(model.get("alone"))


def scored_row(model: Mapping[str, object]) -> Rows:
    """Whose scores are a text's, by a classifier's manifest: its first token's, or of a decoder its last."""
    return "last" if model.get("scored") == "last" else "first"


def token_types(model: Mapping[str, object]) -> bool:
    """Whether a model, by its manifest, is told which text of a pair each token is of."""
    return bool(model.get("token_types"))


def prompts(model: Mapping[str, Any]) -> tuple[str, str]:
    """What a model wants before a question and before a passage; mostly nothing. The names are those of
    sentence-transformers (`config_sentence_transformers.json`).
    """
    given: Mapping[str, Any] = model.get("prompts") or {}
    passage = next((given[name] for name in ("document", "passage", "corpus") if name in given), "")
    return str(given.get("query", "")), str(passage)
