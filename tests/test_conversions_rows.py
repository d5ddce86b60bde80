"""Tensors that transformers merges of several: which rows of these are read for some of the result's."""

from __future__ import annotations

from typing import Any

import numpy as np
from llmc.frontend.conversions import _leaves_first
from llmc.frontend.weights import MergedTensor
from llmc.ir.weights import ArrayTensor
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter


class Counting(ArrayTensor):
    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        super().__init__(array)
        self.spans: list[tuple[int, int | None]] = []

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray[Any, Any]:
        self.spans.append((start, stop))
        return super().read(start, stop)


def test_stacks_that_are_joined_are_read_by_rows() -> None:
    """Experts that are stacked already, gates and ups apart."""
    rng = np.random.default_rng(0)
    gate, up = (Counting(rng.standard_normal((6, 4, 8)).astype(np.float32)) for _ in range(2))
    whole = np.concatenate([gate.read(), up.read()], axis=1)
    gate.spans.clear()
    merged = MergedTensor(
        "gate_up",
        (6, 8, 8),
        lambda parts: np.concatenate([parts["gate"][0], parts["up"][0]], axis=1),
        {"gate": [gate], "up": [up]},
        stacks_rows=False,
        leaves_first=True,
    )
    np.testing.assert_array_equal(merged.read(2, 4), whole[2:4])
    assert gate.spans == [(2, 4)]
    np.testing.assert_array_equal(merged.read(), whole)


def test_which_conversions_leave_the_first_axis() -> None:
    def of(*operations: Any) -> bool:
        return _leaves_first(WeightConverter(["gate", "up"], "both", operations=list(operations)))

    assert of(Concatenate(dim=1))
    assert not of(Concatenate(dim=0))
    assert not of(MergeModulelist(dim=0), Concatenate(dim=1))
