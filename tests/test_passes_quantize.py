"""Round to nearest: the maths against float64, lazy reads against whole ones, and the walk over the graph."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from llmc.ir.core import Graph
from llmc.ir.errors import InputError, LlmcError
from llmc.ir.interpreter import run
from llmc.ir.ops.math import Div, Mul, Tanh
from llmc.ir.ops.nn import Embedding, Linear
from llmc.ir.ops.quant import QuantizedEmbedding, QuantizedLinear
from llmc.ir.ops.shape import Full
from llmc.ir.parser import parse
from llmc.ir.printer import equal, print_graph
from llmc.ir.types import Quantization, TensorType, sym
from llmc.ir.verifier import verify
from llmc.ir.weights import ArrayTensor
from llmc.passes.base import Pass, PassContext
from llmc.passes.quantize import nearest
from llmc.passes.quantize.nearest import QuantizedPart, QuantizedWeight
from llmc.passes.quantize.rtn import dequantize, quantize_rtn
from llmc.passes.quantize.scheme import weight_passes
from llmc.passes.quantize.walk import QuantizeRtn

from .graphs import PagedRun, lowered, opnames, traced
from .models import ids_of, tiny_model

BIG = 1e4
weights = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 40)),
    elements=st.floats(-BIG, BIG, width=32) | st.floats(-(2.0**-20), 2.0**-20, width=32) | st.just(0.0),
)


def reference(w: np.ndarray, bits: int, group: int, symmetric: bool) -> tuple[np.ndarray, np.ndarray]:
    """What the stored numbers stand for and each element's step, in float64, written from the definition:
    codes 0 … 2^bits - 1, scale = range / levels rounded to float16 (up below its normal range), negative on a
    symmetric grid below 8 bits whose largest weight is positive.
    """
    out = np.zeros(w.shape)
    steps = np.zeros(w.shape)
    levels = 2**bits - 1
    for row in range(w.shape[0]):
        for start in range(0, w.shape[1], group):
            part = w[row, start : start + group].astype(np.float64)
            low, high = min(part.min(), 0.0), max(part.max(), 0.0)
            exact = (high - low) / levels
            if symmetric:
                exact = max(-low, high) / (2 ** (bits - 1) - (bits == 8))
            step = float(np.float16(max(exact, 2.0**-24)))
            if step < exact and step < 2.0**-14:
                step += 2.0**-24
            zero = 2 ** (bits - 1) if symmetric else min(max(round(-low / step), 0), levels)
            sign = -1 if symmetric and bits < 8 and high > -low else 1
            codes = [min(max(round(sign * x / step) + zero, 0), levels) for x in part]
            out[row, start : start + group] = [(c - zero) * sign * step for c in codes]
            steps[row, start : start + group] = step
    return out, steps


@settings(max_examples=150, deadline=None)
@given(weights, st.sampled_from([2, 4, 8]), st.sampled_from([1, 8, 16, 64]), st.booleans())
def test_against_float64(w: np.ndarray, bits: int, group: int, symmetric: bool) -> None:
    q = quantize_rtn(w, bits=bits, group_size=group, symmetric=symmetric)
    got = dequantize(q, bits=bits, group_size=group).astype(np.float64)
    wanted, step = reference(w, bits, group, symmetric)
    assert q.codes.dtype == np.uint8 and q.codes.max() < 2**bits and q.scale.dtype == np.float16
    # A tie may fall to either side where float32 and float64 divide differently: never by more than a step.
    assert (abs(got - wanted) <= step * 1.001).all()
    # Half a step (a whole one where a symmetric grid ends a step before the largest weight's negative), and
    # what rounding the scale to float16 moves the outermost code by.
    beyond = abs(w) > step * (2 ** (bits - 1) - 1) if symmetric else np.zeros(w.shape, bool)
    slack = step * (0.5 + 0.5 * beyond + 2**bits * 2.0**-11) + 1e-12
    assert (abs(got - w.astype(np.float64)) <= slack).all()


def test_a_symmetric_scale_loses_less_turned_round() -> None:
    """Its error beside that of a grid whose scale is positive and reaches every weight."""
    w = np.random.default_rng(3).normal(size=(64, 256)).astype(np.float32)
    q = quantize_rtn(w, bits=4, group_size=64, symmetric=True)
    assert set(np.sign(q.scale).flat) == {-1, 1}
    assert set(q.codes.flat) == set(range(16))
    found = ((dequantize(q, bits=4, group_size=64) - w) ** 2).sum()
    steps = np.abs(w.reshape(64, 4, 64)).max(-1, keepdims=True) / 7
    plain = ((np.rint(w.reshape(64, 4, 64) / steps) * steps - w.reshape(64, 4, 64)) ** 2).sum()
    assert found < 0.82 * plain


@pytest.mark.parametrize("symmetric", [False, True])
def test_groups_of_zeros_and_of_one_value(symmetric: bool) -> None:
    w = np.zeros((3, 64), np.float32)
    w[1] = 0.37
    w[2] = -12.5
    q = quantize_rtn(w, bits=4, group_size=32, symmetric=symmetric)
    back = dequantize(q, bits=4, group_size=32)
    assert not back[0].any()
    np.testing.assert_allclose(back[1:], w[1:], rtol=1e-3)
    assert (q.zero_point is None) is symmetric


def test_zero_is_exact_wherever_it_stands() -> None:
    """Pruned weights stay pruned: zero is one of the codes."""
    rng = np.random.default_rng(0)
    w = rng.normal(3.0, 1.0, (4, 64)).astype(np.float32)
    w[:, ::5] = 0.0
    back = dequantize(quantize_rtn(w, bits=4, group_size=32, symmetric=False), bits=4, group_size=32)
    assert not back[:, ::5].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_is_refused_with_the_tensors_name(bad: float) -> None:
    w = np.zeros((2, 8), np.float32)
    w[1, 3] = bad
    with pytest.raises(
        InputError, match=r"model\.safetensors:w holds NaN or infinite values; the checkpoint"
    ):
        quantize_rtn(w, bits=4, group_size=8, symmetric=False, what="model.safetensors:w")


def test_scales_beyond_float16_are_refused() -> None:
    w = np.array([[3e38, -3e38]], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match="head needs a scale of inf, beyond float16; keep this model"):
            quantize_rtn(w, bits=4, group_size=2, symmetric=False, what="head")


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_chunked_reads_equal_whole_reads(symmetric: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the order and the length of reads, and wherever the pieces inside end."""
    monkeypatch.setattr(nearest, "CHUNK_BYTES", 7 * 4 * 40)
    w = np.random.default_rng(1).normal(size=(64, 40)).astype(np.float32)
    whole = quantize_rtn(w, bits=4, group_size=16, symmetric=symmetric)
    quant = Quantization(4, 16, symmetric)
    lazy = QuantizedWeight(ArrayTensor(w), quant)
    names = ["codes", "scale"] if symmetric else ["codes", "scale", "zero_point"]
    for _ in range(2):  # a second target reads everything again
        for name in names:
            part = QuantizedPart(lazy, name)
            pieces = [part.read(a, min(a + rows, 64)) for a in range(0, 64, rows)]
            np.testing.assert_array_equal(np.concatenate(pieces), getattr(whole, name))
            assert part.read(3, 3).shape == (0, part.shape[1])
    backwards = QuantizedPart(lazy, "scale")
    np.testing.assert_array_equal(backwards.read(60), whole.scale[60:])
    np.testing.assert_array_equal(backwards.read(2, 9), whole.scale[2:9])


class Counted(ArrayTensor):
    """Counts the rows that are read, and the most at once."""

    rows = 0
    most = 0

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray[Any, Any]:
        found = super().read(start, stop)
        self.rows += len(found)
        self.most = max(self.most, len(found))
        return found


def test_each_row_is_read_once_and_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "CHUNK_BYTES", 8 * 4 * 32)
    base = Counted(np.random.default_rng(2).normal(size=(100, 32)).astype(np.float32))
    lazy = QuantizedWeight(base, Quantization(4, 16, False))
    for name in ("codes", "scale", "zero_point"):
        QuantizedPart(lazy, name).read()
    assert base.rows == 100 and base.most == 8


# -- the walk
def tied_model(head_first: bool = False) -> Graph:
    """ids → embedding → linear → linear by the embedding's table, soft-capped with the scalar first."""
    rng = np.random.default_rng(3)
    g = Graph("tied", "fused")
    g.facts["kind"] = "causal_lm"
    ids = g.add_input("ids", TensorType("int32", (sym("T"),)))
    table = g.add_weight("embed", ArrayTensor(rng.normal(size=(50, 48)).astype(np.float32), "embed"))
    inner = g.add_weight("inner", ArrayTensor(rng.normal(size=(48, 48)).astype(np.float32), "inner"))
    head = (
        table
        if not head_first
        else g.add_weight("head", ArrayTensor(rng.normal(size=(50, 48)).astype(np.float32)))
    )
    x = g.append(Embedding(ids, table)).result
    y = g.append(Linear(g.append(Linear(x, inner, None)).result, head, None)).result
    cap = g.append(Full(value=9.0, dtype="float32")).result
    capped = g.append(Tanh(g.append(Div(y, cap)).result)).result
    g.outputs, g.output_names = [g.append(Mul(cap, capped)).result], ["logits"]
    return g


def scheme(name: str) -> list[Pass]:
    """Linear layers by the scheme, embeddings and head at 8 bits."""
    return weight_passes(name)


def quantize(graph: Graph, name: str) -> None:
    for step in scheme(name):
        step.run(graph, PassContext())
        graph.stage = "quantized"


def test_a_tied_embedding_is_quantized_once_at_eight_bits() -> None:
    g = tied_model()
    quantize(g, "int4-g16")
    verify(g)
    tables = [op for op in g if isinstance(op, QuantizedEmbedding | QuantizedLinear)]
    embedding, inner, head = tables
    assert isinstance(embedding, QuantizedEmbedding) and embedding.q is head.q
    assert head.q.type.quant == Quantization(8, 48, True)
    assert inner.q.type.quant == Quantization(4, 16, False)
    assert sorted(g.weights) == ["embed.q", "embed.scale", "inner.q", "inner.scale", "inner.zero_point"]


def test_a_head_behind_a_soft_cap_is_found() -> None:
    g = tied_model(head_first=True)
    quantize(g, "int4-g16")
    bits = {op.q.name: op.q.type.quant.bits for op in g if isinstance(op, QuantizedLinear) if op.q.type.quant}
    assert bits == {"inner.q": 4, "head.q": 8}


def test_a_weight_that_something_else_reads_stays() -> None:
    g = tied_model()
    inner = g.weights["inner"]
    g.outputs.append(g.append(Mul(inner, inner)).result)
    g.output_names.append("square")
    QuantizeRtn(bits=4, group=16).run(g, PassContext())
    assert "inner" in g.weights and "inner.q" not in g.weights


def test_nothing_to_quantize_is_said() -> None:
    g = Graph("empty", "fused")
    x = g.add_input("x", TensorType("float32", (2,)))
    g.outputs, g.output_names = [g.append(Tanh(x)).result], ["y"]
    result = QuantizeRtn().run(g, PassContext())
    assert not result.changed
    assert result.notes == ["no linear layer was found to quantize"]


@pytest.mark.parametrize("name", ["int8", "int8-g128", "int4-g8", "int4-g32-sym", "int4-g1024"])
def test_quantized_graph_means_its_dequantized_weights(name: str) -> None:
    """The interpreter on quantized weights equals the plain graph on the weights they stand for."""
    g = tied_model()
    plain = g.clone()
    step = next(p for p in scheme(name) if isinstance(p, QuantizeRtn))
    quantize(g, name)
    assert equal(parse(print_graph(g)), g)
    for label, value in plain.weights.items():
        assert value.weight is not None
        w = value.weight.read()
        bits, symmetric = (8, True) if label == "embed" else (step.bits, step.symmetric)
        group = min(64 if label == "embed" else step.group or w.shape[1], w.shape[1])
        q = quantize_rtn(w, bits=bits, group_size=group, symmetric=symmetric)
        value.weight = ArrayTensor(dequantize(q, bits=bits, group_size=group), label)
    ids = torch.arange(50, dtype=torch.int32)
    got, wanted = (run(graph, {"ids": ids})[0] for graph in (g, plain))
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("int5", "no quantization scheme is named 'int5'; known: none, "),
        ("int4-g12", "--quant int4-g12: group size 12; use a multiple of 8 from 8 to 1024"),
        ("int4-g2048", "--quant int4-g2048: group size 2048; use a multiple of 8 from 8 to 1024"),
    ],
)
def test_unknown_schemes(name: str, sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        scheme(name)
    assert str(caught.value).startswith(sentence)
    assert scheme("none") == []


@pytest.mark.parametrize("options", [{"bits": 9}, {"bits": 1}, {"group": -1}])
def test_impossible_options(options: dict[str, int]) -> None:
    with pytest.raises(LlmcError, match=next(iter(options))):
        QuantizeRtn(**options)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_quantized_paged_model_stays_close(family: str) -> None:
    """int8 moves the rows of a tiny model by a few percent at most, and every matrix is quantized."""
    model = tiny_model(family)
    graph = traced(model, encoder=family == "bert")
    plain, _ = lowered(graph, "paged")
    quantized, _ = lowered(graph, "paged", scheme("int8"))
    assert not {"linear", "embedding"} & set(opnames(quantized))
    ids = ids_of(20)
    (a,), (b,) = (PagedRun(g).step([("s", ids)]) for g in (plain, quantized))
    assert float((a - b).abs().mean() / a.abs().mean()) < 0.06
