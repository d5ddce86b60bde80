"""Where a model's layers begin and end, read off the graph: nothing here knows a model's name.

Between two layers of a transformer only the residual stream is alive: whatever is computed later depends on
the tokens through that one value. Such values cut the graph, and a layer is what lies between two of them and
holds one attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from llmc.plugins import Graph, Op, UnsupportedError, Value, ops, run_graph


@dataclass(frozen=True)
class Layer:
    """A layer's input and output, of one type."""

    before: Value
    after: Value


def find_layers(graph: Graph) -> list[Layer]:
    """The layers in order. Raises UnsupportedError where the graph does not come apart into layers: some
    layers read what is inside of others (a cache that layers share), or there is no attention.
    """
    order = {op: i for i, op in enumerate(graph)}
    attentions = [order[op] for op in graph if isinstance(op, ops.attention.Attention)]
    cuts = _cuts(graph, order)
    first_of: list[int] = []  # of each layer, the last cut before its attention
    for place in attentions:
        before = [i for i, (at, _) in enumerate(cuts) if at < place]
        if not before:
            raise UnsupportedError(
                f"{graph.name}: nothing separates its first layer from what is before it",
                remedy="leave this pass out",
            )
        first_of.append(before[-1])
    steps = {b - a for a, b in pairwise(first_of)}
    if not attentions or len(steps) > 1 or 0 in steps:
        raise UnsupportedError(
            f"{graph.name} does not come apart into layers of one attention each",
            remedy="leave this pass out",
        )
    step = steps.pop() if steps else 0
    ends = [*first_of[1:], first_of[-1] + step]
    if step == 0 or ends[-1] >= len(cuts):
        raise UnsupportedError(f"{graph.name} has fewer than two layers", remedy="leave this pass out")
    layers = [Layer(cuts[a][1], cuts[b][1]) for a, b in zip(first_of, ends, strict=True)]
    if any(layer.before.type != layer.after.type for layer in layers):
        raise UnsupportedError(f"{graph.name}: its layers change the width", remedy="leave this pass out")
    return layers


def _cuts(graph: Graph, order: dict[Op, int]) -> list[tuple[int, Value]]:
    """(place, value) of each value that alone is alive, of those that depend on the tokens, behind the op at
    its place. What depends on positions alone (rotary tables, masks) may live on.
    """
    depends: set[Value] = {graph.input("input_ids")}
    last: dict[Value, int] = {}
    for op in graph:
        for v in op.operands:
            last[v] = order[op]
        if any(v in depends for v in op.operands) and not _only_counts(op):
            depends.update(op.results)
    for v in graph.outputs:
        last[v] = len(order)
    alive: set[Value] = {graph.input("input_ids")}
    cuts: list[tuple[int, Value]] = []
    for op in graph:
        alive.update(r for r in op.results if r in depends)
        alive = {v for v in alive if last.get(v, -1) > order[op]}
        if len(alive) == 1 and op.result in alive:
            cuts.append((order[op], op.result))
    return cuts


def _only_counts(op: Op) -> bool:
    """Whether an op reads of its operand no more than how many tokens there are."""
    return op.opname in ("arange", "dim_value", "full")


def influence(
    graph: Graph, layers: Sequence[Layer], sequences: Sequence[Any], progress: Callable[[str, float], None]
) -> list[float]:
    """Of each layer 1 − the mean cosine of the angle between a token's vector before and after it."""
    import torch

    wanted = {v for layer in layers for v in (layer.before, layer.after)}
    totals = [0.0] * len(layers)
    kept: dict[str, Any] = {}
    for number, tokens in enumerate(sequences):
        progress("influence of layers", number / len(sequences))
        seen: dict[Value, Any] = {}

        def look(op: Op, operands: Sequence[Any], results: Any, seen: dict[Value, Any] = seen) -> None:
            seen.update((v, r) for v, r in zip(op.results, results, strict=True) if v in wanted)

        ids = torch.tensor([tokens.tolist()], dtype=torch.int64)
        run_graph(graph, {"input_ids": ids}, observe=look, keep_weights=kept)
        for i, layer in enumerate(layers):
            before, after = seen[layer.before].double(), seen[layer.after].double()
            totals[i] += float(1.0 - torch.nn.functional.cosine_similarity(before, after, dim=-1).mean())
    return [total / len(sequences) for total in totals]
