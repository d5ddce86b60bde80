"""A language model of a few thousand weights, made here: what plugins are checked on, without a download."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...codegen.manifest import PAGE_SIZE
from ...ir.core import Graph, Op, Value
from ...ir.ops import math, nn, shape
from ...ir.ops.attention import Attention
from ...ir.types import TensorType, sym
from ...ir.weights import ArrayTensor
from ...passes.base import PassContext
from ...passes.manager import run_passes
from ...passes.pipelines import canonicalize, page

VOCABULARY = 96
HIDDEN = 64
_T = sym("T")


def tiny_model(*, layers: int = 3, window: int | None = None, seed: int = 0) -> Graph:
    """A decoder as it stands after fusion: embedding, `layers` of attention (4 heads of 16, 2 of keys) and
    gated MLP with RMS norms and rotary positions, a head of its own. Input `input_ids` [1, T], output logits
    [1, T, 96].

    `window`: of every second layer's attention, in tokens.
    """
    return _Builder(np.random.default_rng(seed), layers, window).graph()


def paged(graph: Graph, kv_dtype: str = "float32") -> Graph:
    """A copy of a fused or quantized graph as targets get it: the ragged step over a paged cache."""
    context = PassContext(context_length=512)
    return run_passes(graph.clone(), [*page(PAGE_SIZE, kv_dtype), *canonicalize()], context)[0]


def logits_of(graph: Graph, tokens: Sequence[int]) -> np.ndarray:
    """float32 [T, vocabulary]: what a graph that is not paged gives for a sequence, by the meanings of its
    ops.
    """
    import torch

    from ...ir.interpreter import run

    ids = torch.tensor([list(tokens)], dtype=torch.int64)
    (found, *_) = run(graph, {"input_ids": ids})
    return found[0].float().numpy()


class _Builder:
    heads, kv_heads, width, hidden, inner = 4, 2, 16, HIDDEN, 96

    def __init__(self, rng: np.random.Generator, layers: int, window: int | None) -> None:
        self.rng, self.layers, self.window = rng, layers, window
        self.g = Graph("tiny", "fused")
        self.g.facts = {"kind": "causal_lm"}

    def add(self, op: Op, loc: str = "") -> Value:
        op.loc = loc
        return self.g.append(op).result

    def weight(self, name: str, *dims: int, around: float = 0.0, spread: float | None = None) -> Value:
        size = float(dims[-1]) ** -0.5 if spread is None else spread
        array = (around + size * self.rng.standard_normal(dims)).astype(np.float32)
        return self.g.add_weight(name, ArrayTensor(array, name))

    def graph(self) -> Graph:
        ids = self.g.add_input("input_ids", TensorType("int64", (1, _T)))
        x = self.add(nn.Embedding(ids, self.weight("embed", VOCABULARY, self.hidden, spread=1.0)))
        tables = self.tables()
        for i in range(self.layers):
            x = self.layer(x, i, tables)
        x = self.norm(x, "norm")
        logits = self.add(nn.Linear(x, self.weight("head", VOCABULARY, self.hidden)), "head")
        self.g.outputs, self.g.output_names = [logits], ["logits"]
        return self.g

    def tables(self) -> tuple[Value, Value]:
        """cos and sin [T, width]."""
        count = self.width // 2
        frequencies = (10000.0 ** (-np.arange(count) / count)).astype(np.float32)[None, :]
        position = self.add(math.Cast(self.add(shape.Arange(length=_T)), dtype="float32"))
        column = self.add(shape.Reshape(position, shape=(_T, 1)))
        held = self.g.add_weight("frequencies", ArrayTensor(frequencies, "frequencies"))
        multiply: Any = math.Mul  # made by @op: a type checker does not see inherited operands
        angle = self.add(multiply(column, held))
        both = self.add(shape.Concat([angle, angle], axis=-1))
        cos: Any = math.Cos
        sin: Any = math.Sin
        return self.add(cos(both)), self.add(sin(both))

    def norm(self, x: Value, name: str) -> Value:
        return self.add(nn.RmsNorm(x, self.weight(name, self.hidden, around=1.0, spread=0.1), eps=1e-6), name)

    def plus(self, a: Value, b: Value, loc: str) -> Value:
        add: Any = math.Add
        return self.add(add(a, b), loc)

    def layer(self, x: Value, i: int, tables: tuple[Value, Value]) -> Value:
        at = f"layers.{i}"
        h = self.norm(x, f"{at}.input_norm")
        q, k, v = (self.project(h, f"{at}.{name}", n) for name, n in self.parts())
        q, k = (self.add(nn.Rope(part, *tables), at) for part in (q, k))
        window = self.window if i % 2 else None
        mixed = self.add(
            Attention(q, k, v, None, None, None, scale=self.width**-0.5, causal=True, window=window),
            f"{at}.attention",
        )
        flat = self.add(shape.Reshape(mixed, shape=(1, _T, self.heads * self.width)))
        out = self.weight(f"{at}.o", self.hidden, self.heads * self.width)
        x = self.plus(x, self.add(nn.Linear(flat, out), f"{at}.o"), at)
        h = self.norm(x, f"{at}.post_norm")
        gates = self.add(
            nn.Linear(h, self.weight(f"{at}.gate_up", 2 * self.inner, self.hidden)), f"{at}.gate_up"
        )
        h = self.add(nn.GatedMlp(gates, activation="silu"), at)
        down = self.weight(f"{at}.down", self.hidden, self.inner)
        return self.plus(x, self.add(nn.Linear(h, down), f"{at}.down"), at)

    def parts(self) -> tuple[tuple[str, int], ...]:
        return ("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads)

    def project(self, h: Value, name: str, heads: int) -> Value:
        y = self.add(nn.Linear(h, self.weight(name, heads * self.width, self.hidden)), name)
        return self.add(shape.Reshape(y, shape=(1, _T, heads, self.width)), name)
