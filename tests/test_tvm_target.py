"""tvm-cpu from a graph to numbers: every emitter, a paged model, the artifact's bytes, errors."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llmc.codegen.artifact import Artifact, ArtifactWriter
from llmc.codegen.target import get_target, no_progress
from llmc.codegen.tvm.cpu import OPERATIONS, supports
from llmc.codegen.tvm.weights import weight_specs
from llmc.codegen.tvm.worker import Compilation
from llmc.ir import interpreter
from llmc.ir.core import Graph, Value
from llmc.ir.errors import ArtifactError, CompileError, InputError, UnsupportedError
from llmc.ir.ops import attention, cache, math, nn, quant, shape
from llmc.ir.printer import print_graph
from llmc.ir.types import Quantization, TensorType, sym
from llmc.ir.weights import ArrayTensor
from llmc.runtime import cpu
from llmc.runtime.executor import StepInputs, open_executor
from llmc.runtime.executor.tvm import TvmExecutor, aligned

m: Any = math
T, B, R, P, N = (sym(s) for s in "TBRPN")
PAGES, PAGE = 12, 16
RNG = np.random.default_rng(3)

# The level that this machine runs: which one does not matter to what is tested here.
ISA = next(level for level in ("avx512vnni", "avx2", "generic") if level in cpu.supported_isas())


def random(*dims: int, scale: float = 1.0) -> np.ndarray:
    return (RNG.standard_normal(dims) * scale).astype(np.float32)


def compile_graph(
    graph: Graph, out: Path, kind: str = "function", isa: str = ISA, **manifest: Any
) -> Artifact:
    with ArtifactWriter(out) as writer:
        entry = get_target(f"tvm-cpu:isa={isa}").compile(graph, writer, progress=no_progress)
        return writer.finish({"kind": kind, "model": {}, "targets": {"tvm-cpu": entry}, **manifest})


def open_tvm(artifact: Artifact, threads: int = 2) -> TvmExecutor:
    executor = open_executor(artifact, threads=threads)
    assert isinstance(executor, TvmExecutor)
    return executor


# -- functions: one graph for many ops, so that it is compiled once
# ----------------------------------------------------


class Ops:
    """Collects results of single ops over shared inputs, each an output of its own."""

    def __init__(self) -> None:
        self.graph = Graph()
        self.a = self.graph.add_input("a", TensorType("float32", (T, 24)))
        self.b = self.graph.add_input("b", TensorType("float32", (T, 24)))
        self.c = self.graph.add_input("c", TensorType("float32", (3, T, 8)))
        self.i = self.graph.add_input("i", TensorType("int64", (T,)))
        self.k = self.graph.add_input("k", TensorType("int32", (2, T)))

    def __call__(self, op: Any) -> Value:
        return self.graph.append(op).result

    def out(self, name: str, op: Any) -> None:
        self.graph.outputs.append(self(op))
        self.graph.output_names.append(name)

    def weight(self, name: str, *dims: int, scale: float = 1.0) -> Value:
        return self.graph.add_weight(name, ArrayTensor(random(*dims, scale=scale)))


def add_elementwise(o: Ops) -> None:
    positive = o(m.Add(o(m.Abs(o.a)), o(shape.Full(0.1, "float32"))))
    for cls in (m.Neg, m.Exp, m.Tanh, m.Sin, m.Cos, m.Erf, m.Sigmoid, m.Relu, m.Abs, m.Floor, m.Silu, m.Gelu):
        o.out(cls.opname, cls(o.a))
    o.out("gelu_tanh", m.Gelu(o.a, True))
    for cls in (m.Log, m.Sqrt, m.Rsqrt, m.Reciprocal):
        o.out(cls.opname, cls(positive))
    for cls in (m.Add, m.Sub, m.Mul, m.Div, m.Maximum, m.Minimum):
        o.out(cls.opname, cls(o.a, o.b))
    o.out("pow", m.Pow(positive, o.b))
    o.out("scalars", m.Add(o(shape.Full(2.0, "float32")), o(shape.Full(3.0, "float32"))))
    o.out("broadcast", m.Mul(o.c, o.weight("row", 8)))
    o.out("column", m.Sub(o.a, o(m.ReduceMax(o.a, (-1,), True))))


def add_integers(o: Ops) -> None:
    three = o(shape.Full(3, "int64"))
    for cls in (
        m.FloorDivide,
        m.Remainder,
        m.Less,
        m.LessEqual,
        m.Greater,
        m.GreaterEqual,
        m.Equal,
        m.NotEqual,
    ):
        o.out(cls.opname, cls(o.i, three))
    low, high = o(m.Less(o.i, three)), o(m.Greater(o.i, o(shape.Full(1, "int64"))))
    for cls in (m.LogicalAnd, m.LogicalOr):
        o.out(cls.opname, cls(low, high))
    o.out("logical_not", m.LogicalNot(low))
    o.out("to_float", m.Cast(o.i, "float32"))
    o.out("to_int", m.Cast(o.a, "int32"))
    o.out("to_bool", m.Cast(o.k, "bool"))
    o.out("where", m.Where(o(shape.Reshape(low, (T, 1))), o.a, o.b))
    o.out("cumsum", m.CumSum(o.k))
    o.out("cumsum_rows", m.CumSum(o.a, -2))
    o.out("diff", m.Diff(o.k, o(shape.Full(-1, "int32", (2, 1)))))
    o.out("dim_value", shape.DimValue(2 * T + 1))
    o.out("arange", shape.Arange(T + 1, 3, 2))
    o.out("full", shape.Full(1.5, "float32", (2, T)))


def add_movement(o: Ops) -> None:
    o.out("reshape", shape.Reshape(o.a, (T, 4, 6)))
    o.out("again", shape.Reshape(o(m.Exp(o.a)), (T, 4, 6)))
    o.out("transpose", shape.Transpose(o.c, (-2, -3, -1)))
    o.out("expand", shape.Expand(o(shape.Reshape(o.a, (1, T, 24))), (2, T, 24)))
    o.out("slice", shape.Slice(o.a, -1, 3, 20))
    o.out("slice_step", shape.Slice(o.a, -1, 1, 24, 2))
    o.out("slice_end", shape.Slice(o.a, -2, T - 1, T))
    o.out("concat", shape.Concat([o.a, o.b, o(shape.Slice(o.a, -1, 0, 5))], -1))
    o.out("concat_rows", shape.Concat([o.a, o.b], -2))
    o.out("index", shape.Index(o.weight("table", 7, 5), [o.i]))
    o.out("index_two", shape.Index(o.weight("cube", 7, 6, 5), [o.i, o.k]))
    o.out("negative", shape.Index(o.weight("line", 9), [o(m.Neg(o(m.Add(o.i, o(shape.Full(1, "int64"))))))]))
    o.out(
        "gather",
        shape.Gather(
            o(m.Exp(o(shape.Slice(o.c, -3, 0, 2)))), o(shape.Expand(o(shape.Reshape(o.i, (T, 1))), (2, T, 3)))
        ),
    )
    for cls in (m.ReduceSum, m.ReduceMean, m.ReduceMax):
        o.out(cls.opname, cls(o.a, (-1,)))
        o.out(f"{cls.opname}_kept", cls(o.c, (-3, -2), True))
    o.out("softmax", m.Softmax(o.c))
    o.out("softmax_rows", m.Softmax(o.a, -2))
    o.out("matmul", m.MatMul(o.c, o(shape.Transpose(o.c, (-1, -2)))))
    o.out("matmul_shared", m.MatMul(o.c, o.weight("right", 8, 11)))
    o.graph.outputs += [o.a, o.graph.outputs[0]]
    o.graph.output_names += ["input", "twice"]


def add_layers(o: Ops) -> None:
    table = o.weight("embedding", 7, 24)
    o.out("embedding", nn.Embedding(o.i, table))
    o.out("embedding_rank2", nn.Embedding(o.k, table))
    o.out("tied", nn.Linear(o.a, table, None))
    o.out("linear", nn.Linear(o.c, o.weight("w", 10, 8), o.weight("bias", 10)))
    product = o(nn.Linear(o.a, o.weight("square", 24, 24), None))
    o.out("residual", m.Add(o.b, product))
    o.out("both", m.Add(o(nn.Linear(o.a, table, None)), o(nn.Linear(o.b, table, None))))
    mixed = o.weight("mixed", 10, 24)  # read by a linear op and by another one: stored as it is
    o.out("mixed", nn.Linear(o.a, mixed, None))
    o.out("mixed_exp", m.Exp(mixed))
    o.out("by_input", nn.Linear(o.a, o(shape.Slice(o.b, -2, 0, T)), None))
    o.out("rms_norm", nn.RmsNorm(o.a, o.weight("n", 24), 1e-6))
    o.out("rms_norm_heads", nn.RmsNorm(o(shape.Reshape(o.a, (T, 3, 8))), o.weight("h", 8), 1e-6))
    o.out("rms_norm_rank3", nn.RmsNorm(o.c, None, 1e-5))
    o.out("layer_norm", nn.LayerNorm(o.c, o.weight("lw", 8), o.weight("lb", 8), 1e-5))
    cos, sin = (o(f(o(shape.Slice(o.a, -1, 0, 8)))) for f in (m.Cos, m.Sin))
    o.out("rope", nn.Rope(o(shape.Reshape(o.b, (T, 3, 8))), cos, sin))
    part = o(shape.Reshape(o(shape.Slice(o.b, -1, 8, 24)), (T, 2, 8)))
    o.out("rope_of_columns", nn.Rope(part, cos, sin))
    o.out(
        "rope_batched",
        nn.Rope(o(shape.Reshape(o.c, (3, T, 2, 4))), *(o(shape.Slice(t, -1, 0, 4)) for t in (cos, sin))),
    )
    o.out("gated_mlp", nn.GatedMlp(o.c, "gelu_tanh"))
    heads = [o(shape.Reshape(x, (1, T, 3, 8))) for x in (o.a, o.b, o.a)]
    o.out("attention", attention.Attention(*heads, None, 0.35, window=3))
    o.out("sdpa", attention.Sdpa(o.c, o.c, o.c, None, 0.3, causal=True))
    add_quantized(o)


def add_quantized(o: Ops) -> None:
    for bits, symmetric in ((4, False), (8, True)):
        q = o.graph.add_weight(
            f"q{bits}",
            ArrayTensor(RNG.integers(0, 1 << bits, (9, 24), np.uint8)),
            TensorType("uint8", (9, 24), Quantization(bits, 24 if symmetric else 8, symmetric)),
        )
        groups = 1 if symmetric else 3
        scale = o.graph.add_weight(
            f"s{bits}", ArrayTensor((RNG.random((9, groups)) * 0.02).astype(np.float16))
        )
        zero = None
        if not symmetric:
            zero = o.graph.add_weight(f"z{bits}", ArrayTensor(RNG.integers(5, 11, (9, groups), np.uint8)))
        o.out(f"quantized_embedding{bits}", quant.QuantizedEmbedding(o.i, q, scale, zero))
        o.out(f"quantized_linear{bits}", quant.QuantizedLinear(o.a, q, scale, zero, None))


def inputs_of(t: int) -> dict[str, np.ndarray]:
    return {
        "a": random(t, 24),
        "b": random(t, 24),
        "c": random(3, t, 8),
        "i": RNG.integers(0, 6, t),
        "k": RNG.integers(0, 6, (2, t), np.int32),
    }


@pytest.mark.parametrize("add", [add_elementwise, add_integers, add_movement, add_layers])
def test_every_emitter_equals_its_reference(add: Callable[[Ops], None], tmp_path: Path) -> None:
    o = Ops()
    add(o)
    executor = open_tvm(compile_graph(o.graph, tmp_path / "f.llmc"))
    for t in (5, 1, 70):
        values = inputs_of(t)
        wanted = interpreter.run(o.graph, {k: torch.from_numpy(v) for k, v in values.items()})
        got = executor.run(values)
        assert list(got) == o.graph.output_names
        for (name, array), reference in zip(got.items(), wanted, strict=True):
            assert array.dtype == reference.numpy().dtype, name
            # A quantized product rounds its activations to 8 bits.
            loose = 0.02 * float(reference.abs().max()) if name.startswith("quantized_linear") else 3e-5
            np.testing.assert_allclose(
                array, reference.numpy(), rtol=3e-5, atol=loose, err_msg=f"{name}, T={t}"
            )


def test_the_list_of_operations_is_what_there_are_emitters_for() -> None:
    from llmc.codegen.tvm import emit_llm, emit_tensor
    from llmc.codegen.tvm.lower import EMITTERS

    assert emit_llm.__name__ and emit_tensor.__name__
    assert set(EMITTERS) == set(OPERATIONS)


def test_functions_check_their_inputs(tmp_path: Path) -> None:
    o = Ops()
    o.out("sum", m.Add(o.a, o.b))
    executor = open_tvm(compile_graph(o.graph, tmp_path / "f.llmc"))
    good = inputs_of(4)
    with pytest.raises(InputError, match="inputs missing: b; unknown: bb"):
        executor.run({**{k: v for k, v in good.items() if k != "b"}, "bb": good["b"]})
    with pytest.raises(InputError, match=r"b is float32\[5, 24\], wanted float32\['T', 24\]"):
        executor.run({**good, "b": random(5, 24)})
    with pytest.raises(InputError, match="a is float64"):
        executor.run({**good, "a": good["a"].astype(np.float64)})


# -- a paged language model
# ------------------------------------------------------------------------------------------

HEADS, KV_HEADS, DIM, WIDTH, INNER, VOCAB = 4, 2, 16, 48, 40, 50


class Model:
    """Two layers like Llama's, by hand, with float or quantized weights."""

    def __init__(self, quantized: bool = False, kv_dtype: str = "float32", **attributes: Any) -> None:
        self.graph = Graph(stage="paged")
        self.quantized = quantized
        g, i32 = self.graph, "int32"
        ids, positions, slots = (
            g.add_input(n, TensorType(i32, (T,))) for n in ("token_ids", "positions", "slot_mapping")
        )
        start = g.add_input("query_start", TensorType(i32, (B + 1,)))
        length = g.add_input("context_len", TensorType(i32, (B,)))
        table = g.add_input("block_table", TensorType(i32, (B, P)))
        wanted = g.add_input("output_index", TensorType(i32, (R,)))
        page = TensorType(kv_dtype, (2, N, PAGE, KV_HEADS, DIM))
        pages = [g.add_input(f"kv_pages.{layer}", page) for layer in range(2)]
        self.embedding = g.add_weight("embedding", ArrayTensor(random(VOCAB, WIDTH)))
        x = self.add(nn.Embedding(ids, self.embedding))
        cos, sin = self.angles(positions)
        for layer in range(2):
            x = self.layer(layer, x, (cos, sin), pages[layer], (slots, start, length, table), attributes)
        x = self.add(nn.RmsNorm(self.add(cache.GatherLast(x, wanted)), self.norm("last", WIDTH), 1e-6))
        g.outputs = [self.add(nn.Linear(x, self.embedding, None))]
        g.output_names = ["logits"]

    def add(self, op: Any) -> Value:
        return self.graph.append(op).result

    def norm(self, name: str, width: int) -> Value:
        return self.graph.add_weight(name, ArrayTensor(1 + random(width, scale=0.1)))

    def linear(self, name: str, x: Value, n: int) -> Value:
        k = x.shape[-1]
        assert isinstance(k, int)
        if not self.quantized:
            return self.add(
                nn.Linear(x, self.graph.add_weight(name, ArrayTensor(random(n, k, scale=k**-0.5))), None)
            )
        type_ = TensorType("uint8", (n, k), Quantization(4, 8, False))
        q = self.graph.add_weight(f"{name}.q", ArrayTensor(RNG.integers(0, 16, (n, k), np.uint8)), type_)
        scale = self.graph.add_weight(
            f"{name}.s", ArrayTensor(np.full((n, k // 8), 0.2 * k**-0.5, np.float16))
        )
        zero = self.graph.add_weight(f"{name}.z", ArrayTensor(RNG.integers(6, 10, (n, k // 8), np.uint8)))
        return self.add(quant.QuantizedLinear(x, q, scale, zero, None))

    def angles(self, positions: Value) -> tuple[Value, Value]:
        frequency = self.graph.add_weight(
            "frequency", ArrayTensor((0.1 ** np.arange(DIM // 2)).astype(np.float32))
        )
        at = self.add(shape.Reshape(self.add(m.Cast(positions, "float32")), (T, 1)))
        angle = self.add(m.Mul(at, frequency))
        both = self.add(shape.Concat([angle, angle], -1))
        return self.add(m.Cos(both)), self.add(m.Sin(both))

    def layer(
        self, n: int, x: Value, tables: Any, pages: Value, where: Any, attributes: dict[str, Any]
    ) -> Value:
        slots, start, length, table = where
        h = self.add(nn.RmsNorm(x, self.norm(f"{n}.in", WIDTH), 1e-6))
        merged = self.linear(f"{n}.qkv", h, (HEADS + 2 * KV_HEADS) * DIM)
        q_end, k_end, v_end = HEADS * DIM, (HEADS + KV_HEADS) * DIM, (HEADS + 2 * KV_HEADS) * DIM
        parts: list[Value] = []
        for begin, end in ((0, q_end), (q_end, k_end), (k_end, v_end)):
            part = self.add(shape.Slice(merged, -1, begin, end))
            parts.append(self.add(shape.Reshape(part, (T, (end - begin) // DIM, DIM))))
        q, k = (self.add(nn.Rope(part, *tables)) for part in parts[:2])
        kept = self.add(cache.AppendKv(k, parts[2], pages, slots))
        attended = self.add(
            cache.PagedAttention(q, kept, start, length, table, None, DIM**-0.5, **attributes)
        )
        flat = self.add(shape.Reshape(attended, (T, HEADS * DIM)))
        x = self.add(m.Add(x, self.linear(f"{n}.out", flat, WIDTH)))
        h = self.add(nn.RmsNorm(x, self.norm(f"{n}.post", WIDTH), 1e-6))
        gated = self.add(nn.GatedMlp(self.linear(f"{n}.up", h, 2 * INNER), "silu"))
        return self.add(m.Add(x, self.linear(f"{n}.down", gated, WIDTH)))

    def compile(self, out: Path, isa: str = ISA) -> Artifact:
        return compile_graph(self.graph, out, "causal_lm", isa, page_size=PAGE, model={"vocab_size": VOCAB})


Piece = tuple[Sequence[int], int, Sequence[int]]
"""(tokens of a sequence, position of the first, its pages)."""


def step_inputs(pieces: Sequence[Piece], wanted: Sequence[int] | None = None) -> StepInputs:
    width = max(len(pages) for _, _, pages in pieces)
    tokens = [t for ids, _, _ in pieces for t in ids]
    positions = [start + i for ids, start, _ in pieces for i in range(len(ids))]
    slots = [pages[p // PAGE] * PAGE + p % PAGE for ids, s, pages in pieces for p in range(s, s + len(ids))]
    arrays = [
        tokens,
        positions,
        slots,
        np.cumsum([0, *(len(ids) for ids, _, _ in pieces)]),
        [start + len(ids) for ids, start, _ in pieces],
        [[*pages, *[0] * (width - len(pages))] for _, _, pages in pieces],
        range(len(tokens)) if wanted is None else wanted,
    ]
    return StepInputs(*(np.ascontiguousarray(a, dtype=np.int32) for a in arrays))


def reference(model: Model, pieces: Sequence[Piece], pages: dict[str, torch.Tensor]) -> np.ndarray:
    """The step through the interpreter; `pages` (the logical layout) are updated."""
    inputs = step_inputs(pieces)
    values = {n: torch.from_numpy(getattr(inputs, n)) for n in inputs.__slots__}
    graph = model.graph.clone()
    written = [op.result for op in graph if op.opname == "append_kv"]
    graph.outputs += written
    graph.output_names += list(pages)
    logits, *after = interpreter.run(graph, {**values, **pages})
    pages.update(zip(pages, after, strict=True))
    return logits.numpy()


def empty_pages(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {f"kv_pages.{i}": torch.zeros(2, PAGES, PAGE, KV_HEADS, DIM, dtype=dtype) for i in range(2)}


IDS = [int(t) for t in np.random.default_rng(5).integers(0, VOCAB, 40)]
PAGES_OF = [3, 7, 1]


@pytest.fixture(scope="module")
def float_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Artifact]:
    model = Model()
    return model, model.compile(tmp_path_factory.mktemp("float") / "m.llmc")


@pytest.fixture(scope="module")
def quantized_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Artifact]:
    model = Model(quantized=True, kv_dtype="float16")
    return model, model.compile(tmp_path_factory.mktemp("quantized") / "m.llmc")


def test_a_model_equals_its_references(float_model: tuple[Model, Artifact]) -> None:
    model, artifact = float_model
    executor = open_tvm(artifact)
    executor.allocate_kv(PAGES)
    pages = empty_pages()
    other = ([1, 2, 3], 0, [5])
    for pieces in (
        [(IDS[:20], 0, PAGES_OF)],
        [(IDS[20:21], 20, PAGES_OF), other],
        [(IDS[21:], 21, PAGES_OF)],
    ):
        wanted = reference(model, pieces, pages)
        np.testing.assert_allclose(executor.step(step_inputs(pieces)), wanted, rtol=1e-4, atol=1e-4)


def test_a_quantized_model_is_near_its_references(quantized_model: tuple[Model, Artifact]) -> None:
    model, artifact = quantized_model
    executor = open_tvm(artifact)
    executor.allocate_kv(PAGES)
    wanted = reference(model, [(IDS, 0, PAGES_OF)], empty_pages(torch.float16))
    got = executor.step(step_inputs([(IDS, 0, PAGES_OF)]))
    # Activations are rounded to 8 bits before each of the eight products.
    assert np.abs(got - wanted).max() < 0.03 * np.abs(wanted).max()


@pytest.mark.parametrize("name", ["float_model", "quantized_model"])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_row_is_the_same_however_steps_are_cut(
    name: str, threads: int, request: pytest.FixtureRequest
) -> None:
    _, artifact = request.getfixturevalue(name)
    executor = open_tvm(artifact, threads)
    executor.allocate_kv(PAGES)
    whole = executor.step(step_inputs([(IDS, 0, PAGES_OF)])).copy()
    for cuts in ([0, 17, 18, 19, 40], [0, 1, 33, 40], list(range(41))):
        parts: list[np.ndarray] = []
        for begin, end in pairwise(cuts):
            company = [] if begin % 2 else [(IDS[3 : 3 + begin % 5 + 1], 0, [9, 10])]
            # Alone or behind another sequence, on other pages in the second half of the table.
            pieces = [*company, (IDS[begin:end], begin, [8, 2, 11])]
            parts.append(executor.step(step_inputs(pieces))[-(end - begin) :].copy())
        assert np.array_equal(np.concatenate(parts), whole), cuts


def test_only_wanted_rows_come_back_and_none_may_be_wanted(float_model: tuple[Model, Artifact]) -> None:
    executor = open_tvm(float_model[1])
    executor.allocate_kv(PAGES)
    whole = executor.step(step_inputs([(IDS, 0, PAGES_OF)])).copy()
    assert np.array_equal(executor.step(step_inputs([(IDS, 0, PAGES_OF)], [39, 4])), whole[[39, 4]])
    assert executor.step(step_inputs([(IDS, 0, PAGES_OF)], [])).shape == (0, VOCAB)


def test_copied_pages_continue_alike(quantized_model: tuple[Model, Artifact]) -> None:
    executor = open_tvm(quantized_model[1])
    executor.allocate_kv(PAGES)
    assert executor.kv_bytes_per_page == 2 * 2 * KV_HEADS * PAGE * DIM * 2
    executor.step(step_inputs([(IDS[:20], 0, PAGES_OF)]))
    executor.copy_pages([PAGES_OF[1]], [6])
    wanted = executor.step(step_inputs([(IDS[20:21], 20, PAGES_OF)])).copy()
    assert np.array_equal(executor.step(step_inputs([(IDS[20:21], 20, [PAGES_OF[0], 6])])), wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_ids": [VOCAB]}, r"token_ids holds a value outside of 0 .. 49"),
        ({"slot_mapping": [-1]}, r"slot_mapping holds a value outside of 0 .. 191"),
        ({"block_table": [[PAGES]]}, "block_table holds a value outside"),
        ({"context_len": [17]}, "context_len holds a value outside of 0 .. 16"),
        ({"output_index": [1]}, "output_index holds a value outside of 0 .. 0"),
        ({"query_start": [0, 2]}, "does not describe the step"),
        ({"positions": [0, 1]}, "1 tokens and 1 sequences has arrays of other lengths"),
    ],
)
def test_indices_out_of_range_are_refused(
    change: dict[str, Any], message: str, float_model: tuple[Model, Artifact]
) -> None:
    executor = open_tvm(float_model[1])
    executor.allocate_kv(PAGES)
    good = step_inputs([([1], 0, [0])])
    arrays = {n: getattr(good, n) for n in good.__slots__} | {
        k: np.array(v, np.int32) for k, v in change.items()
    }
    with pytest.raises(InputError, match=message):
        executor.step(StepInputs(**arrays))


def test_arrays_that_kernels_cannot_index_are_refused(float_model: tuple[Model, Artifact]) -> None:
    executor = open_tvm(float_model[1])
    most = (2**31 - 1) // (2 * KV_HEADS * PAGE * DIM)
    with pytest.raises(InputError, match=f"cache of {most + 1} pages .*at most {most} pages"):
        executor.allocate_kv(most + 1)
    with pytest.raises(InputError, match="at least one page"):
        executor.allocate_kv(0)


def test_a_library_of_another_model_is_refused(float_model: tuple[Model, Artifact], tmp_path: Path) -> None:
    _, artifact = float_model
    entry = artifact.manifest["targets"]["tvm-cpu"]
    broken = {
        **artifact.manifest,
        "targets": {"tvm-cpu": {**entry, "arguments": ["weight:none", *entry["arguments"]]}},
    }
    with pytest.raises(ArtifactError, match="the kernels want weight 'none'"):
        open_executor(Artifact(artifact.root, broken))


# -- compiling
# -------------------------------------------------------------------------------------------------------


def test_the_same_graph_gives_the_same_bytes(float_model: tuple[Model, Artifact], tmp_path: Path) -> None:
    model, artifact = float_model
    again = model.compile(tmp_path / "again.llmc")
    assert again.manifest == artifact.manifest  # it holds the sha256 of every file


def test_compiling_needs_no_path_and_running_neither_tvm_nor_torch(tmp_path: Path) -> None:
    script = f"""
import sys
from llmc.codegen.artifact import Artifact
from tests.test_tvm_target import Ops, compile_graph, inputs_of, m
o = Ops()
o.out("sum", m.Add(o.a, o.b))
compile_graph(o.graph, {str(tmp_path / "f.llmc")!r})
"""
    environment = {**os.environ, "PATH": "", "PYTHONPATH": str(Path(__file__).parent.parent)}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
    script = f"""
import sys
import numpy as np
from llmc.codegen.artifact import Artifact
from llmc.runtime.executor import open_executor
executor = open_executor(Artifact.open({str(tmp_path / "f.llmc")!r}))
x = dict(a=np.ones((2, 24), np.float32), b=np.ones((2, 24), np.float32), c=np.zeros((3, 2, 8), np.float32),
         i=np.zeros(2, np.int64), k=np.zeros((2, 2), np.int32))
assert (executor.run(x)["sum"] == 2).all()
assert not {{"tvm", "tvm_ffi", "torch"}} & set(sys.modules), "too much is loaded"
"""
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


@pytest.mark.slow
def test_every_level_compiles(tmp_path: Path) -> None:
    model = Model(quantized=True)
    levels = "generic+avx2+avxvnni+avx512vnni"
    artifact = model.compile(tmp_path / "m.llmc", levels)
    kernels = artifact.manifest["targets"]["tvm-cpu"]["kernels"]
    assert [k["isa"] for k in kernels] == levels.split("+")
    rows: list[np.ndarray] = []
    for level in cpu.supported_isas():
        executor = open_executor(artifact, isa=level)
        executor.allocate_kv(PAGES)
        rows.append(executor.step(step_inputs([(IDS, 0, PAGES_OF)])).copy())
    for other in rows[1:]:
        np.testing.assert_allclose(other, rows[0], rtol=1e-3, atol=1e-3 * np.abs(rows[0]).max())


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(InputError, match=r"no instruction-set level 'avx9'; isa=generic\+avx2"):
        compile_graph(Graph(), Path("unused.llmc"), isa="avx9")


def run_worker(graph: Graph, out: Path) -> None:
    with Compilation(print_graph(graph), ISA, out) as compilation:
        compilation.result()


def test_errors_of_the_worker_keep_their_kind_and_a_dead_worker_is_an_error(tmp_path: Path) -> None:
    graph = Graph()
    x = graph.add_input("x", TensorType("float32", (1, 2, T, 8)))
    op = graph.append(attention.Sdpa(x, x, x, None, 1.0))
    op.loc = "layers.0.attention"
    graph.outputs, graph.output_names = [op.result], ["y"]
    with pytest.raises(UnsupportedError, match=r"cannot emit sdpa \(layers.0.attention\)"):
        run_worker(graph, tmp_path / "x.so")
    o = Ops()
    o.out("sum", m.Add(o.a, o.b))
    with pytest.raises(
        CompileError, match=f"the kernel compiler for {ISA} ended with status 1: .*no-such-folder"
    ):
        run_worker(o.graph, tmp_path / "no-such-folder" / "x.so")


def test_a_worker_ends_with_the_compilation(tmp_path: Path) -> None:
    o = Ops()
    o.out("sum", m.Add(o.a, o.b))
    with Compilation(print_graph(o.graph), ISA, tmp_path / "x.so") as compilation:
        process = compilation._process
        assert process.poll() is None
    assert process.poll() is not None
    assert not (tmp_path / "x.so").exists()


def test_progress_of_packing_ends_at_one() -> None:
    shares: list[float] = []
    for _, shape_, dtype, chunks in weight_specs(Model(quantized=True).graph, shares.append):
        packed = np.concatenate(list(chunks))
        assert packed.shape == shape_
        assert packed.dtype.name == dtype
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_instances_that_the_kernels_do_not_take() -> None:
    graph = Graph()
    x = graph.add_input("x", TensorType("float32", (2, T, 3, 8)))
    table = graph.add_input("t", TensorType("float32", (T, 8)))
    assert not supports(nn.Rope(x, table, table))
    assert supports(nn.Rope(graph.add_input("y", TensorType("float32", (T, 3, 8))), table, table))
    half = graph.add_input("h", TensorType("float16", (T, 8)))
    assert not supports(nn.RmsNorm(half, None, 1e-6))


def test_aligned_arrays() -> None:
    for dims in ((1,), (3, 5), (64,)):
        array = aligned(dims, np.dtype(np.float32))
        assert array.shape == dims
        assert array.ctypes.data % 64 == 0
        assert not array.any()
