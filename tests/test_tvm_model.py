"""tvm-cpu: a paged model from graph to numbers, however steps are cut; its bytes, its levels, refusals."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llmc.codegen.artifact import Artifact
from llmc.codegen.tvm.weights import weight_specs
from llmc.ir import interpreter
from llmc.ir.core import Graph, Value
from llmc.ir.errors import ArtifactError, InputError
from llmc.ir.ops import cache, nn, quant, shape
from llmc.ir.types import Quantization, TensorType
from llmc.ir.weights import ArrayTensor
from llmc.runtime import cpu
from llmc.runtime.executor import StepInputs, open_executor

from .tvm_graphs import (
    ISA,
    PAGE,
    PAGES,
    RNG,
    B,
    N,
    P,
    R,
    T,
    compile_graph,
    m,
    open_tvm,
    random,
)

HEADS, KV_HEADS, DIM, WIDTH, INNER, VOCAB = 4, 2, 16, 48, 40, 50


FORMS = [
    (Quantization(4, 8, False), "uint8"),
    (Quantization(6, 16, True, "float32", super_group=64), None),  # Q6_K in kind
    (Quantization(5, 32, False, "float32", super_group=64), "float32"),  # Q5_K in kind
    (Quantization(4, 32, True, codebook="iq4_nl"), None),
    (Quantization(4, 16, True, "float32", codebook="nf4"), None),
    (Quantization(3, 16, True), None),
    (Quantization(8, 24, False), "float16"),
    (Quantization(2, 8, False), "uint8"),
]
"""(quantization, dtype of its zero points), one for each linear op of `Model`."""


def quantized_parts(form: Quantization, zero: str | None, n: int, k: int) -> list[np.ndarray | None]:
    """Random codes, scales and zero points of a weight with a standard deviation of about k^-0.5."""
    groups, half = -(-k // form.group_size), 1 << (form.bits - 1)
    spread = {"iq4_nl": 70.0, "nf4": 0.6}.get(form.codebook or "", 2 * half / 12**0.5)
    codes = RNG.integers(0, 2 * half, (n, k), np.uint8)
    scale = np.full((n, groups), k**-0.5 / spread).astype(form.scale_dtype)
    if form.super_group:
        base = np.float32(np.float16(k**-0.5 / spread / 50))
        scale = base * RNG.integers(40, 60, (n, groups)).astype(np.float32)
    if zero is None:
        return [codes, scale, None]
    if zero == "uint8":
        low, high = half - half // 4 - 1, half + half // 4 + 1
        return [codes, scale, RNG.integers(low, high, (n, groups), np.uint8)]
    factor = np.float32(0.5 - half) if not form.super_group else np.float32(-half)
    return [codes, scale, (factor * scale.astype(np.float32)).astype(zero)]


class Model:
    """Two layers like Llama's, by hand, with float weights or each linear op's quantized in its own way."""

    def __init__(self, quantized: bool = False, kv_dtype: str = "float32", **attributes: Any) -> None:
        self.graph = Graph(stage="paged")
        self.quantized = quantized
        self.linears = 0
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
        form, zero_dtype = FORMS[self.linears % len(FORMS)]
        self.linears += 1
        codes, scale, zero = (
            None if a is None else ArrayTensor(a) for a in quantized_parts(form, zero_dtype, n, k)
        )
        assert codes is not None and scale is not None
        parts = [
            self.graph.add_weight(f"{name}.q", codes, TensorType("uint8", (n, k), form)),
            self.graph.add_weight(f"{name}.s", scale),
        ]
        point = None if zero is None else self.graph.add_weight(f"{name}.z", zero)
        return self.add(quant.QuantizedLinear(x, *parts, point, None))

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
            cache.PagedAttention(q, kept, start, length, table, None, scale=DIM**-0.5, **attributes)
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
    values = {name: torch.from_numpy(array) for name, array in inputs.given().items()}
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
    model = Model(quantized=True, kv_dtype="bfloat16")
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
    wanted = reference(model, [(IDS, 0, PAGES_OF)], empty_pages(torch.bfloat16))
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


def test_the_same_graph_gives_the_same_bytes(float_model: tuple[Model, Artifact], tmp_path: Path) -> None:
    model, artifact = float_model
    again = model.compile(tmp_path / "again.llmc")
    assert again.manifest == artifact.manifest  # it holds the sha256 of every file


@pytest.mark.slow
def test_every_level_compiles(tmp_path: Path) -> None:
    model = Model(quantized=True)
    levels = "+".join(cpu.ISA_LEVELS)
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


def test_progress_of_packing_ends_at_one() -> None:
    shares: list[float] = []
    for _, shape_, dtype, chunks in weight_specs(Model(quantized=True).graph, shares.append):
        packed = np.concatenate(list(chunks))
        assert packed.shape == shape_
        assert packed.dtype.name == dtype
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
