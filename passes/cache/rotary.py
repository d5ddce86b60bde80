"""What rotary embedding turned the keys of each cache by, read off the paged graph.

A runtime that takes tokens out of the middle of a cache has to turn the keys behind them back by as many
positions (Xiao et al., "Efficient Streaming Language Models with Attention Sinks", ICLR 2024,
arXiv:2309.17453, section 3.2). It knows no graph, so the manifest says which elements of a key turn, in which
pairs, and how fast.

A key may be moved only where its position is nowhere but in that rotation. So whatever else positions flow
into (a learned embedding, a scale that grows with the position) is a refusal, and so is whatever is done to a
key between its rotation and the cache.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from ...ir.core import Graph, Value
from ...ir.interpreter import to_torch
from ...ir.ops import math as m
from ...ir.ops.cache import AppendKv, PagedAttention
from ...ir.ops.nn import Rope
from ...ir.ops.shape import Concat, Expand, Reshape, Transpose
from ...ir.ops.state import Recurrence
from .positions import PositionsError, check_positions, cone

_PROBES = (0, 1, 2, 5, 17, 100)
"""Positions at which tables are compared with what the frequencies give."""
_CLOSE = 1e-3
"""Largest difference there: angles are float32 and below 100, tables may be rounded to bfloat16's 2^-9."""


def rotary_facts(graph: Graph) -> dict[str, Any]:
    """For the manifest: `tables` [{`start`, `dim`, `interleaved`, `frequencies`}] and `layers`, the number of
    each cache's table or None where its keys hold no position; or `refused`, the reason, where moving keys
    would change more than their distance.

    Elements `start` … `start + dim - 1` of a key turn, in pairs (2i, 2i + 1) if `interleaved` and else (i,
    i + dim / 2); pair i by `frequencies[i]` radians a position, float64.
    """
    try:
        return _read(graph)
    except PositionsError as reason:
        return {"refused": str(reason)}


def _read(graph: Graph) -> dict[str, Any]:
    if any(isinstance(op, Recurrence) for op in graph):
        raise PositionsError("its recurrent states keep what was evicted")
    known = check_positions(graph, {graph.input("positions")}, graph.input("context_len"))
    turned = _turned(graph)
    tables: list[dict[str, Any]] = []
    layers: dict[int, int | None] = {}
    read: dict[tuple[Value, Value, bool], list[float]] = {}
    for op in graph:
        if not isinstance(op, AppendKv):
            continue
        parts = list(_parts(op.k, 0, turned))
        if len(parts) > 1:
            raise PositionsError(f"keys in {op.loc or graph.name} turn in several parts")
        layer = int(op.pages.name.removeprefix("kv_pages."))
        if not parts:
            layers[layer] = None
            continue
        ((start, rope),) = parts
        key = (rope.cos, rope.sin, rope.interleaved)
        if not {rope.cos, rope.sin} <= known:
            raise PositionsError(f"the rotary embedding in {rope.loc} turns by more than positions")
        if key not in read:
            read[key] = _frequencies(graph, rope)
        table = {
            "start": start,
            "dim": rope.rotary_dim,
            "interleaved": rope.interleaved,
            "frequencies": read[key],
        }
        if table not in tables:
            tables.append(table)
        layers[layer] = tables.index(table)
    return {"tables": tables, "layers": [layers.get(layer) for layer in range(len(graph.facts["kv"]))]}


def _turned(graph: Graph) -> set[Value]:
    """Values that a rotary embedding is part of, on this side of an attention."""
    found: set[Value] = set()
    for op in graph:
        if isinstance(op, Rope) or (
            not isinstance(op, PagedAttention | AppendKv) and any(v in found for v in op.operands)
        ):
            found.update(op.results)
    return found


def _parts(v: Value, start: int, turned: set[Value]) -> Iterable[tuple[int, Rope]]:
    """(first element, rotary embedding) of each part of a key's last axis that turned."""
    op = v.producer
    if isinstance(op, Rope):
        if op.x in turned:
            raise PositionsError(f"keys in {op.loc} turn twice")
        yield start, op
    elif isinstance(op, m.Cast | Expand | Reshape | Transpose) and _keeps_last_axis(op):
        yield from _parts(op.x, start, turned)
    elif isinstance(op, Concat) and op.axis == -1:
        for part in op.operands:
            yield from _parts(part, start, turned)
            width = part.shape[-1]
            assert isinstance(width, int)
            start += width
    elif v in turned:
        assert op is not None
        raise PositionsError(f"{op.opname} in {op.loc} changes keys after their rotary embedding")


def _keeps_last_axis(op: m.Cast | Expand | Reshape | Transpose) -> bool:
    if isinstance(op, Transpose):
        return op.perm[-1] == -1
    return op.x.shape[-1] == op.result.shape[-1]


# Frequencies ------------------------------------------------------------------------------------------------


def _frequencies(graph: Graph, rope: Rope) -> list[float]:
    """Radians a position of each pair: the angles at position 1, where the model computes angles; otherwise
    what its tables have there. Refused where other positions do not turn in proportion.
    """
    positions = graph.input("positions")
    cos, sin = (_evaluated(v, positions) for v in (rope.cos, rope.sin))
    scale = cos[0]  # nothing turns at position 0: what YaRN and its like multiply both tables by
    if not np.isfinite(scale).all() or not (scale > 0).all():
        raise PositionsError(f"the tables of the rotary embedding in {rope.loc} are not finite")
    if _has_cosine(rope.cos):
        angles = _evaluated(rope.cos, positions, angles=True)[1] / scale
    else:
        angles = np.arctan2(sin[1], cos[1])
    turns = np.array(_PROBES, np.float64)[:, None] * angles
    off = max(np.abs(scale * np.cos(turns) - cos).max(), np.abs(scale * np.sin(turns) - sin).max())
    half = len(angles) // 2
    first, second = (
        (angles[::2], angles[1::2]) if rope.interleaved else (angles[:half], angles[half : 2 * half])
    )
    if not off <= _CLOSE * scale.max() or not np.array_equal(first, second):
        raise PositionsError(
            f"the rotary embedding in {rope.loc} does not turn in proportion to the position"
        )
    return [float(f) for f in first]


def _has_cosine(v: Value) -> bool:
    """Whether angles are computed on the way to a table."""
    return any(isinstance(op, m.Cos) for op in cone(v))


def _evaluated(v: Value, positions: Value, *, angles: bool = False) -> np.ndarray:
    """[positions, R] float64 of a table at `_PROBES`; with `angles` what the cosines are taken of, after what
    else is done to them.
    """
    import torch

    values: dict[Value, Any] = {positions: torch.tensor(_PROBES, dtype=torch.int32)}

    def fetch(operand: Value) -> Any:
        if operand not in values:
            assert operand.weight is not None, "tables come from positions and weights alone"
            values[operand] = to_torch(operand.weight.read())
        return values[operand]

    with torch.no_grad():
        for op in cone(v):
            operands = op.grouped([fetch(operand) for operand in op.operands])
            if angles and isinstance(op, m.Cos):
                results = [operands[0]]
            else:
                result = op.reference({"T": len(_PROBES)}, *operands)
                results = list(result) if isinstance(result, tuple | list) else [result]
            values.update(zip(op.results, results, strict=True))
    table = fetch(v).double().numpy()
    return np.broadcast_to(table, (len(_PROBES), table.shape[-1]))


__all__ = ["rotary_facts"]
