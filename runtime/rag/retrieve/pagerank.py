"""Personalised PageRank over passages and entities.

    x = (1 − d)·s + d·P·x        (Page et al. 1998; with seeds s as in Haveliwala's topic-sensitive
    PageRank, 2002)

P holds in column j the shares in which node j hands its weight on; the walk returns to the seeds s with
probability 1 − d at each step. The graph's edges go both ways, so P is a symmetric matrix with its columns
divided, its eigenvalues are real and lie in −1 … 1, and Chebyshev's semi-iteration (Golub and Varga 1961)
takes half as many products as the power method for the same error: 1 / cosh(k·arcosh(1/d)) after k of them,
1% after six at d = 0.7, where 0.7^12 is 1.4%. Then the order of the first hundred passages no longer changes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

DAMPING = 0.7
STEPS = 6


def personalised_pagerank(
    matrix: Any, seeds: np.ndarray, *, damping: float = DAMPING, steps: int = STEPS, restart: bool = False
) -> np.ndarray:
    """Weights [n] of all nodes, none below 0, in the dtype of `seeds` [n], after so many products with
    `matrix` [n, n].

    A node without edges loses its weight. igraph and networkx give it back to the seeds, which multiplies all
    weights by the same number: with `restart` they are theirs, and sum up to 1.
    """
    given = (1 - damping) * seeds
    before, weights = np.zeros_like(given), given
    omega = 2.0
    for _ in range(steps):
        omega = 1 / (1 - damping**2 * omega / 4)
        after = matrix @ weights
        after *= damping
        after += given
        after -= before
        after *= omega
        after += before
        before, weights = weights, after
    weights = np.maximum(weights, 0)  # on the way to a small one the polynomials may pass below
    return weights / weights.sum() if restart else weights
