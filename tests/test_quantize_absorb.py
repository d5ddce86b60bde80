"""Absorbing scales of channels: the function stays, whatever the scales, where it is said to be possible."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llmc.ir.core import Graph, Value
from llmc.ir.errors import CompileError, LlmcError
from llmc.ir.interpreter import run
from llmc.ir.ops import math as m
from llmc.ir.ops.attention import Attention
from llmc.ir.ops.nn import Embedding, GatedMlp, LayerNorm, Linear, RmsNorm
from llmc.ir.ops.shape import Concat, Reshape, Slice, Transpose
from llmc.ir.types import TensorType, sym
from llmc.ir.verifier import verify
from llmc.ir.weights import ArrayTensor
from llmc.passes.derived import ScaledColumns, ScaledRows
from llmc.passes.quantize.absorb import absorb, find_absorption, give_norms_weights
from llmc.passes.quantize.channels import reshaped

from .conftest import LONG
from .family_configs import token_ids
from .graphs import lowered, traced, worst
from .small_models import FAMILIES

TOLERANCE = 1e-5
# Linear layers whose input can be scaled, of all: what the ops around them allow.
ABSORBED = {
    "llama": (9, 9),
    "gemma2": (8, 9),  # the embedding is the head
    "gpt2": (6, 9),  # nothing passes a GELU
    "olmo": (7, 9),  # values are clipped
    "olmo2": (5, 9),  # norms stand behind the layers
    "nemotron": (9, 9),  # relu² passes a square root
    "bert": (2, 8),  # every norm's result is also added
    "albert": (3, 9),  # layers share their weights
    "diffllama": (7, 9),
}


class Small:
    """A graph over x [1, T, width] under construction."""

    def __init__(self, width: int = 8) -> None:
        self.graph = Graph("small", "fused")
        self.rng = np.random.default_rng(5)
        self.x = self.graph.add_input("x", TensorType("float32", (1, sym("T"), width)))

    def weight(self, name: str, *shape: int) -> Value:
        return self.graph.add_weight(name, ArrayTensor(self.rng.normal(size=shape).astype(np.float32), name))

    def add(self, op: Any) -> Value:
        return self.graph.append(op).result

    def linear(self, x: Value, name: str, n: int, *, bias: bool = False) -> Value:
        k = x.shape[-1]
        assert isinstance(k, int)
        return self.add(Linear(x, self.weight(name, n, k), self.weight(f"{name}.bias", n) if bias else None))

    def done(self, *outputs: Value) -> Graph:
        self.graph.outputs = list(outputs)
        self.graph.output_names = [f"y{i}" for i in range(len(outputs))]
        verify(self.graph)
        return self.graph


def check_scaled(graph: Graph, x: Value, seed: int = 0) -> None:
    """Random scales on x change nothing but x."""
    inputs = {"x": torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(1))}
    before = run(graph, inputs)
    found = find_absorption(graph, x)
    assert found.possible, found.reason
    scale = np.exp(np.random.default_rng(seed).uniform(-1, 1, found.count))
    seen: dict[str, Any] = {}
    run(graph, inputs, observe=lambda op, _, results: seen.update(x=results[0]) if op is x.producer else None)
    old = seen["x"]
    absorb(graph, found, scale)
    verify(graph)
    after = run(graph, inputs, observe=lambda op, _, r: seen.update(x=r[0]) if op is x.producer else None)
    for a, b in zip(after, before, strict=True):
        assert worst(a, b) < TOLERANCE
    torch.testing.assert_close(
        seen["x"], old / torch.from_numpy(found.per_channel(scale)).float(), rtol=1e-4, atol=1e-5
    )


def normed() -> tuple[Graph, Value]:
    s = Small()
    h = s.add(LayerNorm(s.x, s.weight("norm", 8), s.weight("norm.bias", 8), eps=1e-5))
    return s.done(s.linear(h, "a", 6, bias=True), s.linear(h, "b", 4)), h


def gated() -> tuple[Graph, Value]:
    s = Small()
    h = s.add(GatedMlp(s.linear(s.x, "gate_up", 20, bias=True), activation="silu"))
    return s.done(s.linear(h, "down", 8)), h


def unfused_gate() -> tuple[Graph, Value]:
    s = Small()
    act = s.add(m.Silu(s.linear(s.x, "gate", 10)))
    h = s.add(m.Mul(act, s.linear(s.x, "up", 10)))
    return s.done(s.linear(h, "down", 8)), h


def squared() -> tuple[Graph, Value]:
    s = Small()
    r = s.add(m.Relu(s.linear(s.x, "up", 10, bias=True)))
    h = s.add(m.Mul(r, r))
    return s.done(s.linear(h, "down", 8)), h


def grouped_values() -> tuple[Graph, Value]:
    s = Small()
    qkv = s.linear(s.x, "qkv", 4 * 4 + 2 * 4 + 2 * 6)
    parts = [s.add(Slice(qkv, axis=-1, start=a, stop=b)) for a, b in ((0, 16), (16, 24), (24, 36))]
    q, k, v = (
        s.add(Reshape(p, shape=(1, sym("T"), heads, d)))
        for p, heads, d in zip(parts, (4, 2, 2), (4, 4, 6), strict=True)
    )
    h = s.add(Reshape(s.add(Attention(q, k, v, None, scale=0.5)), shape=(1, sym("T"), 24)))
    return s.done(s.linear(h, "o", 8)), h


def joined() -> tuple[Graph, Value]:
    s = Small()
    a, b = s.linear(s.x, "a", 6), s.linear(s.x, "b", 4)
    h = s.add(m.Neg(s.add(Concat([a, b], axis=-1))))
    turned = s.add(Transpose(h, perm=(-1, -2)))
    back = s.add(Transpose(turned, perm=(-1, -2)))
    return s.done(s.linear(back, "down", 8)), back


def weighted() -> tuple[Graph, Value]:
    s = Small()
    h = s.add(m.Mul(s.add(m.Tanh(s.x)), s.weight("gain", 8)))
    return s.done(s.linear(h, "down", 8)), h


@pytest.mark.parametrize(
    "build",
    [normed, gated, unfused_gate, squared, grouped_values, joined, weighted],
    ids=lambda f: f.__name__,
)
def test_scales_are_absorbed(build: Callable[[], tuple[Graph, Value]]) -> None:
    graph, x = build()
    check_scaled(graph, x)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_any_scales_are_absorbed(seed: int) -> None:
    for build in (gated, grouped_values, squared):
        graph, x = build()
        check_scaled(graph, x, seed)


def test_query_heads_share_the_scale_of_their_values() -> None:
    graph, x = grouped_values()
    found = find_absorption(graph, x)
    groups = found.groups.reshape(2, 2, 6)  # key/value head, query head, channel
    assert found.count == 12
    np.testing.assert_array_equal(groups[:, 0], groups[:, 1])
    wanted = np.arange(1.0, 25.0)
    tied = found.per_channel(found.tied(wanted)).reshape(2, 2, 6)
    np.testing.assert_allclose(tied[0, 0, 0], np.sqrt(1.0 * 7.0))
    edits = {e.weight.name: e for e in found.edits}
    rows = edits["qkv"].groups
    assert (rows[:24] == -1).all() and (rows[24:] >= 0).all(), "rows of q and k stay"


def test_only_the_up_half_of_a_gated_mlp_is_scaled() -> None:
    graph, x = gated()
    edits = {e.weight.name: e for e in find_absorption(graph, x).edits}
    assert (edits["gate_up"].groups[:10] == -1).all() and (edits["gate_up"].groups[10:] >= 0).all()
    assert edits["gate_up"].power == -1 and edits["down"].power == 1 and edits["down"].axis == 1


def gelu() -> tuple[Graph, Value]:
    s = Small()
    h = s.add(m.Gelu(s.linear(s.x, "up", 10)))
    return s.done(s.linear(h, "down", 8)), h


def read_elsewhere() -> tuple[Graph, Value]:
    s = Small()
    h = s.add(RmsNorm(s.x, s.weight("norm", 8), eps=1e-5))
    return s.done(s.linear(h, "a", 8), s.add(m.Tanh(h))), h


def output() -> tuple[Graph, Value]:
    s = Small()
    h = s.add(RmsNorm(s.x, s.weight("norm", 8), eps=1e-5))
    return s.done(s.linear(h, "a", 8), h), h


def given_input() -> tuple[Graph, Value]:
    s = Small()
    return s.done(s.linear(s.x, "a", 8)), s.x


def bare_norm() -> tuple[Graph, Value]:
    s = Small()
    h = s.add(RmsNorm(s.x, None, eps=1e-5))
    return s.done(s.linear(h, "a", 8)), h


def tied_table() -> tuple[Graph, Value]:
    s = Small()
    ids = s.graph.add_input("ids", TensorType("int32", (1, sym("T"))))
    table = s.weight("table", 12, 8)
    h = s.add(RmsNorm(s.add(Embedding(ids, table)), s.weight("norm", 8), eps=1e-5))
    return s.done(s.add(Linear(h, table, None))), h


def both_sides() -> tuple[Graph, Value]:
    s = Small()
    h = s.linear(s.x, "a", 8)
    return s.done(s.linear(h, "b", 8), s.add(m.Mul(h, s.add(m.Neg(h))))), h


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (gelu, "gelu lets no scale of channels pass"),
        (read_elsewhere, "tanh lets no scale of channels pass"),
        (output, "is an output of the graph"),
        (given_input, "x is an input of the graph"),
        (bare_norm, "rms_norm has no weight"),
        (tied_table, "rms_norm takes the scale of its operand away"),
        (both_sides, "both sides of mul would be scaled"),
    ],
    ids=lambda f: getattr(f, "__name__", ""),
)
def test_refusals_say_why(build: Callable[[], tuple[Graph, Value]], sentence: str) -> None:
    graph, x = build()
    found = find_absorption(graph, x)
    assert not found.possible and found.count == 0 and not found.edits
    assert found.reason is not None and sentence in found.reason


def test_a_norm_without_a_weight_gets_one() -> None:
    graph, _ = bare_norm()
    assert give_norms_weights(graph) == 1 and give_norms_weights(graph) == 0
    (norm,) = (op for op in graph if isinstance(op, RmsNorm))
    check_scaled(graph, norm.result)


def test_impossible_scales_are_refused() -> None:
    graph, x = gated()
    found = find_absorption(graph, x)
    for scale in (np.ones(3), np.zeros(found.count), np.full(found.count, np.inf)):
        with pytest.raises(CompileError, match="positive numbers"):
            absorb(graph, found, scale)


def test_reshapes_that_mix_tokens_and_channels() -> None:
    t = sym("T")
    numbers = np.arange(1, 13).reshape(1, 1, 12)
    split = reshaped(numbers, (1, t, 12), (t, 3, 4))
    assert split is not None and split.shape == (1, 3, 4)
    np.testing.assert_array_equal(split.ravel(), numbers.ravel())
    back = reshaped(split, (t, 3, 4), (1, t, 12))
    assert back is not None and back.shape == (1, 1, 12)
    assert reshaped(numbers, (1, t, 12), (1, t * 12)) is None
    heads = reshaped(np.arange(1, 4).reshape(1, 3, 1), (t, 3, 4), (t, 12))
    assert heads is not None
    np.testing.assert_array_equal(heads[0], np.repeat(np.arange(1, 4), 4))


def test_scaled_weights_are_lazy() -> None:
    base = ArrayTensor(np.arange(12, dtype=np.float16).reshape(4, 3), "w")
    rows = ScaledRows(base, np.array([1, 2, 3, 4]), "float32")
    columns = ScaledColumns(base, np.array([1, 2, 3]), "float16")
    np.testing.assert_array_equal(rows.read(1, 3), [[6, 8, 10], [18, 21, 24]])
    np.testing.assert_array_equal(columns.read(3), [[9, 20, 33]])
    assert rows.read().dtype == np.float32 and columns.read().dtype == np.float16
    vector = ScaledRows(ArrayTensor(np.ones(4, np.float32)), np.array([1, 2, 3, 4]), "float32")
    np.testing.assert_array_equal(vector.read(2), [3, 4])


def absorb_all(name: str) -> tuple[int, int, float] | str:
    """(layers scaled, layers, difference) after random scales wherever they go; a sentence where the family
    does not compile.
    """
    family = FAMILIES[name]
    graph: Graph | None = None
    refusal = ""
    for attention in ("sdpa", "eager"):
        try:
            model = family.build()
            graph, _ = lowered(traced(model, attention=attention, encoder=family.encoder), "fused")
            break
        except (
            LlmcError,
            ValueError,
            ImportError,
            TypeError,
            RuntimeError,
            AttributeError,
            KeyError,
        ) as error:
            refusal = str(error)
    if graph is None:
        return refusal
    inputs = {graph.inputs[0].name: torch.tensor([token_ids(24)])}
    before = run(graph, inputs)[0]
    give_norms_weights(graph)
    rng = np.random.default_rng(0)
    scaled = 0
    for x in list(dict.fromkeys(op.x for op in graph if isinstance(op, Linear))):
        found = find_absorption(graph, x)
        if found.possible:
            absorb(graph, found, np.exp(rng.uniform(-0.7, 0.7, found.count)))
            scaled += sum(isinstance(u, Linear) for u in x.users)
    verify(graph)
    total = sum(isinstance(op, Linear) for op in graph)
    return scaled, total, worst(run(graph, inputs)[0], before)


@pytest.mark.parametrize("name", ["llama", "gpt2", "nemotron"])
def test_tiny_models_keep_their_meaning(name: str) -> None:
    outcome = absorb_all(name)
    assert not isinstance(outcome, str), outcome
    assert outcome[:2] == ABSORBED[name]
    assert outcome[2] < TOLERANCE


@pytest.mark.slow
def test_families_keep_their_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.root.manager, "disable", logging.WARNING)
    compiled, tried = 0, list(FAMILIES)[:: 1 if LONG else 5]
    for name in tried:
        outcome = absorb_all(name)
        if isinstance(outcome, str):
            continue
        compiled += 1
        scaled, total, difference = outcome
        assert difference < TOLERANCE, (name, difference)
        assert (scaled, total) == ABSORBED.get(name, (scaled, total)), name
    assert compiled > 0.6 * len(tried)
