"""How well passages and answers fit what they should be: the usual measures, with their uncertainty.

Of a question with gold (`questions.Gold`), from the passages found, best first:

    recall@k     share of the gold that the first k hold
    precision@k  share of the first k that hold any of it (fewer found: of k all the same, as trec_eval)
    mrr          1 / rank of the first that does, 0 where none does (averaged: mean reciprocal rank)
    ndcg@k       Σ gain / log2(1 + rank) over the first k, divided by what the best order would give
                 (Järvelin & Kekäläinen, "Cumulated gain-based evaluation of IR techniques", TOIS 2002)

Of an answer: exact match and F1 of words, normalized as in SQuAD's evaluate-v1.1.py (Rajpurkar et al., EMNLP
2016), with HotpotQA's rule for yes and no (hotpot_evaluate_v1.py; Yang et al., EMNLP 2018) and the rule of
SQuAD 2.0 for empty answers; the best over the right answers.

Intervals are percentiles of a bootstrap over questions (Efron & Tibshirani 1993, section 13.3); two runs are
compared over the same questions, by the differences (Koehn, EMNLP 2004).
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .questions import Gold, Question
from .types import Passage

RESAMPLES = 10_000
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CLOSED = ("yes", "no", "noanswer")
_BLOCK = 1 << 22  # numbers drawn at a time


# Retrieval -----------------------------------------------------------------------------------------------


def found_ranks(gold: Sequence[Gold], passages: Sequence[Passage]) -> list[int | None]:
    """For each of the gold the rank of the first passage that fits, from 1; None where none does."""
    return [next((n for n, one in enumerate(passages, 1) if item.fits(one)), None) for item in gold]


def recall_at(ranks: Sequence[int | None], k: int) -> float:
    """Share of the gold among the first k."""
    return sum(rank is not None and rank <= k for rank in ranks) / len(ranks)


def precision_at(relevant: Sequence[bool], k: int) -> float:
    """Share of k that is relevant; `relevant` by rank."""
    return sum(relevant[:k]) / k


def reciprocal_rank(relevant: Sequence[bool]) -> float:
    """1 / rank of the first that is relevant, or 0."""
    return next((1 / rank for rank, good in enumerate(relevant, 1) if good), 0.0)


def ndcg_at(gains: Sequence[float], ideal: Iterable[float], k: int) -> float:
    """Discounted cumulated gain of the first k, over that of the best order of `ideal`; gains by rank."""
    best = _dcg(sorted(ideal, reverse=True)[:k])
    return _dcg(gains[:k]) / best if best else 0.0


def _dcg(gains: Sequence[float]) -> float:
    return math.fsum(gain / math.log2(1 + rank) for rank, gain in enumerate(gains, 1))


def gains_of(gold: Sequence[Gold], ranks: Sequence[int | None], count: int) -> list[float]:
    """What each of `count` passages newly finds: the highest grade of the gold that is first found there.

    Each of the gold counts once, and each passage for one of them, so that no order is better than the ideal.
    """
    gains = [0.0] * count
    for item, rank in zip(gold, ranks, strict=True):
        if rank is not None:
            gains[rank - 1] = max(gains[rank - 1], item.grade)
    return gains


def retrieval_scores(
    gold: Sequence[Gold], passages: Sequence[Passage], ks: Sequence[int]
) -> tuple[dict[str, float], list[int | None]]:
    """All measures of one question by name, and `found_ranks`; no measures where there is no gold."""
    ranks = found_ranks(gold, passages)
    if not gold:
        return {}, ranks
    relevant = [any(item.fits(one) for item in gold) for one in passages]
    gains = gains_of(gold, ranks, len(passages))
    grades = [item.grade for item in gold]
    scores = {
        **{f"recall@{k}": recall_at(ranks, k) for k in ks},
        **{f"precision@{k}": precision_at(relevant, k) for k in ks},
        "mrr": reciprocal_rank(relevant),
        **{f"ndcg@{k}": ndcg_at(gains, grades, k) for k in ks},
    }
    return scores, ranks


# Answers -------------------------------------------------------------------------------------------------


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation, then without English articles, one space between words."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, right: Sequence[str]) -> float:
    """1 where the answer is one of the right ones, both normalized; otherwise 0."""
    return float(any(normalize_answer(answer) == normalize_answer(one) for one in right))


def token_f1(answer: str, right: Sequence[str]) -> float:
    """The best F1 of the answer's words over the right answers."""
    return max((_f1(normalize_answer(answer), normalize_answer(one)) for one in right), default=0.0)


def _f1(answer: str, right: str) -> float:
    if answer != right and (answer in _CLOSED or right in _CLOSED):
        return 0.0
    given, wanted = answer.split(), right.split()
    if not given or not wanted:
        return float(given == wanted)
    common = (Counter(given) & Counter(wanted)).total()
    return 2 * common / (len(given) + len(wanted))  # = 2pr / (p + r)


# Uncertainty ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """The mean over `count` questions, between `low` and `high` with the confidence asked for."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Difference:
    """Mean of (this run − the other) over the questions that both have, its interval, and the two-sided
    p-value of "they are equally good": twice the share of resamples on the other side of 0.
    """

    mean: float
    low: float
    high: float
    p: float
    count: int


def interval(
    values: Sequence[float], *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Percentile bootstrap of the mean of `values` (not empty); the same for the same values in order."""
    means = _resampled_means(values, resamples, seed)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(_mean(values), float(low), float(high), len(values))


def compare(
    ours: Mapping[str, float],
    theirs: Mapping[str, float],
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference | None:
    """Paired bootstrap of two runs' values by question id; None where they have no question in common."""
    shared = sorted(ours.keys() & theirs.keys())
    if not shared:
        return None
    differences = [ours[id] - theirs[id] for id in shared]
    means = _resampled_means(differences, resamples, seed)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    # One is added to both, since the sample itself is a resample: p is never 0.
    sides = [(1 + int((means <= 0).sum())) / (1 + resamples), (1 + int((means >= 0).sum())) / (1 + resamples)]
    return Difference(_mean(differences), float(low), float(high), min(1.0, 2 * min(sides)), len(shared))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _resampled_means(values: Sequence[float], resamples: int, seed: int) -> np.ndarray:
    """[resamples] float64: means of as many values, drawn with replacement."""
    given = np.asarray(values, np.float64)
    random = np.random.default_rng(seed)
    rows = max(1, _BLOCK // len(given))
    means = [
        given[random.integers(0, len(given), (min(rows, resamples - start), len(given)))].mean(1)
        for start in range(0, resamples, rows)
    ]
    return np.concatenate(means)


# Whole runs ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """One question of a run. `ranks` says where each of `gold` was found, `scores` holds its measures."""

    id: str
    question: str
    gold: tuple[str, ...]
    ranks: tuple[int | None, ...]
    scores: Mapping[str, float]
    passages: tuple[Passage, ...]
    answers: tuple[str, ...] = ()
    answer: str | None = None

    def missed(self, k: int) -> list[str]:
        """The gold that the first k passages do not hold."""
        return [name for name, rank in zip(self.gold, self.ranks, strict=True) if rank is None or rank > k]

    def as_json(self) -> dict[str, Any]:
        """What a record's file holds of it; texts of passages are in the store and not repeated."""
        return {
            "id": self.id,
            "question": self.question,
            "gold": [{"name": name, "rank": rank} for name, rank in zip(self.gold, self.ranks, strict=True)],
            "scores": dict(self.scores),
            "passages": [
                {"chunk": p.chunk, "document": p.document, "title": p.title, "score": p.score}
                for p in self.passages
            ],
            **({"answers": list(self.answers)} if self.answers else {}),
            **({"answer": self.answer} if self.answer is not None else {}),
        }


@dataclass(frozen=True)
class Evaluation:
    """A run's records, in the questions' order."""

    records: list[Record] = field(default_factory=list[Record])

    def values(self) -> dict[str, dict[str, float]]:
        """Values by measure and question id; a question has those that it has gold, or answers, for."""
        found: dict[str, dict[str, float]] = {}
        for record in self.records:
            for name, value in record.scores.items():
                found.setdefault(name, {})[record.id] = value
        return found

    def intervals(self, *, level: float = 0.95, seed: int = 0) -> dict[str, Interval]:
        """The mean of each measure, with its interval."""
        return {
            name: interval(list(values.values()), level=level, seed=seed)
            for name, values in self.values().items()
        }


def evaluate(
    questions: Sequence[Question],
    search: Callable[[Question], Sequence[Passage]],
    *,
    ks: Sequence[int],
    answer: Callable[[Question, Sequence[Passage]], str] | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> Evaluation:
    """Ask each question, and measure what is found; with `answer`, what is answered too."""
    records: list[Record] = []
    for number, question in enumerate(questions):
        if progress is not None:
            progress("asking", number / len(questions))
        passages = tuple(search(question))
        scores, ranks = retrieval_scores(question.gold, passages, ks)
        said = answer(question, passages) if answer is not None and question.answers else None
        if said is not None:
            scores["exact match"] = exact_match(said, question.answers)
            scores["f1"] = token_f1(said, question.answers)
        gold = tuple(map(str, question.gold))
        record = Record(
            question.id, question.question, gold, tuple(ranks), scores, passages, question.answers, said
        )
        records.append(record)
    return Evaluation(records)
