"""Which linear layers are routers: those whose results choose experts."""

from __future__ import annotations

from ..ir.core import Op
from ..ir.ops.math import MatMul
from ..ir.ops.nn import Linear
from ..ir.ops.quant import QuantizedLinear
from ..ir.ops.select import TopK


def is_router(op: Op) -> bool:
    """Whether a `top_k` chooses by what a layer makes, no other layer between.

    A router is small and its choice falls the other way for little: it is neither quantized nor merged with
    layers that are.
    """
    seen: set[Op] = set()
    waiting = [op]
    while waiting:
        for user in {u: None for v in waiting.pop().results for u in v.users}:
            if isinstance(user, TopK):
                return True
            if user not in seen and not isinstance(user, Linear | QuantizedLinear | MatMul):
                seen.add(user)
                waiting.append(user)
    return False
