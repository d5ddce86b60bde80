"""Rows of tokens: which ops of the paged graph treat each of them alone."""

from __future__ import annotations

from ...ir.core import Op
from ...ir.ops import math as m
from ...ir.ops.attention import Attention, Sdpa
from ...ir.ops.nn import LayerNorm, Linear, RmsNorm
from ...ir.ops.quant import Hadamard, QuantizedLinear
from ...ir.ops.select import TopK
from ...ir.ops.shape import Concat, DimValue, Gather, Index, Reshape, Slice
from ...ir.ops.state import Recurrence
from ...ir.types import Dim, DimExpr, Shape, sym

T, R = sym("T"), sym("R")
"""Tokens of a step, and those of them whose logits are wanted."""


def mentions_tokens(d: Dim) -> bool:
    """Whether a dimension grows with the number of tokens."""
    return isinstance(d, DimExpr) and "T" in d.symbols()


def token_axes(shape: Shape) -> list[int]:
    """The axes that grow with the number of tokens, counted from the end."""
    return [i - len(shape) for i, d in enumerate(shape) if mentions_tokens(d)]


def _multiplies_each(a: list[int], b: list[int]) -> bool:
    """Whether a product keeps tokens apart whose operands have them along these axes."""
    if not b:
        return a != [-1]
    if b == [-1]:
        return not a  # each token's column, by a matrix of all
    return b[0] < -2 and a in ([], b)  # each token's own matrix


def row_mixing(op: Op) -> str | None:
    """Why an op of the paged graph mixes rows of different tokens, or None when every row stands alone."""
    axes = [token_axes(v.shape) for v in op.operands]
    out = token_axes(op.results[0].shape)
    if any(len(a) > 1 for a in (*axes, out)):
        return "has two axes of tokens"
    inner = {a[0] for a in axes if a}
    match op:
        case Sdpa() | Attention():
            return "attends to other tokens and was not paged"
        case Recurrence():
            return None if op.kept else "runs along the tokens"
        case m.CumSum() | m.Diff() if getattr(op, "axis", -1) in inner:
            return "runs along the tokens"
        case m.Reduce() if inner & set(op.axes):
            return "reduces over tokens"
        case m.Softmax() if op.axis in inner:
            return "normalises over tokens"
        case m.MatMul() if not _multiplies_each(*axes):
            return "multiplies along the axis of tokens"
        # Of a table cut to the number of tokens the first rows, whatever the places of the tokens are.
        case Slice() | Concat() if op.axis in (inner or out):
            return "cuts or joins along the axis of tokens"
        case Reshape() if inner and (not out or _lead(op.operands[0].shape) != _lead(op.results[0].shape)):
            return "moves the axis of tokens"
        case Index() if axes[0]:
            return "picks rows by index"
        case Gather() | TopK() if -1 in inner:
            return "picks rows by index"
        case RmsNorm() | LayerNorm() | Linear() | QuantizedLinear() | Hadamard() if -1 in inner:
            return "works along the axis of tokens"
        case DimValue() if mentions_tokens(op.dim):
            return "reads the number of tokens"
        case _:
            return None


def _lead(shape: Shape) -> Dim:
    """Elements in front of the token axis: equal on both sides when rows keep their order."""
    total: Dim = 1
    for d in shape:
        if mentions_tokens(d):
            break
        total = total * d
    return total
