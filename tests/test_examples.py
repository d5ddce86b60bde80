"""The examples do what they say."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

from examples import attention_module


def test_the_attention_module_has_the_shapes_it_says() -> None:
    module, hidden = attention_module.example()
    output, weights = module(hidden)
    assert tuple(output.shape) == (2, 5, 64)
    assert tuple(weights.shape) == (2, 8, 5, 5)
    assert weights.sum(-1).sub(1).abs().max() < 1e-6


@pytest.mark.parametrize("target", ["tvm-cpu", "onnx-cpu"])
def test_the_attention_module_equals_torch(target: str, tmp_path: Path) -> None:
    output, weights = attention_module.differences(tmp_path, target)
    assert output <= 1e-5
    assert weights <= 1e-5
