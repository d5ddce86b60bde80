"""Canonicalisation: constants, equal ops, shapes, weights computed when read; and the pass manager."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llmc.ir.core import Graph, Value
from llmc.ir.errors import CompileError, VerifyError
from llmc.ir.interpreter import run
from llmc.ir.ops import math as m
from llmc.ir.ops.nn import LayerNorm, Linear, RmsNorm
from llmc.ir.ops.shape import Arange, Concat, DimValue, Expand, Full, Gather, Index, Reshape, Slice, Transpose
from llmc.ir.parser import parse
from llmc.ir.printer import equal, print_graph
from llmc.ir.rewriter import constant
from llmc.ir.types import TensorType, sym
from llmc.ir.weights import ArrayTensor, ShapeOnlyTensor
from llmc.passes.base import Pass, PassContext, PassResult
from llmc.passes.canonicalize.cse import DropDead, MergeEqual
from llmc.passes.canonicalize.fold import FoldConstants
from llmc.passes.canonicalize.shapes import NormalizeShapes
from llmc.passes.derived import ComputedTensor, ConcatRows, SliceRows, TransposedTensor
from llmc.passes.manager import run_passes
from llmc.passes.stage import MarkStage

from .graphs import opnames

T = sym("T")


class Build:
    """A graph with one input x, built op by op."""

    def __init__(self, *shape: Any, dtype: str = "float32") -> None:
        self.graph = Graph("g", "fused")
        self.x = self.graph.add_input("x", TensorType(dtype, shape or (4, 6)))
        self.rng = np.random.default_rng(0)

    def __call__(self, op: Any) -> Value:
        return self.graph.append(op).result

    def weight(self, name: str, *shape: int, values: Any = None) -> Value:
        data = self.rng.normal(size=shape).astype(np.float32) if values is None else np.asarray(values)
        return self.graph.add_weight(name, ArrayTensor(data, name))

    def full(self, value: Any, dtype: str = "float32", shape: Any = ()) -> Value:
        return self(Full(value=value, dtype=dtype, shape=shape))

    def result(self, value: Value, step: Pass, *, tolerance: float = 1e-6) -> Graph:
        """The graph after a pass, its text read back and its numbers compared."""
        self.graph.outputs, self.graph.output_names = [value], ["y"]
        before = self.graph.clone()
        after, _ = run_passes(self.graph, [step], PassContext())
        assert equal(parse(print_graph(after)), after)
        shape = [5 if not isinstance(d, int) else d for d in self.x.shape]
        x = torch.randn(shape) if self.x.dtype == "float32" else torch.randint(0, 4, shape)
        (wanted,), (got,) = run(before, {"x": x}), run(after, {"x": x})
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted, atol=tolerance, rtol=tolerance, equal_nan=True)
        return after


FOLD, SHAPES = FoldConstants(), NormalizeShapes()

# name → (function of Build, the ops that are left)
FOLDS: dict[str, tuple[Any, list[str]]] = {
    "numbers": (lambda b: b(m.Add(b.x, b(m.Mul(b.full(2.0), b.full(3.0))))), ["full", "add"]),
    "times one": (lambda b: b(m.Mul(b.full(1.0), b.x)), []),
    "plus zero": (lambda b: b(m.Add(b.x, b.full(0.0))), []),
    "minus zero, divided by one": (lambda b: b(m.Div(b(m.Sub(b.x, b.full(0.0))), b.full(1.0))), []),
    "product of zeros": (
        lambda b: b(m.Add(b(m.MatMul(b.x, b.full(0.0, shape=(6, 6)))), b.x)),
        [],
    ),
    "product of ones": (lambda b: b(m.MatMul(b.x, b.full(1.0, shape=(6, 2)))), ["full", "matmul"]),
    "zero minus": (lambda b: b(m.Sub(b.full(0.0), b.x)), ["full", "sub"]),
    "one divided": (lambda b: b(m.Div(b.full(1.0), b.x)), ["full", "div"]),
    "one that widens": (lambda b: b(m.Mul(b.x, b.full(1.0, shape=(3, 4, 6)))), ["full", "mul"]),
    "square": (lambda b: b(m.Pow(b.x, b.full(2.0))), ["mul"]),
    "cube": (lambda b: b(m.Pow(b.x, b.full(3.0))), ["mul", "mul"]),
    "power of one": (lambda b: b(m.Pow(b.x, b.full(1.0))), []),
    "root": (lambda b: b(m.Pow(b(m.Abs(b.x)), b.full(0.5))), ["abs", "sqrt"]),
    "inverse root": (lambda b: b(m.Reciprocal(b(m.Sqrt(b(m.Abs(b.x)))))), ["abs", "rsqrt"]),
    "other power": (lambda b: b(m.Pow(b(m.Abs(b.x)), b.full(1.7))), ["abs", "full", "pow"]),
    "silu": (lambda b: b(m.Mul(b(m.Sigmoid(b.x)), b.x)), ["silu"]),
    "no silu": (lambda b: b(m.Mul(b(m.Sigmoid(b(m.Neg(b.x)))), b.x)), ["neg", "sigmoid", "mul"]),
    "same cast and shape": (lambda b: b(Reshape(b(m.Cast(b.x, dtype="float32")), shape=(4, 6))), []),
    "moved numbers": (
        lambda b: b(m.Add(b.x, b(Expand(b(Reshape(b.full(2.0, shape=(3, 2)), shape=(1, 6))), shape=(4, 6))))),
        ["full", "add"],
    ),
    "slice of counting": (
        lambda b: b(
            m.Add(
                b.x,
                b(m.Cast(b(Slice(b(Arange(length=20)), axis=-1, start=2, stop=14, step=2)), dtype="float32")),
            )
        ),
        ["arange", "cast", "add"],
    ),
    "slice of everything": (lambda b: b(Slice(b.x, axis=-1, start=0, stop=6)), []),
    "concat with nothing": (lambda b: b(Concat([b.x, b(Slice(b.x, axis=-1, start=3, stop=3))], axis=-1)), []),
    "index of a number": (
        lambda b: b(m.Add(b.x, b(Index(b.full(2.0, shape=(9,)), [b(Arange(length=6))])))),
        ["full", "add"],
    ),
    "gather of a number": (
        lambda b: b(m.Add(b.x, b(Gather(b.full(2.0, shape=(6,)), b(Arange(length=6)))))),
        ["full", "add"],
    ),
    "counted up": (
        lambda b: b(m.Add(b.x, b(m.CumSum(b.full(2.0, shape=(4, 6)))))),
        ["arange", "cast", "reshape", "expand", "add"],
    ),
    "half as an integer": (
        lambda b: b(m.Add(b.x, b(m.Cast(b(m.Cast(b.full(0.5), dtype="int64")), dtype="float32")))),
        [],
    ),
    "a power beyond float64": (
        lambda b: b(m.Minimum(b.x, b(m.Pow(b.full(1e30), b.full(20.0))))),
        ["full", "full", "pow", "minimum"],
    ),
    "the root of a negative number": (
        lambda b: b(m.Mul(b.x, b(m.Pow(b.full(-2.0), b.full(0.25))))),
        ["full", "full", "pow", "mul"],
    ),
}


@pytest.mark.parametrize("name", FOLDS)
def test_folding(name: str) -> None:
    make, left = FOLDS[name]
    b = Build()
    after = b.result(make(b), FOLD)
    assert sorted(opnames(after)) == sorted(left)


def test_a_cast_changes_the_number_that_a_constant_has() -> None:
    b = Build()
    half = b.full(0.5)
    assert constant(half) == 0.5
    assert constant(b(m.Cast(half, dtype="int64"))) == 0.0
    assert constant(b(m.Cast(half, dtype="bool"))) == 1.0
    assert constant(b(m.Cast(b(m.Cast(half, dtype="bool")), dtype="float32"))) == 1.0
    assert constant(b(m.Cast(b.full(-2.7), dtype="int32"))) == -2.0
    assert constant(b.x) is None


def test_large_integers_are_not_folded_through_float64() -> None:
    b = Build(4, dtype="int64")
    big = b(m.Add(b.full((1 << 53) + 1, "int64"), b.full(0, "int64")))
    after = b.result(b(m.Minimum(b.x, big)), FOLD)
    assert "minimum" in opnames(after)


def test_ops_on_weights_become_weights_that_are_computed_when_read() -> None:
    b = Build()
    w = b.weight("norm", 6)
    after = b.result(b(m.Mul(b.x, b(m.Add(b.full(1.0), w)))), FOLD)
    assert opnames(after) == ["mul"]
    (folded,) = after.weights.values()
    assert folded.name == "norm.add" and isinstance(folded.weight, ComputedTensor)
    assert folded.weight.source == "add(norm)"


def test_large_weights_and_layers_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmc.passes.canonicalize.fold.FOLD_LIMIT", 10)
    b = Build()
    after = b.result(b(m.Mul(b.x, b(m.Neg(b.weight("table", 4, 6))))), FOLD)
    assert opnames(after) == ["neg", "mul"]


def test_buffers_of_constants_become_ops() -> None:
    b = Build(4, 6)
    scale, same = b.weight("scale", values=np.float32(3.0)), b.weight("same", values=np.full((1, 6), 2))
    count = b.weight("count", values=np.arange(6)[None])
    other = b.weight("other", values=np.array([1, 2, 4, 7, 1, 0]))
    y = b(m.Mul(b.x, scale))
    for integers in (same, count, other):
        y = b(m.Add(y, b(m.Cast(integers, dtype="float32"))))
    after = b.result(y, FOLD)
    assert opnames(after).count("arange") == 1 and opnames(after).count("full") >= 2
    assert [v.name for v in after.weights.values()] == ["other.cast"]


def test_weights_without_values_are_not_read() -> None:
    g = Graph("check", "canonical")
    x = g.add_input("x", TensorType("float32", (4,)))
    scale = g.add_weight("scale", ShapeOnlyTensor((), "float32", "scale"))
    g.outputs, g.output_names = [g.append(m.Mul(x, scale)).result], ["y"]
    assert opnames(FOLD.run(g, PassContext()).graph) == ["mul"]


def test_equal_ops_become_one_and_others_do_not() -> None:
    b = Build()
    cos = [b(m.Cos(b.x)) for _ in range(3)]
    gelus = [b(m.Gelu(b.x, tanh=t)) for t in (False, True)]
    numbers = [b.full(1.0), b.full(1, "int64"), b.full(True, "bool")]
    total = cos[0]
    for other in (*cos[1:], *gelus, numbers[0]):
        total = b(m.Add(total, other))
    total = b(m.Add(total, b(m.Where(numbers[2], total, numbers[0]))))
    total = b(m.Add(total, b(m.Cast(numbers[1], dtype="float32"))))
    after = b.result(total, MergeEqual())
    names = opnames(after)
    assert names.count("cos") == 1 and names.count("gelu") == 2 and names.count("full") == 3


def test_dead_ops_and_weights_go() -> None:
    b = Build()
    b(m.Mul(b(m.Cos(b.x)), b.weight("unused", 6)))
    after = b.result(b(m.Sin(b.x)), DropDead())
    assert opnames(after) == ["sin"] and not after.weights


# -- shapes
SWAP = (-2, -3, -1)


SHAPED: dict[str, tuple[Any, Any, list[str]]] = {
    "reshapes": ((4, 6), lambda b: b(Reshape(b(Reshape(b.x, shape=(24,))), shape=(2, 12))), ["reshape"]),
    "reshape there and back": ((4, 6), lambda b: b(Reshape(b(Reshape(b.x, shape=(24,))), shape=(4, 6))), []),
    "transposes cancel": ((2, 3, 4), lambda b: b(Transpose(b(Transpose(b.x, perm=SWAP)), perm=SWAP)), []),
    "transposes merge": (
        (2, 3, 4),
        lambda b: b(Transpose(b(Transpose(b.x, perm=SWAP)), perm=(-1, -2))),
        ["transpose"],
    ),
    "unit transposes": ((4, 1, 6), lambda b: b(Transpose(b.x, perm=SWAP)), ["reshape"]),
    "function of a transpose": (
        (2, 3, 4),
        lambda b: b(Transpose(b(m.Silu(b(Transpose(b.x, perm=SWAP)))), perm=SWAP)),
        ["silu"],
    ),
    "norm of a transpose": (
        (2, 3, 4),
        lambda b: b(
            Transpose(b(RmsNorm(b(Transpose(b.x, perm=SWAP)), b.weight("w", 4), eps=1e-5)), perm=SWAP)
        ),
        ["rms_norm"],
    ),
    "norm over another axis": (
        (2, 3, 4),
        lambda b: b(LayerNorm(b(Transpose(b.x, perm=(-1, -2))), None, None, eps=1e-5)),
        ["transpose", "layer_norm"],
    ),
    "slice and concat of transposes": (
        (2, 3, 4),
        lambda b: (
            lambda t: b(Transpose(b(Concat([b(Slice(t, axis=-1, start=2, stop=4)), t], axis=-1)), perm=SWAP))
        )(b(Transpose(b.x, perm=SWAP))),
        ["slice", "concat"],
    ),
    "layer behind a reshape": (
        (2, 3, 4),
        lambda b: b(
            Reshape(b(Linear(b(Reshape(b.x, shape=(6, 4))), b.weight("w", 5, 4), None)), shape=(2, 3, 5))
        ),
        ["linear"],
    ),
    "reshape that cuts the last axis": (
        (2, 3, 4),
        lambda b: b(Linear(b(Reshape(b.x, shape=(3, 8))), b.weight("w", 5, 8), None)),
        ["reshape", "linear"],
    ),
    "product with a weight": ((3, 4), lambda b: b(m.MatMul(b.x, b.weight("w", 4, 5))), ["linear"]),
    "product with a transposed weight": (
        (3, 4),
        lambda b: b(m.MatMul(b.x, b(Transpose(b.weight("w", 5, 4), perm=(-1, -2))))),
        ["linear"],
    ),
    "product with a stack of weights": (
        (2, 3, 4),
        lambda b: b(m.MatMul(b.x, b.weight("w", 2, 4, 5))),
        ["matmul"],
    ),
    "addmm (Conv1D)": (
        (2, 3, 4),
        lambda b: b(
            Reshape(
                b(m.Add(b.weight("b", 5), b(m.MatMul(b(Reshape(b.x, shape=(6, 4))), b.weight("w", 4, 5))))),
                shape=(2, 3, 5),
            )
        ),
        ["linear"],
    ),
    "bias": (
        (3, 4),
        lambda b: b(m.Add(b(Linear(b.x, b.weight("w", 5, 4), None)), b.weight("b", 5))),
        ["linear"],
    ),
    "bias of another shape": (
        (3, 4),
        lambda b: b(m.Add(b(Linear(b.x, b.weight("w", 5, 4), None)), b.weight("b", 3, 5))),
        ["linear", "add"],
    ),
    "symbolic length": (
        (1, T, 4),
        lambda b: b(
            Reshape(b(Linear(b(Reshape(b.x, shape=(T, 4))), b.weight("w", 5, 4), None)), shape=(1, T, 5))
        ),
        ["linear"],
    ),
}


@pytest.mark.parametrize("name", SHAPED)
def test_shapes(name: str) -> None:
    shape, make, left = SHAPED[name]
    b = Build(*shape)
    after = b.result(make(b), SHAPES, tolerance=1e-5)
    assert sorted(opnames(after)) == sorted(left)


REFUSED: dict[str, tuple[Any, str]] = {
    "a stack": (
        lambda b: b(m.MatMul(b(Reshape(b.x, shape=(2, 2, 6))), b.weight("w", 2, 6, 5))),
        "MatMulToLinear: weight w has rank 3",
    ),
    "two biases": (
        lambda b: b(m.Add(b(Linear(b.x, b.weight("w", 5, 6), b.weight("b", 5))), b.weight("c", 5))),
        "AddBias: the linear layer has a bias already",
    ),
    "no vector": (
        lambda b: b(m.Add(b(Linear(b.x, b.weight("w", 5, 6), None)), b.weight("b", 4, 5))),
        "AddBias: b float32[4, 5] is no vector over the outputs",
    ),
    "used twice": (
        lambda b: (lambda y: b(m.Mul(b(m.Add(y, b.weight("b", 5))), y)))(
            b(Linear(b.x, b.weight("w", 5, 6), None))
        ),
        "AddBias: the product without the bias is used elsewhere",
    ),
    "reshaped before": (
        lambda b: b(
            m.Add(b(Reshape(b(Linear(b.x, b.weight("w", 4, 6), None)), shape=(8, 2))), b.weight("b", 2))
        ),
        "AddBias: b float32[2] is no vector over the outputs",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_shapes_refused(name: str) -> None:
    make, sentence = REFUSED[name]
    b = Build()
    b.graph.outputs, b.graph.output_names = [make(b)], ["y"]
    assert sentence in SHAPES.run(b.graph, PassContext()).notes


# -- derived weights
@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.data())
def test_rows_of_derived_weights_are_rows_of_the_whole(rows: list[int], data: st.DataObject) -> None:
    rng = np.random.default_rng(1)
    parts = [rng.normal(size=(n, 3)).astype(np.float32) for n in rows]
    whole = np.concatenate(parts)
    lazy = ConcatRows([ArrayTensor(p) for p in parts])
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    np.testing.assert_array_equal(lazy.read(start, stop), whole[start:stop])
    np.testing.assert_array_equal(SliceRows(lazy, start, stop).read(), whole[start:stop])
    np.testing.assert_array_equal(
        TransposedTensor(ArrayTensor(whole.T.copy())).read(start, stop), whole[start:stop]
    )
    np.testing.assert_array_equal(
        ComputedTensor(whole.shape, "float32", "c", lambda: whole).read(start, stop), whole[start:stop]
    )


def test_weights_that_differ_are_not_joined() -> None:
    parts = [ArrayTensor(np.zeros((2, 3), np.float32), "a"), ArrayTensor(np.zeros((2, 4), np.float32), "b")]
    with pytest.raises(CompileError, match=r"weights to merge differ: a float32\[2, 3\], b float32\[2, 4\]"):
        ConcatRows(parts)


# -- the manager
@dataclass(frozen=True)
class Breaks(Pass):
    """Leaves a result whose type is wrong."""

    name = "breaks"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        graph.ops[-1].result.type = TensorType("float16", (4, 6))
        return PassResult(graph, True)


def test_the_manager_names_the_pass_that_left_a_broken_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Breaks, "__module__", "breaking.passes")
    b = Build()
    b.graph.outputs, b.graph.output_names = [b(m.Sin(b.x))], ["y"]
    with pytest.raises(VerifyError, match="after pass breaks of package breaking: "):
        run_passes(b.graph, [Breaks()], PassContext())


def test_the_manager_checks_the_stage_and_dumps_every_pass(tmp_path: Path) -> None:
    b = Build()
    b.graph.stage = "canonical"
    b.graph.outputs, b.graph.output_names = [b(m.Add(b(m.Sin(b.x)), b.full(0.0)))], ["y"]
    heard: list[tuple[str, float]] = []
    context = PassContext(progress=lambda what, share: heard.append((what, share)))
    passes: Sequence[Pass] = [FOLD, MergeEqual(), MarkStage(stage="fused")]
    graph, records = run_passes(b.graph, passes, context, tmp_path / "ir")
    assert [r.name for r in records] == ["fold-constants", "merge-equal", "mark-stage{stage=fused}"]
    assert [r.changed for r in records] == [True, False, True]
    assert graph.stage == "fused" and heard[0] == ("pass fold-constants", 0.0)
    dumped = sorted(p.name for p in (tmp_path / "ir").iterdir())
    assert dumped == ["00-traced.txt", "01-fold-constants.txt", "02-merge-equal.txt", "03-mark-stage.txt"]
    assert equal(parse((tmp_path / "ir" / "03-mark-stage.txt").read_text()), graph)

    @dataclass(frozen=True)
    class Late(Breaks):
        name = "late"
        requires = "paged"

    with pytest.raises(CompileError, match="pass late needs a graph of stage paged, not fused"):
        run_passes(graph, [Late()], PassContext())


def test_a_dimension_keeps_its_value_through_folding() -> None:
    b = Build(T, 6)
    after = b.result(b(m.Mul(b.x, b(DimValue(dim=T * 2 + 1, dtype="float32")))), FOLD)
    assert opnames(after) == ["dim_value", "mul"]
