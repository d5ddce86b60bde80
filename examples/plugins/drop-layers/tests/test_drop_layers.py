"""The passes on a small model: against the same model made with fewer layers, and what they refuse."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from llmc.plugins import InputError, UnsupportedError
from llmc.plugins.testing import check_pass, logits_of, tiny_model
from llmc_drop_layers import DropIdleLayers, DropLayers
from llmc_drop_layers.layers import find_layers

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]


def without(*layers: int, of: int = 4):
    """The oracle: a model whose named layers add nothing, since their last projections are zero."""
    graph = tiny_model(layers=of)
    for layer in layers:
        for part in ("o", "down"):
            weight = graph.weights[f"layers.{layer}.{part}"]
            weight.weight._array[:] = 0.0
    return graph


@pytest.mark.parametrize(("first", "count"), [(1, 1), (0, 1), (3, 1), (1, 2), (2, 2)])
def test_what_is_left_computes_as_if_the_layers_added_nothing(first: int, count: int) -> None:
    result = check_pass(DropLayers(first=first, count=count), tiny_model(layers=4))
    assert result.changed and result.notes == [
        f"left out layers {', '.join(map(str, range(first, first + count)))} of 4"
    ]
    wanted = logits_of(without(*range(first, first + count)), TOKENS)
    np.testing.assert_allclose(
        logits_of(result.graph, TOKENS), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max()
    )
    held = {name.split(".")[1] for name in result.graph.weights if name.startswith("layers.")}
    assert held == {str(i) for i in range(4)} - {str(i) for i in range(first, first + count)}


def test_the_idle_layer_is_found() -> None:
    graph = without(2)  # of influence 0
    result = check_pass(DropIdleLayers(count=1), graph)
    assert result.notes == ["left out layers 2 (0.000) of 4, by their influence"]
    np.testing.assert_allclose(logits_of(result.graph, TOKENS), logits_of(graph, TOKENS), rtol=0, atol=1e-4)


def test_layers_are_what_lies_between_two_cuts() -> None:
    layers = find_layers(tiny_model(layers=3))
    assert len(layers) == 3
    assert [a.after is b.before for a, b in pairwise(layers)] == [True, True]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DropLayers(first=-1), "first=-1, count=1"),
        (lambda: DropLayers(count=0), "first=1, count=0"),
        (lambda: DropIdleLayers(count=0), "count=0"),
    ],
)
def test_impossible_options_are_refused(make, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_too_many_layers_are_refused() -> None:
    with pytest.raises(InputError, match="2 layers cannot be left out of 3"):
        check_pass(DropLayers(first=2, count=2), tiny_model(layers=3))
    with pytest.raises(InputError, match="2 layers cannot be left out of 3"):
        check_pass(DropIdleLayers(count=2), tiny_model(layers=3))
    with pytest.raises(UnsupportedError, match="has fewer than two layers"):
        check_pass(DropLayers(first=0), tiny_model(layers=1))
