"""Perplexity of a text and closeness of two artifacts, over the paged step.

The text is cut into consecutive windows that do not overlap, each scored on its own with an empty cache.
Where the tokenizer begins a text with BOS by default, every window begins with it (and takes one token less
of the text), since models trained that way are lost without it. A window of W tokens gives W - 1
predictions: those of its tokens 1 … W - 1. Perplexity is exp of the mean negative log-likelihood over all
predictions of all windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Logits = Callable[[Sequence[int], int], Iterator[np.ndarray]]
"""`LLM.iter_logits`: (token ids, rows at a time) → logits of every token, [rows, vocab] float32 at a time."""

# Logits held at once, in elements: 2**24 float32 are 64 MB, and scoring needs a few arrays of that size.
_LOGITS = 1 << 24


def cut(ids: Sequence[int], *, window: int, count: int | None, bos: int | None) -> list[np.ndarray]:
    """Windows of `window` token ids, int32; the incomplete one at the end is left out."""
    fresh = window - (bos is not None)
    number = len(ids) // fresh
    number = number if count is None else min(number, count)
    head = [] if bos is None else [bos]
    return [np.array([*head, *ids[i * fresh : (i + 1) * fresh]], np.int32) for i in range(number)]


@dataclass
class Score:
    """Sums over predictions: negative log-likelihood and KL divergence in nats, agreements of the best
    token.
    """

    predictions: int = 0
    nll: float = 0.0
    nll_against: float = 0.0
    kl: float = 0.0
    agreements: int = 0

    def result(self, *, against: bool) -> dict[str, Any]:
        """The JSON of `llmc eval`. `kl` is the mean of D(against || artifact) per prediction."""
        count = max(1, self.predictions)
        result: dict[str, Any] = {"ppl": math.exp(self.nll / count), "tokens": self.predictions}
        if against:
            result["ppl_against"] = math.exp(self.nll_against / count)
            result["kl"] = self.kl / count
            result["top1_agreement"] = self.agreements / count
        return result


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural log-probabilities, float32 [rows, vocab]; the normaliser is summed in float64."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    normaliser = np.log(np.exp(shifted).sum(axis=1, keepdims=True, dtype=np.float64))
    return shifted - normaliser.astype(np.float32)


def score(
    windows: Sequence[np.ndarray],
    logits: Logits,
    against: Logits | None = None,
    *,
    vocab_size: int,
    progress: Callable[[str, float], None] | None = None,
) -> Score:
    """Scores every window; with `against`, both artifacts see the same tokens, chunk by chunk."""
    total = Score()
    chunk = max(16, min(256, _LOGITS // vocab_size))
    for number, ids in enumerate(windows):
        if progress is not None:
            progress(f"scoring {len(windows)} windows", number / len(windows))
        others = against(ids.tolist(), chunk) if against is not None else None
        start = 0
        for part in logits(ids.tolist(), chunk):
            # Row i predicts token i + 1; the window's last row predicts a token outside it.
            targets = ids[start + 1 : start + 1 + len(part)]
            rows = log_softmax(part[: len(targets)])
            other = log_softmax(next(others)[: len(targets)]) if others is not None else None
            _add(total, rows, other, targets)
            start += len(part)
    return total


def _add(total: Score, rows: np.ndarray, other: np.ndarray | None, targets: np.ndarray) -> None:
    index = np.arange(len(targets))
    total.predictions += len(targets)
    total.nll -= float(rows[index, targets].sum(dtype=np.float64))
    if other is None:
        return
    total.nll_against -= float(other[index, targets].sum(dtype=np.float64))
    total.kl += float((np.exp(other) * (other - rows)).sum(dtype=np.float64))
    total.agreements += int((rows.argmax(axis=1) == other.argmax(axis=1)).sum())
