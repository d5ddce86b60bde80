"""Constants and identities.

mul(x, 1.0)            → x
matmul(x, 0.0)         → 0.0
pow(x, 2.0)            → mul(x, x)
mul(x, sigmoid(x))     → silu(x)
add(weight, 1.0)       → a weight (computed when it is read)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any as Anything

import numpy as np

from ...ir.core import Graph, Op, Value
from ...ir.dtypes import to_numpy
from ...ir.interpreter import from_torch, to_torch
from ...ir.ops import math as m
from ...ir.ops.moe import Moe
from ...ir.ops.shape import Arange, Concat, Expand, Full, Gather, Index, Reshape, Slice, Transpose
from ...ir.rewriter import Any, Const, Match, Or, P, Rewriter, Rule, apply_rules, constant
from ...ir.types import TensorType
from ...ir.weights import ArrayTensor, ShapeOnlyTensor, num_elements, quantized_of, straight_of
from ..base import Pass, PassContext, PassResult
from ..derived import ComputedTensor
from . import lengths

FOLD_LIMIT = 1 << 22  # elements: larger weights stay as they are, folding would read them whole

_NUMBERS: dict[type[Op], Callable[[float, float], float]] = {
    m.Add: lambda a, b: a + b,
    m.Sub: lambda a, b: a - b,
    m.Mul: lambda a, b: a * b,
    m.Maximum: max,
    m.Minimum: min,
    m.Pow: lambda a, b: a**b,
    m.Less: lambda a, b: a < b,
    m.LessEqual: lambda a, b: a <= b,
    m.Greater: lambda a, b: a > b,
    m.GreaterEqual: lambda a, b: a >= b,
    m.Equal: lambda a, b: a == b,
    m.NotEqual: lambda a, b: a != b,
    m.LogicalAnd: lambda a, b: bool(a) and bool(b),
    m.LogicalOr: lambda a, b: bool(a) or bool(b),
}


def full_like(type: TensorType, value: float) -> Full:
    number: float | int | bool = (
        bool(value)
        if type.dtype == "bool"
        else value
        if type.dtype.startswith(("float", "bfloat"))
        else int(value)
    )
    return Full(value=number, dtype=type.dtype, shape=type.shape)


def _representable(value: float, dtype: str) -> bool:
    """Whether float64, in which constants are folded, holds what the dtype would."""
    return math.isfinite(value) and (dtype.startswith(("float", "bfloat")) or abs(value) < 1 << 53)


class FoldNumbers(Rule):
    """op(full a, full b) → full"""

    pattern = P(tuple(_NUMBERS), Const("a"), Const("b"))

    def check(self, found: Match) -> str | None:
        return None

    def rewrite(self, found: Match, rw: Rewriter) -> Sequence[Value] | None:
        try:
            value = float(_NUMBERS[type(rw.root)](found["a"], found["b"]))
        except (ArithmeticError, TypeError):  # 0 ** -1, a root of a negative number, a power beyond float64
            return None
        if not _representable(value, rw.root.result.dtype):
            return None
        return [rw.insert(full_like(rw.root.result.type, value))]


class FoldMoved(Rule):
    """cast / expand / reshape / slice / transpose of a full → full"""

    pattern = P((m.Cast, Expand, Reshape, Slice, Transpose), Const("a"))

    def rewrite(self, found: Match, rw: Rewriter) -> Sequence[Value] | None:
        dtype = rw.root.result.dtype
        if not dtype.startswith(("float", "bfloat")) and not _representable(found["a"], dtype):
            return None
        return [rw.insert(full_like(rw.root.result.type, found["a"]))]


_NEUTRAL: dict[type[Op], float] = {
    m.Add: 0,
    m.Sub: 0,
    m.Mul: 1,
    m.Div: 1,
    m.LogicalAnd: 1,
    m.LogicalOr: 0,
}


class DropIdentity(Rule):
    """x + 0, x - 0, x · 1, x / 1, true and x, false or x, cast to the same dtype, reshape or expand to the
    same shape → x
    """

    pattern = P((m.Add, m.Sub, m.Mul, m.Div, m.LogicalAnd, m.LogicalOr, m.Cast, Reshape, Expand, Transpose))

    def rewrite(self, found: Match, rw: Rewriter) -> Sequence[Value] | None:
        op = rw.root
        x = op.operands[0]
        if isinstance(op, m.Binary):
            neutral = _NEUTRAL[type(op)]
            for a, b in ((op.a, op.b), (op.b, op.a)):
                if constant(b) == neutral and a.type == op.result.type:
                    return [a]
                if isinstance(op, (m.Sub, m.Div)):
                    break
            return None
        if isinstance(op, Transpose) and op.perm != tuple(range(-len(op.perm), 0)):
            return None
        return [x] if x.type == op.result.type else None


class ProductOfZeros(Rule):
    """matmul(x, zeros) → zeros"""

    pattern = P(m.MatMul)

    def rewrite(self, found: Match, rw: Rewriter) -> Sequence[Value] | None:
        if not any(constant(v) == 0 for v in rw.root.operands):
            return None
        return [rw.insert(full_like(rw.root.result.type, 0.0))]


class Square(Rule):
    """pow(x, 1) → x;  pow(x, 2) → x · x;  pow(x, 3) → x · x · x;  pow(x, ±0.5) → sqrt, rsqrt"""

    pattern = P(m.Pow, Any("x"), Const("n"))

    def rewrite(self, found: Match, rw: Rewriter) -> Sequence[Value] | None:
        x: Value = found["x"]
        match found["n"]:
            case 1.0:
                return [x]
            case 2.0:
                return [rw.insert(m.Mul(x, x))]
            case 3.0:
                return [rw.insert(m.Mul(rw.insert(m.Mul(x, x)), x))]
            case 0.5:
                return [rw.insert(m.Sqrt(x))]
            case -0.5:
                return [rw.insert(m.Rsqrt(x))]
            case _:
                return None


class ReciprocalSqrt(Rule):
    """reciprocal(sqrt(x)) → rsqrt(x)"""

    pattern = P(m.Reciprocal, P(m.Sqrt, Any("x")))

    def rewrite(self, found: Match, rw: Rewriter) -> Sequence[Value]:
        return [rw.insert(m.Rsqrt(found["x"]))]


class MakeSilu(Rule):
    """x · sigmoid(x) → silu(x)"""

    pattern = P(m.Mul, Any("x"), P(m.Sigmoid, Any("x")))

    def rewrite(self, found: Match, rw: Rewriter) -> Sequence[Value]:
        return [rw.insert(m.Silu(found["x"]))]


_CUBE = Or(P(m.Mul, P(m.Mul, Any("x"), Any("x")), Any("x")), P(m.Pow, Any("x"), Const(equals=3.0)))


class MakeGeluTanh(Rule):
    """0.5 · x · (1 + tanh(√(2/π) · (x + 0.044715 · x³))) → gelu(x, tanh)"""

    pattern = P(
        m.Mul,
        P(m.Mul, Any("x"), Const(equals=0.5)),
        P(
            m.Add,
            P(m.Tanh, P(m.Mul, P(m.Add, Any("x"), P(m.Mul, _CUBE, Const("c"))), Const("s"))),
            Const(equals=1.0),
        ),
    )

    def check(self, found: Match) -> str | None:
        if abs(found["c"] - 0.044715) > 1e-6 or abs(found["s"] - math.sqrt(2 / math.pi)) > 1e-6:
            return f"the constants {found['c']}, {found['s']} are not those of the tanh approximation"
        return None

    def rewrite(self, found: Match, rw: Rewriter) -> Sequence[Value]:
        return [rw.insert(m.Gelu(found["x"], tanh=True))]


class MakeGeluErf(Rule):
    """0.5 · x · (1 + erf(x / √2)) → gelu(x)"""

    pattern = P(
        m.Mul,
        P(m.Mul, Any("x"), Const(equals=0.5)),
        P(
            m.Add,
            P(m.Erf, Or(P(m.Div, Any("x"), Const("d")), P(m.Mul, Any("x"), Const("s")))),
            Const(equals=1.0),
        ),
    )

    def check(self, found: Match) -> str | None:
        scale = 1 / found["d"] if "d" in found else found["s"]
        return None if abs(scale - math.sqrt(0.5)) < 1e-6 else f"erf is of {scale} x, not x / sqrt(2)"

    def rewrite(self, found: Match, rw: Rewriter) -> Sequence[Value]:
        return [rw.insert(m.Gelu(found["x"]))]


class SliceOfArange(Rule):
    """slice(arange) → arange, in any rank where only the arange's axis is longer than one"""

    pattern = P(Slice, Or(P(Arange, name="inner"), P(Reshape, P(Arange, name="inner"))))

    def rewrite(self, found: Match, rw: Rewriter) -> Sequence[Value] | None:
        op, inner = rw.root, found.op("inner")
        assert isinstance(op, Slice) and isinstance(inner, Arange)
        if op.x.shape[op.axis] != inner.length or not isinstance(op.start, int):
            return None
        new = rw.insert(
            Arange(
                length=op.result.shape[op.axis],
                start=inner.start + op.start * inner.step,
                step=inner.step * op.step,
                dtype=inner.dtype,
            )
        )
        return [new if new.shape == op.result.shape else rw.insert(Reshape(new, shape=op.result.shape))]


class DropEmpty(Rule):
    """concat([x, y of length 0]) → x;  slice of everything → x"""

    pattern = P((Concat, Slice))

    def rewrite(self, found: Match, rw: Rewriter) -> Sequence[Value] | None:
        op = rw.root
        if isinstance(op, Slice):
            return [op.x] if op.start == 0 and op.step == 1 and op.x.type == op.result.type else None
        assert isinstance(op, Concat)
        kept = [v for v in op.xs if v.shape[op.axis] != 0]
        if len(kept) == len(op.xs) or not kept:
            return None
        return [kept[0] if len(kept) == 1 else rw.insert(Concat(kept, axis=op.axis))]


class IndexOfFull(Rule):
    """index(full, …) and gather(full, …) → full"""

    pattern = P((Index, Gather), Const("a"))

    def rewrite(self, found: Match, rw: Rewriter) -> Sequence[Value]:
        return [rw.insert(full_like(rw.root.result.type, found["a"]))]


class CountUp(Rule):
    """cumsum(full c) → c, 2c, 3c, …: how models make positions out of a mask of ones"""

    pattern = P(m.CumSum, Const("c"))

    def check(self, found: Match) -> str | None:
        dtype = found.root.result.dtype  # float32 counts exactly up to 2^24, more than any context
        whole = found["c"] == int(found["c"])
        return (
            None if whole and dtype in ("int32", "int64", "float32") else f"a running sum in {dtype} rounds"
        )

    def rewrite(self, found: Match, rw: Rewriter) -> Sequence[Value]:
        op = rw.root
        assert isinstance(op, m.CumSum)
        shape, step = op.result.shape, int(found["c"])
        count = rw.insert(Arange(length=shape[op.axis], start=step, step=step))
        count = count if count.dtype == op.result.dtype else rw.insert(m.Cast(count, dtype=op.result.dtype))
        along = tuple(d if i - len(shape) == op.axis else 1 for i, d in enumerate(shape))
        count = count if count.shape == along else rw.insert(Reshape(count, shape=along))
        return [count if along == shape else rw.insert(Expand(count, shape=shape))]


RULES: tuple[Rule, ...] = (
    FoldNumbers(),
    FoldMoved(),
    DropIdentity(),
    ProductOfZeros(),
    Square(),
    ReciprocalSqrt(),
    MakeSilu(),
    MakeGeluTanh(),
    MakeGeluErf(),
    SliceOfArange(),
    IndexOfFull(),
    DropEmpty(),
    CountUp(),
)


def simplify_weights(graph: Graph) -> int:
    """Small buffers that are constants become ops: rank 0 → full, equal integers → full, 0, 1, 2, … → arange.

    How many.
    """
    count = 0
    for v in list(graph.weights.values()):
        data = v.weight
        assert data is not None
        integer = data.dtype.startswith("int") and isinstance(data, ArrayTensor)
        if (data.shape and not integer) or num_elements(data) > FOLD_LIMIT or not v.uses:
            continue
        if isinstance(data, ShapeOnlyTensor):  # `llmc check` traces with shapes alone
            continue
        values = data.read()
        new: Op | None = None
        if values.size and (values == values.flat[0]).all():
            new = full_like(v.type, float(values.flat[0]))
        elif integer and values.size == values.shape[-1] and (values.ravel() == np.arange(values.size)).all():
            new = Arange(length=values.size, dtype=data.dtype)
        if new is None:
            continue
        first = graph.ops[0]
        graph.insert(new, before=first)
        result = new.result
        if result.shape != v.shape:
            reshape = Reshape(result, shape=v.shape)
            graph.insert(reshape, before=first)
            result = reshape.result
        graph.replace_uses(v, result)
        count += 1
    graph.drop_dead()
    return count


def _computes(op: Op) -> Callable[[], Anything]:
    parts = [(v.weight, constant(v), v.type) for v in op.operands]

    def compute() -> Anything:
        operands = [
            to_torch(w.read())
            if w is not None
            else to_torch(np.full([int(str(d)) for d in t.shape], c, dtype=to_numpy(t.dtype)))
            for w, c, t in parts
        ]
        return from_torch(op.reference({}, *op.grouped(operands)))

    return compute


def _puts_experts_together(op: Op) -> bool:
    """Whether all that an op does is to move rows of stored codes for a mixture of experts: a computed weight
    would have floats, and `normalize-experts` keeps the codes.
    """
    if not isinstance(op, Concat | Reshape | Slice | Transpose):
        return False
    if not any(quantized_of(straight_of(v.weight) or v.weight) for v in op.operands):
        return False
    users = list(op.result.users)
    for user in users:  # grows as it goes
        if isinstance(user, Moe):
            return True
        if isinstance(user, Concat | Reshape | Slice | Transpose):
            users += user.result.users
    return False


def fold_weights(graph: Graph) -> int:
    """Ops over nothing but small weights and constants become weights, computed when read. How many."""
    count = 0
    for op in graph.ops:
        size = 1
        for d in op.results[0].shape if op.results else ():
            size = size * d if isinstance(d, int) else FOLD_LIMIT + 1
        weights = [v for v in op.operands if v.is_weight]
        if len(op.results) != 1 or not weights or size > FOLD_LIMIT or isinstance(op, Expand):
            continue
        if not all(v.is_weight or constant(v) is not None for v in op.operands) or op.opname == "embedding":
            continue
        if _puts_experts_together(op):
            continue
        name = weights[0].name + f".{op.opname}"
        if name in graph.weights:
            name = next(n for i in itertools.count(2) if (n := f"{name}{i}") not in graph.weights)
        shape = [d for d in op.result.shape if isinstance(d, int)]
        data = ComputedTensor(
            shape,
            op.result.dtype,
            f"{op.opname}({', '.join(w.weight.source for w in weights if w.weight)})",
            _computes(op),
        )
        graph.replace(op, [graph.add_weight(name, data)])
        count += 1
    graph.drop_dead()
    return count


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Constants, identities and ops on weights alone."""

    name = "fold-constants"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        notes = lengths.show_whole_texts(graph)
        count = len(notes) + simplify_weights(graph)
        while True:
            folded, _ = apply_rules(graph, RULES)
            folded += fold_weights(graph)
            count += folded
            if not folded:
                return PassResult(graph, count > 0, notes)
