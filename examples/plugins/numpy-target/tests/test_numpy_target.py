"""The target through llmc's own conformance checks, and what it refuses."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from llmc.plugins import Executor, InputError, UnsupportedError
from llmc.plugins.testing import check_target, compile_tiny, paged, tiny_model
from llmc_numpy_target.executor import open_target
from llmc_numpy_target.target import NumpyCpu


@pytest.mark.parametrize("rows", [256, 3])
def test_every_logit_is_what_the_graph_means(rows: int) -> None:
    report = check_target(NumpyCpu(rows=rows), open_target, tolerance=1e-5)
    assert len(report.errors) == 16 and report.worst < 1e-5


def test_the_cache_counts_its_bytes(tmp_path: Path) -> None:
    executor: Executor = open_target(
        compile_tiny(NumpyCpu(), tiny_model(layers=3), tmp_path / "m.llmc"), isa=None, threads=None
    )
    assert (
        executor.kv_bytes_per_page == 3 * 2 * 16 * 2 * 16 * 4
    )  # layers, K and V, tokens, heads, width, bytes
    assert executor.page_size == 16 and executor.vocab_size == 96
    with pytest.raises(InputError, match="this artifact is a language model"):
        executor.run({"x": np.zeros(1, np.float32)})


def test_what_it_has_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="numpy-cpu: rows=0"):
        NumpyCpu(rows=0)
    graph = paged(tiny_model(layers=1), kv_dtype="int8")
    with pytest.raises(UnsupportedError, match="numpy-cpu has no cache of int8"):
        NumpyCpu().compile(graph, writer=None, progress=lambda what, share: None)
    assert [field.name for field in dataclasses.fields(NumpyCpu)] == ["rows"]
