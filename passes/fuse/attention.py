"""Attention, from scaled_dot_product_attention and from matmul–softmax–matmul.

    sdpa(q, repeat(k), repeat(v), mask)                           → attention(q, k, v), causal, window
    matmul(softmax(softcap(matmul(q, kᵀ) · scale) + mask), v)     → attention(q, k, v), softcap as well
    matmul(slice(softmax(concat([scores, sinks]))), v)            → attention(q, k, v, sinks)
    scores + slopes [H, 1, 1] · positions                         → attention(q, k, v, slopes)
    scores + table[bucket(j - i)]                                 → attention(q, k, v, distances)
    matmul(matmul(q, kᵀ) · decays, v)                             → ssd_scan (`decays.py`)
    scores + bias of each key [B, H, 1, T]                        → attention([q, …], [k, bias], v)

`attention` is token-major; the transposes made here cancel with the model's own. Repeated heads (GQA) are
recognised and dropped. What a mask means is worked out by `masks.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any as Anything

from ...ir.core import Graph, Value
from ...ir.ops import math as m
from ...ir.ops.attention import Attention, Sdpa
from ...ir.ops.shape import Arange, Concat, Expand, Reshape, Slice, Transpose
from ...ir.rewriter import Any, Match, Or, P, Rewriter, Rule, constant, single_use
from ...ir.types import Shape, product
from ..base import PassContext, PassResult, RulePass
from .decays import FuseDecayedAttention, check_tables, keys_of
from .distances import Distances, read_distances
from .key_bias import KeyBias, read_key_bias
from .mask_terms import NEGATIVE, Choice, Meaning, Predicate
from .masks import MaskAnalysis, MaskFacts, classify
from .rope import SWAP_HEADS, token_major
from .slopes import Slopes, read_slopes

_LOWEST = -3e38


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


Along = Slopes | Distances | KeyBias


@dataclass(frozen=True)
class Terms:
    """What is added to scores: masks, and slopes along the keys, what belongs to their distance, or what each
    brings along.
    """

    masks: tuple[Meaning, ...] = ()
    along: Along | None = None

    def and_mask(self, mask: Meaning) -> Terms:
        return Terms((*self.masks, mask), self.along)

    def both(self, other: Terms) -> Terms:
        return Terms(self.masks + other.masks, self.along or other.along)


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
    terms: Terms
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


def _peel_masks(x: Value) -> tuple[Value, Terms]:
    """What is added to scores taken off: scores + mask → scores; where(seen, scores, very negative) →
    scores; scores + slopes · positions → scores.
    """
    terms = Terms()
    known = MaskAnalysis()
    while True:
        op = x.producer
        if isinstance(op, m.Where):
            split = _hidden(known, op)
            if split is None or split[0].shape != x.shape:
                break
            x, terms = split[0], terms.and_mask(split[1])
        elif isinstance(op, m.Mul) and (zeroed := _zeroed(known, op, terms.masks)) is not None:
            x = zeroed
        elif isinstance(op, m.Maximum) and (constant(op.b) or 0.0) <= _LOWEST and op.a.shape == x.shape:
            x = op.a  # it only keeps sums of masks from becoming -inf
        elif isinstance(op, m.Add | m.Sub):
            found = _added(known, op)
            if found is None:
                break
            x, more = found
            if terms.along is not None and more.along is not None:
                break
            terms = terms.both(more)
        else:
            break
    return x, terms


def _zeroed(known: MaskAnalysis, op: m.Mul, masks: Sequence[Meaning]) -> Value | None:
    """scores · seen → scores, where a mask that was taken off hides what is not seen anyway."""
    for scores, seen in ((op.a, op.b), (op.b, op.a)):
        meaning = known.meaning(seen)
        if isinstance(meaning, Choice) and (meaning.yes, meaning.no) == (1.0, 0.0):
            meaning = meaning.when
        hides = [one.visible() if isinstance(one, Choice) else one for one in masks]
        if isinstance(meaning, Predicate) and meaning in hides and scores.shape == op.result.shape:
            return scores
    return None


def _hidden(known: MaskAnalysis, op: m.Where) -> tuple[Value, Meaning] | None:
    """where(seen, x, very negative) → x and what is seen."""
    hidden, x = (op.a, op.b) if constant(op.a) is not None else (op.b, op.a)
    number = constant(hidden)
    if number is None or number > NEGATIVE:
        return None
    return x, known.opposite(op.condition) if hidden is op.a else known.meaning(op.condition)


def _added(known: MaskAnalysis, op: m.Add | m.Sub) -> tuple[Value, Terms] | None:
    """Which operand of scores + bias is the bias, and what it means: the one that is understood, or else the
    one that all heads share.
    """
    heads = op.result.shape[-3] if op.result.type.rank >= 3 else None
    if isinstance(op, m.Sub):
        slopes = read_slopes(known, op.b, heads)
        fits = slopes is not None and op.a.shape == op.result.shape
        return (op.a, Terms((), slopes.times(-1.0))) if slopes is not None and fits else None
    for bias, scores in ((op.b, op.a), (op.a, op.b)):
        terms = read_bias(known, bias, heads)
        if terms is not None and scores.shape == op.result.shape:
            return scores, terms
    shared = [(a, b) for a, b in ((op.a, op.b), (op.b, op.a)) if b.shape[-3:-2] == (1,)]
    return (shared[0][0], Terms().and_mask(None)) if len(shared) == 1 else None


def read_bias(known: MaskAnalysis, bias: Value, heads: object) -> Terms | None:
    """A bias of scores [..., heads, T, T] as masks, slopes and distances; None where it is something else."""
    meaning = known.meaning(bias)
    if meaning is not None:
        return Terms((meaning,))
    along = read_slopes(known, bias, heads) or read_distances(bias, heads)
    if along is not None:
        return Terms((), along)
    op = bias.producer
    if isinstance(op, m.Where) and (split := _hidden(known, op)) is not None:
        inner = read_bias(known, split[0], heads)
        return None if inner is None else inner.and_mask(split[1])
    if isinstance(op, m.Add):
        parts = [read_bias(known, v, heads) for v in (op.a, op.b)]
        if parts[0] is None or parts[1] is None or (parts[0].along and parts[1].along):
            return None
        return parts[0].both(parts[1])
    once = unrepeated(bias) if bias.type.rank == 4 else Heads(bias, bias.shape)
    own = None if _reads_positions(bias) else read_key_bias(once.value, once.shape)
    if own is not None:
        return Terms((), own)
    if once.value is not bias and once.value.shape == once.shape:
        found = read_bias(known, once.value, once.shape[1])
        if found is not None and (found.along is None or isinstance(found.along, KeyBias)):
            return found
    if isinstance(op, Reshape | Expand) and bias.shape[-3:] == op.x.shape[-3:]:
        return read_bias(known, op.x, heads)
    return None


def read_scores(x: Value) -> Scores | str:
    """Take the operand of the softmax apart; the sentence says what could not be read."""
    peeled = _peel_sinks(x)
    if isinstance(peeled, str):
        return peeled
    x, sinks = peeled
    x, terms = _peel_masks(x)
    x, scale = _peel_scale(x, 1.0)
    softcap: float | None = None
    if isinstance(op := x.producer, m.Tanh):
        softcap, scale = scale, 1.0
        x, scale = _peel_scale(op.x, 1.0)
        scale *= softcap
    product = x.producer
    if (
        softcap is None
        and isinstance(product, m.Add | m.Sub)
        and any(_reads_positions(v) for v in (product.a, product.b))
    ):
        return (
            "a bias of positions is added to the scores that is neither a slope a head nor a number of each "
            "distance"
        )
    if not isinstance(product, m.MatMul):
        return "the softmax is not over a product of queries and keys"
    keys = keys_of(product.b)
    if keys is None:
        return "the keys are not transposed in the last two axes"
    q, scale = _peel_scale(product.a, scale)
    key, scale = _peel_scale(keys[0], scale)
    return Scores(q, key, keys[1], scale, softcap, terms, sinks)


def _reads_positions(v: Value) -> bool:
    """Whether a value is made of weights and positions alone."""
    seen: set[Value] = set()
    waiting, counts = [v], False
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        if one.producer is None and not one.is_weight:
            return False
        if one.producer is not None:
            counts |= isinstance(one.producer, Arange)
            waiting += one.producer.operands
    return counts


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


def _bias_fits(along: Along | None, k: Heads, k_token_major: bool, softcap: float | None) -> str | None:
    """Why a bias of each key is none of these keys; None where nothing is wrong with it."""
    if not isinstance(along, KeyBias):
        return None
    batch, heads, tokens = (k.shape[i] for i in ((0, 2, 1) if k_token_major else (0, 1, 2)))
    if along.shape[1] not in (1, heads):
        return f"a bias of {along.shape[1]} heads is added to scores of {heads} heads of keys"
    if (along.shape[0], along.shape[3]) != (batch, tokens):
        return "a bias of other keys than those is added to the scores"
    return None if softcap is None else "a bias of each key is added to scores that are capped"


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
    along: Along | None,
    *,
    k_token_major: bool = False,
    **fields: Anything,
) -> Value:
    queries = token_major(rw, q)
    keys = k.emit(rw) if k_token_major else token_major(rw, k.emit(rw))
    if isinstance(along, KeyBias):
        queries, keys = along.joined(rw, queries, keys, fields["scale"])
    if sinks is not None and sinks.type.rank != 1:
        sinks = rw.insert(Reshape(sinks, shape=(product(sinks.shape),)))
    heads = q.shape[1]
    assert isinstance(heads, int)
    slopes = along.emit(rw, heads) if isinstance(along, Slopes) else None
    distances = along.emit(rw) if isinstance(along, Distances) else None
    values = token_major(rw, v.emit(rw))
    y = rw.insert(Attention(queries, keys, values, sinks, slopes, distances, **fields))
    return rw.insert(Transpose(y, perm=SWAP_HEADS))


class FuseSdpa(Rule):
    """sdpa(q, k, v, mask) → attention(q, k, v)"""

    pattern = P(Sdpa, name="sdpa")

    def _parts(self, found: Match) -> tuple[Sdpa, Heads, Heads, MaskFacts | str, Along | None]:
        op = found.op("sdpa")
        assert isinstance(op, Sdpa)
        terms = Terms()
        if op.mask is not None:
            known = MaskAnalysis()
            terms = read_bias(known, op.mask, op.q.shape[-3]) or terms.and_mask(None)
        facts = _facts(terms.masks)
        if isinstance(facts, str) and op.mask is not None and not _reads_positions(op.mask):
            facts = "what is added to the scores is computed from hidden states, and is no number of each key"
        if isinstance(facts, MaskFacts) and op.causal:
            facts = MaskFacts(True, facts.window)
        return op, unrepeated(op.k), unrepeated(op.v), facts, terms.along

    def check(self, found: Match) -> str | None:
        op, k, v, facts, along = self._parts(found)
        if isinstance(facts, str):
            return facts
        return _heads_fit(op.q, k, v) or _bias_fits(along, k, False, None)

    def rewrite(self, found: Match, rw: Rewriter) -> Sequence[Value]:
        op, k, v, facts, along = self._parts(found)
        assert isinstance(facts, MaskFacts)
        fields: dict[str, Anything] = {"scale": op.scale, "causal": facts.causal, "window": facts.window}
        return [_emit(rw, op.q, k, v, None, along, softcap=None, **fields)]


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
        if scores.sinks is not None and scores.terms.along is not None:
            return "scores have sinks and a bias of positions", "sinks"
        if (scores.sinks is not None) != ("slice" in found):
            return "the sinks' column is not cut off after the softmax", "sinks"
        return scores, _facts(scores.terms.masks)

    def check(self, found: Match) -> str | None:
        scores, facts = self._parts(found)
        if isinstance(scores, str):
            return scores
        if isinstance(facts, str):
            return facts
        weights = [found.op(name) for name in ("softmax", "slice") if name in found]
        if not all(op.graph is not None and single_use(op.graph, op.result) for op in weights):
            return "the attention weights are used elsewhere"
        k, along = unrepeated(scores.k), scores.terms.along
        misfit = _heads_fit(scores.q, k, unrepeated(found["v"]), scores.k_token_major)
        return misfit or _bias_fits(along, k, scores.k_token_major, scores.softcap)

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
                scores.terms.along,
                k_token_major=scores.k_token_major,
                scale=scores.scale,
                causal=facts.causal,
                window=facts.window,
                softcap=scores.softcap,
            )
        ]


class FuseAttention(RulePass):
    """Attention from its traced forms."""

    name = "fuse-attention"
    rules = (FuseSdpa(), FuseEagerAttention(), FuseDecayedAttention())

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        result = super().run(graph, context)
        check_tables(graph)
        return result
