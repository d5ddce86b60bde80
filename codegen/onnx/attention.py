"""Attention: over the paged cache (one local function, used by all layers alike), and of whole sequences.

    function PagedAttention(q [T, H, D], k, v [T, Hkv, D], k_pages, v_pages [Hkv, N, page_size, D], plan…,
    sinks?)
      Loop over the plan's groups:                               (b sequences, t queries, S keys)
        K = concat(gather(k_pages, pages), gather(k, key_rows))  [Hkv, b, S, D]
        scores = Q · Kᵀ · scale, soft-capped, + mask             [Hkv, b, G · t, S]
        rows = softmax(scores) · V                               [b · t, H, D]
      gather(concat(rows of all groups), inverse)                [T, H, D]

onnxruntime's own GroupQueryAttention needs contiguous per-sequence caches and its PagedAttention exists for
CUDA only.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnx import FunctionProto, TensorProto, helper

from ...ir.core import Value
from ...ir.errors import UnsupportedError
from ...ir.ops import attention as ir
from ...ir.ops import cache as ir_cache
from ...ir.types import Dim, divide
from .attention_plan import Plan, describe, make_plan, visible
from .builder import CONTRIB, LOCAL, Names, Scope
from .context import Context, emits, opsets

_Array = tuple[str, tuple[Dim, ...]]  # an ONNX value and its shape


@emits("append_kv")
def append_kv(c: Context, op: ir_cache.AppendKv) -> None:
    """The rows become outputs; attention reads them as the cache will hold them (rounded to its dtype)."""
    pages = c.pages.get(op.pages)
    if pages is None or pages.index in c.new_rows:
        raise UnsupportedError(
            f"onnx-cpu: append_kv from {op.loc or 'the graph'} must write a cache input, each once",
            remedy="compile for tvm-cpu",
        )
    dtype = op.pages.dtype
    k, v = (c.name(x) if x.dtype == dtype else c.scope.cast(c.name(x), dtype) for x in (op.k, op.v))
    c.new_rows[pages.index] = (k, v, op.k.type.with_dtype(dtype))


@dataclass(frozen=True)
class _Config:
    """What the function's body depends on."""

    heads: int
    kv_heads: int
    dim: int
    scale: float
    softcap: float | None
    sinks: bool
    half_cache: bool


def _softmax(s: Scope, scores: str, sinks: str | None) -> str:
    """Softmax over the last axis; `sinks` broadcasts to the scores with a last axis of 1 and is dropped
    again.
    """
    if sinks is None:
        return s.op("Softmax", scores, axis=-1)
    lead = s.op("Concat", s.op("Shape", scores, start=0, end=-1), s.i64(1), axis=0)
    column = s.op("Expand", sinks, lead)
    return s.slice(s.op("Softmax", s.op("Concat", scores, column, axis=-1), axis=-1), -1, 0, -1)


def _capped(s: Scope, scores: str, softcap: float | None) -> str:
    if softcap is None:
        return scores
    small = s.op("Tanh", s.op("Mul", scores, s.scalar(1.0 / softcap, "float32")))
    return s.op("Mul", small, s.scalar(softcap, "float32"))


def _keys(s: Scope, cfg: _Config, pages: str, rows: str, page_index: str, row_index: str) -> str:
    """[Hkv, b, S, D] in float32: the past from its pages, then the new rows [Hkv, T, D]."""
    old = s.op("Gather", pages, page_index, axis=1)
    old = s.reshape(old, 0, 0, -1, cfg.dim)
    if cfg.half_cache:
        old = s.cast(old, "float32")
    return s.op("Concat", old, s.op("Gather", rows, row_index, axis=1), axis=2)


def _group_rows(s: Scope, cfg: _Config, values: dict[str, str], group: str) -> str:
    """The Loop's body for one group: attention rows [b · t, H, Dv]."""
    ratio = cfg.heads // cfg.kv_heads
    take = {n: s.op("SequenceAt", values[n], group) for n in ("query_rows", "key_rows", "pages", "mask")}
    q = s.op("Gather", values["q"], take["query_rows"], axis=0)  # [b, t, Hkv, G, D]
    q = s.reshape(s.transpose(q, 2, 0, 3, 1, 4), 0, 0, -1, cfg.dim)
    k = _keys(s, cfg, values["k_pages"], values["k"], take["pages"], take["key_rows"])
    v = _keys(s, cfg, values["v_pages"], values["v"], take["pages"], take["key_rows"])
    scores = s.op("FusedMatMul", q, k, domain=CONTRIB, transB=1, alpha=cfg.scale)
    together = s.op("Shape", scores)
    scores = _capped(s, scores, cfg.softcap)
    if ratio > 1 or cfg.sinks:
        queries = s.op("Shape", take["query_rows"], start=1, end=2)
        scores = s.op("Reshape", scores, s.op("Concat", s.i64(0, 0, ratio), queries, s.i64(-1), axis=0))
        mask = take["mask"]  # [b, 1, t, S] against [Hkv, b, G, t, S]
        weights = _softmax(s, s.op("Add", scores, mask), values.get("sinks"))
        weights = s.op("Reshape", weights, together)
    else:
        weights = _softmax(s, s.op("Add", scores, s.op("Squeeze", take["mask"], s.i64(1))), None)
    rows = s.reshape(s.op("MatMul", weights, v), 0, 0, ratio, -1, cfg.dim)  # [Hkv, b, G, t, Dv]
    return s.reshape(s.transpose(rows, 1, 3, 0, 2, 4), -1, cfg.heads, cfg.dim)


_INPUTS = [
    "q",
    "k",
    "v",
    "k_pages",
    "v_pages",
    "groups",
    "query_rows",
    "key_rows",
    "pages",
    "mask",
    "inverse",
]


def _function(cfg: _Config, name: str) -> FunctionProto:
    """The local function of one configuration."""
    s = Scope(Names())
    inputs = [*_INPUTS, *(["sinks"] if cfg.sinks else [])]
    values = {n: s.names.fresh(n) for n in inputs}
    ratio = cfg.heads // cfg.kv_heads
    inner_values = dict(values)
    inner_values["q"] = s.reshape(values["q"], -1, cfg.kv_heads, ratio, cfg.dim)
    inner_values["k"], inner_values["v"] = (s.transpose(values[n], 1, 0, 2) for n in ("k", "v"))
    if cfg.sinks:
        inner_values["sinks"] = s.reshape(values["sinks"], cfg.kv_heads, 1, ratio, 1, 1)

    inner = Scope(s.names)
    group, more, carried = (s.names.fresh(n) for n in ("group", "more", "carried"))
    grown = inner.op("SequenceInsert", carried, _group_rows(inner, cfg, inner_values, group))
    again = inner.op("Identity", more)
    flag, number = TensorProto.BOOL, TensorProto.INT64
    body = inner.body(
        [
            helper.make_tensor_value_info(group, number, []),
            helper.make_tensor_value_info(more, flag, []),
            helper.make_tensor_sequence_value_info(carried, TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info(again, flag, []),
            helper.make_tensor_sequence_value_info(grown, TensorProto.FLOAT, None),
        ],
        "groups",
    )
    # The first element is empty, so that a step without tokens still has something to concatenate.
    nothing = s.slice(s.reshape(values["q"], -1, cfg.heads, cfg.dim), 0, 0, 0)
    start = s.op("SequenceConstruct", nothing)
    done = s.op("Loop", values["groups"], None, start, body=body)
    rows = s.op("ConcatFromSequence", done, axis=0)
    out = s.op("Gather", rows, values["inverse"], axis=0)
    return helper.make_function(LOCAL, name, [values[n] for n in inputs], [out], s.nodes, opsets())


def _plan(c: Context, op: ir_cache.PagedAttention, page_size: int) -> Plan:
    """The plan for this op's batch and mask, made when the first layer asks."""
    key = (op.query_start, op.context_len, op.block_table, page_size)
    if key not in c.batches:
        rows = c.scope.op("Squeeze", c.scope.op("Shape", c.name(op.q), start=0, end=1), c.scope.i64(0))
        batch = [c.name(v) for v in (op.query_start, op.context_len, op.block_table)]
        c.batches[key] = describe(c.scope, rows, *batch)
    mask = (*key, op.causal, op.window)
    if mask not in c.plans:
        c.plans[mask] = make_plan(c.scope, c.batches[key], page_size, op.causal, op.window)
    return c.plans[mask]


@emits("paged_attention")
def paged_attention(c: Context, op: ir_cache.PagedAttention) -> str:
    append = op.pages.producer
    pages = c.pages.get(append.pages) if isinstance(append, ir_cache.AppendKv) else None
    if pages is None or not isinstance(append, ir_cache.AppendKv):
        raise UnsupportedError(
            f"onnx-cpu: paged_attention from {op.loc or 'the graph'} reads a cache that no append_kv wrote",
            remedy="compile for tvm-cpu",
        )
    heads, dim = op.q.shape[-2:]
    _, _, size, kv_heads, width = op.pages.shape
    assert isinstance(heads, int) and isinstance(kv_heads, int) and isinstance(dim, int)
    assert isinstance(size, int) and isinstance(width, int)
    half = op.pages.dtype != "float32"
    cfg = _Config(heads, kv_heads, dim, op.scale, op.softcap, op.sinks is not None, half)
    if cfg not in c.functions:
        c.functions[cfg] = _function(cfg, f"PagedAttention{len(c.functions)}")
    k, v, _ = c.new_rows[pages.index]
    if half:
        k, v = c.scope.cast(k, "float32"), c.scope.cast(v, "float32")
    plan = _plan(c, op, size)
    sinks = [] if op.sinks is None else [c.name(op.sinks)]
    inputs = [c.name(op.q), k, v, *pages.names, *plan.names, *sinks]
    return c.scope.op(c.functions[cfg].name, *inputs, domain=LOCAL)


# -- whole sequences
# -----------------------------------------------------------------------------------------------


def _head_major(c: Context, value: Value) -> tuple[str, tuple[Dim, ...]]:
    """[..., T, H, D] → [..., H, T, D] with its shape."""
    lead = value.shape[:-3]
    n = len(lead)
    t, h, d = value.shape[-3:]
    return c.scope.transpose(c.name(value), *range(n), n + 1, n, n + 2), (*lead, h, t, d)


def _attend(
    c: Context,
    op: ir.Sdpa | ir.Attention,
    q: _Array,
    k: _Array,
    v: _Array,
    mask: str | None,
    rows_may_be_blind: bool,
) -> str:
    """q [..., H, T, D], k [..., Hkv, S, D], v [..., Hkv, S, Dv] → [..., H, T, Dv]; mask additive."""
    s = c.scope
    (q_name, q_shape), (k_name, k_shape), (v_name, v_shape) = q, k, v
    heads, kv_heads = q_shape[-3], k_shape[-3]
    grouped = heads != kv_heads
    ratio = divide(heads, kv_heads)
    assert ratio is not None
    scores_shape = (*q_shape[:-1], k_shape[-2])
    if grouped:  # MatMul broadcasts over the heads that share keys and values
        q_name = c.dims.reshape(q_name, q_shape, (*q_shape[:-3], kv_heads, ratio, *q_shape[-2:]))
        k_name, v_name = s.unsqueeze(k_name, -3), s.unsqueeze(v_name, -3)
    rank = len(q_shape) + grouped
    k_name = s.transpose(k_name, *range(rank - 2), rank - 1, rank - 2)
    scores = s.op("Mul", s.op("MatMul", q_name, k_name), s.scalar(op.scale, "float32"))
    split = (*q_shape[:-3], kv_heads, ratio, q_shape[-2], k_shape[-2])
    if grouped:
        scores = c.dims.reshape(scores, split, scores_shape)
    scores = _capped(s, scores, op.softcap if isinstance(op, ir.Attention) else None)
    if mask is not None:
        scores = s.op("Add", scores, mask)
    sinks = op.sinks if isinstance(op, ir.Attention) else None
    weights = _softmax(s, scores, None if sinks is None else s.unsqueeze(c.name(sinks), -1, -2))
    if rows_may_be_blind:  # torch gives zeros where a row sees nothing
        weights = s.op("Where", s.op("IsNaN", weights), s.scalar(0.0, "float32"), weights)
    if not grouped:
        return s.op("MatMul", weights, v_name)
    out = s.op("MatMul", c.dims.reshape(weights, scores_shape, split), v_name)
    return c.dims.reshape(out, (*split[:-1], v_shape[-1]), (*q_shape[:-1], v_shape[-1]))


def _position_mask(c: Context, queries: Dim, keys: Dim, causal: bool, window: int | None) -> str | None:
    """Additive float32 [T, S] for query i and key j at positions i and j; None where all is seen."""
    if not causal and window is None:
        return None
    s = c.scope
    rows, columns = (s.arange(s.op("Squeeze", c.dims.value(n), s.i64(0))) for n in (queries, keys))
    seen = visible(s, s.unsqueeze(rows, 0), s.unsqueeze(columns, 0), causal, window)
    mask = s.op("Where", seen, s.scalar(0.0, "float32"), s.scalar(float("-inf"), "float32"))
    return s.op("Squeeze", mask, s.i64(0))


@emits("attention")
def attention(c: Context, op: ir.Attention) -> str:
    q, k, v = (_head_major(c, x) for x in (op.q, op.k, op.v))
    mask = _position_mask(c, q[1][-2], k[1][-2], op.causal, op.window)
    out = _attend(c, op, q, k, v, mask, rows_may_be_blind=False)
    n = op.q.type.rank - 3
    return c.scope.transpose(out, *range(n), n + 1, n, n + 2)


@emits("sdpa")
def sdpa(c: Context, op: ir.Sdpa) -> str:
    q, k, v = ((c.name(x), x.shape) for x in (op.q, op.k, op.v))
    mask = _position_mask(c, q[1][-2], k[1][-2], op.causal, None)
    if op.mask is not None:
        given = c.name(op.mask)
        if op.mask.dtype == "bool":
            zero, never = c.scope.scalar(0.0, "float32"), c.scope.scalar(float("-inf"), "float32")
            given = c.scope.op("Where", given, zero, never)
        mask = given if mask is None else c.scope.op("Add", mask, given)
    return _attend(c, op, q, k, v, mask, rows_may_be_blind=op.mask is not None)
