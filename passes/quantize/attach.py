"""How a quantized weight enters the graph.

    linear(x, w)        → quantized_linear(x, q, scale, zero_point)
    embedding(ids, w)   → quantized_embedding(ids, q, scale, zero_point)

A weight that several ops read (tied embeddings) is attached once.
"""

from __future__ import annotations

from ...ir.core import Graph, Op, Value
from ...ir.ops.nn import Embedding, Linear
from ...ir.ops.quant import QuantizedEmbedding, QuantizedLinear
from ...ir.types import Quantization, TensorType
from ...ir.weights import LazyTensor
from ..routers import is_router


def is_quantizable(weight: Value) -> bool:
    """Whether linear layers and embeddings, and nothing else, read a weight as their matrix [N, K]; routers
    of experts stay as they are.
    """
    users = weight.users
    plain = bool(users) and all(isinstance(u, (Linear, Embedding)) and u.weight is weight for u in users)
    return plain and not any(is_router(u) for u in users)


def is_head(graph: Graph, weight: Value) -> bool:
    """Whether a weight is an embedding table or makes the logits: read by an embedding, or by the last linear
    layer before an output.
    """
    if any(isinstance(u, Embedding) for u in weight.users):
        return True
    for output in graph.outputs:
        op = output.producer
        while op is not None and not isinstance(op, (Linear, QuantizedLinear)):
            # A scalar may stand first in a product (soft-capped logits): the logits are what has axes.
            op = next((v.producer for v in op.operands if v.type.rank), None)
        if isinstance(op, Linear) and op.weight is weight and graph.facts.get("kind") == "causal_lm":
            return True
    return False


def attach_quantized(
    graph: Graph,
    weight: Value,
    quant: Quantization,
    codes: LazyTensor,
    scale: LazyTensor,
    zero_point: LazyTensor | None,
) -> None:
    """Let every user of `weight` [N, K] read codes uint8 [N, K], scale [N, G] and zero_point [N, G] instead.

    The caller drops what is dead afterwards (`graph.drop_dead()`). New weights are named NAME.q, NAME.scale
    and NAME.zero_point.
    """
    n, k = codes.shape
    q = graph.add_weight(f"{weight.name}.q", codes, TensorType("uint8", (n, k), quant))
    s = graph.add_weight(f"{weight.name}.scale", scale)
    z = None if zero_point is None else graph.add_weight(f"{weight.name}.zero_point", zero_point)
    for user in list(weight.users):
        replacement = _replacement(user, (q, s, z))
        replacement.loc = user.loc
        graph.insert(replacement, before=user)
        graph.replace(user, [replacement.result])


def _replacement(user: Op, parts: tuple[Value, Value, Value | None]) -> Op:
    codes, scale, zero = parts
    if isinstance(user, Linear):
        return QuantizedLinear(user.x, codes, scale, zero, user.bias)
    assert isinstance(user, Embedding)
    return QuantizedEmbedding(user.ids, codes, scale, zero)
