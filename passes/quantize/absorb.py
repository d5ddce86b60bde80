"""A scale of channels moves from a value into the weights before and after it, and the function stays.

    x = rms_norm(h, w); y = linear(x, W)      →  x = rms_norm(h, w / s); y = linear(x, W · diag(s))

Quantizers choose s so that W · diag(s) rounds with less error (AWQ, SmoothQuant). Whether x can become x / s
is a question of the ops around it (`channels.py`), never of the model's name: everything that makes x must be
able to divide, and everything that reads it to multiply.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...ir.core import Graph, Op, Value
from ...ir.dtypes import to_numpy
from ...ir.errors import CompileError
from ...ir.ops.nn import LayerNorm, Linear, RmsNorm
from ...ir.weights import ArrayTensor, LazyTensor
from ..derived import ScaledColumns, ScaledRows
from .channels import Channels, Numbers

Array = np.ndarray[Any, Any]
MOST_CHOICES = 4  # products on the way of which each may pass the scale to either side


@dataclass(frozen=True)
class Edit:
    """Along `axis`, element i of `weight` is multiplied by scale[groups[i]] ** power (by 1 where groups[i] is
    -1).
    """

    weight: Value
    axis: int
    groups: Numbers
    power: float

    def factors(self, scale: Array) -> Array:
        """float64, one an element along the axis."""
        padded = np.append(np.asarray(scale, np.float64), 1.0)
        return padded[self.groups] ** self.power


@dataclass(frozen=True)
class Absorption:
    """How x → x / s can be made good.

    Attributes:
        groups: int64 [K], the scale that each channel of x takes, 0 … count - 1; -1 where a channel cannot be
            scaled. Channels that must share a scale have one number.
        linears: the linear layers that read x (through reshapes) and take the scale into their columns.
        values: what is scaled on the way, x itself too: by value its groups, of the value's rank (1
            along axes on which nothing depends), and the power.
        reason: why some channels, or all, cannot be scaled; None where all can.
    """

    x: Value
    groups: Numbers
    count: int
    linears: tuple[Linear, ...]
    edits: tuple[Edit, ...]
    values: Mapping[Value, tuple[Numbers, float]]
    reason: str | None

    @property
    def possible(self) -> bool:
        return self.count > 0

    def tied(self, wanted: Array) -> Array:
        """Scales [count] for wishes [K] > 0: the geometric mean over the channels that share one."""
        logs = np.log(np.asarray(wanted, np.float64))
        keep = self.groups >= 0
        total = np.bincount(self.groups[keep], logs[keep], self.count)
        return np.exp(total / np.bincount(self.groups[keep], minlength=self.count))

    def per_channel(self, scale: Array) -> Array:
        """float64 [K]: what each channel of x is divided by."""
        return np.append(np.asarray(scale, np.float64), 1.0)[self.groups]

    def value_factors(self, value: Value, scale: Array) -> Array | None:
        """What a value of the graph is multiplied by (it broadcasts); None for one that stays."""
        if value not in self.values:
            return None
        groups, power = self.values[value]
        return np.append(np.asarray(scale, np.float64), 1.0)[groups] ** power


def find_absorption(graph: Graph, x: Value) -> Absorption:
    """What dividing the last axis of x [..., K] by positive scales would change. Changes nothing itself."""
    best = _search(graph, x, ())
    found = best[1]
    for choices in itertools.islice(itertools.product((0, 1), repeat=min(best[0], MOST_CHOICES)), 16):
        if not best[0] or bool((found.groups >= 0).all()):
            break
        other = _search(graph, x, choices)[1]
        if (other.groups >= 0).sum() > (found.groups >= 0).sum():
            found = other
    return found


def _search(graph: Graph, x: Value, choices: Sequence[int]) -> tuple[int, Absorption]:
    """How many products had to choose a side, and what comes of these choices."""
    k = x.shape[-1]
    if not isinstance(k, int):
        raise CompileError(f"{x!r} has no fixed number of channels", remedy="scale another value")
    channels = Channels(graph, choices)
    numbers = channels.fresh([k])
    channels.scale(x, numbers.reshape((1,) * (x.type.rank - 1) + (k,)), -1.0)
    channels.spread()
    return len(channels.choices), _result(x, numbers, channels)


def _result(x: Value, numbers: Numbers, channels: Channels) -> Absorption:
    roots = channels.roots(numbers)
    order = {root: i for i, root in enumerate(dict.fromkeys(roots[roots > 0].tolist()))}

    def groups_of(which: Numbers) -> Numbers:
        flat = channels.roots(which).ravel()
        return np.fromiter((order.get(int(r), -1) for r in flat), np.int64, flat.size)

    groups = groups_of(numbers)
    stuck = np.flatnonzero(groups < 0)
    reason = channels.reason(int(numbers[stuck[0]])) if stuck.size else None
    edits: list[Edit] = []
    values: dict[Value, tuple[Numbers, float]] = {}
    for value, scaled in channels.at.items():
        shape = scaled.numbers.shape
        axis = next((i for i, n in enumerate(shape) if n > 1), len(shape) - 1)
        found = groups_of(scaled.numbers)
        if not value.is_weight:
            values[value] = (found.reshape(shape), scaled.power)
        elif (found >= 0).any():
            length = value.shape[axis]
            assert isinstance(length, int)
            edits.append(Edit(value, axis, np.broadcast_to(found, (length,)), scaled.power))
    linears = [
        op
        for edit in edits
        if edit.axis == 1
        for op in edit.weight.users
        if isinstance(op, Linear) and op.x in channels.at
    ]
    return Absorption(x, groups, len(order), tuple(dict.fromkeys(linears)), tuple(edits), values, reason)


def absorb(graph: Graph, absorption: Absorption, scale: Array) -> None:
    """Carry it out: x becomes x / scale (scale > 0, [count]), and weights take in the difference, lazily.

    Weights keep their names; the fact `scaled_channels` says that layers read other numbers than their
    modules do. CompileError where a scale is not positive and finite.
    """
    scale = np.asarray(scale, np.float64)
    if scale.shape != (absorption.count,) or not (np.isfinite(scale).all() and (scale > 0).all()):
        raise CompileError(
            f"scales of {absorption.x!r} must be {absorption.count} positive numbers",
            remedy="this is a bug of the quantizer",
        )
    graph.facts["scaled_channels"] = True
    for edit in absorption.edits:
        _scale_weight(graph, edit.weight, edit.factors(scale).astype(np.float32), edit.axis)


def _scale_weight(graph: Graph, value: Value, factors: Array, axis: int) -> None:
    assert value.weight is not None
    base = value.weight
    rank = len(base.shape)
    # What a linear layer or an RMSNorm reads may be of any float type; others need that of their operand.
    free = all(isinstance(u, (Linear, RmsNorm)) for u in value.users)
    dtype = "float32" if free else base.dtype
    data: LazyTensor
    if axis == 0:
        data = ScaledRows(base, factors, dtype)
    elif axis == rank - 1:
        data = ScaledColumns(base, factors, dtype)
    else:
        raise CompileError(f"{value.name} cannot be scaled along axis {axis}", remedy="report the model")
    graph.set_weight(value, data)


def give_norms_weights(graph: Graph) -> int:
    """Norms without a weight that a linear layer reads get one of ones, to take a scale; how many did.

    rms_norm(x, _)  → rms_norm(x, ones)
    """
    count = 0
    for norm in graph.ops:
        if not isinstance(norm, (RmsNorm, LayerNorm)) or norm.weight is not None:
            continue
        width = norm.x.shape[-1]
        if not isinstance(width, int) or not any(isinstance(u, Linear) for u in norm.result.users):
            continue
        name = f"{norm.loc or 'norm'}.weight"
        while name in graph.weights:
            name += "_"
        weight = graph.add_weight(name, ArrayTensor(np.ones(width, to_numpy(norm.x.dtype)), name))
        new: Op
        if isinstance(norm, RmsNorm):
            new = RmsNorm(norm.x, weight, eps=norm.eps)
        else:
            new = LayerNorm(norm.x, weight, norm.bias, eps=norm.eps)
        new.loc = norm.loc
        graph.insert(new, before=norm)
        graph.replace(norm, [new.result])
        count += 1
    return count
