"""Text form of a graph. `parser.parse(print_graph(g))` gives an equal graph.

    graph "main" stage="fused"
    fact "kind" = "causal_lm"
    input %token_ids : int32[T]
    weight @"model.norm.weight" : float32[576]
    %0 : float32[T, 576] = embedding(%token_ids, @"model.embed_tokens.weight") loc "model.embed_tokens"
    %1 : float32[T, 576] = rms_norm(%0, @"model.norm.weight") {eps = 1e-06}
    return "hidden" = %1

An absent optional operand is `_`, a list of operands stands in brackets, a symbolic dimension in an attribute
is `$T+1`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from .core import Graph, Op, Value
from .types import DimExpr


def attribute_text(value: Any) -> str:
    if isinstance(value, DimExpr):
        return f"${value}"
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(attribute_text(v) for v in cast("Sequence[Any]", value)) + "]"
    return json.dumps(value)


def _name_values(graph: Graph) -> dict[Value, str]:
    names = {v: f"%{v.name}" for v in graph.inputs}
    names.update({v: f"@{json.dumps(name)}" for name, v in graph.weights.items()})
    count = 0
    for op in graph:
        for r in op.results:
            names[r] = f"%{count}"
            count += 1
    return names


def _operands_text(op: Op, names: Mapping[Value, str]) -> str:
    parts: list[str] = []
    for f, part in zip(op.operand_fields, op.grouped([names.get(v, "%?") for v in op.operands]), strict=True):
        parts.append("[" + ", ".join(part) + "]" if f.kind == "many" else (part or "_"))
    return ", ".join(parts)


def op_text(op: Op, names: Mapping[Value, str]) -> str:
    results = ", ".join(f"{names.get(r, '%?')} : {r.type}" for r in op.results)
    attributes = ", ".join(f"{k} = {attribute_text(v)}" for k, v in op.attributes().items())
    loc = f" loc {json.dumps(op.loc)}" if op.loc else ""
    return (
        f"{results} = {op.opname}({_operands_text(op, names)})"
        + (f" {{{attributes}}}" if attributes else "")
        + loc
    )


def print_graph(graph: Graph) -> str:
    """The whole graph as text, one line an op; deterministic."""
    names = _name_values(graph)
    lines = [f"graph {json.dumps(graph.name)} stage={json.dumps(graph.stage)}"]
    lines += [
        f"fact {json.dumps(k)} = {json.dumps(graph.facts[k], sort_keys=True)}" for k in sorted(graph.facts)
    ]
    lines += [f"input {names[v]} : {v.type}" for v in graph.inputs]
    lines += [f"weight {names[v]} : {v.type}" for v in graph.weights.values()]
    lines += [op_text(op, names) for op in graph]
    labels = graph.output_names or [f"output{i}" for i in range(len(graph.outputs))]
    lines += [
        f"return {json.dumps(label)} = {names[v]}" for label, v in zip(labels, graph.outputs, strict=True)
    ]
    return "\n".join(lines) + "\n"


def equal(a: Graph, b: Graph) -> bool:
    """Same structure, types, attributes and weight names (weights' data is not read)."""
    return print_graph(a) == print_graph(b)
