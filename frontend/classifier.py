"""A classifier of texts → its scores as if every token were the first.

    hidden [1, T, D] → slice of the first token → head → scores [1, labels]
    hidden [1, T, D] → head → scores [1, T, labels]

A paged step has a row for each token, and gives those that are asked for: asked for the first token of each
sequence, it gives each sequence's scores, and the head is computed for these rows alone.
"""

from __future__ import annotations

from ..ir.core import Graph, Op, Value
from ..ir.errors import CompileError, UnsupportedError
from ..ir.ops.shape import Expand, Reshape, Slice
from ..ir.types import Shape, sym

_TOKENS = sym("T")


def score_every_token(graph: Graph) -> None:
    """Rewrite a traced classifier in place.

    Raises UnsupportedError where its scores are not a function of the first token's hidden state.
    """
    firsts = [op for op in graph if isinstance(op, Slice) and _is_first_token(op)]
    if len(firsts) != 1:
        raise _refusal(graph, f"{len(firsts)} places take the first token")
    (first,) = firsts
    changed: set[Value] = set()
    op = first.next
    users = {user for user, _ in first.result.uses}
    graph.replace(first, [first.x])
    while op is not None:
        if op in users or changed.intersection(op.operands):
            _widen(graph, op)
            changed.update(op.results)
        op = op.next
    if graph.outputs[0].shape[:-1] != (1, _TOKENS):
        raise _refusal(graph, f"its result is {graph.outputs[0].type}")


def _is_first_token(op: Slice) -> bool:
    return op.x.shape[op.axis] == _TOKENS and (op.start, op.stop, op.step) == (0, 1, 1)


def _widen(graph: Graph, op: Op) -> None:
    """Infer an op's results again, of which there is now one for each token."""
    if isinstance(op, Reshape | Expand):
        op.shape = (1, _TOKENS, *_without_ones(op.shape))
    try:
        graph.retype(op)
    except CompileError as error:
        raise _refusal(graph, error.message) from None


def _without_ones(shape: Shape) -> Shape:
    start = 0
    while start < len(shape) - 1 and shape[start] == 1:
        start += 1
    return shape[start:]


def _refusal(graph: Graph, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"{graph.name}: its scores do not come from the first token's hidden state alone ({why})",
        remedy="give one that pools its first token (where its configuration has classifier_pooling: cls)",
    )
