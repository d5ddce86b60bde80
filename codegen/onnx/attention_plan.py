"""What every layer's paged attention needs to know about the batch, computed once a step.

A ragged batch is cut into groups of sequences with the same number t of query tokens, so that a group is
dense:

    sequences with one new token (decode)   up to 16 together, most context first, padded to the longest of
    them sequences with more (prefill)           one sequence and up to 128 of its tokens a group

Both limits bound the memory of a layer's scores and gathered keys, however long the batch is. For each group
there are the rows of the new tokens, the pages to gather, the places of the new keys among the gathered ones,
and an additive mask. The first group's are plain values, since a small batch has only one and a `Loop` costs
about as much as the attention of one token; those of the others lie in ONNX sequences that the layers' own
loops read.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnx import GraphProto, TensorProto, helper

from .builder import Scope

DECODE_GROUP = 16
DECODE_TOKENS = 8192  # padded context tokens of a group of decoding sequences
CHUNK = 128  # query tokens of a group of one prefilling sequence


@dataclass(frozen=True)
class Batch:
    """The ragged batch in numbers; names of int64 values. B sequences, T tokens."""

    first: str  # [B] first row of each sequence
    count: str  # [B] new tokens
    past: str  # [B] tokens in the cache before this step
    block_table: str  # [B, P]
    order: str  # members of the groups, back to back: sequence
    offset: str  # … and the first of its new tokens that the group computes
    starts: str  # [groups] range of each group in `order`
    stops: str
    groups: str  # rank 0
    inverse: str  # [T] where the groups' rows, back to back, hold each token


_KINDS: dict[str, int] = {
    **dict.fromkeys(("query_rows", "key_rows", "pages", "places", "tiles"), TensorProto.INT64),
    **dict.fromkeys(("mask", "behind"), TensorProto.FLOAT),
    "distance": TensorProto.INT64,
}


def parts(slopes: bool, distances: bool) -> tuple[str, ...]:
    """The parts of a plan's groups: `behind` is for slopes alone, `distance` for distances."""
    left_out = {"behind": not slopes, "distance": not distances}
    return tuple(part for part in _KINDS if not left_out.get(part))


@dataclass(frozen=True)
class Plan:
    """What the layers take. A group has b sequences, t queries, n new keys, p pages each, S = p · page_size.

    query_rows  int64 [b, t]           rows of T
    key_rows    int64 [b, n]           rows of T
    pages       int64 [b, p]           every page of the context that a query sees, those of the new keys
                                       included
    places      int64 [Hkv, b, n, 3]   index of each new key in the gathered keys [Hkv, b, S, D]
    tiles       int64 [3]              how often to repeat the mask for the query heads of a key head
    mask        float32 [b, t, S]      0 where the key is seen, else -inf
    behind      float32 [b, S]         position of each key, less the length of the sequence's context; with
                                       slopes only
    distance    int64 [b, t, S]        position of each key, less that of the query; with distances only
    """

    first: tuple[str, ...]  # `parts` of the first group
    rest: tuple[str, ...]  # ONNX sequences of `parts` of the others
    others: str  # how many they are, rank 0
    inverse: str  # Batch.inverse

    @property
    def names(self) -> list[str]:
        return [*self.first, *self.rest, self.others, self.inverse]


def _div_up(s: Scope, a: str, b: int) -> str:
    return s.op("Div", s.op("Add", a, s.scalar(b - 1)), s.scalar(b))


def _decoding(s: Scope, count: str, past: str) -> tuple[str, str, str, str]:
    """Sequences with one new token, most context first; their number; starts and stops of their groups."""
    found = s.op("Squeeze", s.op("NonZero", s.op("Equal", count, s.scalar(1))), s.i64(0))
    lengths = s.op("Gather", past, found)
    number = s.op("Shape", found)
    _, by_length = s.many("TopK", [lengths, number], 2, axis=0)
    members = s.op("Gather", found, by_length)
    longest = s.op("ReduceMax", s.op("Concat", lengths, s.i64(1), axis=0), keepdims=0)
    fitting = s.op("Div", s.scalar(DECODE_TOKENS), longest)
    size = s.op("Min", s.op("Max", fitting, s.scalar(1)), s.scalar(DECODE_GROUP))
    total = s.op("Squeeze", number, s.i64(0))
    groups = s.op("Div", s.op("Sub", s.op("Add", total, size), s.scalar(1)), size)
    starts = s.op("Mul", s.arange(groups), size)
    return members, total, starts, s.op("Min", s.op("Add", starts, size), total)


def _prefilling(s: Scope, count: str) -> tuple[str, str]:
    """Chunks of the sequences with several new tokens: the sequence and the first token of each."""
    several = s.op("Greater", count, s.scalar(1))
    chunks = s.op("Where", several, _div_up(s, count, CHUNK), s.scalar(0))
    ends = s.op("CumSum", chunks, s.scalar(0))
    each = s.arange(s.op("ReduceSum", chunks, keepdims=0))
    passed = s.op("LessOrEqual", s.unsqueeze(ends, 0), s.unsqueeze(each, 1))
    sequence = s.op("ReduceSum", s.cast(passed, "int64"), s.i64(1), keepdims=0)
    before = s.op("Gather", s.op("Sub", ends, chunks), sequence)
    return sequence, s.op("Mul", s.op("Sub", each, before), s.scalar(CHUNK))


def _inverse(s: Scope, rows: str, count: str, last: str, decoding_rows: str) -> str:
    """Rows in group order are the decoding sequences' ones, then all others as they come; the inverse of
    that.
    """
    each = s.arange(rows)
    passed = s.op("LessOrEqual", s.unsqueeze(last, 0), s.unsqueeze(each, 1))
    sequence = s.op("ReduceSum", s.cast(passed, "int64"), s.i64(1), keepdims=0)
    several = s.op("Greater", s.op("Gather", count, sequence), s.scalar(1))
    others = s.op("Squeeze", s.op("NonZero", several), s.i64(0))
    order = s.op("Concat", decoding_rows, others, axis=0)
    return s.op("ScatterElements", each, order, each, axis=0)


def describe(s: Scope, rows: str, query_start: str, context_len: str, block_table: str) -> Batch:
    """The groups of a batch. `rows`: T, rank 0; the others are the step's inputs, int32."""
    edges = s.cast(query_start, "int64")
    first, last = s.slice(edges, 0, 0, -1), s.slice(edges, 0, 1, 1 << 62)
    count = s.op("Sub", last, first)
    past = s.op("Sub", s.cast(context_len, "int64"), count)
    members, number, starts, stops = _decoding(s, count, past)
    sequence, offset = _prefilling(s, count)
    nothing = s.op("Mul", members, s.scalar(0))
    chunks = s.op("Squeeze", s.op("Shape", sequence), s.i64(0))
    single = s.op("Add", s.arange(chunks), number)
    all_starts = s.op("Concat", starts, single, axis=0)
    return Batch(
        first,
        count,
        past,
        s.cast(block_table, "int64"),
        s.op("Concat", members, sequence, axis=0),
        s.op("Concat", nothing, offset, axis=0),
        all_starts,
        s.op("Concat", stops, s.op("Add", single, s.scalar(1)), axis=0),
        s.op("Squeeze", s.op("Shape", all_starts), s.i64(0)),
        _inverse(s, rows, count, last, s.op("Gather", first, members)),
    )


def visible(s: Scope, queries: str, keys: str, causal: bool, window: int | None) -> str | None:
    """bool [b, t, S] from positions [b, t] and [b, S]; None where all is seen."""
    if not causal and window is None:
        return None
    distance = s.op("Sub", s.unsqueeze(queries, 2), s.unsqueeze(keys, 1))
    seen: str | None = None
    if window is not None:
        seen = s.op("Less", distance, s.scalar(window))
        if not causal:
            return s.op("And", seen, s.op("Greater", distance, s.scalar(-window)))
    ahead = s.op("GreaterOrEqual", distance, s.scalar(0))
    return ahead if seen is None else s.op("And", seen, ahead)


def additive(s: Scope, seen: str) -> str:
    """bool → float32: 0 where true, else -inf."""
    return s.op("Where", seen, s.scalar(0.0, "float32"), s.scalar(float("-inf"), "float32"))


@dataclass(frozen=True)
class Mask:
    """What layers must share to share a plan."""

    page_size: int
    kv_heads: int
    ratio: int  # query heads of a key head
    causal: bool
    window: int | None
    slopes: bool
    distances: bool


def _places(s: Scope, column: str, kv_heads: int) -> str:
    """[b, n] places along S → int64 [Hkv, b, n, 3] indices (head, sequence, place)."""
    shape = s.op("Concat", s.i64(kv_heads), s.op("Shape", column), axis=0)
    heads = s.constant([[[h]] for h in range(kv_heads)], "int64")
    sequences = s.arange(s.op("Squeeze", s.op("Shape", column, start=0, end=1), s.i64(0)))
    parts = [heads, s.unsqueeze(sequences, 1), column]
    return s.op("Concat", *[s.unsqueeze(s.op("Expand", x, shape), -1) for x in parts], axis=-1)


def _group(s: Scope, batch: Batch, group: str, m: Mask) -> list[str]:
    """`parts` of one group."""
    start, stop = (s.op("Gather", edges, group) for edges in (batch.starts, batch.stops))
    members = s.op("Slice", batch.order, s.unsqueeze(start, 0), s.unsqueeze(stop, 0))
    offset = s.op("Gather", batch.offset, start)
    count = s.op("Gather", batch.count, s.op("Gather", batch.order, start))
    queries = s.op("Min", s.op("Sub", count, offset), s.scalar(CHUNK))
    keys = (
        s.op("Add", offset, queries) if m.causal else count
    )  # new ones, from the sequence's first new token
    first = s.unsqueeze(s.op("Gather", batch.first, members), 1)
    past = s.unsqueeze(s.op("Gather", batch.past, members), 1)

    context = s.op("Add", past, keys)
    oldest = s.scalar(0)
    if m.window is not None:  # pages wholly before the window are not gathered
        oldest = s.op("Max", s.op("Sub", s.op("Add", past, offset), s.scalar(m.window - 1)), s.scalar(0))
    first_page = s.op("Div", oldest, s.scalar(m.page_size))
    width = s.op("ReduceMax", s.op("Sub", _div_up(s, context, m.page_size), first_page), keepdims=0)
    columns = s.op("Add", first_page, s.unsqueeze(s.arange(width), 0))
    table = s.op("Gather", batch.block_table, members)
    widest = s.op("Sub", s.op("Shape", table, start=1, end=2), s.scalar(1))
    wide = s.op("Expand", columns, s.op("Concat", s.op("Shape", members), s.i64(1), axis=0))
    pages = s.op("GatherElements", table, s.op("Min", wide, widest), axis=1)

    base = s.op("Mul", first_page, s.scalar(m.page_size))  # position of the first gathered key
    skipped = s.op("ReduceMax", s.op("Max", s.op("Sub", base, past), s.scalar(0)), keepdims=0)
    new_steps = s.op("Range", skipped, keys, s.scalar(1))
    steps = s.op("Add", offset, s.arange(queries))
    places = _places(s, s.op("Sub", s.op("Add", past, new_steps), base), m.kv_heads)
    along = s.unsqueeze(s.arange(s.op("Mul", width, s.scalar(m.page_size))), 0)
    key_positions = s.op("Add", base, along)
    exists = s.unsqueeze(s.op("Less", key_positions, context), 1)
    seen = visible(s, s.op("Add", past, steps), key_positions, m.causal, m.window)
    shape = s.op("Concat", s.i64(1), s.unsqueeze(queries, 0), s.i64(1), axis=0)
    mask = additive(s, s.op("Expand", exists, shape) if seen is None else s.op("And", seen, exists))
    # One query a sequence: the mask broadcasts over the heads by itself.
    repeat = s.op("Where", s.op("Equal", queries, s.scalar(1)), s.i64(1, 1, 1), s.i64(1, m.ratio, 1))
    found = [s.op("Add", first, steps), s.op("Add", first, new_steps), pages, places, repeat, mask]
    if m.slopes:
        found.append(s.cast(s.op("Sub", key_positions, context), "float32"))
    if m.distances:
        own = s.unsqueeze(s.op("Add", past, steps), 2)  # [b, t, 1]
        found.append(s.op("Sub", s.unsqueeze(key_positions, 1), own))
    return found


def make_plan(s: Scope, batch: Batch, m: Mask) -> Plan:
    """All groups: the first one, and the loop over the others. A step has at least one token."""
    first = _group(s, batch, s.scalar(0), m)
    others = s.op("Sub", batch.groups, s.scalar(1))
    kinds = [_KINDS[part] for part in parts(m.slopes, m.distances)]
    empty = [s.op("SequenceEmpty", dtype=kind) for kind in kinds]
    inner = Scope(s.names)
    step, more = s.names.fresh("step"), s.names.fresh("more")
    carried = [s.names.fresh("carried") for _ in kinds]
    made = _group(inner, batch, inner.op("Add", step, inner.scalar(1)), m)
    grown = [inner.op("SequenceInsert", c, p) for c, p in zip(carried, made, strict=True)]
    body = loop_body(inner, "plan", step, more, list(zip(carried, grown, kinds, strict=True)))
    rest = s.many("Loop", [others, None, *empty], len(kinds), body=body)
    return Plan(tuple(first), tuple(rest), others, batch.inverse)


def loop_body(
    inner: Scope, name: str, step: str, more: str, carried: list[tuple[str, str, int]]
) -> GraphProto:
    """The body of a `Loop` that grows sequences: (name before, name after, element type) of each."""
    again = inner.op("Identity", more)
    flag, number = TensorProto.BOOL, TensorProto.INT64
    ins = [helper.make_tensor_value_info(step, number, []), helper.make_tensor_value_info(more, flag, [])]
    outs = [helper.make_tensor_value_info(again, flag, [])]
    for before, after, kind in carried:
        ins.append(helper.make_tensor_sequence_value_info(before, kind, None))
        outs.append(helper.make_tensor_sequence_value_info(after, kind, None))
    return inner.body(ins, outs, name)
