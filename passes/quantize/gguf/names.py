"""Which parameters of the model a weight of the graph holds, by its name.

    model.layers.0.self_attn.q_proj.weight+k_proj+v_proj   → the three of them, one below the other
    model.norm.weight.add                                  → model.norm.weight, with something added

Merging (`passes/fuse/projections.py`) and folding leave names from which the parameters can be read.
"""

from __future__ import annotations

from ....ir.core import Value
from ....ir.weights import LazyTensor
from ...derived import CastTensor, ConcatRows
from ...merged_names import merged_names


def flat_parts(data: LazyTensor) -> list[LazyTensor]:
    """The tensors that stand one below the other in a merged one, cast or not."""
    if isinstance(data, CastTensor) and isinstance(data.base, ConcatRows):
        return [CastTensor(part, data.dtype) for part in flat_parts(data.base)]
    return (
        [one for part in data.parts for one in flat_parts(part)] if isinstance(data, ConcatRows) else [data]
    )


def named_parts(weight: Value) -> list[tuple[str, LazyTensor]]:
    """(parameter, tensor) of a weight's parts; by number behind its own name where theirs do not fit."""
    assert weight.weight is not None
    parts = flat_parts(weight.weight)
    names = merged_names(weight.name)
    if len(names) != len(parts):
        names = [f"{weight.name}.{number}" for number in range(len(parts))]
    return list(zip(names, parts, strict=True))
