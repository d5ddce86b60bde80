"""Rotary embedding.

    add(mul(x, cos), mul(concat([neg(slice(x, h:)), slice(x, :h)]), sin))   → rope(x, cos, sin)
    … concat([neg(slice(x, 1::2)), slice(x, ::2)]) side by side instead …   → rope(x, cos, sin, interleaved)
    concat([rope(slice(x, :r)), slice(x, r:)])                              → rope(x, cos, sin)  (partial)
    concat([a · cos - b · sin, b · cos + a · sin])                          → rope(concat([a, b]), cos, sin)
    a, b = columns of reshape(x, [..., n, 2]):
    reshape(concat([a · cos - b · sin, a · sin + b · cos], side by side))   → rope(x, cos, sin, interleaved)

x is [1, H, T, D] (head-major) or [1, T, H, D] here, as its tables say; rope is token-major, so around a
head-major one a transpose goes in and one comes out, and they cancel with their neighbours. The tables stay
what the model computes from its positions: every RoPE scaling works without being known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...ir.core import Value
from ...ir.ops import math as m
from ...ir.ops.nn import Rope
from ...ir.ops.shape import Concat, Expand, Reshape, Slice, Transpose
from ...ir.rewriter import Any, Match, P, Rewriter, Rule
from ...ir.types import Dim, divide
from ..base import RulePass

SWAP_HEADS = (-2, -3, -1)  # [.., H, T, D] ↔ [.., T, H, D]


def token_major(rw: Rewriter, x: Value) -> Value:
    """x [.., H, T, D] → [.., T, H, D]; cancels a transpose that is there already."""
    op = x.producer
    if isinstance(op, Transpose) and op.perm == SWAP_HEADS:
        return op.x
    return rw.insert(Transpose(x, perm=SWAP_HEADS))


@dataclass(frozen=True)
class Part:
    """A strided piece of the last axis of `base`, perhaps negated and with heads and tokens swapped."""

    base: Value
    piece: tuple[Dim, Dim, int]
    negated: bool
    swapped: bool


def _part(v: Value) -> Part | None:
    """Take reshape to [..., n, 1], neg and transpose off, down to the slice."""
    negated = swapped = False
    while True:
        op = v.producer
        if isinstance(op, m.Neg):
            negated, v = not negated, op.x
        elif isinstance(op, Transpose) and op.perm == SWAP_HEADS:
            swapped, v = not swapped, op.x
        elif isinstance(op, Reshape) and op.shape == (*op.x.shape, 1):
            v = op.x
        elif isinstance(op, Slice) and op.axis == -1:
            return Part(op.x, (op.start, op.stop, op.step), negated, swapped)
        else:
            return None


@dataclass(frozen=True)
class Turned:
    """The rotated companion of `base`: (-second, first) of each pair."""

    base: Value
    interleaved: bool
    swapped: bool


def turned(v: Value) -> Turned | None:
    """Whether v is x with each pair (a, b) turned into (-b, a), and of which x."""
    swapped = False
    if isinstance(v.producer, Transpose) and v.producer.perm == SWAP_HEADS:
        swapped, v = True, v.producer.x
    op = v.producer
    interleaved = isinstance(op, Reshape)
    if isinstance(op, Reshape):
        beside = op.x.producer
        if op.x.shape != (*op.shape[:-1], divide(op.shape[-1], 2), 2):
            return None
        op = beside
    if not isinstance(op, Concat) or op.axis != -1 or len(op.operands) != 2:
        return None
    first, second = _part(op.operands[0]), _part(op.operands[1])
    if first is None or second is None or first.base is not second.base or first.swapped != second.swapped:
        return None
    width = first.base.shape[-1]
    if not isinstance(width, int) or width % 2 or not first.negated or second.negated:
        return None
    half = width // 2
    wanted = ((1, width, 2), (0, width, 2)) if interleaved else ((half, width, 1), (0, half, 1))
    if (_ended(first, width), _ended(second, width)) != wanted:
        return None
    return Turned(first.base, interleaved, swapped != first.swapped)


def _ended(part: Part, width: int) -> tuple[Dim, Dim, int]:
    """The slice with its stop at the end of the axis where the last step reaches it."""
    start, stop, step = part.piece
    return (start, width if step == 2 and stop == width - 1 else stop, step)


def one_table(rw: Rewriter, table: Value) -> Value:
    """cos or sin as [1, T, R] from [1, 1, T, R] or [1, T, 1, R]."""
    target = (1, *(d for d in table.shape[:-1] if d != 1), table.shape[-1])
    return table if table.shape == target else rw.insert(Reshape(table, shape=target))


class FuseRope(Rule):
    """x · cos + turned(x) · sin → rope(x, cos, sin)"""

    pattern = P(m.Add, P(m.Mul, Any("x"), Any("cos")), P(m.Mul, Any("turned"), Any("sin")))

    def _read(self, found: Match) -> tuple[Value, Value, Value, bool] | str | None:
        """x, cos, sin, interleaved (products have no order); None where nothing is turned at all."""
        refusal: str | None = None
        for x, cos in (("x", "cos"), ("cos", "x")):
            for rotated, sin in (("turned", "sin"), ("sin", "turned")):
                t = turned(found[rotated])
                if t is None:
                    continue
                refusal = "the second product does not turn the pairs of the same tensor"
                base = found[x]
                if t.swapped:
                    op = base.producer
                    base = op.x if isinstance(op, Transpose) and op.perm == SWAP_HEADS else base
                if base is t.base:
                    return found[x], found[cos], found[sin], t.interleaved
        return refusal

    def check(self, found: Match) -> str | None:
        read = self._read(found)
        if read is None or isinstance(read, str):
            return read
        x, cos, sin, _ = read
        if x.type.rank != 4:
            return "rotary embedding of a tensor that is neither [1, H, T, D] nor [1, T, H, D]"
        return (
            None
            if layout(x, cos) is not None and layout(x, cos) == layout(x, sin)
            else (f"the tables {cos.type} and {sin.type} are not one row a token of {x.type}")
        )

    def rewrite(self, found: Match, rw: Rewriter) -> Sequence[Value] | None:
        read = self._read(found)
        if read is None or isinstance(read, str):
            return None
        x, cos, sin, interleaved = read
        cos, sin = one_table(rw, cos), one_table(rw, sin)
        if layout(x, read[1]) == "token-major":
            return [rw.insert(Rope(x, cos, sin, interleaved=interleaved))]
        y = rw.insert(Rope(token_major(rw, x), cos, sin, interleaved=interleaved))
        return [rw.insert(Transpose(y, perm=SWAP_HEADS))]


def layout(x: Value, table: Value, *, pairs: bool = False) -> str | None:
    """How x [1, a, b, D] lies, by the axis along which its table [..., D], or [..., D / 2] of `pairs`,
    varies; None where neither fits.
    """
    width = table.shape[-1] * 2 if pairs else table.shape[-1]
    if table.type.rank not in (2, 3, 4) or width != x.shape[-1] or x.shape[0] != 1:
        return None
    lead = (1,) * (4 - table.type.rank) + table.shape[:-1]
    if lead == (1, 1, x.shape[-2]):
        return "head-major"
    return "token-major" if lead == (1, x.shape[-3], 1) else None


def _column(v: Value) -> Value | None:
    """v [..., n] of its reshape to [..., n, 1]."""
    op = v.producer
    return op.x if isinstance(op, Reshape) and op.shape == (*op.x.shape, 1) else None


def _half(v: Value) -> tuple[Value, object] | None:
    """(pairs [..., n, 2], 0 or 1) where v is that column of them."""
    op = v.producer
    cut = op.x.producer if isinstance(op, Reshape) else None
    if not isinstance(cut, Slice) or cut.axis != -1 or cut.x.shape != (*v.shape, 2) or cut.step != 1:
        return None
    return cut.x, cut.start


def _factors(v: Value) -> tuple[Value, object, Value] | None:
    """(pairs, which of them, table) of a product of one column of pairs and a table."""
    if not isinstance(v.producer, m.Mul):
        return None
    for one, table in ((v.producer.a, v.producer.b), (v.producer.b, v.producer.a)):
        half = _half(one)
        if half is not None:
            return *half, table
    return None


def _turned(real: Value, imag: Value) -> tuple[Value, Value, Value] | None:
    """(pairs, cos, sin) of the two parts of a product of complex numbers."""
    if not isinstance(real.producer, m.Sub) or not isinstance(imag.producer, m.Add):
        return None
    parts = [_factors(v) for op in (real.producer, imag.producer) for v in op.operands]
    found = [p for p in parts if p is not None]
    if len(found) != 4 or any(p[0] is not found[0][0] for p in found):
        return None
    first, second, *rest = found
    cos, sin = first[2], second[2]
    places = {(p[1], p[2]) for p in rest}
    fits = (first[1], second[1]) == (0, 1) and places == {(0, sin), (1, cos)}
    return (first[0], cos, sin) if fits else None


class FusePairedRope(Rule):
    """The parts of x · (cos + i sin), side by side → rope(x, cos, sin, interleaved)"""

    pattern = P(Reshape, P(Concat, axis=-1))

    def _read(self, found: Match) -> tuple[Value, Value, Value] | None:
        """x, cos, sin."""
        root = found.root
        joined = root.operands[0].producer
        if not isinstance(joined, Concat) or len(joined.operands) != 2:
            return None
        columns = [_column(v) for v in joined.operands]
        if columns[0] is None or columns[1] is None:
            return None
        read = _turned(columns[0], columns[1])
        source = read[0].producer if read is not None else None
        if read is None or not isinstance(source, Reshape) or source.x.shape != root.result.shape:
            return None
        return source.x, read[1], read[2]

    def check(self, found: Match) -> str | None:
        read = self._read(found)
        if read is None:
            return None
        x, cos, sin = read
        if x.type.rank != 4:
            return "rotary embedding of a tensor that is neither [1, H, T, D] nor [1, T, H, D]"
        first, second = (layout(x, table, pairs=True) for table in (cos, sin))
        fits = first is not None and first == second
        return None if fits else f"the tables {cos.type} and {sin.type} are not one row a token of {x.type}"

    def rewrite(self, found: Match, rw: Rewriter) -> Sequence[Value] | None:
        read = self._read(found)
        if read is None:
            return None
        x, cos, sin = read
        tables = [one_table(rw, _twice(rw, t)) for t in (cos, sin)]
        if layout(x, cos, pairs=True) == "token-major":
            return [rw.insert(Rope(x, *tables, interleaved=True))]
        y = rw.insert(Rope(token_major(rw, x), *tables, interleaved=True))
        return [rw.insert(Transpose(y, perm=SWAP_HEADS))]


def _whole(a: Value, b: Value) -> Value | None:
    """x where a and b are the halves of its last axis."""
    first, second = a.producer, b.producer
    if not isinstance(first, Slice) or not isinstance(second, Slice) or first.x is not second.x:
        return None
    half, width = a.shape[-1], first.x.shape[-1]
    cuts = [(op.axis, op.start, op.stop, op.step) for op in (first, second)]
    return first.x if cuts == [(-1, 0, half, 1), (-1, half, width, 1)] else None


def _is_cosine(v: Value) -> bool:
    """Whether v is a cosine, but for layout and a number that it is multiplied by."""
    op = v.producer
    if isinstance(op, m.Cos):
        return True
    if isinstance(op, m.Mul):
        return any(_is_cosine(one) and other.type.rank == 0 for one, other in ((op.a, op.b), (op.b, op.a)))
    if isinstance(op, Concat):
        return all(_is_cosine(part) for part in op.operands)
    return isinstance(op, Reshape | Slice | Transpose | Expand | m.Cast) and _is_cosine(op.x)


class FuseHalvesRope(Rule):
    """concat([a · cos - b · sin, b · cos + a · sin]) → rope(concat([a, b]), [cos, cos], [sin, sin])"""

    pattern = P(Concat, axis=-1)

    def _read(self, found: Match) -> tuple[Value, Value, Value, Value] | None:
        """a, b, cos, sin."""
        if len(found.root.operands) != 2:
            return None
        real, imag = (v.producer for v in found.root.operands)
        if not isinstance(real, m.Sub) or not isinstance(imag, m.Add):
            return None
        products = [v.producer for op in (real, imag) for v in op.operands]
        pairs = [(p.a, p.b) for p in products if isinstance(p, m.Mul)]
        if len(pairs) != 4:
            return None
        for cos, a in (pairs[0], pairs[0][::-1]):
            for sin, b in (pairs[1], pairs[1][::-1]):
                rest = [set(pair) for pair in pairs[2:]]
                if _is_cosine(cos) and {cos, b} in rest and {sin, a} in rest:
                    return a, b, cos, sin
        return None

    def check(self, found: Match) -> str | None:
        read = self._read(found)
        if read is None:
            return None
        a, b, cos, sin = read
        if a.type.rank != 4 or a.shape != b.shape:
            return "rotary embedding of a tensor that is neither [1, H, T, D] nor [1, T, H, D]"
        fits = layout(a, cos) is not None and layout(a, cos) == layout(a, sin)
        return None if fits else f"the tables {cos.type} and {sin.type} are not one row a token of {a.type}"

    def rewrite(self, found: Match, rw: Rewriter) -> Sequence[Value] | None:
        read = self._read(found)
        if read is None:
            return None
        a, b, cos, sin = read
        tables = [one_table(rw, rw.insert(Concat([t, t], axis=-1))) for t in (cos, sin)]
        whole = _whole(a, b)
        x = whole if whole is not None else rw.insert(Concat([a, b], axis=-1))
        if layout(a, cos) == "token-major":
            return [rw.insert(Rope(x, tables[0], tables[1]))]
        return [
            rw.insert(Transpose(rw.insert(Rope(token_major(rw, x), tables[0], tables[1])), perm=SWAP_HEADS))
        ]


def _twice(rw: Rewriter, table: Value) -> Value:
    """[..., n] → [..., 2n], each number twice in a row."""
    column = rw.insert(Reshape(table, shape=(*table.shape, 1)))
    both = rw.insert(Concat([column, column], axis=-1))
    return rw.insert(Reshape(both, shape=(*table.shape[:-1], table.shape[-1] * 2)))


class WidenRope(Rule):
    """concat([rope(slice(x, :r), cos, sin), slice(x, r:)]) → rope(x, cos, sin) of partial width"""

    pattern = P(Concat, axis=-1)

    def rewrite(self, found: Match, rw: Rewriter) -> Sequence[Value] | None:
        operands = rw.root.operands
        if len(operands) != 2:
            return None
        rope, rest = operands[0].producer, operands[1].producer
        if not isinstance(rope, Rope) or not isinstance(rest, Slice):
            return None
        turned = rope.x.producer
        if (
            not isinstance(turned, Slice)
            or turned.x is not rest.x
            or (turned.start, turned.axis, rest.axis) != (0, -1, -1)
        ):
            return None
        if turned.stop != rest.start or rest.stop != rest.x.shape[-1] or turned.stop != rope.rotary_dim:
            return None
        return [rw.insert(Rope(rest.x, rope.cos, rope.sin, interleaved=rope.interleaved))]


class FuseRotary(RulePass):
    """Rotary position embedding."""

    name = "fuse-rope"
    rules = (FuseRope(), FuseHalvesRope(), FusePairedRope(), WidenRope())
