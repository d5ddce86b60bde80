"""Attention: over the paged cache (one local function, used by all layers alike), and of whole sequences.

    function PagedAttention(q [T, H, D], k, v [T, Hkv, D], k_pages, v_pages [Hkv, N, page_size, D], plan…,
    sinks?)
      for each of the plan's groups:                             (b sequences, t queries, S keys)
        K = gather(k_pages, pages), new rows written into it     [Hkv, b, S, D]
        scores = Q · Kᵀ · scale, soft-capped, + mask             [Hkv, b, G · t, S]
        rows = softmax(scores) · V                               [b · t, H, D]
      gather(concat(rows of all groups), inverse)                [T, H, D]

onnxruntime's own GroupQueryAttention wants each sequence's cache contiguous, and its PagedAttention exists
for CUDA only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from onnx import FunctionProto, TensorProto, helper

from ...ir.core import Value
from ...ir.dtypes import FLOAT8
from ...ir.errors import UnsupportedError
from ...ir.ops import attention as ir
from ...ir.ops import cache as ir_cache
from ...ir.types import Dim, TensorType, divide
from .attention_plan import Mask, Plan, additive, describe, loop_body, make_plan, parts, visible
from .builder import CONTRIB, LOCAL, Names, Scope
from .context import Context, NewRows, emits, opsets

_Array = tuple[str, tuple[Dim, ...]]  # an ONNX value and its shape


@emits("append_kv")
def append_kv(c: Context, op: ir_cache.AppendKv) -> None:
    """The rows become outputs; attention reads them as the cache will hold them."""
    pages = c.pages.get(op.pages)
    if pages is None or pages.index in c.new_rows:
        raise UnsupportedError(
            f"onnx-cpu: append_kv from {op.loc or 'the graph'} must write a cache input, each once",
            remedy="compile for tvm-cpu",
        )
    if op.pages.dtype in ("bfloat16", FLOAT8):
        raise UnsupportedError(
            f"onnx-cpu keeps no cache of {op.pages.dtype}, which ONNX Runtime does not take from numpy",
            remedy=f"pass --kv-dtype {'int8' if op.pages.dtype == FLOAT8 else 'float16'}",
        )
    dtype = "float32" if pages.quantized else op.pages.dtype
    k, v = (c.name(x) if x.dtype == dtype else c.scope.cast(c.name(x), dtype) for x in (op.k, op.v))
    if not pages.quantized:
        kind = op.k.type.with_dtype(dtype)
        outputs = [(f"new_{part}.{pages.index}", row, kind) for part, row in (("k", k), ("v", v))]
        c.new_rows[pages.index] = NewRows(k, v, outputs)
        return
    held: dict[str, str] = {}
    outputs = []
    for part, row in (("k", k), ("v", v)):
        codes, scale, held[part] = _quantized(c.scope, row)
        outputs.append((f"new_{part}.{pages.index}", codes, op.k.type.with_dtype("int8")))
        outputs.append((f"new_{part}_scale.{pages.index}", scale, TensorType("float32", op.k.shape[:-1])))
    c.new_rows[pages.index] = NewRows(held["k"], held["v"], outputs)


def _quantized(s: Scope, x: str) -> tuple[str, str, str]:
    """float32 [T, Hkv, D] → codes int8 [T, Hkv, D], scale [T, Hkv], and what they stand for; bit for bit
    `ir.ops.cache.quantize_heads`.
    """
    size = s.op("Abs", x)
    # A NaN may get lost in a maximum; in the sum of the elements times 0 neither it nor an infinity does.
    zero, nan = s.scalar(0.0, "float32"), s.scalar(float("nan"), "float32")
    finite = s.op("Equal", s.op("ReduceSum", s.op("Mul", size, zero), s.i64(-1), keepdims=1), zero)
    largest = s.op("ReduceMax", size, s.i64(-1), keepdims=1)
    enough = s.op("GreaterOrEqual", largest, s.scalar(ir_cache.SMALLEST_SCALED, "float32"))
    usable = s.op("And", finite, enough)
    top = s.scalar(127.0, "float32")
    inverse = s.op("Where", usable, s.op("Div", top, largest), zero)
    clipped = s.op("Clip", s.op("Mul", x, inverse), s.scalar(-127.0, "float32"), top)
    whole = s.op("Where", usable, s.op("Round", clipped), zero)
    scale = s.op("Where", usable, s.op("Div", largest, top), s.op("Where", finite, zero, nan))
    codes = s.cast(whole, "int8")
    return codes, s.op("Squeeze", scale, s.i64(-1)), s.op("Mul", whole, scale)


@dataclass(frozen=True)
class _Config:
    """What the function's body depends on."""

    heads: int
    kv_heads: int
    dim: int
    scale: float
    softcap: float | None
    sinks: bool
    slopes: bool
    distances: int  # elements of a head's row, 0 for none
    kv_dtype: str


def _softmax(s: Scope, scores: str, column: str | None) -> str:
    """Softmax over the last axis; `column` [..., 1] holds the sinks' logits, which take weight and give
    nothing.
    """
    if column is None:
        return s.op("Softmax", scores, axis=-1)
    return s.slice(s.op("Softmax", s.op("Concat", scores, column, axis=-1), axis=-1), -1, 0, -1)


def _capped(s: Scope, scores: str, softcap: float | None) -> str:
    if softcap is None:
        return scores
    small = s.op("Tanh", s.op("Mul", scores, s.scalar(1.0 / softcap, "float32")))
    return s.op("Mul", small, s.scalar(softcap, "float32"))


def _keys(s: Scope, cfg: _Config, values: Mapping[str, str], part: str, take: Mapping[str, str]) -> str:
    """[Hkv, b, S, D] in float32: the context's pages, with the new rows [Hkv, T, D] where they belong.

    Writing them into what was gathered happens in place and spares a second copy, which concatenating would
    be.
    """
    gathered = s.reshape(s.op("Gather", values[f"{part}_pages"], take["pages"], axis=1), 0, 0, -1, cfg.dim)
    if cfg.kv_dtype != "float32":
        gathered = s.cast(gathered, "float32")
    if cfg.kv_dtype == "int8":
        scales = s.reshape(s.op("Gather", values[f"{part}_scales"], take["pages"], axis=1), 0, 0, -1, 1)
        gathered = s.op("Mul", gathered, scales)
    new = s.op("Gather", values[part], take["key_rows"], axis=1)
    return s.op("ScatterND", gathered, take["places"], new)


def _slopes(s: Scope, slopes: str, take: Mapping[str, str]) -> str:
    """What is added to scores [Hkv, b, G · t, S]: slopes [Hkv, 1, G, 1, 1] times how far the keys stand from
    the end of the context. Softmax does not see that queries stand elsewhere.
    """
    along = s.op("Mul", slopes, s.unsqueeze(take["behind"], 1, 2))  # [Hkv, b, G, 1, S]
    queries = s.op("Shape", take["query_rows"], start=1, end=2)
    shape = s.op("Concat", s.i64(1, 1, 1), queries, s.i64(1), axis=0)
    merged = s.op("Concat", s.i64(0, 0, -1), s.op("Shape", take["behind"], start=1, end=2), axis=0)
    return s.op("Reshape", s.op("Expand", along, shape), merged)


def _at_distances(s: Scope, table: str, width: int, distance: str) -> str:
    """Elements [H, …] of a table [H, width] for distances […] of keys from their queries."""
    index = s.op("Add", distance, s.scalar(width // 2))
    index = s.op("Min", s.op("Max", index, s.scalar(0)), s.scalar(width - 1))
    return s.op("Gather", table, index, axis=1)


def _by_distance(s: Scope, cfg: _Config, table: str, distance: str) -> str:
    """What is added to scores [Hkv, b, G · t, S]: of a table [H, W] for distances [b, t, S]."""
    found = _at_distances(s, table, cfg.distances, distance)
    shape = s.op("Concat", s.i64(cfg.kv_heads, cfg.heads // cfg.kv_heads), s.op("Shape", distance), axis=0)
    split = s.transpose(s.op("Reshape", found, shape), 0, 2, 1, 3, 4)  # [Hkv, b, G, t, S]
    merged = s.op("Concat", s.i64(0, 0, -1), s.op("Shape", distance, start=2, end=3), axis=0)
    return s.op("Reshape", split, merged)


def _group_rows(s: Scope, cfg: _Config, values: Mapping[str, str], take: Mapping[str, str]) -> str:
    """Attention rows [b · t, H, D] of one group; `take`: its `parts`."""
    ratio = cfg.heads // cfg.kv_heads
    q = s.op("Gather", values["q"], take["query_rows"], axis=0)  # [b, t, Hkv, G, D]
    q = s.reshape(s.transpose(q, 2, 0, 3, 1, 4), 0, 0, -1, cfg.dim)
    k, v = (_keys(s, cfg, values, part, take) for part in "kv")
    scores = _capped(s, s.op("FusedMatMul", q, k, domain=CONTRIB, transB=1, alpha=cfg.scale), cfg.softcap)
    if cfg.slopes:
        scores = s.op("Add", scores, _slopes(s, values["slopes"], take))
    if cfg.distances:
        scores = s.op("Add", scores, _by_distance(s, cfg, values["distances"], take["distance"]))
    mask = take["mask"] if ratio == 1 else s.op("Tile", take["mask"], take["tiles"])
    column = None
    if cfg.sinks:  # [Hkv, 1, G, 1, 1] → [Hkv, b, G · t, 1]
        batch, queries = (s.op("Shape", take["query_rows"], start=i, end=i + 1) for i in (0, 1))
        shape = s.op("Concat", s.i64(1), batch, s.i64(1), queries, s.i64(1), axis=0)
        column = s.reshape(s.op("Expand", values["sinks"], shape), 0, 0, -1, 1)
    weights = _softmax(s, s.op("Add", scores, mask), column)
    rows = s.reshape(s.op("MatMul", weights, v), 0, 0, ratio, -1, cfg.dim)  # [Hkv, b, G, t, D]
    return s.reshape(s.transpose(rows, 1, 3, 0, 2, 4), -1, cfg.heads, cfg.dim)


def _function(cfg: _Config, name: str) -> FunctionProto:
    """The local function of one configuration."""
    s = Scope(Names())
    of_group = parts(cfg.slopes, cfg.distances > 0)
    inputs = ["q", "k", "v", "k_pages", "v_pages"]
    inputs += ["k_scales", "v_scales"] if cfg.kv_dtype == "int8" else []
    inputs += [f"{which}_{part}" for which in ("first", "rest") for part in of_group]
    inputs += ["others", "inverse"]
    per_head = [name for name in ("sinks", "slopes") if getattr(cfg, name)]
    inputs += per_head + (["distances"] if cfg.distances else [])
    given = {n: s.names.fresh(n) for n in inputs}
    ratio = cfg.heads // cfg.kv_heads
    values = dict(given)
    values["q"] = s.reshape(given["q"], -1, cfg.kv_heads, ratio, cfg.dim)
    values["k"], values["v"] = (s.transpose(given[n], 1, 0, 2) for n in ("k", "v"))
    for one in per_head:
        values[one] = s.reshape(given[one], cfg.kv_heads, 1, ratio, 1, 1)
    first = _group_rows(s, cfg, values, {p: given[f"first_{p}"] for p in of_group})

    inner = Scope(s.names)
    step, more, carried = (s.names.fresh(n) for n in ("step", "more", "carried"))
    used = [p for p in of_group if p != "tiles" or ratio > 1]
    take = {p: inner.op("SequenceAt", given[f"rest_{p}"], step) for p in used}
    grown = inner.op("SequenceInsert", carried, _group_rows(inner, cfg, values, take))
    body = loop_body(inner, "groups", step, more, [(carried, grown, TensorProto.FLOAT)])
    done = s.op("Loop", given["others"], None, s.op("SequenceConstruct", first), body=body)
    out = s.op("Gather", s.op("ConcatFromSequence", done, axis=0), given["inverse"], axis=0)
    return helper.make_function(LOCAL, name, [given[n] for n in inputs], [out], s.nodes, opsets())


def _plan(c: Context, op: ir_cache.PagedAttention, mask: Mask) -> Plan:
    """The plan for this op's batch and mask, made when the first layer asks."""
    key = (op.query_start, op.context_len, op.block_table)
    if key not in c.batches:
        rows = c.scope.op("Squeeze", c.scope.op("Shape", c.name(op.q), start=0, end=1), c.scope.i64(0))
        batch = [c.name(v) for v in key]
        c.batches[key] = describe(c.scope, rows, *batch)
    if (key, mask) not in c.plans:
        c.plans[key, mask] = make_plan(c.scope, c.batches[key], mask)
    return c.plans[key, mask]


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
    _, _, size, kv_heads, _ = op.pages.shape
    assert isinstance(heads, int) and isinstance(kv_heads, int) and isinstance(dim, int)
    assert isinstance(size, int)
    per_head = (op.sinks is not None, op.slopes is not None)
    distances = 0 if op.distances is None else op.distances.shape[1]
    assert isinstance(distances, int)
    cfg = _Config(heads, kv_heads, dim, op.scale, op.softcap, *per_head, distances, op.pages.dtype)
    if cfg not in c.functions:
        c.functions[cfg] = _function(cfg, f"PagedAttention{len(c.functions)}")
    rows = c.new_rows[pages.index]
    k, v = rows.k, rows.v
    if op.pages.dtype == "float16":
        k, v = c.scope.cast(k, "float32"), c.scope.cast(v, "float32")
    mask = Mask(size, kv_heads, heads // kv_heads, op.causal, op.window, per_head[1], distances > 0)
    plan = _plan(c, op, mask)
    given = [c.name(v) for v in (op.sinks, op.slopes, op.distances) if v is not None]
    caches = [name for name, _ in pages.inputs]
    inputs = [c.name(op.q), k, v, *caches, *plan.names, *given]
    return c.scope.op(c.functions[cfg].name, *inputs, domain=LOCAL)


# -- whole sequences -------------------------------------------------------------------------------------


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
    if isinstance(op, ir.Attention) and op.slopes is not None:
        keys = s.arange(s.op("Squeeze", c.dims.value(k_shape[-2]), s.i64(0)))
        along = s.op("Mul", s.unsqueeze(c.name(op.slopes), -1, -2), s.cast(keys, "float32"))
        scores = s.op("Add", scores, along)
    if isinstance(op, ir.Attention) and op.distances is not None:
        width = op.distances.shape[1]
        assert isinstance(width, int)
        rows, keys = (
            s.arange(s.op("Squeeze", c.dims.value(n), s.i64(0))) for n in (q_shape[-2], k_shape[-2])
        )
        distance = s.op("Sub", s.unsqueeze(keys, 0), s.unsqueeze(rows, 1))
        scores = s.op("Add", scores, _at_distances(s, c.name(op.distances), width, distance))
    if mask is not None:
        scores = s.op("Add", scores, mask)
    sinks = op.sinks if isinstance(op, ir.Attention) else None
    column = None
    if sinks is not None:
        column = s.op("Expand", s.unsqueeze(c.name(sinks), -1, -2), c.dims.shape((*q_shape[:-1], 1)))
    weights = _softmax(s, scores, column)
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
    return None if seen is None else s.op("Squeeze", additive(s, seen), s.i64(0))


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
            given = additive(c.scope, given)
        mask = given if mask is None else c.scope.op("Add", mask, given)
    return _attend(c, op, q, k, v, mask, rows_may_be_blind=op.mask is not None)
