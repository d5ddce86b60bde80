"""Target onnx-cpu: quantized weights, what lies in the artifact, and how it is loaded."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from llmc.codegen.onnx.cpu import OnnxCpu
from llmc.ir.core import Graph, Value
from llmc.ir.errors import ArtifactError
from llmc.ir.ops import math, nn, quant
from llmc.ir.types import Quantization, TensorType
from llmc.runtime.executor.onnx import OnnxExecutor

from .test_onnx_paged import VARIANTS, Heads, step_graph
from .test_onnx_target import RNG, T, build, check, f32, function, normal, private_bytes, weight

# -- quantized weights -------------------------------------------------------------------------------------


def quantized(
    g: Graph, name: str, n: int, k: int, q: Quantization, minimum: str = ""
) -> tuple[Value, Value, Value | None]:
    rng = RNG(7)
    groups = -(-k // q.group_size)
    values = rng.integers(0, 1 << q.bits, (n, k), dtype=np.uint8)
    scale = ((rng.random((n, groups)) + 0.5) / (1 << q.bits)).astype(q.scale_dtype)
    scale[1::3] *= -1
    parts = [weight(g, name, values, TensorType("uint8", (n, k), q)), weight(g, f"{name}.scale", scale)]
    zero = None
    if minimum:
        zero = weight(g, f"{name}.zero_point", -0.5 * rng.random((n, groups)).astype(minimum))
    elif not q.symmetric:
        zero = weight(g, f"{name}.zero_point", rng.integers(0, 1 << q.bits, (n, groups), dtype=np.uint8))
    return parts[0], parts[1], zero


SCHEMES = [
    (4, 32, 128), (4, 64, 192), (4, 128, 128), (4, 16, 48), (8, 64, 128), (8, 192, 192), (8, 100, 100),
    (4, 100, 100), (4, 24, 48), (8, 8, 40), (4, 512, 1024), (3, 32, 96), (4, 160, 320),
]  # fmt: skip
"""(bits, group, K): plain blocks, whole rows, K padded, groups of several blocks, no block fits, odd widths.
"""


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group", "k"), SCHEMES)
@pytest.mark.parametrize("level", [1, 4])
def test_quantized_linear(level: int, bits: int, group: int, k: int, symmetric: bool, tmp_path: Path) -> None:
    """Level 1 multiplies in float32: only the order of the sum differs. Level 4 rounds x to int8 per block:
    each element is off by at most 1/254 of its block's largest (about 3.5 standard deviations), at random:
    0.8% of an output's standard deviation, so 2% covers the worst of 120 outputs against the largest one.
    """
    scheme = Quantization(bits, group, symmetric)

    def body(g: Graph, x: Value) -> list[Value]:
        bias = weight(g, "bias", normal(24, seed=3))
        return [g.append(quant.QuantizedLinear(x, *quantized(g, "w", 24, k, scheme), bias)).result]

    version = tuple(int(n) for n in onnxruntime.__version__.split(".")[:2])
    if level == 1 and bits == 8 and version < (1, 23):
        pytest.skip("onnxruntime 1.22 multiplies 8-bit weights at accuracy level 4 only")
    for rows in (1, 5):
        graph = function({"x": f32(T, k)}, body)
        check(
            graph,
            tmp_path / str(rows),
            {"x": normal(rows, k)},
            2e-2 if level == 4 else 1e-5,
            accuracy_level=level,
        )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group", "k"), SCHEMES)
def test_quantized_embedding_is_exact(bits: int, group: int, k: int, symmetric: bool, tmp_path: Path) -> None:
    scheme = Quantization(bits, group, symmetric)

    def body(g: Graph, ids: Value) -> list[Value]:
        parts = quantized(g, "w", 24, k, scheme)
        return [
            g.append(quant.QuantizedEmbedding(ids, *parts)).result,
            g.append(quant.Dequantize(*parts)).result,
        ]

    graph = function({"ids": TensorType("int32", (T,))}, body)
    check(graph, tmp_path, {"ids": np.array([3, 0, 23, 3], np.int32)}, 1e-7)


FORMS = [
    (Quantization(4, 32, False), "float16", 128),
    (Quantization(5, 32, False, "float32"), "float32", 96),
    (Quantization(2, 16, False, "float32"), "float32", 40),
    (Quantization(8, 100, False), "float16", 100),
    (Quantization(3, 24, False), "float16", 60),
    (Quantization(6, 16, True, "float32"), "", 64),
    (Quantization(4, 32, True, codebook="iq4_nl"), "", 96),
    (Quantization(4, 64, True, "float32", codebook="nf4"), "", 80),
]
"""(quantization, dtype of a minimum, K): whole and short groups, grids with and without a kernel."""


@pytest.mark.parametrize(("form", "minimum", "k"), FORMS)
def test_minima_and_codebooks_are_exact(form: Quantization, minimum: str, k: int, tmp_path: Path) -> None:
    def rows(g: Graph, ids: Value) -> list[Value]:
        parts = quantized(g, "w", 24, k, form, minimum)
        return [
            g.append(quant.QuantizedEmbedding(ids, *parts)).result,
            g.append(quant.Dequantize(*parts)).result,
        ]

    def product(g: Graph, x: Value) -> list[Value]:
        bias = weight(g, "bias", normal(24, seed=3))
        return [g.append(quant.QuantizedLinear(x, *quantized(g, "w", 24, k, form, minimum), bias)).result]

    ids = np.array([3, 0, 23, 3], np.int32)
    check(function({"ids": TensorType("int32", (T,))}, rows), tmp_path / "rows", {"ids": ids}, 1e-7)
    graph = function({"x": f32(T, k)}, product)
    version = tuple(int(n) for n in onnxruntime.__version__.split(".")[:2])
    levels = [4] if form.bits > 4 and version < (1, 23) else [1, 4]
    for level in levels:
        tolerance = 2e-2 if level == 4 else 1e-5
        check(graph, tmp_path / str(level), {"x": normal(5, k)}, tolerance, accuracy_level=level)


def test_tied_quantized_table_is_held_once(tmp_path: Path) -> None:
    def body(g: Graph, ids: Value) -> list[Value]:
        parts = quantized(g, "w", 24, 64, Quantization(4, 32, False))
        x = g.append(quant.QuantizedEmbedding(ids, *parts)).result
        return [g.append(quant.QuantizedLinear(x, *parts, None)).result]

    graph = function({"ids": TensorType("int32", (T,))}, body)
    artifact = build(graph, tmp_path)
    weights = artifact.weights("onnx-cpu")
    assert {n: (a.dtype.name, a.shape) for n, a in weights.items()} == {
        "w:4x32": ("uint8", (24, 2, 16)),
        "w.scale:4x32": ("float32", (24, 2)),
        "w.zero_point:4x32": ("uint8", (24, 1)),
    }


# -- the artifact ------------------------------------------------------------------------------------------


def test_two_compiles_give_the_same_bytes(tmp_path: Path) -> None:
    made = [build(step_graph(VARIANTS["everything"]), tmp_path / n, kind="causal_lm") for n in "ab"]
    assert made[0].manifest["files"] == made[1].manifest["files"]
    entry = made[0].target("onnx-cpu")
    assert entry["batch_invariant"] is False
    assert entry["arguments"][:2] == ["token_ids", "query_start"]
    assert "slot_mapping" not in entry["arguments"]


@pytest.mark.parametrize("name", ["everything", "one head each"])
def test_the_model_is_valid_onnx(name: str, tmp_path: Path) -> None:
    """onnx's checker accepts it, with the weights as further inputs."""
    build(step_graph(VARIANTS[name]), tmp_path, kind="causal_lm")
    model = onnx.load(tmp_path / "model.llmc/targets/onnx-cpu/model.onnx", load_external_data=False)
    for t in model.graph.initializer:
        model.graph.input.append(onnx.helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)))
    del model.graph.initializer[:]
    onnx.checker.check_model(model)
    dims = {d.dim_param for v in model.graph.input for d in v.type.tensor_type.shape.dim if d.dim_param}
    assert dims == {"T", "B", "B+1", "P", "R", "N"}


def test_weights_are_streamed_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmc.codegen.onnx.weights.CHUNK_BYTES", 1000)
    reads: list[int] = []

    def body(g: Graph, x: Value) -> list[Value]:
        w = weight(g, "w", normal(50, 32))
        assert w.weight is not None
        real = w.weight.read
        monkeypatch.setattr(
            w.weight, "read", lambda a=0, b=None: (reads.append((b or 50) - a), real(a, b))[1]
        )
        return [g.append(nn.Linear(x, w, None)).result]

    artifact = build(function({"x": f32(T, 32)}, body), tmp_path)
    np.testing.assert_array_equal(artifact.weights("onnx-cpu")["w"], normal(50, 32))
    assert max(reads) <= 7
    assert sum(reads) == 50


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_weights_are_not_copied_when_loaded(tmp_path: Path) -> None:
    """Private memory of the process grows by less than half of a 32 MB weight when it is loaded and used."""

    graph = function({"x": f32(T, 2048)}, lambda g, x: nn.Linear(x, weight(g, "w", normal(4096, 2048)), None))
    artifact = build(graph, tmp_path)
    del graph
    gc.collect()  # graphs are cyclic, and this one holds the weight
    executor = OnnxExecutor(
        build(function({"x": f32(T)}, lambda g, x: math.Neg(x)), tmp_path / "warm"), threads=1
    )
    before = private_bytes()
    executor = OnnxExecutor(artifact, threads=1)
    executor.run({"x": normal(1, 2048)})
    assert private_bytes() - before < 16 << 20


def test_a_model_that_onnxruntime_cannot_read_is_refused(tmp_path: Path) -> None:
    artifact = build(step_graph(Heads()), tmp_path, kind="causal_lm")
    artifact.path("targets/onnx-cpu/model.onnx").write_bytes(b"no model")
    with pytest.raises(ArtifactError, match=r"model\.onnx: onnxruntime .* cannot load it"):
        OnnxExecutor(artifact)


def test_options_are_declared() -> None:
    assert OnnxCpu().options() == {"accuracy_level": 4, "pack": False}
