"""Perplexity and KL against sums written out, on an executor whose logits are known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from llmc.cli.scoring import WindowRunner, cut, log_softmax, score
from llmc.runtime.executor import StepInputs

VOCAB = 11


class Markov:
    """Logits are a row of a table chosen by the token, so that each is known whatever the chunking."""

    page_size = 4
    vocab_size = VOCAB
    kv_bytes_per_page = 0
    batch_invariant = True

    def __init__(self, seed: int) -> None:
        self.table = np.random.default_rng(seed).normal(size=(VOCAB, VOCAB)).astype(np.float32) * 3
        self.pages = 0
        self.contexts: list[int] = []

    def allocate_kv(self, num_pages: int) -> None:
        self.pages = num_pages

    def copy_pages(self, src: Sequence[int], dst: Sequence[int]) -> None:
        raise AssertionError("scoring copies no pages")

    def step(self, inputs: StepInputs) -> np.ndarray:
        assert inputs.slot_mapping.max() < self.pages * self.page_size
        np.testing.assert_array_equal(inputs.slot_mapping, inputs.positions)
        assert inputs.positions[-1] + 1 == inputs.context_len[0]
        self.contexts.append(int(inputs.context_len[0]))
        return self.table[inputs.token_ids][inputs.output_index]

    def run(self, inputs):  # type: ignore[no-untyped-def]
        raise AssertionError("not a function")


def test_cut_begins_every_window_with_bos_and_drops_the_rest() -> None:
    windows = cut(range(10, 20), window=4, count=None, bos=1)
    assert [w.tolist() for w in windows] == [[1, 10, 11, 12], [1, 13, 14, 15], [1, 16, 17, 18]]
    assert [w.tolist() for w in cut(range(10), window=4, count=None, bos=None)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
    ]
    assert len(cut(range(10), window=2, count=3, bos=None)) == 3
    assert cut(range(3), window=4, count=None, bos=None) == []


@pytest.mark.parametrize("length", [2, 16, 17, 40])
def test_score_equals_the_sums_written_out(length: int) -> None:
    rng = np.random.default_rng(length)
    windows = [rng.integers(0, VOCAB, length).astype(np.int32) for _ in range(3)]
    mine, other = Markov(0), Markov(1)
    found = score(windows, WindowRunner(mine, length), WindowRunner(other, length)).result(against=True)
    nll = kl = agree = 0.0
    for ids in windows:
        for now, following in itertools.pairwise(ids):
            p, q = (np.exp(row.astype(np.float64)) for row in (mine.table[now], other.table[now]))
            p, q = p / p.sum(), q / q.sum()
            nll -= math.log(p[following])
            kl += float((q * np.log(q / p)).sum())
            agree += p.argmax() == q.argmax()
    count = 3 * (length - 1)
    assert found["tokens"] == count
    assert found["ppl"] == pytest.approx(math.exp(nll / count), rel=1e-5)
    assert found["kl"] == pytest.approx(kl / count, rel=1e-4)
    assert found["top1_agreement"] == pytest.approx(agree / count)


def test_an_artifact_against_itself_is_no_distance() -> None:
    ids = [np.arange(9, dtype=np.int32)]
    found = score(ids, WindowRunner(Markov(2), 9), WindowRunner(Markov(2), 9)).result(against=True)
    assert found["kl"] == 0
    assert found["top1_agreement"] == 1
    assert found["ppl"] == found["ppl_against"]


def test_a_window_is_run_in_chunks() -> None:
    executor = Markov(3)
    runner = WindowRunner(executor, 600)
    list(runner.logits(np.zeros(600, np.int32)))
    assert executor.contexts == [256, 512, 600]


def test_log_softmax_survives_large_logits() -> None:
    rows = log_softmax(np.array([[1e4, 1e4 - 1, -1e4]], np.float32))
    assert np.isfinite(rows).all()
    assert np.exp(rows).sum() == pytest.approx(1, rel=1e-6)
