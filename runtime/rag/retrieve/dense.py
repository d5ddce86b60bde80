"""Cosines of all passages with a question's vector.

Up to some millions of elements one product of float32. Beyond, vectors rounded to int8 (a scale for each
passage) are multiplied a block at a time, so that a block stays in the processor's cache; the error of a
cosine is about 0.002, and whoever needs the best ones exactly takes their float16 vectors
(`Snapshot.vectors_of`).
"""

from __future__ import annotations

import numpy as np

from ..snapshot import Snapshot

_BLOCK = 256


def cosines(snapshot: Snapshot, vector: np.ndarray) -> np.ndarray:
    """[n] float32."""
    if snapshot.exact is not None:
        return snapshot.exact @ vector
    small = snapshot.arrays["small_vectors"]
    scores = np.empty(len(small), np.float32)
    wide = np.empty((_BLOCK, small.shape[1]), np.float32)
    for at in range(0, len(small), _BLOCK):
        block = small[at : at + _BLOCK]
        np.copyto(wide[: len(block)], block, casting="unsafe")
        scores[at : at + _BLOCK] = wide[: len(block)] @ vector
    scores *= snapshot.arrays["vector_scales"]
    return scores
