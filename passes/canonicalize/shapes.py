"""Reshapes and transposes: merged, cancelled, moved out of the way of fusion; transposes of weights go into
the weights.

    reshape(reshape(x))                     → reshape(x)
    transpose(transpose(x))                 → transpose(x) or x
    silu(transpose(x))                      → transpose(silu(x)); slice, concat, norm over the last axis too
    linear(reshape(x: [1,T,K] → [T,K]), w)  → reshape(linear(x, w))
    matmul(x, weight [K, N])                → linear(x, weightᵀ)
    add(linear(x, w), bias [N])             → linear(x, w, bias)
    matmul([H,T,D], [H,D,T])                → a reshape of matmul([1,H,T,D], [1,H,D,T]), where both were that
"""

from __future__ import annotations

from collections.abc import Sequence

from ...ir.core import Value
from ...ir.ops import math as m
from ...ir.ops.nn import LayerNorm, Linear, RmsNorm
from ...ir.ops.shape import Concat, Reshape, Slice, Transpose
from ...ir.rewriter import Any, Match, Or, P, Rewriter, Rule, Weight
from ..base import RulePass
from ..derived import TransposedTensor
from . import swapped


class MergeReshapes(Rule):
    """reshape(reshape(x)) → reshape(x)"""

    pattern = P(Reshape, P(Reshape, Any("x")))

    def rewrite(self, found: Match, rw: Rewriter) -> Sequence[Value]:
        x: Value = found["x"]
        return [x if x.shape == rw.root.result.shape else rw.insert(Reshape(x, shape=rw.root.result.shape))]


class MergeTransposes(Rule):
    """transpose(transpose(x)) → transpose(x) or x"""

    pattern = P(Transpose, P(Transpose, Any("x"), name="inner"), name="outer")

    def rewrite(self, found: Match, rw: Rewriter) -> Sequence[Value]:
        inner, outer = found.op("inner"), found.op("outer")
        assert isinstance(inner, Transpose) and isinstance(outer, Transpose)
        first, second = inner.full_perm(), outer.full_perm()
        total = [first[i] - len(first) for i in second]
        while total and total[0] == -len(total):
            total = total[1:]
        return [found["x"] if not total else rw.insert(Transpose(found["x"], perm=tuple(total)))]


_ELEMENTWISE = (m.Neg, m.Silu, m.Gelu, m.Relu, m.Tanh, m.Sigmoid, m.Cast)


class SinkTransposeUnary(Rule):
    """f(transpose(x)) → transpose(f(x)) for elementwise f"""

    pattern = P(_ELEMENTWISE, P(Transpose, Any("x"), name="t"))

    def rewrite(self, found: Match, rw: Rewriter) -> Sequence[Value]:
        t = found.op("t")
        assert isinstance(t, Transpose)
        return [rw.insert(Transpose(rw.insert(rw.root.clone({t.result: found["x"]})), perm=t.perm))]


class SinkTransposeNorm(Rule):
    """rms_norm(transpose(x)) → transpose(rms_norm(x)), layer_norm likewise, where the last axis stays last"""

    pattern = P((RmsNorm, LayerNorm), P(Transpose, Any("x"), name="t"))

    def rewrite(self, found: Match, rw: Rewriter) -> Sequence[Value] | None:
        t = found.op("t")
        assert isinstance(t, Transpose)
        if t.perm[-1] != -1:
            return None
        return [rw.insert(Transpose(rw.insert(rw.root.clone({t.result: found["x"]})), perm=t.perm))]


class SinkTransposeSlice(Rule):
    """slice(transpose(x), last axis) → transpose(slice(x))  where the last axis stays last"""

    pattern = P(Slice, P(Transpose, Any("x"), name="t"), axis=-1)

    def rewrite(self, found: Match, rw: Rewriter) -> Sequence[Value] | None:
        t, s = found.op("t"), rw.root
        assert isinstance(t, Transpose) and isinstance(s, Slice)
        if t.perm[-1] != -1:
            return None
        return [
            rw.insert(
                Transpose(
                    rw.insert(Slice(found["x"], axis=-1, start=s.start, stop=s.stop, step=s.step)),
                    perm=t.perm,
                )
            )
        ]


class SinkTransposeConcat(Rule):
    """concat([transpose(a), transpose(b)], last axis) → transpose(concat([a, b]))  for one permutation"""

    pattern = P(Concat, axis=-1)

    def rewrite(self, found: Match, rw: Rewriter) -> Sequence[Value] | None:
        ts = [v.producer for v in rw.root.operands]
        perms = {t.perm if isinstance(t, Transpose) else () for t in ts}
        if len(perms) != 1 or () in perms or (perm := tuple(perms.pop()))[-1:] != (-1,):
            return None
        return [
            rw.insert(
                Transpose(rw.insert(Concat([t.operands[0] for t in ts if t is not None], axis=-1)), perm=perm)
            )
        ]


class ReshapeThroughLinear(Rule):
    """linear(reshape(x), w) → reshape(linear(x, w))  where the reshape keeps the last axis"""

    pattern = P(Linear, P(Reshape, Any("x")), Any("w"))

    def rewrite(self, found: Match, rw: Rewriter) -> Sequence[Value] | None:
        x: Value = found["x"]
        op = rw.root
        assert isinstance(op, Linear)
        if not x.shape or x.shape[-1] != op.x.shape[-1]:
            return None
        return [rw.insert(Reshape(rw.insert(Linear(x, op.weight, op.bias)), shape=op.result.shape))]


class ReshapeThroughMatMul(Rule):
    """matmul(reshape(x), weight) → reshape(matmul(x, weight))  where the reshape keeps the last axis"""

    pattern = P(m.MatMul, P(Reshape, Any("x")), Weight("w"))

    def rewrite(self, found: Match, rw: Rewriter) -> Sequence[Value] | None:
        x: Value = found["x"]
        if x.type.rank < 2 or found["w"].type.rank != 2 or x.shape[-1] != rw.root.operands[0].shape[-1]:
            return None
        return [rw.insert(Reshape(rw.insert(m.MatMul(x, found["w"])), shape=rw.root.result.shape))]


class MatMulToLinear(Rule):
    """matmul(x, weight [K, N]) → linear(x, weightᵀ);  matmul(x, transpose(weight)) → linear(x, weight)"""

    pattern = P(m.MatMul, Any("x"), Or(Weight("w"), P(Transpose, Weight("wt"))))

    def check(self, found: Match) -> str | None:
        weight: Value = found["w"] if "w" in found else found["wt"]
        return None if weight.type.rank == 2 else f"weight {weight.name} has rank {weight.type.rank}"

    def rewrite(self, found: Match, rw: Rewriter) -> Sequence[Value]:
        if "wt" in found:
            return [rw.insert(Linear(found["x"], found["wt"], None))]
        weight: Value = found["w"]
        assert weight.weight is not None
        name = weight.name + ".transposed"
        graph = rw.graph
        transposed = (
            graph.weights[name]
            if name in graph.weights
            else graph.add_weight(name, TransposedTensor(weight.weight))
        )
        return [rw.insert(Linear(found["x"], transposed, None))]


class AddBias(Rule):
    """add(linear(x, w), b [N]) → linear(x, w, b)"""

    pattern = P(
        m.Add,
        Or(
            P(Linear, Any("x"), Any("w"), name="linear"),
            P(Reshape, P(Linear, Any("x"), Any("w"), name="linear"), name="reshape"),
        ),
        Weight("b"),
    )

    def check(self, found: Match) -> str | None:
        linear, bias = found.op("linear"), found.value("b")
        assert isinstance(linear, Linear)
        if linear.bias is not None:
            return "the linear layer has a bias already"
        if bias.shape != (linear.result.shape[-1],):
            return f"{bias.name} {bias.type} is no vector over the outputs"
        if len(linear.result.uses) != 1:
            return "the product without the bias is used elsewhere"
        if "reshape" in found and found.op("reshape").result.shape[-1] != linear.result.shape[-1]:
            return "the result is reshaped before the bias"
        return None

    def rewrite(self, found: Match, rw: Rewriter) -> Sequence[Value]:
        linear = found.op("linear")
        assert isinstance(linear, Linear)
        y = rw.insert(Linear(linear.x, linear.weight, found["b"]))
        return [rw.insert(Reshape(y, shape=rw.root.result.shape)) if y.shape != rw.root.result.shape else y]


class TransposeOfUnit(Rule):
    """transpose that only moves axes of length one → reshape"""

    pattern = P(Transpose, Any("x"))

    def rewrite(self, found: Match, rw: Rewriter) -> Sequence[Value] | None:
        op = rw.root
        assert isinstance(op, Transpose)
        moved = [p for p in op.perm if op.x.shape[p] != 1]
        if moved != sorted(moved):
            return None
        return [rw.insert(Reshape(op.x, shape=op.result.shape))]


def _with_batch(v: Value) -> Value | None:
    """x [1, H, T, D] where v [H, T, D] is its reshape."""
    op = v.producer
    is_one = isinstance(op, Reshape) and v.type.rank == 3 and op.x.shape == (1, *v.shape)
    return op.x if isinstance(op, Reshape) and is_one else None


class KeepBatchAxis(Rule):
    """f(reshape(x: [1,H,T,D] → [H,T,D])) → reshape(f(x)): products of heads keep the axis of the batch"""

    pattern = P((m.MatMul, Transpose, m.Add, m.Sub, m.Mul, m.Div, m.Softmax, m.Cast, m.Where))

    def rewrite(self, found: Match, rw: Rewriter) -> Sequence[Value] | None:
        op = rw.root
        if op.result.type.rank != 3:
            return None
        wide = [_with_batch(v) for v in op.operands]
        if not any(w is not None and w.shape[1:] == op.result.shape for w in wide) and not (
            isinstance(op, m.MatMul | Transpose) and wide[0] is not None
        ):
            return None
        if isinstance(op, m.MatMul) and None in wide:
            return None
        mapping = {old: new for old, new in zip(op.operands, wide, strict=True) if new is not None}
        return [rw.insert(Reshape(rw.insert(op.clone(mapping)), shape=op.result.shape))]


RULES: tuple[Rule, ...] = (
    KeepBatchAxis(),
    MergeReshapes(),
    MergeTransposes(),
    SinkTransposeUnary(),
    SinkTransposeNorm(),
    SinkTransposeSlice(),
    SinkTransposeConcat(),
    ReshapeThroughLinear(),
    ReshapeThroughMatMul(),
    MatMulToLinear(),
    AddBias(),
    TransposeOfUnit(),
    *swapped.RULES,
)


class NormalizeShapes(RulePass):
    """Reshapes, transposes, linear layers with bias."""

    name = "normalize-shapes"
    rules = RULES
