"""The kernel that turns logits into probabilities, against float64."""

from __future__ import annotations

import numpy as np
import pytest
from llmc.codegen.tvm import kernels
from llmc.codegen.tvm.kernels.layout import SAMPLING_BLOCK as BLOCK

from .kernel_harness import call, normal, vector_levels


def sampling(isa: str, logits: np.ndarray, scale: np.ndarray) -> list[np.ndarray]:
    """(best, sums, tops, what stands in the place of the logits)."""
    rows, vocab = logits.shape
    blocks = np.full((rows, vocab // BLOCK), np.nan, np.float32)
    best = np.full(rows, -7, np.int32)
    return call(kernels.make_sampling, isa, {}, scale, best, blocks, blocks.copy(), logits, outputs=5)[1:]


@vector_levels
@pytest.mark.parametrize("vocab", [1, 17, 255, 256, 300, 5003, 32 * BLOCK, 33 * BLOCK + 5])
def test_probabilities_sums_and_maxima(isa: str, vocab: int) -> None:
    logits = 4 * normal(4, vocab, seed=vocab)
    logits[1] = np.round(logits[1])  # several maxima
    logits[2, : vocab // 2] = -np.inf
    logits[3] -= 300 * (np.arange(vocab) % 3)  # far out of reach
    scale = np.array([1.4427, 0.0, 0.5, 2.0], np.float32)
    best, sums, tops, weight = sampling(isa, logits.copy(), scale)
    assert best.tolist() == logits.argmax(axis=1).tolist()
    assert np.array_equal(weight[1], logits[1]), "a greedy row stays as it is"
    whole = vocab // BLOCK * BLOCK
    for row in (0, 2, 3):
        power = (logits[row] - logits[row].max()).astype(np.float64) * scale[row]
        expected = np.where(power < -126, 0, np.exp2(power))
        np.testing.assert_allclose(weight[row], expected, rtol=3e-5, atol=2.0**-124)
        assert (weight[row][power < -126] == 0).all(), "a token out of reach has no share"
        in_blocks = weight[row, :whole].reshape(-1, BLOCK)
        np.testing.assert_allclose(sums[row], in_blocks.sum(axis=1, dtype=np.float64), rtol=1e-6)
        assert np.array_equal(tops[row], in_blocks.max(axis=1))


@vector_levels
def test_a_broken_row_is_found_and_left_alone(isa: str) -> None:
    logits = normal(6, 700)
    logits[0, 3], logits[1, 699], logits[2, 600] = np.nan, np.inf, np.nan
    logits[3] = -np.inf
    logits[4, 5:] = -np.inf
    best, _, _, after = sampling(isa, logits.copy(), np.ones(6, np.float32))
    assert best.tolist() == [-1, -1, -1, -1, logits[4].argmax(), logits[5].argmax()]
    assert np.array_equal(after[:4], logits[:4], equal_nan=True)
    assert after[4, 5:].max() == 0


@vector_levels
def test_a_row_does_not_depend_on_its_batch(isa: str) -> None:
    logits, scale = 3 * normal(5, 9000), np.full(5, 0.7, np.float32)
    together = sampling(isa, logits.copy(), scale)
    for row in range(5):
        alone = sampling(isa, logits[row : row + 1].copy(), scale[:1])
        assert all(np.array_equal(a[0], b[row]) for a, b in zip(alone, together, strict=True))
