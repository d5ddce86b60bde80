"""Perplexity of a text and closeness of two artifacts, over the paged step.

The text is cut into consecutive windows that do not overlap, each scored on its own with an empty cache.
Where the tokenizer begins a text with BOS by default, every window begins with it (and takes one token less
of the text), since models trained that way are lost without it. A window of W tokens gives W - 1
predictions: those of its tokens 1 … W - 1. Perplexity is exp of the mean negative log-likelihood over all
predictions of all windows.

`roll` is the other way, lm-evaluation-harness's: every token of the text is predicted, and the likelihood of
all of it is spread over its words or bytes, so that models of different tokenizers can be compared.
"""

from __future__ import annotations

import math
import re
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


def roll(ids: Sequence[int], *, window: int, prefix: int) -> tuple[list[np.ndarray], list[int]]:
    """Windows, int32, in which every token of the text is predicted once; and for each the number of its
    first token that is. Those before it are context.

    A window has at most `window` + 1 tokens: its last one is predicted, and predicts nothing. The first
    window begins with `prefix`, a further one with the last token before it; the last one reaches back as
    far as the others, and predicts only what is left.
    """
    whole = np.array([prefix, *ids], np.int32)
    windows, firsts = [whole[: window + 1]], [1]
    for start in range(window, len(ids), window):
        end = min(start + window, len(ids))
        windows.append(whole[end - window : end + 1])
        firsts.append(start + 1 - (end - window))
    return windows, firsts


def lengths(text: str) -> tuple[int, int]:
    """Words (pieces between white space, empty ones at the ends included) and UTF-8 bytes of a text."""
    return len(re.split(r"\s+", text)), len(text.encode())


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

    def by_length(self, words: int, octets: int) -> dict[str, float]:
        """`word_perplexity`, `byte_perplexity` and `bits_per_byte` of a text that was predicted whole."""
        return {
            "word_perplexity": math.exp(self.nll / words),
            "byte_perplexity": math.exp(self.nll / octets),
            "bits_per_byte": self.nll / octets / math.log(2),
        }


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural log-probabilities, float32 [rows, vocab]; the normaliser is summed in float64."""
    shifted = logits - logits.max(axis=1, keepdims=True, initial=-np.inf)
    normaliser = np.log(np.exp(shifted).sum(axis=1, keepdims=True, dtype=np.float64))
    return shifted - normaliser.astype(np.float32)


def score(
    windows: Sequence[np.ndarray],
    logits: Logits,
    against: Logits | None = None,
    *,
    vocab_size: int,
    firsts: Sequence[int] | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> Score:
    """Scores every window; with `against`, both artifacts see the same tokens, chunk by chunk.

    `firsts` as `roll` gives them: predictions before a window's first are not counted, and its last token is
    not computed, for it may be one more than the cache has room for.
    """
    total = Score()
    chunk = max(16, min(256, _LOGITS // vocab_size))
    for number, ids in enumerate(windows):
        if progress is not None:
            progress(f"scoring {len(windows)} windows", number / len(windows))
        inputs = (ids if firsts is None else ids[:-1]).tolist()
        skipped = 0 if firsts is None else firsts[number] - 1  # rows that predict context
        others = against(inputs, chunk) if against is not None else None
        start = 0
        for part in logits(inputs, chunk):
            # Row i predicts token i + 1; without `firsts` the last row predicts a token outside the window.
            targets = ids[start + 1 : start + 1 + len(part)]
            used = slice(max(0, skipped - start), len(targets))
            rows = log_softmax(part[used])
            other = log_softmax(next(others)[used]) if others is not None else None
            _add(total, rows, other, targets[used])
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
