"""Experts quantized on what calibration sends them: a part of the walk (`calibrated.py`).

    x, indices of the float model  →  of each expert: its rows x_e, Σ x_eᵀ x_e  →  codes of gate_up
                                      gate(x_e · coded gate_upᵀ), …             →  codes of down

An expert sees the tokens that its router sends it. Where these are too few for a method that minimises the
error on them, or none, its matrices are rounded to nearest, and the notes name it (`too_few_tokens`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...ir.core import Graph, Value
from ...ir.ops.moe import Moe
from ...ir.types import Quantization
from ...ir.weights import LazyTensor
from ..calibration import too_few_tokens
from .blocks import Activations, Segment, check_finite, read_weight
from .grid import Grid
from .moe import Parts, attach_experts, experts_of

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, Any]
Coder = Callable[["torch.Tensor", "torch.Tensor", int, Grid, str], dict[str, Array]]
"""(matrix [N, K], mean of xᵀ x [K, K], tokens, grid, name) → the arrays of its codes."""
_NAMED = 8  # experts that a note names one by one


def mixtures_of(graph: Graph, segment: Segment) -> list[Moe]:
    """The mixtures of a segment that are to be quantized."""
    known = set(experts_of(graph))
    return [op for op in segment.ops if isinstance(op, Moe) and op in known]


def read_of_mixtures(mixtures: Sequence[Moe]) -> tuple[Value, ...]:
    """What `code_experts` needs of the float model after the segment."""
    return tuple(dict.fromkeys(v for op in mixtures for v in (op.x, op.indices)))


def code_experts(
    op: Moe, exact: Activations, grid_of: Callable[[Value], Grid], code: Coder, notes: list[str]
) -> dict[Value, dict[str, Array]]:
    """The codes of both weights of a mixture, those of all experts stacked: [E, N, …]. Raises InputError
    where a weight holds NaN or infinite values.
    """
    import torch

    rows, chosen = _inputs(op, exact)
    coded: dict[Value, list[dict[str, Array]]] = {op.gate_up: [], op.down: []}
    few: list[tuple[int, int]] = []
    assert op.gate_up.weight is not None and op.down.weight is not None
    biases = None if op.up_bias is None else read_weight(op.up_bias)
    for e in range(op.gate_up.weight.shape[0]):
        x = rows[(chosen == e).any(-1)]
        too_few = False
        for weight in (op.gate_up, op.down):
            assert weight.weight is not None
            w = torch.from_numpy(weight.weight.read(e, e + 1)[0].astype(np.float32))
            check_finite(weight, w)
            too_few |= too_few_tokens("", len(x), w.shape[1]) is not None
            hessian = x.T @ x / max(1, len(x))
            grid = grid_of(weight)
            parts = code(w, hessian, len(x), grid, f"{weight.name}[{e}]")
            coded[weight].append(parts)
            if weight is op.gate_up:
                products = x @ dequantized(parts, grid).T
                x = op.gate(products if biases is None else products + biases[e])
        if too_few:
            few.append((e, len(x)))
    if few:
        notes.append(_note(op, few))
    return {w: {part: np.stack([p[part] for p in parts]) for part in parts[0]} for w, parts in coded.items()}


def _note(op: Moe, few: Sequence[tuple[int, int]]) -> str:
    named = ", ".join(f"{e} ({tokens})" for e, tokens in few[:_NAMED])
    more = f" and {len(few) - _NAMED} more" if len(few) > _NAMED else ""
    total = op.gate_up.shape[0]
    return (
        f"{op.loc or op.gate_up.name}: {len(few)} of {total} experts saw too few calibration tokens and are "
        f"rounded to nearest: expert (tokens) {named}{more}"
    )


def _inputs(op: Moe, exact: Activations) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [tokens, D] of all sequences, and the experts [tokens, k] that were chosen for them."""
    import torch

    rows: list[Any] = []
    chosen: list[Any] = []
    for i in range(len(exact)):
        found = exact.load(i, (op.x, op.indices))
        rows.append(found[op.x].reshape(-1, found[op.x].shape[-1]).float())
        chosen.append(found[op.indices].reshape(-1, found[op.indices].shape[-1]))
    return torch.cat(rows), torch.cat(chosen)


def dequantized(parts: Mapping[str, Array], grid: Grid) -> torch.Tensor:
    """float32 of arrays "q" [..., N, K], "scale" and "zero" [..., N, G]."""
    import torch

    q, scale, zero = (torch.from_numpy(parts[name].astype(np.float32)) for name in ("q", "scale", "zero"))
    k = q.shape[-1]
    size = min(grid.group or k, k)

    def spread(groups: torch.Tensor) -> torch.Tensor:
        return groups.repeat_interleave(size, -1)[..., :k]

    return (q - spread(zero)) * spread(scale)


def attach_coded(
    graph: Graph,
    coded: Mapping[Value, Mapping[str, Array]],
    grids: Mapping[Value, Grid],
    lazy: Callable[[Array, str], LazyTensor],
) -> set[Value]:
    """Let mixtures read their codes; which weights that were."""
    done: set[Value] = set()
    for op in experts_of(graph):
        if op.gate_up not in coded or op.down not in coded:
            continue
        parts: list[Parts] = []
        for weight in (op.gate_up, op.down):
            grid, arrays = grids[weight], coded[weight]
            k = arrays["q"].shape[-1]
            zero = None if grid.symmetric else lazy(arrays["zero"], f"zero_point({weight.name})")
            quant = Quantization(grid.bits, min(grid.group or k, k), grid.symmetric)
            codes, scale = (lazy(arrays[part], f"{part}({weight.name})") for part in ("q", "scale"))
            parts.append(Parts(quant, codes, scale, zero))
            done.add(weight)
        attach_experts(graph, op, *parts)
    return done
