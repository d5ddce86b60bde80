"""What `benchmarks/long_context.py` computes beside the models: the fit of a prompt's steps, prompts with a
key, the picture.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.long_context import CHUNK, draw, fit, passkey_prompt

from .models import tiny_tokenizer


def test_the_fit_finds_both_parts() -> None:
    """Steps of 2 ms a token, and 30 ns a pair of tokens; the last step is cut and left out."""
    steps = [CHUNK * (2e-3 + 30e-9 * CHUNK * i) for i in range(64)]
    found = fit([*steps, 0.1])
    assert found["linear_us_per_token"] == pytest.approx(2000)
    assert found["quadratic_ns_per_pair"] == pytest.approx(30)
    assert found["r2"] == pytest.approx(1)
    noisy = np.random.default_rng(0).normal(1.0, 0.3, 65).tolist()
    assert fit(noisy)["r2"] < 0.2


class Tokens:
    """The tiny tokenizer, as the runtime's."""

    def __init__(self) -> None:
        self._tokenizer = tiny_tokenizer()

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids

    def decode(self, ids: Any) -> str:
        return self._tokenizer.decode(list(ids))


@pytest.mark.parametrize("depth", [0.1, 0.5, 0.9])
def test_a_prompt_tells_its_key_once_at_its_depth(depth: float) -> None:
    tokenizer = Tokens()
    ids = passkey_prompt(tokenizer, 4000, depth, 48213)
    assert 3800 < len(ids) <= 4000
    text = tokenizer.decode(ids)
    assert text.count("The pass key is 48213.") == 1 and text.endswith("The pass key is")
    assert text.index("48213") / len(text) == pytest.approx(depth, abs=0.05)


def test_the_picture_has_a_panel_for_each_part(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    record = {
        "ppl": {"text": "t", "bucket": 1024, "starts": [0, 1024], "kinds": {"none": {"ppl": [9.0, 8.0]}}},
        "passkey": {"lengths": [1024, 2048], "kinds": {"yarn:4": {"1024": 1.0, "2048": 0.4}}},
        "prefill": {"rows": [{"artifact": "a.llmc", "seconds": [0.1, 0.2, 0.1], "rss_peak": 10**9}]},
    }
    draw(record, tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert all(word in text for word in ("perplexity", "passkey", "prefill", "yarn:4", "RSS 1.00 GB"))
    draw(record, tmp_path / "b.svg")
    assert (tmp_path / "b.svg").read_bytes() == (tmp_path / "a.svg").read_bytes()
