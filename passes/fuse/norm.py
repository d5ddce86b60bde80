"""Norms.

mul(x, rsqrt(add(mean(mul(x, x)), eps)))        → rms_norm(x)
mul(rms_norm(x), weight)                        → rms_norm(x, weight)
rms_norm(sub(x, mean(x)))                       → layer_norm(x)
add(mul(layer_norm(x), weight), bias)           → layer_norm(x, weight, bias)
"""

from __future__ import annotations

from collections.abc import Sequence

from ...ir.core import Value
from ...ir.ops import math as m
from ...ir.ops.nn import LayerNorm, RmsNorm
from ...ir.rewriter import Any, Const, Match, Or, P, Rewriter, Rule, Weight
from ..base import RulePass

_MEAN_SQUARE = P(m.Add, P(m.ReduceMean, P(m.Mul, Any("x"), Any("x")), axes=(-1,), keepdim=True), Const("eps"))


class FuseRmsNorm(Rule):
    """x · rsqrt(mean(x²) + eps) or x / sqrt(mean(x²) + eps) → rms_norm(x)"""

    pattern = P((m.Mul, m.Div), Any("x"), Or(P(m.Rsqrt, _MEAN_SQUARE), P(m.Sqrt, _MEAN_SQUARE, name="root")))

    def check(self, found: Match) -> str | None:
        if isinstance(found.root, m.Div) != ("root" in found):
            return "the norm is multiplied where it should divide"
        return (
            None
            if found.value("x").dtype == "float32"
            else f"the norm runs in {found.value('x').dtype}, not float32"
        )

    def rewrite(self, found: Match, rw: Rewriter) -> Sequence[Value]:
        return [rw.insert(RmsNorm(found["x"], None, eps=found["eps"]))]


def _vector_over(weight: Value, x: Value) -> str | None:
    return (
        None
        if weight.shape == x.shape[-1:]
        else f"{weight.name} {weight.type} is no vector over the normalised axis"
    )


class ScaleRmsNorm(Rule):
    """rms_norm(x) · weight → rms_norm(x, weight)"""

    pattern = P(m.Mul, P(RmsNorm, Any("x"), name="norm"), Weight("w"))

    def check(self, found: Match) -> str | None:
        norm = found.op("norm")
        assert isinstance(norm, RmsNorm)
        if norm.weight is not None or len(norm.result.uses) != 1:
            return (
                "the norm has a weight already"
                if norm.weight is not None
                else "the unscaled norm is used elsewhere"
            )
        return _vector_over(found["w"], found["x"])

    def rewrite(self, found: Match, rw: Rewriter) -> Sequence[Value]:
        norm = found.op("norm")
        assert isinstance(norm, RmsNorm)
        return [rw.insert(RmsNorm(norm.x, found["w"], eps=norm.eps))]


class FuseLayerNorm(Rule):
    """rms_norm(x - mean(x), weight) → layer_norm(x, weight)"""

    pattern = P(
        RmsNorm,
        P(m.Sub, Any("x"), P(m.ReduceMean, Any("x"), axes=(-1,), keepdim=True)),
    )

    def rewrite(self, found: Match, rw: Rewriter) -> Sequence[Value]:
        norm = rw.root
        assert isinstance(norm, RmsNorm)
        return [rw.insert(LayerNorm(found["x"], norm.weight, None, eps=norm.eps))]


class ScaleLayerNorm(Rule):
    """layer_norm(x) · weight → layer_norm(x, weight);  layer_norm(x, …) + bias → layer_norm(x, …, bias)"""

    pattern = P((m.Mul, m.Add), P(LayerNorm, Any("x"), name="norm"), Weight("w"))

    def check(self, found: Match) -> str | None:
        norm = found.op("norm")
        assert isinstance(norm, LayerNorm)
        if (
            norm.bias is not None
            or (isinstance(found.root, m.Mul) and norm.weight is not None)
            or len(norm.result.uses) != 1
        ):
            return "the norm is scaled or used already"
        return _vector_over(found["w"], found["x"])

    def rewrite(self, found: Match, rw: Rewriter) -> Sequence[Value]:
        norm = found.op("norm")
        assert isinstance(norm, LayerNorm)
        scaled = isinstance(rw.root, m.Mul)
        return [
            rw.insert(
                LayerNorm(
                    norm.x,
                    found["w"] if scaled else norm.weight,
                    None if scaled else found["w"],
                    eps=norm.eps,
                )
            )
        ]


class FuseNorms(RulePass):
    """rms_norm and layer_norm with weight and bias."""

    name = "fuse-norms"
    rules = (FuseRmsNorm(), ScaleRmsNorm(), FuseLayerNorm(), ScaleLayerNorm())
