"""Which parameters of the model a weight of the graph holds, by its name.

    model.layers.0.self_attn.q_proj.weight+k_proj+v_proj   → the three of them, one below the other
    model.norm.weight.add                                  → model.norm.weight, with something added

Merging (`passes/fuse/projections.py`) and folding leave names from which the parameters can be read.
"""

from __future__ import annotations

from ....ir.core import Value
from ....ir.weights import LazyTensor
from ...derived import ConcatRows
from ...merged_names import merged_names


def flat_parts(data: LazyTensor) -> list[LazyTensor]:
    """The tensors that stand one below the other in a merged one."""
    return (
        [one for part in data.parts for one in flat_parts(part)] if isinstance(data, ConcatRows) else [data]
    )


def named_parts(weight: Value) -> list[tuple[str, LazyTensor]]:
    """(parameter, tensor) of a weight's parts; all under its own name where their number does not fit."""
    assert weight.weight is not None
    parts = flat_parts(weight.weight)
    names = merged_names(weight.name)
    return list(zip(names if len(names) == len(parts) else [weight.name] * len(parts), parts, strict=True))
