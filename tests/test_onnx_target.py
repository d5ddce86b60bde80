"""Target onnx-cpu: every op's lowering against its reference meaning in torch, paged attention at awkward
shapes.

Tolerances. Both sides compute in float32 and differ by the order of summation and by the polynomial of exp,
tanh and erf: a few units in the last place of the largest term, hence 2e-6 relative to the largest output for
elementwise ops and 1e-5 for sums over up to a few hundred terms. Integers and moved data must be equal.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llmc.codegen.artifact import Artifact, ArtifactWriter
from llmc.codegen.onnx.cpu import OnnxCpu
from llmc.codegen.target import no_progress
from llmc.ir import interpreter
from llmc.ir.core import Graph, Op, Value
from llmc.ir.define import OPS
from llmc.ir.errors import UnsupportedError
from llmc.ir.ops import attention, math, nn, shape
from llmc.ir.types import TensorType, sym
from llmc.ir.weights import ArrayTensor
from llmc.runtime.executor.onnx import OnnxExecutor

from .attention_biases import distance_table

T, S, B, P, R, N = (sym(s) for s in "TSBPRN")
RNG = np.random.default_rng


def build(graph: Graph, folder: Path, *, kind: str = "function", **options: Any) -> Artifact:
    """An artifact of one graph for onnx-cpu."""
    with ArtifactWriter(folder / "model.llmc") as writer:
        entry = OnnxCpu(**options).compile(graph, writer, progress=no_progress)
        model = {"vocab_size": graph.outputs[0].shape[-1] if kind != "function" else 0}
        return writer.finish({"kind": kind, "model": model, "targets": {"onnx-cpu": entry}})


def function(inputs: dict[str, TensorType], body: Callable[..., Op | list[Value]]) -> Graph:
    """A graph from a Python function of its inputs that returns an op (or several values)."""
    graph = Graph()
    values = [graph.add_input(name, type) for name, type in inputs.items()]
    made = body(graph, *values)
    graph.outputs = made if isinstance(made, list) else list(made.results)
    if not isinstance(made, list):
        graph.append(made)
    graph.output_names = [f"out{i}" for i in range(len(graph.outputs))]
    return graph


def check(
    graph: Graph, folder: Path, arrays: dict[str, np.ndarray], tolerance: float, **options: Any
) -> None:
    """The compiled function equals the interpreter: largest difference ≤ tolerance · largest output."""
    expected = interpreter.run(graph, {n: interpreter.to_torch(a) for n, a in arrays.items()})
    got = OnnxExecutor(build(graph, folder, **options), threads=1).run(arrays)
    for name, want in zip(graph.output_names, expected, strict=True):
        w, g = want.numpy(), got[name]
        assert g.shape == w.shape
        assert g.dtype == w.dtype
        close(g, w, tolerance)


def close(got: np.ndarray, want: np.ndarray, tolerance: float) -> None:
    if not np.issubdtype(want.dtype, np.floating) or tolerance == 0:
        np.testing.assert_array_equal(got, want)
        return
    assert np.isfinite(got).all()
    scale = float(np.abs(want).max(initial=0.0)) or 1.0
    worst = float(np.abs(got - want).max(initial=0.0))
    assert worst <= tolerance * scale, f"off by {worst / scale:.2e} of the largest output"


def f32(*dims: Any) -> TensorType:
    return TensorType("float32", dims)


def i64(*dims: Any) -> TensorType:
    return TensorType("int64", dims)


def normal(*dims: int, seed: int = 0) -> np.ndarray:
    return RNG(seed).standard_normal(dims, dtype=np.float32)


def weight(graph: Graph, name: str, array: np.ndarray, type: TensorType | None = None) -> Value:
    return graph.add_weight(name, ArrayTensor(array), type)


def private_bytes() -> int:
    """Memory of this process that no file backs."""
    rows = Path("/proc/self/status").read_text().splitlines()
    return next(int(r.split()[1]) * 1024 for r in rows if r.startswith("RssAnon:"))


# -- tensor ops ------------------------------------------------------------------------------------------

UNARY = [n for n, o in OPS.items() if issubclass(o, math.Unary) and n != "logical_not"]
POSITIVE = {"log", "sqrt", "rsqrt", "reciprocal"}
FLOAT_BINARY = ["add", "sub", "mul", "div", "maximum", "minimum", "floor_divide", "remainder"]
COMPARE = ["less", "less_equal", "greater", "greater_equal", "equal", "not_equal"]


def test_an_operation_that_the_target_lacks_is_decomposed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmc.codegen.onnx.lower import EMITTERS

    monkeypatch.setattr(OnnxCpu, "operations", OnnxCpu.operations - {"silu", "expand"})
    monkeypatch.delitem(EMITTERS, "silu")
    check(function({"x": f32(T, 3)}, lambda g, x: math.Silu(x)), tmp_path / "a", {"x": normal(4, 3)}, 1e-6)
    with pytest.raises(UnsupportedError, match="cannot emit expand"):
        build(function({"x": f32(1, 3)}, lambda g, x: shape.Expand(x, (5, 3))), tmp_path / "b")


def test_every_declared_operation_has_an_emitter() -> None:
    from llmc.codegen.onnx.lower import OPERATIONS

    assert OnnxCpu.operations == OPERATIONS
    assert set(OPS) >= OPERATIONS


@pytest.mark.parametrize("name", UNARY)
def test_unary(name: str, tmp_path: Path) -> None:
    x = normal(5, 7) * 3
    graph = function({"x": f32(T, 7)}, lambda g, v: OPS[name](v))
    check(graph, tmp_path, {"x": np.abs(x) + 0.1 if name in POSITIVE else x}, 2e-6)


def test_gelu_tanh_and_logical_not(tmp_path: Path) -> None:
    graph = function({"x": f32(T, 7)}, lambda g, v: math.Gelu(v, tanh=True))
    check(graph, tmp_path / "a", {"x": normal(5, 7) * 3}, 2e-6)
    graph = function({"x": TensorType("bool", (T,))}, lambda g, v: math.LogicalNot(v))
    check(graph, tmp_path / "b", {"x": np.array([True, False])}, 0)


@pytest.mark.parametrize("name", [*FLOAT_BINARY, *COMPARE])
def test_binary_floats_broadcast(name: str, tmp_path: Path) -> None:
    graph = function({"a": f32(T, 1, 4), "b": f32(3, 4)}, lambda g, a, b: OPS[name](a, b))
    b = normal(3, 4, seed=1)
    a = normal(2, 1, 4)
    a[0, 0] = b[0]  # some are equal
    check(graph, tmp_path, {"a": a, "b": b}, 2e-6)


@pytest.mark.parametrize("dtype", ["int64", "int32"])
@pytest.mark.parametrize(
    "name", ["add", "sub", "mul", "maximum", "minimum", "floor_divide", "remainder", *COMPARE]
)
def test_binary_integers(name: str, dtype: str, tmp_path: Path) -> None:
    type = TensorType(dtype, (T,))
    graph = function({"a": type, "b": type}, lambda g, a, b: OPS[name](a, b))
    a = np.array([7, -7, 7, -7, 0, 6, -6, 5], dtype)
    check(graph, tmp_path, {"a": a, "b": np.array([3, 3, -3, -3, 4, 3, -3, 5], dtype)}, 0)


def test_pow_and_logic(tmp_path: Path) -> None:
    graph = function({"a": f32(T), "b": f32(T)}, lambda g, a, b: math.Pow(a, b))
    check(graph, tmp_path / "a", {"a": np.abs(normal(6)) + 0.5, "b": normal(6, seed=1)}, 2e-6)
    flags = {"a": np.array([True, True, False, False]), "b": np.array([True, False, True, False])}
    for op in (math.LogicalAnd, math.LogicalOr, math.Equal):
        graph = function({n: TensorType("bool", (T,)) for n in "ab"}, lambda g, a, b, op=op: op(a, b))
        check(graph, tmp_path / op.opname, flags, 0)


@pytest.mark.parametrize("dtype", ["float32", "int64", "int32", "bool"])
def test_where(dtype: str, tmp_path: Path) -> None:
    types = {"c": TensorType("bool", (T, 1)), "a": TensorType(dtype, (3,)), "b": TensorType(dtype, (T, 3))}
    graph = function(types, lambda g, c, a, b: math.Where(c, a, b))
    values = {"a": np.array([1, 0, 1]).astype(dtype), "b": np.array([[0, 0, 1], [0, 1, 0]]).astype(dtype)}
    check(graph, tmp_path, {"c": np.array([[True], [False]]), **values}, 0)


@pytest.mark.parametrize(
    ("source", "to"),
    [
        ("float32", "int64"),
        ("int64", "float32"),
        ("bool", "float32"),
        ("float32", "float16"),
        ("int32", "bool"),
    ],
)
def test_cast(source: str, to: str, tmp_path: Path) -> None:
    graph = function({"x": TensorType(source, (T,))}, lambda g, x: math.Cast(x, to))
    check(graph, tmp_path, {"x": np.array([-2.7, -1, 0, 1.4, 3]).astype(source)}, 0)


def test_half_precision_is_computed_in_float32(tmp_path: Path) -> None:
    """A bfloat16 chain between float32 ends: each op rounds its result to bfloat16, as in torch."""

    def body(g: Graph, x: Value) -> list[Value]:
        half = g.append(math.Cast(x, "bfloat16")).result
        y = g.append(math.Mul(half, half)).result
        z = g.append(math.Softmax(g.append(math.Add(y, half)).result)).result
        return [g.append(math.Cast(z, "float32")).result]

    # softmax may round the other way at a tie: one unit of bfloat16's 8 bits.
    check(function({"x": f32(T, 8)}, body), tmp_path, {"x": normal(3, 8)}, 2**-8)


@pytest.mark.parametrize(("a", "b"), [((T, 5), (5, 6)), ((2, T, 5), (2, 5, 6)), ((B, 3, T, 5), (3, 5, T))])
def test_matmul(a: Any, b: Any, tmp_path: Path) -> None:
    concrete = [tuple({"T": 4, "B": 2}.get(str(d), d) for d in dims) for dims in (a, b)]
    graph = function({"a": f32(*a), "b": f32(*b)}, lambda g, x, y: math.MatMul(x, y))
    check(graph, tmp_path, {"a": normal(*concrete[0]), "b": normal(*concrete[1], seed=1)}, 1e-5)


@pytest.mark.parametrize("keepdim", [True, False])
@pytest.mark.parametrize("axes", [(-1,), (-2,), (-1, -3), (-1, -2, -3)])
@pytest.mark.parametrize("name", ["reduce_sum", "reduce_mean", "reduce_max"])
def test_reduce(name: str, axes: tuple[int, ...], keepdim: bool, tmp_path: Path) -> None:
    graph = function({"x": f32(2, T, 5)}, lambda g, x: OPS[name](x, axes, keepdim))
    check(graph, tmp_path, {"x": normal(2, 3, 5)}, 1e-5)


@pytest.mark.parametrize("axis", [-1, -2])
def test_softmax_cumsum_diff(axis: int, tmp_path: Path) -> None:
    check(
        function({"x": f32(T, 5)}, lambda g, x: math.Softmax(x, axis)),
        tmp_path / "a",
        {"x": normal(3, 5)},
        2e-6,
    )
    check(
        function({"x": f32(T, 5)}, lambda g, x: math.CumSum(x, axis)),
        tmp_path / "b",
        {"x": normal(3, 5)},
        1e-5,
    )
    flags = {"x": np.array([[True, False, True], [True, True, False]])}
    graph = function({"x": TensorType("bool", (T, 3))}, lambda g, x: math.CumSum(x, axis))
    check(graph, tmp_path / "c", flags, 0)
    graph = function({"x": i64(2, T), "p": i64(2, 1)}, lambda g, x, p: math.Diff(x, p))
    check(graph, tmp_path / "d", {"x": np.array([[3, 5, 4], [1, 1, 2]]), "p": np.array([[1], [1]])}, 0)


# -- shapes ------------------------------------------------------------------------------------------


def test_full_arange_dim_value(tmp_path: Path) -> None:
    def body(g: Graph, x: Value) -> list[Value]:
        ops = [
            shape.Full(2.5, "float32"),
            shape.Full(3, "int64", (T, 2)),
            shape.Full(True, "bool", (T,)),
            shape.DimValue(T * 2 + 1),
            shape.DimValue(T, "float32"),
            shape.Arange(T),
            shape.Arange(T + 1, start=2, step=3, dtype="int32"),
            shape.Arange(4, dtype="float32"),
        ]
        return [g.append(op).result for op in ops]

    check(function({"x": f32(T + 1, 2)}, body), tmp_path, {"x": normal(4, 2)}, 0)


def test_a_dimension_that_no_input_tells_is_refused(tmp_path: Path) -> None:
    graph = function({"x": f32(T * S)}, lambda g, x: shape.Reshape(x, (T, S)))
    with pytest.raises(UnsupportedError, match="tells the dimension T"):
        build(graph, tmp_path)


@pytest.mark.parametrize("t", [0, 1, 3])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((T, 12), (T, 3, 4)),
        ((T, 3, 4), (T * 3, 4)),
        ((S, T, 4), (S * T, 4)),
        ((S, T, 12), (S, T, 3, 4)),
        ((T, S, 6), (S, T, 6)),
        ((T, 2, S), (T * S * 2,)),
        ((1, T, 4), (T, 1, 4)),
        ((2, T, 6), (2, 3, T * 2)),
    ],
)
def test_reshape_symbolic(old: Any, new: Any, t: int, tmp_path: Path) -> None:
    graph = function({"s": f32(S), "t": f32(T), "x": f32(*old)}, lambda g, s, t_, x: shape.Reshape(x, new))
    dims = [{"T": t, "S": 5}.get(str(d), d) for d in old]
    check(graph, tmp_path, {"s": normal(5), "t": normal(t), "x": normal(*dims)}, 0)


def test_moves(tmp_path: Path) -> None:
    def body(g: Graph, x: Value, y: Value) -> list[Value]:
        ops = [
            shape.Transpose(x, (-1, -2)),
            shape.Transpose(x, (-2, -3, -1)),
            shape.Expand(y, (3, T, 4)),
            shape.Slice(x, -2, 1, T),
            shape.Slice(x, -1, 0, 4, 2),
            shape.Slice(x, -1, 1, 2),
            shape.Slice(x, -2, T - 2, T - 1),
            shape.Concat([x, x, y], -3),
            shape.Concat([x, x], -1),
        ]
        return [g.append(op).result for op in ops]

    graph = function({"x": f32(2, T, 4), "y": f32(1, T, 4)}, body)
    check(graph, tmp_path, {"x": normal(2, 3, 4), "y": normal(1, 3, 4, seed=1)}, 0)


def test_index(tmp_path: Path) -> None:
    def body(g: Graph, x: Value, i: Value, j: Value) -> list[Value]:
        column = g.append(shape.Reshape(j, (S, 1))).result
        ops = [shape.Index(x, [i]), shape.Index(x, [column, i]), shape.Index(x, [j, j])]
        return [g.append(op).result for op in ops]

    types = {"x": f32(T, 4, 3), "i": TensorType("int32", (2,)), "j": i64(S)}
    indices = {"i": np.array([1, -1], np.int32), "j": np.array([0, 2, 1, 3])}
    check(function(types, body), tmp_path, {"x": normal(5, 4, 3), **indices}, 0)


def test_gather(tmp_path: Path) -> None:
    graph = function({"x": f32(T, 4), "i": i64(T, 2)}, lambda g, x, i: shape.Gather(x, i))
    check(graph, tmp_path, {"x": normal(3, 4), "i": np.array([[0, 3], [1, 1], [2, 0]])}, 0)


def test_gather_by_one_index_for_all_rows(tmp_path: Path) -> None:
    graph = function({"x": f32(B, T, 4), "i": i64(3)}, lambda g, x, i: shape.Gather(x, i))
    check(graph, tmp_path, {"x": normal(2, 3, 4), "i": np.array([3, 0, 3])}, 0)


# -- layers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(T,), (B, T)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linear(dtype: str, lead: tuple[Any, ...], bias: bool, tmp_path: Path) -> None:
    from llmc.ir.dtypes import to_numpy

    def body(g: Graph, x: Value) -> Op:
        w = weight(g, "w", normal(10, 32, seed=1).astype(to_numpy(dtype)))
        return nn.Linear(x, w, weight(g, "b", normal(10, seed=2)) if bias else None)

    check(function({"x": f32(*lead, 32)}, body), tmp_path, {"x": normal(*[3, 2][: len(lead)], 32)}, 1e-5)


def test_tied_embedding_is_held_once(tmp_path: Path) -> None:
    def body(g: Graph, ids: Value) -> list[Value]:
        table = weight(g, "table", normal(20, 8))
        x = g.append(nn.Embedding(ids, table)).result
        return [x, g.append(nn.Linear(x, table, None)).result]

    graph = function({"ids": TensorType("int32", (T,))}, body)
    check(graph, tmp_path, {"ids": np.array([3, 19, 0], np.int32)}, 1e-5)
    assert list(Artifact.open(tmp_path / "model.llmc").weights("onnx-cpu")) == ["table"]


@pytest.mark.parametrize("parts", ["weight and bias", "weight", "neither"])
def test_norms(parts: str, tmp_path: Path) -> None:
    def body(g: Graph, x: Value) -> list[Value]:
        w = weight(g, "w", normal(48, seed=1)) if "weight" in parts else None
        b = weight(g, "b", normal(48, seed=2)) if "bias" in parts else None
        ops = [nn.RmsNorm(x, w, eps=1e-6), nn.LayerNorm(x, w, b, eps=1e-5)]
        return [g.append(op).result for op in ops]

    check(function({"x": f32(T, 48)}, body), tmp_path, {"x": normal(5, 48) * 4}, 1e-5)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("rotary", [8, 4])
def test_rope(rotary: int, interleaved: bool, tmp_path: Path) -> None:
    types = {"x": f32(T, 3, 8), "cos": f32(T, rotary), "sin": f32(T, rotary)}
    graph = function(types, lambda g, x, c, s: nn.Rope(x, c, s, interleaved))
    angle = normal(5, rotary, seed=1) * 3
    check(graph, tmp_path, {"x": normal(5, 3, 8), "cos": np.cos(angle), "sin": np.sin(angle)}, 2e-6)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize(("heads", "rotary"), [(3, 16), (1, 16), (3, 8)])
def test_rope_with_repeated_tables_is_one_node(heads: int, rotary: int, scaled: bool, tmp_path: Path) -> None:
    """What models trace to: cos and sin of concat(angle, angle), perhaps scaled (YaRN)."""

    def body(g: Graph, x: Value, angle: Value) -> Op:
        both = g.append(shape.Concat([angle, angle], -1)).result
        tables = [g.append(op(both)).result for op in (math.Cos, math.Sin)]
        if scaled:
            factor = g.append(shape.Full(1.1, "float32")).result
            tables = [g.append(math.Mul(t, factor)).result for t in tables]
        return nn.Rope(x, *tables)

    graph = function({"x": f32(T, heads, 16), "angle": f32(T, rotary // 2)}, body)
    check(graph, tmp_path, {"x": normal(5, heads, 16), "angle": normal(5, rotary // 2, seed=1) * 3}, 2e-6)
    model = (tmp_path / "model.llmc/targets/onnx-cpu/model.onnx").read_bytes()
    assert b"RotaryEmbedding" in model


@pytest.mark.parametrize("activation", nn.ACTIVATIONS)
def test_gated_mlp(activation: str, tmp_path: Path) -> None:
    graph = function({"x": f32(T, 12)}, lambda g, x: nn.GatedMlp(x, activation))
    check(graph, tmp_path, {"x": normal(5, 12) * 3}, 2e-6)


@pytest.mark.parametrize("mask", [None, "bool", "float32"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_sdpa(kv_heads: int, mask: str | None, tmp_path: Path) -> None:
    types = {"q": f32(2, 4, T, 8), "k": f32(2, kv_heads, S, 8), "v": f32(2, kv_heads, S, 6)}
    arrays = {
        "q": normal(2, 4, 3, 8),
        "k": normal(2, kv_heads, 5, 8, seed=1),
        "v": normal(2, kv_heads, 5, 6, seed=2),
    }
    if mask:
        types["m"] = TensorType(mask, (1, 1, T, S))
        seen = RNG(3).random((1, 1, 3, 5)) < 0.7
        seen[..., 1, :] = False  # one row sees nothing: zeros
        arrays["m"] = seen if mask == "bool" else np.where(seen, 0, -np.inf).astype(np.float32)

    def body(g: Graph, q: Value, k: Value, v: Value, *m: Value) -> Op:
        return attention.Sdpa(q, k, v, m[0] if m else None, scale=0.3, causal=not m, enable_gqa=kv_heads != 4)

    check(function(types, body), tmp_path, arrays, 1e-5)


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"causal": False},
        {"window": 2},
        {"softcap": 0.5},
        {"sinks": True},
        {"slopes": True},
        {"distances": True},
    ],
)
def test_attention_of_whole_sequences(variant: dict[str, Any], tmp_path: Path) -> None:
    fields = {k: v for k, v in variant.items() if k not in ("sinks", "slopes", "distances")}

    def body(g: Graph, q: Value, k: Value, v: Value) -> Op:
        table = distance_table(4, 32)
        numbers = {"sinks": normal(4, seed=5), "slopes": normal(4, seed=5), "distances": table}
        per_head = [weight(g, n, array) if n in variant else None for n, array in numbers.items()]
        return attention.Attention(q, k, v, *per_head, scale=0.4, **fields)

    types = {"q": f32(B, T, 4, 8), "k": f32(B, T, 2, 8), "v": f32(B, T, 2, 8)}
    arrays = {n: normal(2, 6, 4 if n == "q" else 2, 8, seed=i) for i, n in enumerate("qkv")}
    check(function(types, body), tmp_path, arrays, 1e-5)
