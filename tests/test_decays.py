"""Linear attention whose weights decay with the distance: which tables are read, and which are left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from llmc.ir.core import Graph
from llmc.ir.errors import CompileError, UnsupportedError
from llmc.ir.interpreter import run
from llmc.ir.ops.math import MatMul, Mul
from llmc.ir.ops.shape import Slice, Transpose
from llmc.ir.types import TensorType, sym
from llmc.ir.weights import ArrayTensor, LongerTensor
from llmc.passes.base import PassContext
from llmc.passes.fuse import decays as decays_module
from llmc.passes.fuse.attention import FuseAttention
from llmc.passes.fuse.decays import rates
from llmc.passes.manager import run_passes

from .graphs import notes, opnames, worst


def decays(heads: int = 3, n: int = 12, rate: float = 0.3) -> np.ndarray[Any, Any]:
    distance = np.arange(n)[:, None] - np.arange(n)[None]
    a = -rate * (1 + np.arange(heads))[:, None, None]
    return np.where(distance >= 0, np.exp(a * np.maximum(distance, 0)), 0).astype(np.float32)


def attention(table: Any) -> Graph:
    """Linear attention over [1, 3, T, 4], its products of queries and keys multiplied by a table."""
    graph = Graph()
    q, k, v = (graph.add_input(n, TensorType("float32", (1, 3, sym("T"), 4))) for n in "qkv")

    def put(op: Any) -> Any:
        graph.append(op)
        return op.result

    part = graph.add_weight("table", table)
    for axis in (-2, -1):
        part = put(Slice(part, axis=axis, start=0, stop=sym("T")))
    scores = put(MatMul(q, put(Transpose(k, perm=(-1, -2)))))
    graph.outputs = [put(MatMul(put(Mul(scores, part)), v))]
    graph.output_names = ["y"]
    return graph


@pytest.mark.parametrize("rate", [0.3, 0.0, 2.0, 1e-4, 9.0, -0.1])
def test_attention_that_decays_becomes_a_recurrence(rate: float) -> None:
    """Within 2e-5 of the largest value; over more tokens than there is a table for, too."""
    table = decays(rate=rate)
    found = rates(table)
    assert found is not None and np.allclose(found, -rate * (1 + np.arange(3)), rtol=1e-5, atol=1e-6)
    torch.manual_seed(0)
    for length, stored in ((7, ArrayTensor(table[None])), (30, None)):
        size = 1 << 20
        stored = stored or LongerTensor(ArrayTensor(table[None]), (1, 3, size, size))
        graph, _ = run_passes(attention(stored), [FuseAttention()], PassContext())
        assert "ssd_scan" in opnames(graph) and "matmul" not in opnames(graph)
        given = {name: torch.randn(1, 3, length, 4) for name in "qkv"}
        weights = torch.from_numpy(decays(n=length, rate=rate))
        wanted = (given["q"] @ given["k"].transpose(-1, -2) * weights) @ given["v"]
        assert worst(run(graph, given)[0], wanted) <= 2e-5


def test_a_table_is_compared_with_the_formula_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[int, ...]] = []

    def counted(table: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | None:
        tried.append(table.shape)
        return rates(table)

    monkeypatch.setattr(decays_module, "rates", counted)
    graph, _ = run_passes(attention(ArrayTensor(decays()[None])), [FuseAttention()], PassContext())
    assert "ssd_scan" in opnames(graph) and tried == [(3, 12, 12)]


def _two_rates(table: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (table + decays(rate=0.5)) / 2


CHANGED: dict[str, Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]] = {
    "seen from behind": lambda t: t.swapaxes(1, 2),
    "no decay": lambda t: np.ones_like(t),
    "of two rates": _two_rates,
    "twice as much": lambda t: t * 2,
    "not a number": lambda t: t * np.nan,
    "one element": lambda t: t + 1e-3 * (np.arange(12)[:, None] == 11) * (np.arange(12) == 5),
}


@pytest.mark.parametrize("name", CHANGED)
def test_tables_that_hold_something_else_are_left_alone(name: str) -> None:
    table = CHANGED[name](decays()).astype(np.float32)
    assert rates(table) is None
    graph, records = run_passes(attention(ArrayTensor(table[None])), [FuseAttention()], PassContext())
    assert "ssd_scan" not in opnames(graph)
    assert any("the table table holds no decays of one rate a head" in note for note in notes(records))
    longer = LongerTensor(ArrayTensor(table[None]), (1, 3, 64, 64))
    with pytest.raises(UnsupportedError, match="goes over blocks of tokens, and what it does within one is"):
        run_passes(attention(longer), [FuseAttention()], PassContext())


def test_a_longer_table_has_no_values() -> None:
    with pytest.raises(CompileError, match=r"is read beyond \[2\]"):
        LongerTensor(ArrayTensor(np.ones(2, np.float32)), (9,)).read()
