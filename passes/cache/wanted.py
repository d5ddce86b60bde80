"""Rows whose logits are wanted: what stands behind the last op that mixes tokens is computed for them alone.

Of a prompt that is the last one, so that a dense model's last output projection and MLP, and the head, run on
one row; of a part of a prompt that others follow, none. Experts stay with all rows: the numbers of those that
are chosen are integers, and what takes them is not moved.
"""

from __future__ import annotations

from ...ir.core import Graph, Op, Value
from ...ir.dtypes import is_float
from ...ir.ops.cache import GatherLast
from ...ir.ops.shape import Expand, Reshape
from ...ir.types import DimExpr
from .rows import R, T, row_mixing, token_axes


def gather_wanted_rows(graph: Graph, index: Value) -> None:
    """Let every op that only the logits need, and that treats each row alone, read `gather_last` of what it
    reads of all rows.
    """
    output = graph.outputs[0]
    moved = _only_for(graph, output)
    frontier = {v: None for op in graph if op in moved for v in op.operands if token_axes(v.shape)}
    gathered = [v for v in frontier if v.producer not in moved] if moved else [output]
    changed = {value: _gather(graph, value, index, moved) for value in gathered}
    if not moved:
        graph.outputs = [changed.get(v, v) for v in graph.outputs]
    _retarget(graph, set(changed.values()))


def _only_for(graph: Graph, output: Value) -> set[Op]:
    """The ops that only `output` is made of, and that can compute some of the rows alone."""
    moved: set[Op] = set()
    for op in reversed(graph.ops):
        if len(op.results) != 1 or not _by_row(op):
            continue
        result = op.results[0]
        needed = graph.output_uses(result) if result is not output else graph.output_uses(result) - 1
        if not needed and all(user in moved for user in result.users) and (result.uses or result is output):
            moved.add(op)
    return moved


def _by_row(op: Op) -> bool:
    """Whether each row of the result is made of the same row of the operands, all of which can be gathered:
    matrices of floats with a row a token. What reads an input of the step says itself where rows are.
    """
    if row_mixing(op) is not None or any(v.producer is None and not v.is_weight for v in op.operands):
        return False
    rows = [v for v in op.operands if token_axes(v.shape)]
    return bool(rows) and all(
        v.type.rank == 2 and v.shape[0] == T and token_axes(v.shape) == [-2] and is_float(v.dtype)
        for v in (*rows, op.results[0])
    )


def _gather(graph: Graph, value: Value, index: Value, moved: set[Op]) -> Value:
    """The wanted rows of a value, for those ops alone; where nothing was moved, for all that read it."""
    gather = GatherLast(value, index)
    for user, i in list(value.uses):
        if user is not gather and (user in moved or not moved):
            graph.set_operand(user, i, gather.result)
    after = value.producer
    graph.insert(gather, before=after.next if after is not None else graph.first)
    return gather.result


def _retarget(graph: Graph, changed: set[Value]) -> None:
    """Whatever depends on the gathered rows says R where it said T."""
    for op in graph:
        if isinstance(op, GatherLast) or not any(v in changed for v in op.operands):
            continue
        if isinstance(op, (Reshape, Expand)):
            op.shape = tuple(d.substitute({"T": R}) if isinstance(d, DimExpr) else d for d in op.shape)
        graph.retype(op)
        changed.update(op.results)
