"""Linear layers that read the same input become one.

linear(x, Wq), linear(x, Wk), linear(x, Wv)          → y = linear(x, [Wq; Wk; Wv]), three slices of y
mul(silu(linear(x, Wg)), linear(x, Wu))              → gated_mlp(linear(x, [Wg; Wu]), silu)
mul(silu(slice(y, :I)), slice(y, I:))                → gated_mlp(y, silu)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...ir.core import Graph, Op, Value
from ...ir.dtypes import HALVES
from ...ir.ops import math as m
from ...ir.ops.nn import GatedMlp, Linear
from ...ir.ops.shape import Slice
from ...ir.rewriter import Any, Match, P, Rewriter, Rule, apply_rules
from ...ir.types import Dim
from ...ir.weights import LazyTensor
from ..base import Pass, PassContext, PassResult
from ..derived import CastTensor, ConcatRows
from ..merged_names import merged_name
from ..routers import is_router


def activation_name(op: Op) -> str | None:
    """The name in `nn.ACTIVATIONS` of an activation op."""
    match op:
        case m.Silu():
            return "silu"
        case m.Gelu():
            return "gelu_tanh" if op.tanh else "gelu"
        case m.Relu():
            return "relu"
        case m.Sigmoid():
            return "sigmoid"
        case _:
            return None


def merged_weight(graph: Graph, parts: Sequence[Value]) -> Value:
    """The weights one below the other, as a new weight; the same parts give the same weight. Float32 where
    one of them is and others are of 16 bits, as where an adapter was merged into one.
    """
    name = merged_name([p.name for p in parts])
    data = [p.weight for p in parts if p.weight is not None]
    wide = len({p.dtype for p in data}) > 1
    while name in graph.weights:
        known = graph.weights[name].weight
        if isinstance(known, ConcatRows) and _same(known.parts, data):
            return graph.weights[name]
        name += "_"
    rows = [CastTensor(p, "float32") if wide and p.dtype != "float32" else p for p in data]
    return graph.add_weight(name, ConcatRows(rows))


def _same(known: Sequence[LazyTensor], wanted: Sequence[LazyTensor]) -> bool:
    """Whether these are those weights, cast or not."""
    return len(known) == len(wanted) and all(
        a is b or (isinstance(a, CastTensor) and a.base is b) for a, b in zip(known, wanted, strict=True)
    )


def merged_linear(rw: Rewriter, linears: Sequence[Linear]) -> Value:
    weight = merged_weight(rw.graph, [op.weight for op in linears])
    biases = [op.bias for op in linears if op.bias is not None]
    return rw.insert(Linear(linears[0].x, weight, merged_weight(rw.graph, biases) if biases else None))


def mergeable(linears: Sequence[Linear]) -> str | None:
    """None, or why these cannot be one layer."""
    if len({id(op.x) for op in linears}) != 1:
        return "the layers read different inputs"
    if not all(op.weight.is_weight and (op.bias is None or op.bias.is_weight) for op in linears):
        return "a weight is computed in the graph"
    if len({op.bias is None for op in linears}) != 1:
        return "one of the layers has a bias and another has none"
    dtypes = {op.weight.dtype for op in linears}
    if len(dtypes) == 1 or ("float32" in dtypes and dtypes <= {"float32", *HALVES}):
        return None
    return "the weights have different dtypes"


class FuseGatedMlp(Rule):
    """activation(linear(x, Wg)) · linear(x, Wu) → gated_mlp(linear(x, [Wg; Wu]))"""

    pattern = P(
        m.Mul,
        P((m.Silu, m.Gelu, m.Relu, m.Sigmoid), P(Linear, name="gate"), name="activation"),
        P(Linear, name="up"),
    )

    def _layers(self, found: Match) -> list[Linear]:
        return [op for op in (found.op("gate"), found.op("up")) if isinstance(op, Linear)]

    def check(self, found: Match) -> str | None:
        layers = self._layers(found)
        if layers[0].weight.shape != layers[1].weight.shape:
            return "gate and up differ in width"
        if any(len(op.result.uses) != 1 for op in (*layers, found.op("activation"))):
            return "gate or up is used elsewhere"
        return mergeable(layers)

    def rewrite(self, found: Match, rw: Rewriter) -> Sequence[Value]:
        name = activation_name(found.op("activation"))
        assert name is not None
        return [rw.insert(GatedMlp(merged_linear(rw, self._layers(found)), activation=name))]


class FuseGatedSlices(Rule):
    """activation(slice(y, :I)) · slice(y, I:) → gated_mlp(y)"""

    pattern = P(
        m.Mul,
        P(
            (m.Silu, m.Gelu, m.Relu, m.Sigmoid),
            P(Slice, Any("y"), axis=-1, start=0, step=1, name="gate"),
            name="activation",
        ),
        P(Slice, Any("y"), axis=-1, step=1, name="up"),
    )

    def check(self, found: Match) -> str | None:
        gate, up, y = found.op("gate"), found.op("up"), found.value("y")
        assert isinstance(gate, Slice) and isinstance(up, Slice)
        if gate.stop != up.start or up.stop != y.shape[-1] or gate.result.shape != up.result.shape:
            return "the slices are not the two halves"
        return None

    def rewrite(self, found: Match, rw: Rewriter) -> Sequence[Value]:
        name = activation_name(found.op("activation"))
        assert name is not None
        return [rw.insert(GatedMlp(found["y"], activation=name))]


@dataclass(frozen=True)
class FuseGatedMlps(Pass):
    """The gate of gated MLPs, and with it the merged gate-up projection."""

    name = "fuse-gated-mlp"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        count, notes = apply_rules(graph, (FuseGatedMlp(), FuseGatedSlices()))
        return PassResult(graph, count > 0, notes)


@dataclass(frozen=True)
class MergeProjections(Pass):
    """Sibling linear layers (Q, K and V above all) become one with sliced results."""

    name = "merge-projections"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        notes: list[str] = []
        changed = False
        for value in [*graph.inputs, *(v for op in graph for v in op.results)]:
            linears = [op for op in value.users if isinstance(op, Linear) and op.x is value]
            if len(linears) > 1:
                linears = [op for op in linears if not is_router(op)]
            for biased in (False, True):  # a layer with a bias and one without stay apart
                siblings = [op for op in linears if (op.bias is not None) is biased]
                refusal = mergeable(siblings) if len(siblings) > 1 else None
                if refusal is not None:
                    notes.append(f"{refusal} ({siblings[0].loc})")
                elif len(siblings) > 1:
                    changed = True
                    self._merge(graph, siblings)
        graph.drop_dead()
        return PassResult(graph, changed, notes)

    @staticmethod
    def _merge(graph: Graph, siblings: Sequence[Linear]) -> None:
        order = {id(op): i for i, op in enumerate(graph.ops)}
        first = min(siblings, key=lambda op: order[id(op)])
        rw = Rewriter(graph, first)
        y = merged_linear(rw, siblings)
        start: Dim = 0
        for op in siblings:
            stop = start + op.result.shape[-1]
            graph.replace_uses(op.result, rw.insert(Slice(y, axis=-1, start=start, stop=stop)))
            start = stop
