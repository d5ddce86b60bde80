"""tvm-cpu: every emitter against its reference, the compiler's process, errors."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch
from llmc.codegen.tvm import worker
from llmc.codegen.tvm.cpu import OPERATIONS, TvmCpu
from llmc.codegen.tvm.worker import Compilation, ready_workers
from llmc.ir import interpreter
from llmc.ir.core import Graph
from llmc.ir.errors import CompileError, InputError, UnsupportedError
from llmc.ir.ops import attention, nn, quant, shape
from llmc.ir.printer import print_graph
from llmc.ir.types import Quantization, TensorType
from llmc.ir.weights import ArrayTensor
from llmc.runtime.executor.tvm import aligned

from .tvm_graphs import (
    ISA,
    RNG,
    Ops,
    T,
    compile_graph,
    inputs_of,
    m,
    open_tvm,
    random,
)


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
    edges = [o(shape.Full(float(n), "float32", (n, 24))) for n in (4, 3)]
    padded = o(shape.Concat([edges[0], o.a, edges[1]], -2))
    o.out("padded", m.Sin(padded))
    o.out("windows", m.Mul(o(shape.Slice(padded, -2, 2, T + 2)), o(shape.Slice(padded, -2, 7, T + 7))))
    o.out("index", shape.Index(o.weight("table", 7, 5), [o.i]))
    o.out("index_two", shape.Index(o.weight("cube", 7, 6, 5), [o.i, o.k]))
    o.out("negative", shape.Index(o.weight("line", 9), [o(m.Neg(o(m.Add(o.i, o(shape.Full(1, "int64"))))))]))
    o.out(
        "gather",
        shape.Gather(
            o(m.Exp(o(shape.Slice(o.c, -3, 0, 2)))), o(shape.Expand(o(shape.Reshape(o.i, (T, 1))), (2, T, 3)))
        ),
    )
    order = o.graph.add_weight("order", ArrayTensor(np.arange(24, dtype=np.int32)[::-1].copy()))
    o.out("gather_columns", shape.Gather(o(m.Exp(o.a)), order))
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
    o.out("hadamard", quant.Hadamard(o.c, 8))
    o.out("hadamard_kernel", quant.Hadamard(o(shape.Concat([o.a, o.a], -1)), 16))
    heads = [o(shape.Reshape(x, (1, T, 3, 8))) for x in (o.a, o.b, o.a)]
    o.out("attention", attention.Attention(*heads, None, scale=0.35, window=3))
    o.out("sdpa", attention.Sdpa(o.c, o.c, o.c, None, 0.3, causal=True))


FORMS = [
    (Quantization(4, 8, False), "uint8"),
    (Quantization(8, 24, True), None),
    (Quantization(6, 8, True, "float32", super_group=16), None),
    (Quantization(5, 8, False, "float32"), "float32"),
    (Quantization(4, 8, True, codebook="iq4_nl"), None),
    (Quantization(4, 12, True, codebook="nf4"), None),
]
"""(quantization, dtype of its zero points)"""


def add_quantized(o: Ops) -> None:
    for i, (form, zero_dtype) in enumerate(FORMS):
        bits, groups = form.bits, -(-24 // form.group_size)
        codes = ArrayTensor(RNG.integers(0, 1 << bits, (9, 24), np.uint8))
        q = o.graph.add_weight(f"q{i}", codes, TensorType("uint8", (9, 24), form))
        step = RNG.random((9, groups)) * (0.002 if form.codebook == "iq4_nl" else 0.32 / (1 << bits))
        if form.super_group:
            step = np.float16(0.0001) * RNG.integers(1, 63, (9, groups))
        scale = o.graph.add_weight(f"s{i}", ArrayTensor(step.astype(form.scale_dtype)))
        zero = None
        if zero_dtype == "uint8":
            zero = o.graph.add_weight(f"z{i}", ArrayTensor(RNG.integers(5, 11, (9, groups), np.uint8)))
        elif zero_dtype is not None:
            zero = o.graph.add_weight(f"z{i}", ArrayTensor((-0.5 * step * (1 << bits)).astype(zero_dtype)))
        o.out(f"quantized_embedding{i}", quant.QuantizedEmbedding(o.i, q, scale, zero))
        o.out(f"quantized_linear{i}", quant.QuantizedLinear(o.a, q, scale, zero, None))
        plain = o.graph.add_weight(f"p{i}", codes, TensorType("uint8", (9, 24), form))
        parts = [
            o.graph.add_weight(f"{v.name}p", v.weight) for v in (scale, zero) if v is not None and v.weight
        ]
        o.out(f"dequantize{i}", quant.Dequantize(plain, parts[0], parts[1] if zero is not None else None))


@pytest.mark.parametrize("add", [add_elementwise, add_integers, add_movement, add_layers, add_quantized])
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
    from llmc.codegen.tvm import emit_llm, emit_moe, emit_state, emit_tensor
    from llmc.codegen.tvm.lower import EMITTERS

    assert all(module.__name__ for module in (emit_llm, emit_moe, emit_state, emit_tensor))
    assert set(EMITTERS) == set(OPERATIONS)


def test_an_artifact_in_the_place_of_another_is_what_runs(tmp_path: Path) -> None:
    """In one process, as in a notebook: the old one is loaded still, and goes on being what it was."""
    opened: list[Any] = []
    given = {"a": random(3, 24), "b": random(3, 24), "c": random(3, 3, 8)}
    integers = {"i": np.arange(3), "k": np.zeros((2, 3), np.int32)}
    for _ in range(2):
        for cls in (m.Add, m.Mul):
            o = Ops()
            o.out("y", cls(o.a, o.b))
            shutil.rmtree(tmp_path / "same", ignore_errors=True)
            opened.append(open_tvm(compile_graph(o.graph, tmp_path / "same")))
    wanted = [given["a"] + given["b"], given["a"] * given["b"]] * 2
    for executor, y in zip(opened, wanted, strict=True):
        np.testing.assert_allclose(executor.run({**given, **integers})["y"], y, rtol=1e-6)


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


# -- compiling
# -------------------------------------------------------------------------------------------------------


def test_compiling_needs_no_path_and_running_neither_tvm_nor_torch(tmp_path: Path) -> None:
    script = f"""
import sys
from llmc.codegen.artifact import Artifact
from tests.tvm_graphs import Ops, compile_graph, inputs_of, m
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
        assert compilation._process is not None
        process = compilation._process.popen
        assert process.poll() is None
    assert process.poll() is not None
    assert not (tmp_path / "x.so").exists()


@pytest.fixture
def no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """No processes wait but those that the test has started."""
    monkeypatch.setattr(worker, "_ready", ContextVar("ready", default=None))


@pytest.mark.usefixtures("no_others")
def test_a_worker_that_is_ready_takes_one_job_after_the_other_and_ends(tmp_path: Path) -> None:
    o = Ops()
    o.out("sum", m.Add(o.a, o.b))
    text = print_graph(o.graph)
    with ready_workers(1):
        used: list[subprocess.Popen[bytes]] = []
        for name in ("1.so", "2.so"):
            with Compilation(text, ISA, tmp_path / name) as compilation:
                assert compilation._process is not None
                used.append(compilation._process.popen)
                assert compilation.result()["symbols"] is not None
        assert used[0] is used[1]
        assert used[0].poll() is None, "it waits for the next job"
        # A job that fails ends its process; the next one gets another.
        with (
            pytest.raises(CompileError, match="no-such-folder"),
            Compilation(text, ISA, tmp_path / "no-such-folder" / "x.so") as compilation,
        ):
            compilation.result()
        assert used[0].poll() is not None
        with Compilation(text, ISA, tmp_path / "3.so") as compilation:
            assert compilation._process is not None
            used.append(compilation._process.popen)
            compilation.result()
    assert used[2].poll() is not None
    libraries = [(tmp_path / name).read_bytes() for name in ("1.so", "2.so", "3.so")]
    assert libraries[0] == libraries[1] == libraries[2]


@pytest.mark.usefixtures("no_others")
def test_compilations_within_a_block_use_its_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    o = Ops()
    o.out("sum", m.Add(o.a, o.b))
    used: list[subprocess.Popen[bytes]] = []

    def compile_in_thread(number: int, together: Barrier) -> None:
        with Compilation(print_graph(o.graph), ISA, tmp_path / f"{number}.so") as compilation:
            assert compilation._process is not None
            used.append(compilation._process.popen)
            together.wait(60)  # before one has its result, whose process would do for the next
            compilation.result()

    def one_compilation(levels: int) -> None:
        """As the driver's: a pool of threads, which end with it and end the processes that they started."""
        with ready_workers(1), ThreadPoolExecutor(levels) as threads:
            together, contexts = Barrier(levels), [copy_context() for _ in range(levels)]
            work = [threads.submit(c.run, compile_in_thread, i, together) for i, c in enumerate(contexts)]
            for one in work:
                one.result()

    with ready_workers(1, at_once=False):
        one_compilation(1)
        one_compilation(2)
        assert used[0] in used[1:] and len(set(used)) == 2
        assert used[0].poll() is None
        (other,) = set(used) - {used[0]}
        assert other.poll() is not None, "its thread is gone"
        used[0].kill()
        used[0].wait()
        one_compilation(1)
        one_compilation(1)
        assert used[-1] is used[-2] is not used[0]
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # where a package of ops may be
        one_compilation(1)
        assert used[-1] is not used[-2]
    assert used[-1].poll() is not None


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc here")
@pytest.mark.parametrize("seconds", [0.0, 1.5])
def test_a_worker_ends_where_its_compilation_is_killed(seconds: float, tmp_path: Path) -> None:
    o = Ops()
    o.out("sum", m.Add(o.a, o.b))
    script = f"""
import time
from llmc.codegen.tvm.worker import Compilation
worker = Compilation({print_graph(o.graph)!r}, {ISA!r}, {str(tmp_path / "x.so")!r})
print(worker._process.popen.pid, flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        try:
            assert parent.stdout is not None
            worker = Path("/proc", parent.stdout.readline().strip(), "stat")
            assert worker.exists()
            time.sleep(seconds)
            existed = (tmp_path / "x.so").exists()
        finally:
            parent.kill()
    deadline = time.monotonic() + 60
    while worker.exists() and worker.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert (tmp_path / "x.so").exists() == existed, "the worker went on"


def test_instances_that_the_kernels_do_not_take() -> None:
    graph = Graph()
    x = graph.add_input("x", TensorType("float32", (2, T, 3, 8)))
    table = graph.add_input("t", TensorType("float32", (T, 8)))
    assert not TvmCpu().supports(nn.Rope(x, table, table))
    assert TvmCpu().supports(nn.Rope(graph.add_input("y", TensorType("float32", (T, 3, 8))), table, table))
    half = graph.add_input("h", TensorType("float16", (T, 8)))
    assert not TvmCpu().supports(nn.RmsNorm(half, None, 1e-6))


def test_aligned_arrays() -> None:
    for dims in ((1,), (3, 5), (64,)):
        array = aligned(dims, np.dtype(np.float32))
        assert array.shape == dims
        assert array.ctypes.data % 64 == 0
        assert not array.any()
