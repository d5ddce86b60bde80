"""Recurrences over a whole sequence → the same over the ragged step, with a state cache beside the paged one.

    selective_scan(x, …, [])  →  input state.i [S, N, C], state_slot [B];
                                 selective_scan(x, …, [state.i, state_slot, query_start, context_len])

S is the number of sequences that the cache holds a state for; `state_slot` says which row is whose.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from ...ir.core import Graph, Value
from ...ir.errors import UnsupportedError
from ...ir.ops.state import Recurrence
from ...ir.types import TensorType, sym


def recurrences(graph: Graph) -> list[Recurrence]:
    """The ops that carry a state along the tokens."""
    return [op for op in graph if isinstance(op, Recurrence)]


def keep_states(graph: Graph, query_start: Value, context_len: Value) -> None:
    """Give each recurrence a row of state for each sequence; `facts["state"]` lists the rows' shapes."""
    found = recurrences(graph)
    if not found:
        return
    if graph.facts["kind"] != "causal_lm":
        raise UnsupportedError(
            f"{graph.name} is no language model, and {found[0].loc or 'a layer'} keeps a state from token "
            "to token",
            remedy="compile the language model that it is part of",
        )
    slots = graph.add_input("state_slot", TensorType("int32", (sym("B"),)))
    shapes: list[list[int]] = []
    for number, op in enumerate(found):
        shape = op.state_shape()
        state = graph.add_input(f"state.{number}", TensorType("float32", (sym("S"), *shape)))
        _attach(graph, op, [state, slots, query_start, context_len])
        shapes.append(list(shape))
    graph.facts["state"] = shapes


def _attach(graph: Graph, op: Recurrence, cache: list[Value]) -> None:
    fields, make = op.grouped(op.operands), cast("Callable[..., Recurrence]", type(op))
    paged = make(*fields[:-1], cache, **op.attributes())
    paged.loc = op.loc
    graph.insert(paged, before=op)
    result, after = paged.results
    after.name = cache[0].name
    graph.replace_uses(op.result, result)
    graph.erase(op)
