"""How operations pass a positive scale of channels through: the table that absorption searches with.

A value is scaled where its elements along some axes are multiplied by factors f_i ** power. Which factor an
element takes is written as an array of numbers, one a channel, of the value's rank (1 along axes on which
nothing depends); number 0 stands for the factor 1. Each rule below relates the operands and results of one op
so that the op's meaning is kept, for example

    linear      result rows · f  ⇔  weight rows · f, bias · f          x · f  ⇔  weight columns / f
    rms_norm    result · f       ⇔  weight · f                         x · f: never
    gated_mlp   result · f       ⇔  the `up` half of gate_up · f
    attention   result · f       ⇔  v · f (one factor for the query heads that share a key/value head)
    relu        result · f       ⇔  operand · f                        relu² takes √f

An op without a rule lets no scale pass: the channels that reach it take the factor 1.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...ir.core import Graph, Op, Value
from ...ir.ops import math as m
from ...ir.ops.attention import Attention, Sdpa
from ...ir.ops.nn import Embedding, GatedMlp, LayerNorm, Linear, RmsNorm
from ...ir.ops.shape import Concat, Expand, Reshape, Slice, Transpose
from ...ir.rewriter import constant

Numbers = np.ndarray[Any, np.dtype[np.int64]]
FIXED = 0


@dataclass
class Scaled:
    """The factors of one value: `numbers` of the value's rank, all to the same `power`."""

    numbers: Numbers
    power: float


class Channels:
    """Factors by number, which of them are one, and the values that they scale."""

    def __init__(self, graph: Graph, choices: Sequence[int] = ()) -> None:
        self.graph = graph
        self.at: dict[Value, Scaled] = {}
        self.choices: dict[Op, int] = {}  # which operand of a product takes the scale
        self._given = deque(choices)
        self._parent = [FIXED]
        self._why: dict[int, str] = {}
        self._queue: deque[Value] = deque()

    # -- factors
    # ----------------------------------------------------------------------------------------------------
    def fresh(self, shape: Sequence[int]) -> Numbers:
        """New factors, all different."""
        first = len(self._parent)
        count = int(np.prod(shape, dtype=np.int64))
        self._parent.extend(range(first, first + count))
        return np.arange(first, first + count, dtype=np.int64).reshape(shape)

    def root(self, number: int) -> int:
        while self._parent[number] != number:
            number = self._parent[number]
        return number

    def roots(self, numbers: Numbers) -> Numbers:
        return np.fromiter((self.root(int(i)) for i in numbers.ravel()), np.int64, numbers.size).reshape(
            numbers.shape
        )

    def join(self, a: Numbers, b: Numbers) -> None:
        """These factors are the same."""
        a, b = np.broadcast_arrays(a, b)
        for x, y in set(zip(a.ravel().tolist(), b.ravel().tolist(), strict=True)):
            i, j = self.root(x), self.root(y)
            if i != j:
                self._parent[max(i, j)] = min(i, j)  # FIXED is the least

    def fix(self, numbers: Numbers, why: str) -> None:
        """These factors are 1."""
        for number in set(numbers.ravel().tolist()):
            root = self.root(number)
            if root != FIXED:
                self._why[root] = why
                self._parent[root] = FIXED

    def reason(self, number: int) -> str:
        """Why a factor is fixed."""
        while number not in self._why and number != FIXED:
            number = self._parent[number]
        return self._why.get(number, "it is joined with channels that nothing can scale")

    # -- values
    # -----------------------------------------------------------------------------------------------------
    def scale(self, value: Value, numbers: Numbers, power: float) -> None:
        """A value is scaled so; what that asks of its neighbours is found by `spread`."""
        known = self.at.get(value)
        if known is None:
            self.at[value] = Scaled(numbers, power)
            if self.roots(numbers).any():
                self._queue.append(value)
        elif known.power != power:
            for one in (known.numbers, numbers):
                self.fix(one, f"{value.name or 'a value'} would take two powers of one scale")
        else:
            self.join(known.numbers, numbers)

    def fix_value(self, value: Value, why: str) -> None:
        known = self.at.get(value)
        if known is not None:
            self.fix(known.numbers, why)

    def fit(self, numbers: Numbers, value: Value) -> Numbers:
        """Numbers of a broadcast result as an operand takes them: factors along axes that it lacks join."""
        rank = value.type.rank
        while numbers.ndim > rank:
            self.join(numbers[:1], numbers)
            numbers = numbers[0]
        numbers = numbers.reshape((1,) * (rank - numbers.ndim) + numbers.shape)
        for axis, length in enumerate(value.shape):
            if length == 1 and numbers.shape[axis] != 1:
                first = numbers.take([0], axis)
                self.join(first, numbers)
                numbers = first
        return numbers

    def spread(self) -> None:
        """Follow every demand to the weights that fulfil it, or to what fixes it."""
        while self._queue:
            value = self._queue.popleft()
            numbers = self.at[value].numbers
            if not self.roots(numbers).any():
                continue
            if self.graph.output_uses(value):
                self.fix(numbers, f"{value.name or 'the value'} is an output of the graph")
            elif value.producer is None and not value.is_weight:
                self.fix(numbers, f"{value.name} is an input of the graph")
            for op in [*([value.producer] if value.producer is not None else []), *value.users]:
                rule = RULES.get(type(op))
                if rule is None:
                    self._refuse(op)
                else:
                    rule(op, self)
        for value, scaled in self.at.items():
            if value.is_weight and sum(n > 1 for n in scaled.numbers.shape) > 1:
                self.fix(scaled.numbers, f"{value.name} would be scaled along two axes")

    def _refuse(self, op: Op) -> None:
        for value in (*op.operands, *op.results):
            self.fix_value(value, f"{op.opname}{_where(op)} lets no scale of channels pass")

    def choose(self, op: Op, default: int) -> int:
        """Which operand of a product is scaled, where both may be."""
        if op not in self.choices:
            self.choices[op] = self._given.popleft() if self._given else default
        return self.choices[op]


def _where(op: Op) -> str:
    return f" in {op.loc}" if op.loc else ""


def _only_last(ch: Channels, value: Value) -> Scaled | None:
    """The factors of a value along its last axis; joined where they depend on others too."""
    known = ch.at.get(value)
    if known is None:
        return None
    numbers = known.numbers
    while numbers.ndim > 1:
        ch.join(numbers[:1], numbers)
        numbers = numbers[0]
    return Scaled(numbers, known.power)


def _last(numbers: Numbers, value: Value) -> Numbers:
    return numbers.reshape((1,) * (value.type.rank - 1) + (-1,))


# -- rules: each sees the op with some of its values known, and says what that asks of the others
def _same(op: Op, ch: Channels) -> None:
    """All operands and the result take the same factors (numpy's broadcasting)."""
    values = [op.result, *(v for v in op.operands if not _neutral(op, v))]
    for known in [v for v in values if v in ch.at]:
        scaled = ch.at[known]
        rank = op.result.type.rank
        numbers = scaled.numbers.reshape((1,) * (rank - scaled.numbers.ndim) + scaled.numbers.shape)
        for other in values:
            if other is not known:
                ch.scale(other, ch.fit(numbers, other), scaled.power)


def _neutral(op: Op, value: Value) -> bool:
    """The zero of max(x, 0) and the like, and the condition of a choice: scaling changes neither."""
    if isinstance(op, m.Where):
        return value is op.condition
    return isinstance(op, (m.Maximum, m.Minimum, m.Add, m.Sub)) and constant(value) == 0


def _product(op: Op, ch: Channels) -> None:
    assert isinstance(op, (m.Mul, m.Div))
    a, b, out = op.a, op.b, op.result
    if a is b and isinstance(op, m.Mul):
        if out in ch.at:
            ch.scale(a, ch.at[out].numbers, ch.at[out].power / 2)
        if a in ch.at:
            ch.scale(out, ch.at[a].numbers, ch.at[a].power * 2)
        return
    if isinstance(op, m.Div) or constant(b) is not None:
        taken = 0
    elif constant(a) is not None:
        taken = 1
    else:
        known = a in ch.at, b in ch.at
        taken = ch.choose(op, int(known[1] if any(known) else not a.is_weight))
    chosen, other = (a, b) if taken == 0 else (b, a)
    ch.fix_value(other, f"both sides of {op.opname}{_where(op)} would be scaled")
    if out in ch.at:
        ch.scale(chosen, ch.fit(ch.at[out].numbers, chosen), ch.at[out].power)
    if chosen in ch.at:
        numbers = ch.at[chosen].numbers
        ch.scale(
            out, numbers.reshape((1,) * (out.type.rank - numbers.ndim) + numbers.shape), ch.at[chosen].power
        )


def _linear(op: Op, ch: Channels) -> None:
    assert isinstance(op, Linear)
    x, rows = _only_last(ch, op.x), _only_last(ch, op.result)
    if x is not None:
        ch.scale(op.weight, x.numbers[None, :], -x.power)
    if rows is not None:
        ch.scale(op.weight, rows.numbers[:, None], rows.power)
        if op.bias is not None:
            ch.scale(op.bias, rows.numbers, rows.power)
    weight = ch.at.get(op.weight)
    if weight is not None and weight.numbers.shape[0] == 1:
        ch.scale(op.x, _last(weight.numbers[0], op.x), -weight.power)
    elif weight is not None and weight.numbers.shape[1] == 1:
        ch.scale(op.result, _last(weight.numbers[:, 0], op.result), weight.power)
    if op.bias is not None and op.bias in ch.at:
        bias = ch.at[op.bias]
        ch.scale(op.result, _last(bias.numbers, op.result), bias.power)


def _embedding(op: Op, ch: Channels) -> None:
    assert isinstance(op, Embedding)
    columns, table = _only_last(ch, op.result), ch.at.get(op.weight)
    if columns is not None:
        ch.scale(op.weight, columns.numbers[None, :], columns.power)
    if table is not None and table.numbers.shape[0] != 1:
        ch.fix(table.numbers, f"{op.weight.name} is a table of which each row is another token's")
    elif table is not None:
        ch.scale(op.result, _last(table.numbers[0], op.result), table.power)


def _norm(op: Op, ch: Channels) -> None:
    assert isinstance(op, (RmsNorm, LayerNorm))
    ch.fix_value(op.x, f"{op.opname}{_where(op)} takes the scale of its operand away")
    parts = [v for v in op.operands if v is not op.x]
    out = _only_last(ch, op.result)
    if out is not None:
        for part in parts:
            ch.scale(part, out.numbers, out.power)
        if op.weight is None:
            ch.fix(out.numbers, f"{op.opname}{_where(op)} has no weight")
    for part in parts:
        if part in ch.at:
            ch.scale(op.result, _last(ch.at[part].numbers, op.result), ch.at[part].power)


def _gated_mlp(op: Op, ch: Channels) -> None:
    assert isinstance(op, GatedMlp)
    out, known = _only_last(ch, op.result), _only_last(ch, op.gate_up)
    if out is not None:
        width = op.result.shape[-1]
        assert isinstance(width, int)
        up = np.broadcast_to(out.numbers, (width,))
        both = np.concatenate([np.full_like(up, FIXED), up])
        ch.scale(op.gate_up, _last(both, op.gate_up), out.power)
    if known is not None and known.numbers.size == 1:
        ch.fix(known.numbers, f"the gate{_where(op)} is no linear function")
    elif known is not None:
        gate, up = np.split(known.numbers, 2)
        ch.fix(gate, f"the gate{_where(op)} is no linear function")
        ch.scale(op.result, _last(up, op.result), known.power)


def _attention(op: Op, ch: Channels) -> None:
    """Every query head is a mean of rows of v."""
    assert isinstance(op, (Attention, Sdpa))
    for value in (*op.operands,):
        if value is not op.v:
            ch.fix_value(value, f"{op.opname}{_where(op)} is no linear function of its queries and keys")
    axis = -2 if isinstance(op, Attention) else -3
    heads, shared = op.q.shape[axis], op.v.shape[axis]
    if not isinstance(heads, int) or not isinstance(shared, int):
        for value in (op.result, op.v):
            ch.fix_value(value, f"the number of heads{_where(op)} is not known")
        return
    out, v = ch.at.get(op.result), ch.at.get(op.v)
    if out is not None:
        shape = list(out.numbers.shape)
        shape[axis] = heads
        numbers = np.broadcast_to(out.numbers, shape)
        lead, tail = shape[: len(shape) + axis], shape[len(shape) + axis + 1 :]
        grouped = numbers.reshape(*lead, shared, heads // shared, *tail)
        place = len(shape) + axis + 1
        first = grouped.take([0], place)
        ch.join(first, grouped)
        ch.scale(op.v, first.squeeze(place), out.power)
    if v is not None:
        numbers = v.numbers if v.numbers.shape[axis] == 1 else v.numbers.repeat(heads // shared, axis)
        ch.scale(op.result, numbers, v.power)


def reshaped(numbers: Numbers, old: Sequence[Any], new: Sequence[Any]) -> Numbers | None:
    """Numbers of a value of shape `old` as those of its reshape to `new`; None where axes that matter mix
    with symbolic ones.
    """
    start = next((i for i, n in enumerate(numbers.shape) if n > 1), len(old))
    while all(isinstance(d, int) for d in old[start:]):
        size = int(np.prod(old[start:], dtype=np.int64))
        place, total = len(new), 1
        while total < size and place and isinstance(new[place - 1], int):
            place -= 1
            total *= new[place]
        if total == size:
            tail = np.broadcast_to(numbers.reshape(numbers.shape[start:]), tuple(old[start:]))
            return tail.reshape((1,) * place + tuple(new[place:]))
        if start == 0:
            return None
        start -= 1
    return None


def _reshape(op: Op, ch: Channels) -> None:
    assert isinstance(op, Reshape)
    for known, other in ((op.result, op.x), (op.x, op.result)):
        if known in ch.at:
            numbers = reshaped(ch.at[known].numbers, known.shape, other.shape)
            if numbers is None:
                ch.fix_value(known, f"reshape{_where(op)} mixes channels with tokens")
            else:
                ch.scale(other, numbers, ch.at[known].power)


def _transpose(op: Op, ch: Channels) -> None:
    assert isinstance(op, Transpose)
    perm = op.full_perm()
    if op.x in ch.at:
        ch.scale(op.result, ch.at[op.x].numbers.transpose(perm), ch.at[op.x].power)
    if op.result in ch.at:
        ch.scale(op.x, ch.at[op.result].numbers.transpose(np.argsort(perm)), ch.at[op.result].power)


def _slice(op: Op, ch: Channels) -> None:
    """Channels that are not in the slice are free, as far as it is concerned."""
    assert isinstance(op, Slice)
    length, place = op.x.shape[op.axis], slice(op.start, op.stop, op.step)
    if op.x in ch.at:
        numbers = ch.at[op.x].numbers
        if numbers.shape[op.axis] != 1:
            numbers = numbers[(..., place, *([slice(None)] * (-op.axis - 1)))]
        ch.scale(op.result, numbers, ch.at[op.x].power)
    elif op.result in ch.at:
        numbers = ch.at[op.result].numbers
        if numbers.shape[op.axis] != 1 or (isinstance(length, int) and numbers.size > 1):
            if not isinstance(length, int):
                ch.fix_value(op.result, f"slice{_where(op)} cuts a symbolic axis")
                return
            whole = ch.fresh(
                [length if i == numbers.ndim + op.axis else n for i, n in enumerate(numbers.shape)]
            )
            whole[(..., place, *([slice(None)] * (-op.axis - 1)))] = numbers
            numbers = whole
        ch.scale(op.x, numbers, ch.at[op.result].power)


def _concat(op: Op, ch: Channels) -> None:
    assert isinstance(op, Concat)
    lengths = [x.shape[op.axis] for x in op.xs]
    if not all(isinstance(n, int) for n in lengths):
        for value in (*op.xs, op.result):
            ch.fix_value(value, f"concat{_where(op)} joins a symbolic axis")
        return
    known = ch.at.get(op.result)
    if known is None:
        first = next(x for x in op.xs if x in ch.at)
        numbers, power = ch.at[first].numbers, ch.at[first].power
        shape = [
            sum(n for n in lengths if isinstance(n, int)) if i == numbers.ndim + op.axis else n
            for i, n in enumerate(numbers.shape)
        ]
        known = Scaled(ch.fresh(shape), power)
        ch.scale(op.result, known.numbers, power)
    start = 0
    for x in op.xs:
        n = x.shape[op.axis]
        assert isinstance(n, int)
        part = known.numbers
        if part.shape[op.axis] != 1:
            part = part[(..., slice(start, start + n), *([slice(None)] * (-op.axis - 1)))]
        ch.scale(x, part, known.power)
        start += n


RULES: dict[type[Op], Callable[[Op, Channels], None]] = {
    **dict.fromkeys(
        (m.Add, m.Sub, m.Neg, m.Abs, m.Relu, m.Maximum, m.Minimum, m.Where, m.Cast, Expand), _same
    ),
    **dict.fromkeys((m.Mul, m.Div), _product),
    **dict.fromkeys((RmsNorm, LayerNorm), _norm),
    **dict.fromkeys((Attention, Sdpa), _attention),
    Linear: _linear,
    Embedding: _embedding,
    GatedMlp: _gated_mlp,
    Reshape: _reshape,
    Transpose: _transpose,
    Slice: _slice,
    Concat: _concat,
}
