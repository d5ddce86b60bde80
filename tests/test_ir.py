"""The IR: types, text round trip, interpreter, verifier, rewriter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from llmc.ir import ops as o
from llmc.ir.core import Graph
from llmc.ir.errors import CompileError, VerifyError
from llmc.ir.interpreter import run
from llmc.ir.ops.math import Add, Mul, Neg
from llmc.ir.ops.nn import Linear, RmsNorm
from llmc.ir.ops.shape import Concat, Full, Reshape, Slice
from llmc.ir.parser import parse
from llmc.ir.printer import equal, print_graph
from llmc.ir.rewriter import Any, Match, P, Rewriter, Rule, apply_rules
from llmc.ir.types import Dim, Quantization, TensorType, divide, evaluate, parse_dim, sym
from llmc.ir.verifier import verify
from llmc.ir.weights import ArrayTensor

T = sym("T")


def small_graph() -> Graph:
    rng = np.random.default_rng(0)
    g = Graph("main", "fused")
    x = g.add_input("x", TensorType("float32", (T, 8)))
    w = g.add_weight(
        'layer.0 "q".weight', ArrayTensor(rng.standard_normal((6, 8), dtype=np.float32), "memory")
    )
    n = g.add_weight("norm", ArrayTensor(np.ones(8, np.float32), "memory"))
    h = g.append(RmsNorm(x, n, eps=1e-6)).result
    y = g.append(Linear(h, w)).result
    z = g.append(Concat([y, h], axis=-1)).result
    s = g.append(Slice(z, axis=-1, start=2, stop=10)).result
    r = g.append(Reshape(s, shape=(T, 2, 4))).result
    c = g.append(Full(value=0.5, dtype="float32")).result
    g.outputs = [g.append(Mul(r, c)).result]
    g.output_names = ["out"]
    g.facts["kind"] = "function"
    return g


dims = st.recursive(
    st.integers(-5, 40) | st.sampled_from(["T", "B", "P"]).map(sym),
    lambda d: st.tuples(d, d).map(lambda p: p[0] + p[1]) | st.tuples(d, d).map(lambda p: p[0] * p[1]),
    max_leaves=5,
)


@given(dims, dims)
def test_dimensions_are_polynomials(a: Dim, b: Dim) -> None:
    values = {"T": 7, "B": 3, "P": 11}
    assert evaluate(a + b, values) == evaluate(a, values) + evaluate(b, values)
    assert evaluate(a * b, values) == evaluate(a, values) * evaluate(b, values)
    assert a - a == 0 and a + b == b + a and parse_dim(str(a)) == a
    quotient = divide(a * 6, 3)
    assert quotient == a * 2


def test_divide_by_symbol() -> None:
    assert divide(T * 12, T) == 12
    assert divide(T * 12 + 1, T) is None
    assert divide(7, 2) is None


@pytest.mark.parametrize(
    "text",
    [
        "float32[]",
        "int32[B+1]",
        "float16[2, N, 16, 3, 64]",
        "uint8[576, 1536]<q4:g32:asym:float16:row_major>",
    ],
)
def test_types_round_trip(text: str) -> None:
    assert str(TensorType.parse(text)) == text


def test_text_round_trips_and_keeps_meaning() -> None:
    g = small_graph()
    verify(g)
    again = parse(print_graph(g), {name: v.weight for name, v in g.weights.items() if v.weight is not None})
    assert equal(g, again)
    x = torch.randn(5, 8)
    assert torch.equal(run(g, {"x": x})[0], run(again, {"x": x})[0])
    assert equal(g, g.clone())


def test_parser_names_the_line() -> None:
    with pytest.raises(CompileError, match="line 2 of the graph text: no op is named nonsense"):
        parse('graph "g" stage="fused"\n%0 : float32[2] = nonsense()\n')


def test_verifier_sees_a_stale_type_and_a_wrong_stage() -> None:
    g = small_graph()
    g.ops[0].results[0].type = TensorType("float16", (T, 8))
    with pytest.raises(VerifyError, match="retype_all"):
        verify(g)
    with pytest.raises(VerifyError, match="rms_norm may not stand in a graph of stage traced"):
        verify(small_graph(), "traced")


def test_definition_rejects_misuse() -> None:
    x = Graph().add_input("x", TensorType("float32", (2, 3)))
    with pytest.raises(CompileError, match="needs the attribute eps"):
        RmsNorm(x, None)  # type: ignore[call-arg]
    with pytest.raises(CompileError, match="changes the number of elements"):
        Reshape(x, shape=(7,))
    with pytest.raises(CompileError, match="do not broadcast"):
        Add(x, Graph().add_input("y", TensorType("float32", (4,))))
    assert o.nn.ACTIVATIONS


class DoubleNeg(Rule):
    """neg(neg(x)) → x"""

    pattern = P(Neg, P(Neg, Any("x"), name="inner"))

    def check(self, found: Match) -> str | None:
        return "the inner one is used elsewhere" if len(found.op("inner").result.uses) > 1 else None

    def rewrite(self, found: Match, rw: Rewriter) -> list[object]:
        return [found["x"]]


def test_rewriter_applies_and_refuses_with_the_reason() -> None:
    g = Graph("g", "fused")
    x = g.add_input("x", TensorType("float32", (2,)))
    n = g.append(Neg(x)).result
    g.outputs, g.output_names = [g.append(Neg(n)).result], ["y"]
    assert apply_rules(g.clone(), [DoubleNeg()])[0] == 1
    g.append(Add(n, x))
    g.outputs.append(g.ops[-1].result)
    g.output_names.append("z")
    count, notes = apply_rules(g, [DoubleNeg()])
    assert count == 0 and notes == ["DoubleNeg: the inner one is used elsewhere"]


def test_graph_refuses_to_erase_what_is_used() -> None:
    g = small_graph()
    with pytest.raises(CompileError, match="still used"):
        g.erase(g.ops[0])


@pytest.mark.parametrize(
    "q",
    [
        Quantization(4, 32, False),
        Quantization(6, 16, True, "float32"),
        Quantization(4, 64, True, codebook="nf4"),
        Quantization(4, 32, True, "float32", codebook="iq4_nl", super_group=256),
    ],
)
def test_quantization_text(q: Quantization) -> None:
    assert Quantization.parse(str(q)) == q
    kind = TensorType("uint8", (8, 64), q)
    assert TensorType.parse(str(kind)) == kind
