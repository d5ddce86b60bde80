"""Runs any graph through the ops' reference meanings, in torch on the CPU.

It is the oracle of pass tests, what calibration runs, and the last resort of a target. Weights are read when
they are first needed and values are dropped after their last use, so memory stays near one layer's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .core import Graph, Op, Value
from .dtypes import FLOAT8, to_numpy
from .errors import CompileError
from .types import Dim

if TYPE_CHECKING:
    import torch

Observer = Callable[[Op, Sequence[Any], Any], None]


def bind(pattern: Sequence[Dim], shape: Sequence[int], dims: dict[str, int], what: str) -> None:
    """Bind the symbols of a shape pattern to numbers.

    Only `symbol` and `symbol + constant` bind; all else is checked.
    """
    if len(pattern) != len(shape):
        raise CompileError(
            f"{what} has rank {len(shape)}, the graph wants {len(pattern)}", remedy="reshape it"
        )
    for d, n in zip(pattern, shape, strict=True):
        if isinstance(d, int):
            value: Dim = d
        else:
            value = d.substitute(dict(dims))
            if not isinstance(value, int):
                (mono, c), *rest = value.terms
                constant = rest[0][1] if rest else 0
                if len(mono) == 1 and c == 1 and len(value.terms) <= 2 and (not rest or rest[0][0] == ()):
                    dims[mono[0]] = n - constant
                    continue
        if value != n:
            raise CompileError(
                f"{what} has shape {list(shape)}, the graph wants [{', '.join(map(str, pattern))}]",
                remedy="give that shape",
            )


def to_torch(array: Any) -> torch.Tensor:
    """A numpy array as a tensor; bfloat16 and float8 of ml_dtypes go through their bits."""
    import numpy as np
    import torch

    array = np.ascontiguousarray(array)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    if array.dtype.name == FLOAT8:
        return torch.from_numpy(array.view(np.uint8).copy()).view(torch.float8_e4m3fn)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def from_torch(tensor: torch.Tensor) -> Any:
    """A tensor as a numpy array; bfloat16 goes through its bits."""
    import torch

    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(to_numpy("bfloat16"))
    return tensor.numpy()


def run(
    graph: Graph,
    inputs: Mapping[str, torch.Tensor],
    *,
    observe: Observer | None = None,
    keep_weights: dict[str, Any] | None = None,
) -> list[torch.Tensor]:
    """Outputs of the graph for inputs by name.

    Args:
        observe: called after each op with (op, operands, results): calibration and debugging.
        keep_weights: a dictionary in which weights stay between calls; without it each is read anew and
        dropped after its last use.
    """
    import torch

    dims: dict[str, int] = {}
    values: dict[Value, Any] = {}
    for v in graph.inputs:
        if v.name not in inputs:
            raise CompileError(
                f"input {v.name} is missing", remedy=f"inputs: {', '.join(i.name for i in graph.inputs)}"
            )
        bind(v.shape, inputs[v.name].shape, dims, f"input {v.name}")
        values[v] = inputs[v.name]
    last: dict[Value, Op] = {v: op for op in graph for v in op.operands}
    keep = set(graph.outputs)

    def fetch(v: Value) -> Any:
        if v not in values:
            assert v.weight is not None, f"{v!r} has no value"
            cached = None if keep_weights is None else keep_weights.get(v.name)
            values[v] = to_torch(v.weight.read()) if cached is None else cached
            if keep_weights is not None:
                keep_weights[v.name] = values[v]
        return values[v]

    with torch.no_grad():
        for op in graph:
            operands = op.grouped([fetch(v) for v in op.operands])
            result = op.reference(dims, *operands)
            results = list(result) if isinstance(result, (tuple, list)) else [result]
            values.update(zip(op.results, results, strict=True))
            if observe is not None:
                observe(op, operands, results)
            for v in op.operands:
                if last[v] is op and v not in keep:
                    values.pop(v, None)
    return [fetch(v) for v in graph.outputs]
