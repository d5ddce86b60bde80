"""What every layer's paged attention needs to know about the batch, computed once a step.

A ragged batch is cut into groups of sequences with the same number t of query tokens, so that a group is
dense:

    sequences with one new token (decode)   up to 16 together, most context first, padded to the longest of
    them sequences with more (prefill)           one sequence and up to 128 of its tokens a group

A `Loop` over the groups makes, for each, the rows of the new tokens, the pages to gather and an additive
mask, and puts them into four ONNX sequences; the layers' own loops take them from there. Both limits bound
the memory of a layer's scores and gathered keys, however long the batch is.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnx import TensorProto, helper

from .builder import Scope

DECODE_GROUP = 16
DECODE_TOKENS = 8192  # padded context tokens of a group of decoding sequences
CHUNK = 128  # query tokens of a group of one prefilling sequence
_FAR = 1 << 40  # position of keys that nobody sees


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


@dataclass(frozen=True)
class Plan:
    """Names of the ONNX sequences with one tensor a group: b sequences, t queries, n new keys, p pages each.
    """

    query_rows: str  # int64 [b, t]
    key_rows: str  # int64 [b, n]
    pages: str  # int64 [b, p]
    mask: str  # float32 [b, 1, t, p · page_size + n]: 0 where the key is seen, else -inf
    groups: str
    inverse: str

    @property
    def names(self) -> list[str]:
        return [self.groups, self.query_rows, self.key_rows, self.pages, self.mask, self.inverse]


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


def visible(s: Scope, queries: str, keys: str, causal: bool, window: int | None) -> str:
    """bool [b, t, s] from positions [b, t] and [b, s]."""
    distance = s.op("Sub", s.unsqueeze(queries, 2), s.unsqueeze(keys, 1))
    least = 0 if causal else -(_FAR >> 1) if window is None else 1 - window
    seen = s.op("GreaterOrEqual", distance, s.scalar(least))
    return seen if window is None else s.op("And", seen, s.op("Less", distance, s.scalar(window)))


def _group(s: Scope, batch: Batch, group: str, page_size: int, causal: bool, window: int | None) -> list[str]:
    """query_rows, key_rows, pages and mask of one group (see `Plan`)."""
    start, stop = (s.op("Gather", edges, group) for edges in (batch.starts, batch.stops))
    members = s.op("Slice", batch.order, s.unsqueeze(start, 0), s.unsqueeze(stop, 0))
    offset = s.op("Gather", batch.offset, start)
    count = s.op("Gather", batch.count, s.op("Gather", batch.order, start))
    queries = s.op("Min", s.op("Sub", count, offset), s.scalar(CHUNK))
    new_keys = s.op("Add", offset, queries) if causal else count
    first = s.unsqueeze(s.op("Gather", batch.first, members), 1)
    past = s.unsqueeze(s.op("Gather", batch.past, members), 1)
    steps, new_steps = s.arange(queries), s.arange(new_keys)
    query_rows = s.op("Add", s.op("Add", first, offset), steps)
    key_rows = s.op("Add", first, new_steps)

    end = _div_up(s, past, page_size)
    columns_from = s.op("Mul", past, s.scalar(0))
    if window is not None:  # pages wholly before the window are not even gathered
        oldest = s.op("Sub", s.op("Add", past, offset), s.scalar(window - 1))
        columns_from = s.op("Div", s.op("Max", oldest, s.scalar(0)), s.scalar(page_size))
    width = s.op("Max", s.op("ReduceMax", s.op("Sub", end, columns_from), keepdims=0), s.scalar(0))
    columns = s.op("Add", columns_from, s.arange(width))
    table = s.op("Gather", batch.block_table, members)
    widest = s.op("Sub", s.op("Shape", table, start=1, end=2), s.scalar(1))
    pages = s.op("GatherElements", table, s.op("Min", columns, widest), axis=1)

    places = s.constant(list(range(page_size)), "int64")
    old = s.op("Add", s.unsqueeze(s.op("Mul", columns, s.scalar(page_size)), 2), places)
    old = s.reshape(old, 0, -1)
    old = s.op("Where", s.op("Less", old, past), old, s.scalar(_FAR))
    keys = s.op("Concat", old, s.op("Add", past, new_steps), axis=1)
    seen = visible(s, s.op("Add", s.op("Add", past, offset), steps), keys, causal, window)
    mask = s.op("Where", seen, s.scalar(0.0, "float32"), s.scalar(float("-inf"), "float32"))
    return [query_rows, key_rows, pages, s.unsqueeze(mask, 1)]


def make_plan(s: Scope, batch: Batch, page_size: int, causal: bool, window: int | None) -> Plan:
    """The loop over the groups, for layers that share `causal` and `window`."""
    kinds = [TensorProto.INT64] * 3 + [TensorProto.FLOAT]
    empty = [s.op("SequenceEmpty", dtype=kind) for kind in kinds]
    inner = Scope(s.names)
    group, more = s.names.fresh("group"), s.names.fresh("more")
    carried = [s.names.fresh("carried") for _ in kinds]
    parts = _group(inner, batch, group, page_size, causal, window)
    grown = [inner.op("SequenceInsert", c, p) for c, p in zip(carried, parts, strict=True)]
    again = inner.op("Identity", more)
    body = inner.body(
        [
            helper.make_tensor_value_info(group, TensorProto.INT64, []),
            helper.make_tensor_value_info(more, TensorProto.BOOL, []),
            *(
                helper.make_tensor_sequence_value_info(n, k, None)
                for n, k in zip(carried, kinds, strict=True)
            ),
        ],
        [
            helper.make_tensor_value_info(again, TensorProto.BOOL, []),
            *(helper.make_tensor_sequence_value_info(n, k, None) for n, k in zip(grown, kinds, strict=True)),
        ],
        "plan",
    )
    filled = s.many("Loop", [batch.groups, None, *empty], 4, body=body)
    query_rows, key_rows, pages, mask = filled
    return Plan(query_rows, key_rows, pages, mask, batch.groups, batch.inverse)
