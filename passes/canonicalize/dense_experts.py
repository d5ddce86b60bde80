"""Experts that a model computes all of, of inputs that are zero for those that were not chosen.

    places = top_k(s); w = sigmoid(where(chosen(places), s, -inf))            [T, k], [T, E]
    sum over e of down[e] · (act(gate) · up), gate and up the halves of gate_up[e] · (w[t, e] · x[t])

    →  sum over j of moe(w[t, places[t, j]] · x[t], places[:, j], 1, gate_up, down)

What was not chosen adds nothing: an expert without biases makes zero of zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...ir.core import Graph, Op, Value
from ...ir.ops import math as m
from ...ir.ops.moe import Moe
from ...ir.ops.select import TopK
from ...ir.ops.shape import Arange, Concat, Full, Gather, Reshape, Slice, Transpose
from ...ir.rewriter import constant
from ..base import Pass, PassContext, PassResult


@dataclass(frozen=True)
class _Experts:
    x: Value
    weights: Value
    """Of each token for each expert, [T, E]; zero for those that are not in `places` [T, k]."""
    places: Value
    gate_up: Value
    down: Value
    activation: str


@dataclass(frozen=True)
class ChooseExperts(Pass):
    """Products of all experts, most of them of zeros → those of the chosen ones."""

    name = "choose-experts"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        count = 0
        for op in graph.ops:
            found = _experts(op) if isinstance(op, m.ReduceSum) else None
            if found is not None:
                graph.replace(op, [_chosen_alone(graph, op, found)])
                count += 1
        graph.drop_dead()
        return PassResult(graph, count > 0)


def _chosen_alone(graph: Graph, before: Op, found: _Experts) -> Value:
    """The sum over the chosen experts, one after the other."""

    def put(op: Op) -> Value:
        op.loc = before.loc
        graph.insert(op, before=before)
        return op.result

    tokens, chosen = found.places.shape
    assert isinstance(chosen, int)
    one = put(Full(value=1.0, dtype=found.x.dtype, shape=(tokens, 1)))
    known = graph.facts.get("all_experts", [])
    graph.facts["all_experts"] = [*known, *(v.name for v in (found.gate_up, found.down) if v.is_weight)]
    total: Value | None = None
    for j in range(chosen):
        place = put(Slice(found.places, axis=-1, start=j, stop=j + 1))
        scaled = put(m.Mul(found.x, put(Gather(found.weights, place))))
        experts = (found.gate_up, found.down, None, None)
        y = put(Moe(scaled, place, one, *experts, activation=found.activation, transposed=True))
        total = y if total is None else put(m.Add(total, y))
    assert total is not None
    return total


def _experts(op: m.ReduceSum) -> _Experts | None:
    """What a sum over experts is a sum of; None for any other."""
    product = op.x.producer
    if op.axes != (-3,) or op.keepdim or not isinstance(product, m.MatMul) or not _stacked(product.b):
        return None
    halves = _gated(product.a)
    if halves is None:
        return None
    both, activation = halves
    if not isinstance(both, m.MatMul) or not _stacked(both.b):
        return None
    inputs = _inputs(both.a, both.b.shape[0])
    if inputs is None:
        return None
    x, weights = inputs
    places = _chosen(weights)
    if places is None or x.type.rank != 2 or places.shape[:1] != x.shape[:1]:
        return None
    return _Experts(x, weights, places, both.b, product.b, activation)


def _stacked(v: Value) -> bool:
    return v.is_weight and v.type.rank == 3


def _gated(v: Value) -> tuple[Op | None, str] | None:
    """act(first half) · second half → what makes both, and the activation's name."""
    product = v.producer
    if not isinstance(product, m.Mul):
        return None
    for active, up in ((product.a, product.b), (product.b, product.a)):
        name = _activation(active.producer)
        gate = None if name is None or active.producer is None else active.producer.operands[0].producer
        rest = up.producer
        if name is None or not isinstance(gate, Slice) or not isinstance(rest, Slice) or gate.x is not rest.x:
            continue
        width = gate.x.shape[-1]
        whole = (gate.start, gate.stop, rest.start, rest.stop)
        plain = gate.axis == rest.axis == -1 and gate.step == rest.step == 1
        if plain and isinstance(width, int) and whole == (0, width // 2, width // 2, width):
            return gate.x.producer, name
    return None


def _activation(op: Op | None) -> str | None:
    match op:
        case m.Gelu():
            return "gelu_tanh" if op.tanh else "gelu"
        case m.Silu() | m.Relu():
            return op.opname
        case _:
            return None


def _inputs(v: Value, experts: Any) -> tuple[Value, Value] | None:
    """[E, T, D] of each expert's weights times the tokens → tokens [T, D], weights [T, E]."""
    product = _unshaped(v)
    if not isinstance(product, m.Mul):
        return None
    for repeated, column in ((product.a, product.b), (product.b, product.a)):
        joined, turned = repeated.producer, _unshaped(column)
        if not isinstance(joined, Concat) or not isinstance(turned, Transpose) or turned.perm != (-1, -2):
            continue
        x, weights = joined.xs[0], turned.x
        same = joined.axis == -2 and len(joined.xs) == experts and all(one is x for one in joined.xs)
        if same and column.shape[-1] == 1 and weights.shape == (x.shape[0], experts):
            return x, weights
    return None


def _unshaped(v: Value) -> Op | None:
    while isinstance(v.producer, Reshape):
        v = v.producer.x
    return v.producer


def _chosen(weights: Value) -> Value | None:
    """The places [T, k] of a choice without which weights are zero."""
    gate = weights.producer
    least = 0.0
    if isinstance(gate, m.Sigmoid):
        gate, least = gate.x.producer, float("-inf")
    if not isinstance(gate, m.Where) or constant(gate.b) != least:
        return None
    largest = _uncast(gate.condition).producer
    if not isinstance(largest, m.ReduceMax) or largest.axes != (-2,) or largest.keepdim:
        return None
    equal = _uncast(largest.x).producer
    if not isinstance(equal, m.Equal):
        return None
    column, numbers = equal.a, equal.b.producer
    pick = _unshaped(column)
    counts = isinstance(numbers, Arange) and (numbers.start, numbers.step) == (0, 1)
    if not counts or not isinstance(pick, TopK) or pick.result.type.rank != 2:
        return None
    return pick.result if column.shape == (*pick.result.shape, 1) else None


def _uncast(v: Value) -> Value:
    while isinstance(v.producer, m.Cast):
        v = v.producer.x
    return v
