"""Classifiers of texts → graphs with scores for every token, as a paged step has a row for each.

    hidden [1, T, D] → slice of the first token → head → scores [1, labels]
    hidden [1, T, D] → head → scores [1, T, labels]

The step gives the rows that are asked for: asked for the first token of each sequence, it gives each
sequence's scores, and the head is computed for these rows alone. Of a decoder it is the last token (the fact
`scored`). Scores that come of a text in another way (of the mean of its hidden states, say) are repeated for
each of its tokens; a step takes one text then.

An encoder whose result is a vector of its first token, or of its last one, becomes one that gives a vector
for each token, and says which is the text's (`pool_every_token`).

A language model whose answer is read off the logits of some tokens ("yes", "no") is a classifier with a head
of those rows of its own (`score_by_tokens`).
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..ir.core import Graph, Op, Value
from ..ir.errors import CompileError, InputError, UnsupportedError
from ..ir.ops import math as m
from ..ir.ops.nn import Linear
from ..ir.ops.shape import Expand, Full, Index, Reshape, Slice
from ..ir.rewriter import constant
from ..ir.types import Dim, Shape, sym
from ..ir.weights import ArrayTensor, LazyTensor, ShapeOnlyTensor

_TOKENS = sym("T")


@contextmanager
def unpadded(model: Any) -> Generator[None]:
    """Within it, a decoder that classifies takes no token for padding: its scores are the last token's then,
    not those of the last one that is no padding. The runtime leaves padding at the end out.
    """
    # Some configurations check what is set on them, and the user's own module may be this one.
    config = model.config.get_text_config()
    before = getattr(config, "pad_token_id", None)
    object.__setattr__(config, "pad_token_id", None)
    try:
        yield
    finally:
        object.__setattr__(config, "pad_token_id", before)


def score_every_token(graph: Graph) -> None:
    """Rewrite a traced classifier in place, whose output is [1, labels]."""
    picked = [op for op in graph if isinstance(op, Slice) and _picked(op) is not None]
    if len(picked) == 1 and _widens(graph):
        (op,) = picked
        if _picked(op) == "last":
            graph.facts["scored"] = "last"
        _widen_from(graph, op)
        return
    (scores,) = graph.outputs
    if len(scores.shape) != 2 or scores.shape[0] != 1:
        raise UnsupportedError(
            f"{graph.name}: its result is {scores.type}, not scores of a text", remedy="report the model"
        )
    row = graph.append(Reshape(scores, shape=(1, 1, scores.shape[-1]))).result
    graph.outputs = [graph.append(Expand(row, shape=(1, _TOKENS, scores.shape[-1]))).result]


def pool_every_token(graph: Graph) -> None:
    """Rewrite a traced encoder in place whose result is one row, [1, D]: a row for each token, of which the
    fact `pooling` says which is the text's. Others are left as they are.

    Raises UnsupportedError where the row is not one token's.
    """
    (row,) = graph.outputs
    if len(row.shape) != 2 or row.shape[0] != 1 or row.shape[1] == _TOKENS:
        return
    picked = [op for op in graph if isinstance(op, Slice) and _picked(op) is not None]
    if len(picked) != 1 or not _widens(graph):
        raise UnsupportedError(
            f"{graph.name}: its result is {row.type}, a row that is not of the first or last token alone",
            remedy="report the model",
        )
    graph.facts["pooling"] = {"first": "cls", "last": "last"}[str(_picked(picked[0]))]
    _widen_from(graph, picked[0])


def see_padding(graph: Graph, padding: int) -> None:
    """Masks that hide keys whose ids are those of padding, in a traced encoder: they hide none, as a step has
    no padding. What else is made of such ids (positions are) stays.
    """
    for op in graph.ops:
        if not isinstance(op, m.NotEqual) or op.a not in graph.inputs or constant(op.b) != padding:
            continue
        users = op.result.users
        if users and all(isinstance(u, Index) and op.result not in u.indices for u in users):
            graph.replace(op, [graph.insert(Full(value=1.0, dtype="bool", shape=op.result.shape), op).result])
    graph.drop_dead()


def score_by_tokens(graph: Graph, ids: Sequence[int]) -> None:
    """Rewrite a traced language model in place: its scores are the logits of these tokens, of the last token.

    Raises InputError for an id that the model does not have, UnsupportedError where its head is not found.
    """
    (logits,) = graph.outputs
    vocabulary = logits.shape[-1]
    if not isinstance(vocabulary, int) or not all(0 <= i < vocabulary for i in ids):
        raise InputError(
            f"{graph.name} is to be scored by the tokens {list(ids)}, and has {vocabulary}",
            remedy="download the folder again",
        )
    heads = [op for op in graph if isinstance(op, Linear) and op.result.shape[-1] == vocabulary]
    if not heads or heads[-1].weight.weight is None:
        raise UnsupportedError(f"{graph.name}: its head is no linear layer", remedy="report the model")
    head = heads[-1]
    parts = [_rows(graph, part, ids) for part in (head.weight, head.bias) if part is not None]
    new = graph.insert(Linear(head.x, *parts), before=head)
    new.loc = head.loc
    start = head.next
    graph.replace(head, [new.result])
    _retype_after(graph, start, {new.result}, lambda shape: tuple(_narrowed(shape, vocabulary, len(ids))))
    graph.drop_dead()
    graph.facts |= {"kind": "classifier", "scored": "last"}
    graph.output_names = ["scores"]
    if graph.outputs[0].shape != (1, _TOKENS, len(ids)):
        raise _refusal(graph, f"its scores would be {graph.outputs[0].type}")


def _rows(graph: Graph, part: Value, ids: Sequence[int]) -> Value:
    """Rows of a head's weight, or elements of its bias, as a weight of their own."""
    data = part.weight
    assert data is not None
    shape = (len(ids), *data.shape[1:])
    rows: LazyTensor = ShapeOnlyTensor(shape, "float32")
    if not isinstance(data, ShapeOnlyTensor):
        read = np.concatenate([data.read(i, i + 1) for i in ids])
        rows = ArrayTensor(read.astype(np.float32), f"{data.source}[{', '.join(map(str, ids))}]")
    return graph.add_weight(f"scored.{part.name}", rows)


def _narrowed(shape: Shape, before: int, after: int) -> list[Dim]:
    return [after if i == len(shape) - 1 and d == before else d for i, d in enumerate(shape)]


def _picked(op: Slice) -> str | None:
    """Which token's hidden state a slice is: "first", "last", or neither."""
    if op.x.shape[op.axis] != _TOKENS or op.step != 1 or not op.x.dtype.startswith(("float", "bfloat")):
        return None
    if (op.start, op.stop) == (0, 1):
        return "first"
    return "last" if (op.start, op.stop) == (_TOKENS - 1, _TOKENS) else None


def _widens(graph: Graph) -> bool:
    """Whether the scores are a function of the one token that is picked."""
    trial = graph.clone()
    try:
        _widen_from(trial, next(op for op in trial if isinstance(op, Slice) and _picked(op) is not None))
    except UnsupportedError:
        return False
    return True


def _widen_from(graph: Graph, picked: Slice) -> None:
    """Compute for every token what is computed for the one that is picked."""
    start, users = picked.next, {user for user, _ in picked.result.uses}
    x = picked.x
    graph.replace(picked, [x])
    _retype_after(graph, start, set(), lambda shape: (1, _TOKENS, *_without_ones(shape)), users)
    if graph.outputs[0].shape[:-1] != (1, _TOKENS):
        raise _refusal(graph, f"its result is {graph.outputs[0].type}")


def _retype_after(
    graph: Graph, op: Op | None, changed: set[Value], shape: Any, users: set[Op] | None = None
) -> None:
    """Infer the results again of `users`, and of all ops that read what has changed; shapes that ops hold are
    changed by `shape`.
    """
    while op is not None:
        if (users is not None and op in users) or changed.intersection(op.operands):
            if isinstance(op, Reshape | Expand):
                op.shape = shape(op.shape)
            try:
                graph.retype(op)
            except CompileError as error:
                raise _refusal(graph, error.message) from None
            changed.update(op.results)
        op = op.next


def _without_ones(shape: Shape) -> Shape:
    start = 0
    while start < len(shape) - 1 and shape[start] == 1:
        start += 1
    return shape[start:]


def _refusal(graph: Graph, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"{graph.name}: its scores do not come from one token's hidden state alone ({why})",
        remedy="report the model",
    )
