"""Every decomposition equals its op's reference meaning, and what has none is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from llmc.codegen.legalize import DECOMPOSITIONS, legalize
from llmc.ir import interpreter
from llmc.ir.core import Graph, Value
from llmc.ir.define import OPS
from llmc.ir.errors import UnsupportedError
from llmc.ir.ops import attention, cache, math, moe, nn, quant
from llmc.ir.types import Quantization, TensorType, sym
from llmc.ir.verifier import verify
from llmc.ir.weights import ArrayTensor
from llmc.passes.quantize.moe import attach_experts, nearest_experts

from .attention_biases import distance_table

T = sym("T")
SIMPLE = frozenset(OPS) - frozenset(DECOMPOSITIONS)
"""Ops that nothing decomposes: every decomposition must end in these."""

m: Any = math
Make = Callable[[Graph], Value]


def _input(graph: Graph, name: str, *dims: Any, dtype: str = "float32") -> Value:
    return graph.add_input(name, TensorType(dtype, dims))


def _weight(graph: Graph, name: str, *dims: int) -> Value:
    rng = np.random.default_rng(len(name))
    return graph.add_weight(name, ArrayTensor(rng.standard_normal(dims, dtype=np.float32)))


def _unary(cls: Any, **fields: Any) -> Make:
    return lambda g: g.append(cls(_input(g, "x", T, 6), **fields)).result


def _rope(interleaved: bool, rotary: int) -> Make:
    def make(g: Graph) -> Value:
        x = _input(g, "x", T, 3, 8)
        return g.append(
            nn.Rope(x, _input(g, "cos", T, rotary), _input(g, "sin", T, rotary), interleaved)
        ).result

    return make


def _attention(
    kv_heads: int = 4, sinks: bool = False, slopes: bool = False, distances: bool = False, **fields: Any
) -> Make:
    def make(g: Graph) -> Value:
        q, k, v = (_input(g, n, 2, T, h, 8) for n, h in (("q", 4), ("k", kv_heads), ("v", kv_heads)))
        per_head = [_weight(g, "per_head", 4) if one else None for one in (sinks, slopes)]
        if distances:
            per_head.append(g.add_weight("distances", ArrayTensor(distance_table(4, 32))))
        return g.append(attention.Attention(q, k, v, *per_head, scale=0.3, **fields)).result

    return make


def _sdpa(mask: str = "", grouped: bool = False, causal: bool = False) -> Make:
    def make(g: Graph) -> Value:
        heads = 2 if grouped else 4
        q, k, v = (_input(g, n, 2, h, T, 8) for n, h in (("q", 4), ("k", heads), ("v", heads)))
        given = _input(g, "mask", T, T, dtype=mask) if mask else None
        return g.append(attention.Sdpa(q, k, v, given, 0.4, causal, grouped)).result

    return make


def _quantized(
    kind: str,
    bits: int,
    symmetric: bool,
    k: int = 20,
    group: int = 8,
    codebook: str | None = None,
    minimum: bool = False,
) -> Make:
    def make(g: Graph) -> Value:
        rng = np.random.default_rng(1)
        groups = -(-k // group)
        type_ = TensorType("uint8", (6, k), Quantization(bits, group, symmetric, codebook=codebook))
        q = g.add_weight("q", ArrayTensor(rng.integers(0, 1 << bits, (6, k), np.uint8)), type_)
        scale = g.add_weight("s", ArrayTensor(rng.random((6, groups)).astype(np.float16)))
        zero = (
            None
            if symmetric
            else g.add_weight(
                "z",
                ArrayTensor(
                    rng.standard_normal((6, groups)).astype(np.float16)
                    if minimum
                    else rng.integers(0, 1 << bits, (6, groups), np.uint8)
                ),
            )
        )
        if kind == "dequantize":
            return g.append(quant.Dequantize(q, scale, zero)).result
        if kind == "embedding":
            return g.append(
                quant.QuantizedEmbedding(_input(g, "ids", T, dtype="int64"), q, scale, zero)
            ).result
        return g.append(
            quant.QuantizedLinear(_input(g, "x", T, k), q, scale, zero, _weight(g, "b", 6))
        ).result

    return make


def _norm(cls: Any, weight: bool, bias: bool | None = None) -> Make:
    def make(g: Graph) -> Value:
        parts = {"weight": _weight(g, "w", 6) if weight else None}
        if bias is not None:
            parts["bias"] = _weight(g, "b", 6) if bias else None
        return g.append(cls(_input(g, "x", T, 6), **parts, eps=1e-5)).result

    return make


def _moe(bias: bool = False, **gate: Any) -> Make:
    """2 of 4 experts, each [2 · 3, 8] (without a gate [6, 8]) and [8, 3] (without a gate [8, 6])."""
    inner = 3 if gate.get("gated", True) else 6

    def make(g: Graph) -> Value:
        given = (_input(g, "x", T, 8), _input(g, "i", T, 2, dtype="int64"), _input(g, "w", T, 2))
        experts = (_weight(g, "up", 4, 6, 8), _weight(g, "down", 4, 8, inner))
        biases = (_weight(g, "b", 4, 6), _weight(g, "bias", 4, 8)) if bias else (None, None)
        return g.append(moe.Moe(*given, *experts, *biases, **gate)).result

    return make


def _quantized_moe(g: Graph) -> Value:
    mixture = _moe(bias=True)(g).producer
    assert isinstance(mixture, moe.Moe)
    parts = [nearest_experts(w, 4, 3, False) for w in (mixture.gate_up, mixture.down)]
    attach_experts(g, mixture, *parts)
    return g.ops[-1].result


CASES: dict[str, Make] = {
    "moe": _moe(),
    "moe/gelu, biased": _moe(bias=True, activation="gelu_tanh"),
    "moe/clamped": _moe(activation="swish", alpha=1.7, limit=0.5, offset=1.0),
    "moe/clamped when active": _moe(activation="silu", limit=0.5, limits_active=True),
    "moe/without a gate": _moe(bias=True, activation="relu2", gated=False),
    "quantized_moe": _quantized_moe,
    "neg": _unary(math.Neg),
    "abs": _unary(math.Abs),
    "reciprocal": _unary(math.Reciprocal),
    "rsqrt": lambda g: g.append(m.Rsqrt(g.append(m.Exp(_input(g, "x", T, 6))).result)).result,
    "relu": _unary(math.Relu),
    "sigmoid": _unary(math.Sigmoid),
    "silu": _unary(math.Silu),
    "gelu": _unary(math.Gelu),
    "gelu/tanh": _unary(math.Gelu, tanh=True),
    "softmax": _unary(math.Softmax),
    "softmax/rows": _unary(math.Softmax, axis=-2),
    "reduce_mean": _unary(math.ReduceMean, axes=(-1,)),
    "reduce_mean/symbolic": _unary(math.ReduceMean, axes=(-2, -1), keepdim=True),
    "diff": lambda g: g.append(math.Diff(_input(g, "x", 2, T), _input(g, "before", 2, 1))).result,
    "embedding": lambda g: (
        g.append(nn.Embedding(_input(g, "ids", 2, T, dtype="int64"), _weight(g, "w", 6, 4))).result
    ),
    "gather_last": lambda g: (
        g.append(cache.GatherLast(_input(g, "x", T, 4), _input(g, "ids", sym("R"), dtype="int32"))).result
    ),
    "linear": lambda g: (
        g.append(nn.Linear(_input(g, "x", 2, T, 6), _weight(g, "w", 5, 6), _weight(g, "bb", 5))).result
    ),
    "linear/plain": lambda g: g.append(nn.Linear(_input(g, "x", T, 6), _weight(g, "w", 5, 6), None)).result,
    "rms_norm": _norm(nn.RmsNorm, True),
    "rms_norm/bare": _norm(nn.RmsNorm, False),
    "layer_norm": _norm(nn.LayerNorm, True, True),
    "layer_norm/bare": _norm(nn.LayerNorm, False, False),
    "rope": _rope(False, 8),
    "rope/partial": _rope(False, 4),
    "rope/interleaved": _rope(True, 4),
    "attention": _attention(),
    "attention/grouped, window": _attention(2, window=2),
    "attention/encoder, window": _attention(causal=False, window=2),
    "attention/softcap, sinks": _attention(2, sinks=True, softcap=2.0),
    "attention/slopes": _attention(2, slopes=True, window=5),
    "attention/distances": _attention(2, distances=True, causal=False),
    "sdpa": _sdpa(),
    "sdpa/causal, grouped": _sdpa(grouped=True, causal=True),
    "sdpa/additive": _sdpa("float32"),
    "sdpa/bool": _sdpa("bool"),
    "hadamard": lambda g: g.append(quant.Hadamard(_input(g, "x", 2, T, 12), 4)).result,
    "dequantize": _quantized("dequantize", 4, False),
    "quantized_linear": _quantized("linear", 4, False),
    "quantized_linear/symmetric": _quantized("linear", 8, True, group=20),
    "quantized_linear/minimum": _quantized("linear", 5, False, minimum=True),
    "quantized_linear/codebook": _quantized("linear", 4, True, codebook="nf4"),
    "quantized_embedding": _quantized("embedding", 4, False),
    "quantized_embedding/minimum": _quantized("embedding", 3, False, minimum=True),
    "quantized_embedding/codebook": _quantized("embedding", 4, True, codebook="iq4_nl"),
    "quantized_embedding/symmetric": _quantized("embedding", 8, True, k=16),
} | {
    f"gated_mlp/{name}": lambda g, name=name: g.append(nn.GatedMlp(_input(g, "x", T, 8), name)).result
    for name in nn.ACTIVATIONS
}


def _values(graph: Graph) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(7)
    made: dict[str, torch.Tensor] = {}
    for v in graph.inputs:
        dims = [d if isinstance(d, int) else 5 for d in v.shape]
        if v.dtype.startswith("float"):
            made[v.name] = torch.from_numpy(rng.standard_normal(dims, dtype=np.float32))
        elif v.dtype == "bool":
            made[v.name] = torch.from_numpy(np.tril(np.ones(dims, np.bool_)))
        else:
            made[v.name] = torch.from_numpy(rng.integers(0, 4, dims)).to(getattr(torch, v.dtype))
    return made


@pytest.mark.parametrize("name", CASES)
def test_decomposition_equals_reference(name: str) -> None:
    graph = Graph(stage="paged" if name.startswith("gather") else "quantized")
    graph.outputs = [CASES[name](graph)]
    graph.output_names = ["y"]
    legal = legalize(graph, SIMPLE)
    verify(legal)
    assert {op.opname for op in legal} <= SIMPLE
    assert [op.opname for op in graph.ops][-1] == name.split("/")[0]  # the original is left as it was
    values = _values(graph)
    (wanted,) = interpreter.run(graph, values)
    (got,) = interpreter.run(legal, values)
    torch.testing.assert_close(got, wanted, rtol=2e-6, atol=2e-6)


def test_every_decomposition_has_a_case() -> None:
    assert {name.split("/")[0] for name in CASES} == set(DECOMPOSITIONS)


def test_what_a_target_emits_is_left_alone() -> None:
    graph = Graph()
    graph.outputs = [CASES["silu"](graph)]
    graph.output_names = ["y"]
    assert [op.opname for op in legalize(graph, {"silu"})] == ["silu"]
    assert [op.opname for op in legalize(graph, {"sigmoid", "mul"})] == ["sigmoid", "mul"]


def test_a_refused_instance_is_decomposed() -> None:
    graph = Graph()
    graph.outputs = [CASES["silu"](graph)]
    graph.output_names = ["y"]
    legal = legalize(graph, {"silu", "sigmoid", "mul"}, lambda op: op.opname != "silu")
    assert [op.opname for op in legal] == ["sigmoid", "mul"]


def test_no_decomposition_names_op_and_module() -> None:
    graph = Graph()
    op = graph.append(m.CumSum(_input(graph, "x", T, 6)))
    op.loc = "model.layers.3.router"
    graph.outputs, graph.output_names = [op.result], ["y"]
    with pytest.raises(UnsupportedError, match=r"cannot emit cumsum \(from model.layers.3.router\)"):
        legalize(graph, {"add"})


def test_locations_are_kept() -> None:
    graph = Graph()
    graph.outputs = [CASES["silu"](graph)]
    graph.output_names = ["y"]
    graph.ops[0].loc = "mlp.act"
    assert {op.loc for op in legalize(graph, SIMPLE)} == {"mlp.act"}
