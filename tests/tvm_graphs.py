"""Graphs for the tests of tvm-cpu: single ops over shared inputs, and how a graph is compiled and opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from llmc.codegen.artifact import Artifact, ArtifactWriter
from llmc.codegen.target import get_target, no_progress
from llmc.ir.core import Graph, Value
from llmc.ir.ops import math, quant
from llmc.ir.types import Quantization, TensorType, sym
from llmc.ir.weights import ArrayTensor
from llmc.runtime import cpu
from llmc.runtime.executor import open_executor
from llmc.runtime.executor.tvm import TvmExecutor

m: Any = math
T, B, R, P, N = (sym(s) for s in "TBRPN")
PAGES, PAGE = 12, 16
RNG = np.random.default_rng(3)

# The level that this machine runs: which one does not matter to what is tested with it.
ISA = cpu.best_isa()


def random(*dims: int, scale: float = 1.0) -> np.ndarray:
    return (RNG.standard_normal(dims) * scale).astype(np.float32)


def compile_graph(
    graph: Graph, out: Path, kind: str = "function", isa: str = ISA, tune: int = 0, **manifest: Any
) -> Artifact:
    with ArtifactWriter(out) as writer:
        entry = get_target(f"tvm-cpu:isa={isa},tune={tune}").compile(graph, writer, progress=no_progress)
        return writer.finish({"kind": kind, "model": {}, "targets": {"tvm-cpu": entry}, **manifest})


def open_tvm(artifact: Artifact, threads: int = 2) -> TvmExecutor:
    executor = open_executor(artifact, threads=threads)
    assert isinstance(executor, TvmExecutor)
    return executor


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


def quantized_layer() -> Graph:
    """One `quantized_linear` of 4 bits, input "a" as in `inputs_of`."""
    o = Ops()
    codes = ArrayTensor(RNG.integers(0, 16, (96, 24), np.uint8))
    q = o.graph.add_weight("q", codes, TensorType("uint8", (96, 24), Quantization(4, 24, True)))
    scale = o.graph.add_weight("s", ArrayTensor(np.full((96, 1), 0.02, np.float16)))
    o.out("y", quant.QuantizedLinear(o.a, q, scale, None, None))
    o.graph.inputs[1:] = []
    return o.graph


def inputs_of(t: int) -> dict[str, np.ndarray]:
    return {
        "a": random(t, 24),
        "b": random(t, 24),
        "c": random(3, t, 8),
        "i": RNG.integers(0, 6, t),
        "k": RNG.integers(0, 6, (2, t), np.int32),
    }
