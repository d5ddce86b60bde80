"""Attention, from scaled_dot_product_attention and from matmul–softmax–matmul.

    sdpa(q, repeat(k), repeat(v), mask)                           → attention(q, k, v), causal, window
    matmul(softmax(softcap(matmul(q, kᵀ) · scale) + mask), v)     → attention(q, k, v), softcap as well
    matmul(slice(softmax(concat([scores, sinks]))), v)            → attention(q, k, v, sinks)

`attention` is token-major; the transposes made here cancel with the model's own. Repeated heads (GQA) are
recognised and dropped. What a mask means is worked out by `masks.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any as Anything

from ...ir.core import Value
from ...ir.ops import math as m
from ...ir.ops.attention import Attention, Sdpa
from ...ir.ops.shape import Concat, Expand, Reshape, Slice, Transpose
from ...ir.rewriter import Any, Match, Or, P, Rewriter, Rule, constant, single_use
from ...ir.types import Shape, product
from ..base import RulePass
from .mask_terms import NEGATIVE, Meaning, Predicate
from .masks import MaskAnalysis, MaskFacts, classify
from .rope import SWAP_HEADS, token_major

LAST_TWO = (-1, -2)


@dataclass(frozen=True)
class Heads:
    """Keys or values without the repetition of heads: `value` seen under `shape` [B, Hkv, T, D] (the same
    elements; a reshape where they differ).
    """

    value: Value
    shape: Shape

    def emit(self, rw: Rewriter) -> Value:
        return (
            self.value if self.value.shape == self.shape else rw.insert(Reshape(self.value, shape=self.shape))
        )


def unrepeated(x: Value) -> Heads:
    """x [B, H, T, D] → what it repeats: reshape(expand(reshape(y [B, Hkv, T, D]))) → y; x itself where
    nothing is repeated.
    """
    whole = Heads(x, x.shape)
    outer = x.producer
    if not isinstance(outer, Reshape) or not isinstance(outer.x.producer, Expand):
        return whole
    wide, inner = outer.x, outer.x.producer.x
    if (
        wide.type.rank != 5
        or inner.type.rank != 5
        or inner.shape[2] != 1
        or [i for i in range(5) if wide.shape[i] != inner.shape[i]] != [2]
    ):
        return whole
    b, heads, _, tokens, width = inner.shape
    narrow = inner.producer
    if not isinstance(narrow, Reshape) or outer.shape != (b, heads * wide.shape[2], tokens, width):
        return whole
    before = [d for d in narrow.x.shape if d != 1]
    if before != [d for d in inner.shape if d != 1]:
        return whole  # the reshape does more than add axes of length one
    return Heads(narrow.x, (b, heads, tokens, width))


@dataclass(frozen=True)
class Scores:
    """What stands before the softmax: q head-major, k (token-major where it says so), and how their product
    was treated. `sinks` holds a logit a head.
    """

    q: Value
    k: Value
    k_token_major: bool
    scale: float
    softcap: float | None
    masks: tuple[Meaning, ...]
    sinks: Value | None


def _without_own_maximum(x: Value) -> Value:
    """x - max(x) → x: softmax is the same for both."""
    op = x.producer
    if not isinstance(op, m.Sub) or not isinstance(op.b.producer, m.ReduceMax):
        return x
    maximum = op.b.producer
    own = maximum.operands[0] is op.a and maximum.axes == (-1,) and maximum.keepdim
    return op.a if own else x


def _peel_sinks(x: Value) -> tuple[Value, Value | None] | str:
    """softmax's operand without the column of sinks: concat([scores, expand(reshape(sinks))])."""
    x = _without_own_maximum(x)
    op = x.producer
    if not isinstance(op, Concat) or op.axis != -1 or len(op.operands) != 2 or op.operands[1].shape[-1] != 1:
        return x, None
    scores, column = op.operands
    while isinstance(column.producer, Expand):
        column = column.producer.x
    heads = scores.shape[-3] if scores.type.rank >= 3 else None
    along_heads = column.shape[-3:] == (heads, 1, 1) and product(column.shape) == heads
    while isinstance(column.producer, Reshape):
        column = column.producer.x
    if not column.is_weight or not along_heads:
        return "the column beside the scores is no vector of sinks over the heads"
    return scores, column


def _peel_scale(x: Value, scale: float) -> tuple[Value, float]:
    """x · c, x / c → x, with c multiplied into scale."""
    while isinstance(op := x.producer, (m.Mul, m.Div)):
        c = constant(op.b)
        if c and op.a.shape == x.shape:
            scale = scale * c if isinstance(op, m.Mul) else scale / c
            x = op.a
        elif isinstance(op, m.Mul) and (c := constant(op.a)) is not None and op.b.shape == x.shape:
            scale, x = scale * c, op.b
        else:
            break
    return x, scale


def _peel_masks(x: Value) -> tuple[Value, list[Meaning]]:
    """Masks taken off: scores + mask → scores;  where(seen, scores, very negative) → scores."""
    masks: list[Meaning] = []
    known = MaskAnalysis()
    while True:
        op = x.producer
        if isinstance(op, m.Where):
            hidden, scores = (op.a, op.b) if constant(op.a) is not None else (op.b, op.a)
            number = constant(hidden)
            if number is None or number > NEGATIVE or scores.shape != x.shape:
                break
            seen = known.meaning(op.condition)
            if hidden is op.a:
                seen = seen.negated() if isinstance(seen, Predicate) else None
            masks.append(seen)
            x = scores
        elif isinstance(op, m.Add):
            mask = _mask_operand(known, op)
            if mask is None:
                break
            masks.append(known.meaning(mask))
            x = op.a if mask is op.b else op.b
        else:
            break
    return x, masks


def _mask_operand(known: MaskAnalysis, op: m.Add) -> Value | None:
    """Which operand of scores + mask is the mask: the one that is understood, or else the one that all heads
    share.
    """
    for mask, scores in ((op.b, op.a), (op.a, op.b)):
        if known.meaning(mask) is not None and scores.shape == op.result.shape:
            return mask
    shared = [v for v in (op.b, op.a) if v.shape[1:2] == (1,)]
    return shared[0] if len(shared) == 1 else None


def read_scores(x: Value) -> Scores | str:
    """Take the operand of the softmax apart; the sentence says what could not be read."""
    peeled = _peel_sinks(x)
    if isinstance(peeled, str):
        return peeled
    x, sinks = peeled
    x, masks = _peel_masks(x)
    x, scale = _peel_scale(x, 1.0)
    softcap: float | None = None
    if isinstance(op := x.producer, m.Tanh):
        softcap, scale = scale, 1.0
        x, scale = _peel_scale(op.x, 1.0)
        scale *= softcap
    product = x.producer
    if not isinstance(product, m.MatMul):
        return "the softmax is not over a product of queries and keys"
    keys = _keys_of(product.b)
    if keys is None:
        return "the keys are not transposed in the last two axes"
    q, scale = _peel_scale(product.a, scale)
    key, scale = _peel_scale(keys[0], scale)
    return Scores(q, key, keys[1], scale, softcap, tuple(masks), sinks)


def _keys_of(kt: Value) -> tuple[Value, bool] | None:
    """The keys from kt [B, H, D, T]: head-major k [B, H, T, D], or (true) token-major k [B, T, H, D] where
    the transposes were merged.
    """
    op = kt.producer
    if isinstance(op, Transpose) and op.perm == LAST_TWO:
        return op.x, False
    if isinstance(op, Transpose) and op.perm == (-2, -1, -3):
        return op.x, True
    return None


def _facts(masks: Sequence[Meaning]) -> MaskFacts | str:
    """All masks together."""
    causal, window = False, None
    for mask in masks:
        found = classify(mask)
        if isinstance(found, str):
            return found
        causal |= found.causal
        if found.window is not None:
            window = found.window if window is None else min(window, found.window)
    return MaskFacts(causal, window)


def _heads_fit(q: Value, k: Heads, v: Heads, k_token_major: bool = False) -> str | None:
    if q.type.rank != 4 or len(k.shape) != 4 or len(v.shape) != 4:
        return f"attention over tensors of rank {q.type.rank}, not [B, H, T, D]"
    kv_axis, token_axis = (2, 1) if k_token_major else (1, 2)
    heads, kv = q.shape[1], k.shape[kv_axis]
    if not isinstance(heads, int) or not isinstance(kv, int) or heads % kv or v.shape[1] != kv:
        return f"{heads} query heads do not divide among {kv} key and {v.shape[1]} value heads"
    if q.shape[2] != k.shape[token_axis] or q.shape[2] != v.shape[2]:
        return "queries and keys have different lengths (cross-attention)"
    return None if q.shape[0] == k.shape[0] == v.shape[0] else "keys or values are shared by the batch"


def _emit(
    rw: Rewriter,
    q: Value,
    k: Heads,
    v: Heads,
    sinks: Value | None,
    *,
    k_token_major: bool = False,
    **fields: Anything,
) -> Value:
    keys = k.emit(rw) if k_token_major else token_major(rw, k.emit(rw))
    if sinks is not None and sinks.type.rank != 1:
        sinks = rw.insert(Reshape(sinks, shape=(product(sinks.shape),)))
    y = rw.insert(Attention(token_major(rw, q), keys, token_major(rw, v.emit(rw)), sinks, **fields))
    return rw.insert(Transpose(y, perm=SWAP_HEADS))


class FuseSdpa(Rule):
    """sdpa(q, k, v, mask) → attention(q, k, v)"""

    pattern = P(Sdpa, name="sdpa")

    def _parts(self, found: Match) -> tuple[Sdpa, Heads, Heads, MaskFacts | str]:
        op = found.op("sdpa")
        assert isinstance(op, Sdpa)
        facts = _facts([MaskAnalysis().meaning(op.mask)] if op.mask is not None else [])
        if isinstance(facts, MaskFacts) and op.causal:
            facts = MaskFacts(True, facts.window)
        return op, unrepeated(op.k), unrepeated(op.v), facts

    def check(self, found: Match) -> str | None:
        op, k, v, facts = self._parts(found)
        return facts if isinstance(facts, str) else _heads_fit(op.q, k, v)

    def rewrite(self, found: Match, rw: Rewriter) -> Sequence[Value]:
        op, k, v, facts = self._parts(found)
        assert isinstance(facts, MaskFacts)
        return [
            _emit(
                rw, op.q, k, v, None, scale=op.scale, causal=facts.causal, window=facts.window, softcap=None
            )
        ]


class FuseEagerAttention(Rule):
    """matmul(softmax(scores), v) → attention(q, k, v)"""

    pattern = P(
        m.MatMul,
        Or(
            P(m.Softmax, Any("scores"), axis=-1, name="softmax"),
            P(
                Slice,
                P(m.Softmax, Any("scores"), axis=-1, name="softmax"),
                axis=-1,
                start=0,
                step=1,
                name="slice",
            ),
        ),
        Any("v"),
    )

    def _parts(self, found: Match) -> tuple[Scores | str, MaskFacts | str]:
        scores = read_scores(found["scores"])
        if isinstance(scores, str):
            return scores, scores
        if (scores.sinks is not None) != ("slice" in found):
            return "the sinks' column is not cut off after the softmax", "sinks"
        return scores, _facts(scores.masks)

    def check(self, found: Match) -> str | None:
        scores, facts = self._parts(found)
        if isinstance(scores, str):
            return scores
        if isinstance(facts, str):
            return facts
        weights = [found.op(name) for name in ("softmax", "slice") if name in found]
        if not all(op.graph is not None and single_use(op.graph, op.result) for op in weights):
            return "the attention weights are used elsewhere"
        return _heads_fit(scores.q, unrepeated(scores.k), unrepeated(found["v"]), scores.k_token_major)

    def rewrite(self, found: Match, rw: Rewriter) -> Sequence[Value]:
        scores, facts = self._parts(found)
        assert isinstance(scores, Scores) and isinstance(facts, MaskFacts)
        return [
            _emit(
                rw,
                scores.q,
                unrepeated(scores.k),
                unrepeated(found["v"]),
                scores.sinks,
                k_token_major=scores.k_token_major,
                scale=scores.scale,
                causal=facts.causal,
                window=facts.window,
                softcap=scores.softcap,
            )
        ]


class FuseAttention(RulePass):
    """Attention from both of its traced forms."""

    name = "fuse-attention"
    rules = (FuseSdpa(), FuseEagerAttention())
