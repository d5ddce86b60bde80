"""Perplexity and KL against sums written out, on an executor whose logits are known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from llmc.cli.scoring import cut, lengths, log_softmax, roll, score

VOCAB = 11


class Markov:
    """Logits are a row of a table chosen by the token, so that each is known whatever the chunking."""

    def __init__(self, seed: int, vocab: int = VOCAB) -> None:
        self.table = np.random.default_rng(seed).normal(size=(vocab, vocab)).astype(np.float32) * 3
        self.chunks: list[int] = []

    def __call__(self, ids: Sequence[int], chunk: int) -> Iterator[np.ndarray]:
        for start in range(0, len(ids), chunk):
            part = ids[start : start + chunk]
            self.chunks.append(len(part))
            yield self.table[list(part)]


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
    found = score(windows, mine, other, vocab_size=VOCAB).result(against=True)
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


@pytest.mark.parametrize(("length", "window"), [(3, 8), (8, 8), (9, 8), (16, 8), (21, 8), (5, 1)])
def test_rolling_windows_predict_every_token_once(length: int, window: int) -> None:
    ids = list(range(10, 10 + length))
    windows, firsts = roll(ids, window=window, prefix=1)
    whole = [1, *ids]
    predicted = [token for one, first in zip(windows, firsts, strict=True) for token in one[first:].tolist()]
    assert predicted == ids
    for one, first in zip(windows, firsts, strict=True):
        assert first >= 1
        assert len(one) <= window + 1
        start = whole.index(int(one[0]))
        assert one.tolist() == whole[start : start + len(one)], "a piece of the text"
    if length > window:
        assert len(windows[-1]) == window + 1, "the last one reaches back as far as the others"


def test_rolling_perplexities_spread_the_whole_likelihood() -> None:
    text = "Wide river, slow  boats.\n"
    ids = np.random.default_rng(4).integers(0, VOCAB, 21).tolist()
    model = Markov(5)
    windows, firsts = roll(ids, window=8, prefix=0)
    total = score(windows, model, Markov(6), vocab_size=VOCAB, firsts=firsts)
    assert sum(model.chunks) == 8 * 3, "the last token of a window is not computed"
    nll = 0.0
    for now, following in itertools.pairwise([0, *ids]):
        row = model.table[now].astype(np.float64)
        nll += math.log(np.exp(row).sum()) - row[following]
    assert total.predictions == 21
    assert total.nll == pytest.approx(nll, rel=1e-5)
    assert total.kl > 0
    words, octets = lengths(text)
    assert (words, octets) == (5, 25), "white space at the end makes an empty word, as re.split counts"
    found = total.by_length(words, octets)
    assert found["word_perplexity"] == pytest.approx(math.exp(nll / 5), rel=1e-5)
    assert found["byte_perplexity"] == pytest.approx(2 ** found["bits_per_byte"], rel=1e-9)


def test_an_artifact_against_itself_is_no_distance() -> None:
    ids = [np.arange(9, dtype=np.int32)]
    found = score(ids, Markov(2), Markov(2), vocab_size=VOCAB).result(against=True)
    assert found["kl"] == 0
    assert found["top1_agreement"] == 1
    assert found["ppl"] == found["ppl_against"]


def test_a_window_is_run_in_chunks() -> None:
    model = Markov(3)
    score([np.zeros(600, np.int32)], model, vocab_size=VOCAB)
    assert model.chunks == [256, 256, 88]
    score([np.zeros(40, np.int32)], model, vocab_size=1 << 20)
    assert model.chunks[3:] == [16, 16, 8], "a large vocabulary makes small chunks"


def test_log_softmax_survives_large_logits() -> None:
    rows = log_softmax(np.array([[1e4, 1e4 - 1, -1e4]], np.float32))
    assert np.isfinite(rows).all()
    assert np.exp(rows).sum() == pytest.approx(1, rel=1e-6)
