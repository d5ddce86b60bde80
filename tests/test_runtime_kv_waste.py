"""The benchmark of wasted cache memory counts what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.kv_waste import Arrival, parse, play, read_trace, scale


def test_lengths_are_scaled_by_one_factor_to_the_longest():
    arrivals = [Arrival(0.0, 300, 100), Arrival(1.0, 1, 1)]
    scaled, factor = scale(arrivals, 100)
    assert factor == 0.25
    assert [(a.prompt, a.answer) for a in scaled] == [(75, 25), (1, 1)]
    assert scale(arrivals, 1000) == (arrivals, 1.0)


def test_one_request_wastes_the_end_of_its_last_page():
    args = parse(["--max-sequences", "2", "--peak-floor", "1"])
    found = play([Arrival(0.0, 15, 3)], args, 64)
    # After the steps the cache holds 15, 16 and 17 tokens; the last token is never written.
    assert found["steps"] == 2
    assert found["tokens_computed"] == 17
    assert found["mean_waste"] == pytest.approx((1 / 16 + 0) / 2, abs=1e-5)


def test_the_trace_is_read_with_its_times(shared_data: Path):
    arrivals = read_trace(shared_data / "serving_traces" / "AzureLLMInferenceTrace_conv.csv", 4)
    assert [(a.prompt, a.answer) for a in arrivals] == [(374, 44), (396, 109), (879, 55), (91, 16)]
    assert arrivals[0].seconds == 0
    assert arrivals[1].seconds == pytest.approx(4.314579, abs=1e-6)
