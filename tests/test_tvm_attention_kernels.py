"""TIR kernels of `tvm-cpu` against the reference meanings of their ops: elementwise, cache, attention."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from llmc.codegen.tvm.kernels.attention import make_paged_attention
from llmc.codegen.tvm.kernels.cache import make_append_kv, to_logical, to_physical
from llmc.codegen.tvm.kernels.elementwise import make_activation, make_gated_mlp, make_rope
from llmc.codegen.tvm.kernels.isa import get_isa
from llmc.codegen.tvm.kernels.layout import pack_rows
from llmc.codegen.tvm.kernels.linear import make_linear
from llmc.codegen.tvm.kernels.norms import make_layer_norm, make_rms_norm
from llmc.ir.dtypes import to_numpy
from llmc.ir.ops import attention, nn
from llmc.ir.ops import cache as cache_ops

from .attention_biases import WIDTH as DISTANCES
from .attention_biases import distance_table
from .conftest import LONG
from .kernel_harness import (
    HERE,
    blank,
    call,
    close,
    meaning,
    normal,
    tile_cases,
    tile_levels,
    value,
    vector_cases,
    vector_levels,
)

# Elementwise


@pytest.mark.parametrize("width", [1, 8, 16, 20, 576])
@pytest.mark.parametrize("rows", [1, 70])
@vector_levels
def test_norms_equal_their_references(width: int, rows: int, isa: str) -> None:
    x, w, b = normal(rows, width) * 5 + 1, normal(width, seed=1), normal(width, seed=2)
    out = call(make_rms_norm, isa, {"width": width, "eps": 1e-5}, x, w, blank(rows, width))
    close(out, meaning(nn.RmsNorm(value(x), value(w), eps=1e-5), x, w), 1e-6)
    plain = call(make_rms_norm, isa, {"width": width, "eps": 1e-5, "weight": False}, x, blank(rows, width))
    close(plain, meaning(nn.RmsNorm(value(x), None, eps=1e-5), x, None), 1e-6)
    out = call(make_layer_norm, isa, {"width": width, "eps": 1e-3}, x, w, b, blank(rows, width))
    close(out, meaning(nn.LayerNorm(value(x), value(w), value(b), eps=1e-3), x, w, b), 2e-6)
    one = call(make_layer_norm, isa, {"width": width, "eps": 1e-3}, x[-1:], w, b, blank(1, width))
    assert np.array_equal(one, out[-1:])


@vector_levels
def test_rms_norm_of_heads_reads_them_where_they_stand(isa: str) -> None:
    merged, w = normal(9, 100), normal(12, seed=1)
    x = np.ascontiguousarray(merged[:, 20 : 20 + 36].reshape(9, 3, 12))
    expected = meaning(nn.RmsNorm(value(x), value(w), eps=1e-6), x, w)
    parameters = {"width": 12, "eps": 1e-6, "heads": 3}
    own = call(make_rms_norm, isa, parameters, x, w, blank(9, 3, 12))
    within = call(make_rms_norm, isa, parameters | {"source": (100, 20)}, merged, w, blank(9, 3, 12))
    close(own, expected, 1e-6)
    assert np.array_equal(own, within)


@pytest.mark.parametrize(("dim", "rotary"), [(64, 64), (8, 8), (40, 40), (64, 32), (20, 8), (80, 36)])
@pytest.mark.parametrize("interleaved", [False, True])
@vector_levels
def test_rope_turns_pairs(dim: int, rotary: int, interleaved: bool, isa: str) -> None:
    merged = normal(21, 7 + 3 * dim)
    x = np.ascontiguousarray(merged[:, 7:].reshape(21, 3, dim))
    angle = normal(21, rotary, seed=1)
    cos, sin = np.cos(angle), np.sin(angle)
    parameters = {"heads": 3, "head_dim": dim, "rotary_dim": rotary, "interleaved": interleaved}
    out = call(make_rope, isa, parameters, x, cos, sin, blank(21, 3, dim))
    op = nn.Rope(value(x), value(cos), value(sin), interleaved=interleaved)
    close(out, meaning(op, x, cos, sin), 1e-6)
    source = {"source": (7 + 3 * dim, 7)}
    assert np.array_equal(
        out[-1:],
        call(make_rope, isa, parameters | source, merged[-1:], cos[-1:], sin[-1:], blank(1, 3, dim)),
    )


@pytest.mark.parametrize("activation", nn.ACTIVATIONS)
@vector_levels
def test_activations_are_accurate_to_a_millionth(activation: str, isa: str) -> None:
    # Around 0, through the tails, and values at which an exponential overflows.
    line = np.concatenate([np.linspace(-12, 12, 4001), np.logspace(-6, 0, 50), [-80, 80, -300, 300, 0, 4e9]])
    x = line.astype(np.float32)[None, :]
    out = call(make_activation, isa, {"width": x.shape[1], "activation": activation}, x, blank(*x.shape))
    exact = nn.activate(activation, torch.from_numpy(x).double()).numpy()
    if activation == "gelu":  # torch's own formula cancels for x ≪ 0, in double as well
        exact = np.array([[v * 0.5 * math.erfc(-v / math.sqrt(2)) for v in x[0].tolist()]])
    # Far out on the left side of gelu the argument of exp is large, and its rounding with it: there in
    # absolute terms.
    assert np.all(np.abs(out - exact) <= 1e-6 * np.abs(exact) + 1e-9)
    nan = call(make_activation, isa, {"width": 3, "activation": activation}, blank(1, 3), blank(1, 3))
    assert np.isnan(nan).all() or activation == "relu"


@pytest.mark.parametrize("width", [1, 8, 17, 64])
@pytest.mark.parametrize("activation", nn.ACTIVATIONS)
@vector_levels
def test_gated_mlp_equals_its_reference(width: int, activation: str, isa: str) -> None:
    x = normal(31, 2 * width) * 3
    parameters = {"width": width, "activation": activation}
    out = call(make_gated_mlp, isa, parameters, x, blank(31, width))
    close(out, meaning(nn.GatedMlp(value(x), activation=activation), x), 1e-6)
    assert np.array_equal(call(make_gated_mlp, isa, parameters, x[30:], blank(1, width)), out[30:])


# Cache and attention


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("dim", [8, 16, 24, 64])
@vector_levels
def test_append_kv_writes_slots_and_nothing_else(dtype: str, dim: int, isa: str) -> None:
    merged = normal(6, 2 * 2 * dim + 3)
    merged[0, :8] = [1e-8, 6e-8, 3e-5, -1e-6, 65519, 65520, np.inf, -np.nan]  # edges of float16
    k, v = (np.ascontiguousarray(merged[:, s : s + 2 * dim].reshape(6, 2, dim)) for s in (0, 2 * dim + 3))
    slots = np.array([0, 17, 31, 79, 64, 5], np.int32)
    before = to_physical(normal(2, 5, 16, 2, dim, seed=1).astype(to_numpy(dtype)))
    parameters = {"kv_heads": 2, "head_dim": dim, "kv_dtype": dtype}
    after = call(make_append_kv, isa, parameters, k, v, slots, before)
    logical = to_logical(before)
    assert np.array_equal(to_physical(logical), before)
    op = cache_ops.AppendKv(value(k), value(v), value(logical), value(slots))
    with np.errstate(over="ignore"):
        expected = meaning(op, k, v, logical, slots)
    assert np.array_equal(to_logical(after), expected, equal_nan=True)
    sources = {"k_source": (merged.shape[1], 0), "v_source": (merged.shape[1], 2 * dim + 3)}
    skipped = np.where(np.arange(6) == 2, -1, slots).astype(np.int32)
    within = call(make_append_kv, isa, parameters | sources, merged, merged, skipped, before)
    expected[:, 1, 15] = logical[:, 1, 15]
    assert np.array_equal(to_logical(within), expected, equal_nan=True)


@pytest.mark.parametrize("dim", [32, 64, 80, 96])
@vector_levels
def test_append_kv_of_whole_pages(dim: int, isa: str) -> None:
    full = np.arange(16)
    backward, holed, late = 96 + full[::-1], np.where(full == 4, -1, 112 + full), 128 + np.roll(full, 1)
    runs = [np.arange(5, 16), 16 + full, 48 + full, [2], backward, holed, late, 144 + full, 160 + full[:9]]
    slots = np.concatenate(runs).astype(np.int32)
    k, v = normal(len(slots), 2, dim), normal(len(slots), 2, dim, seed=1)
    k[13, 0, :4] = [np.inf, -np.nan, 1e-40, -0.0]
    before = to_physical(normal(2, 11, 16, 2, dim, seed=2).astype(to_numpy("bfloat16")))
    parameters = {"kv_heads": 2, "head_dim": dim, "kv_dtype": "bfloat16"}
    after = call(make_append_kv, isa, parameters, k, v, slots, before)
    logical = to_logical(before)
    op = cache_ops.AppendKv(value(k), value(v), value(logical), value(slots))
    expected = meaning(op, k, v, logical, slots)
    expected[:, 10, 15] = logical[:, 10, 15]  # slot -1: none
    assert np.array_equal(to_logical(after), expected, equal_nan=True)
    merged = np.concatenate([x.reshape(len(slots), -1) for x in (k, normal(len(slots), 5), v)], axis=1)
    sources = {"k_source": (merged.shape[1], 0), "v_source": (merged.shape[1], 2 * dim + 5)}
    for rows in (len(slots), 27):  # by several threads and by one
        given = (merged[:rows], merged[:rows], slots[:rows], before)
        within = call(make_append_kv, isa, parameters | sources, *given)
        some = call(make_append_kv, isa, parameters, k[:rows], v[:rows], *given[2:])
        assert np.array_equal(within, some, equal_nan=True)
        assert rows < len(slots) or np.array_equal(within, after, equal_nan=True)


@vector_levels
def test_numbers_of_8_bits_are_written_and_read_as_ml_dtypes_has_them(isa: str) -> None:
    float8 = to_numpy("float8_e4m3fn")
    codes = np.arange(256, dtype=np.uint8).view(float8)
    exact = np.sort(codes[:127].astype(np.float32))
    middles = (exact[1:] + exact[:-1]) / 2  # ties
    one_more = (np.nextafter(middles, np.float32(side)) for side in (0, np.inf))
    some = np.concatenate([exact, middles, *one_more, [464, 1e30, np.inf, 1e-40, np.nan]]).astype(np.float32)
    merged = np.concatenate([some, -some, np.zeros(-2 * len(some) % 64, np.float32)]).reshape(-1, 1, 64)
    slots = np.arange(len(merged), dtype=np.int32)
    blank_pages = np.zeros((2, 2, 1, 16, 64), np.uint8).view(float8)
    parameters = {"kv_heads": 1, "head_dim": 64, "kv_dtype": "float8_e4m3fn"}
    after = to_logical(call(make_append_kv, isa, parameters, merged, merged, slots, blank_pages))
    with np.errstate(over="ignore"):
        # ml_dtypes goes from 464 on to NaN.
        wanted = np.clip(merged, -448, 448).astype(float8)
    for written in after.reshape(2, -1, 1, 64):
        assert np.array_equal(written[: len(merged)], wanted, equal_nan=True)
    # A sequence of one token has its value as the result.
    pages = np.zeros((2, 4, 16, 1, 64), float8)
    pages[1, :, 0, 0] = codes.reshape(4, 64)
    read = call(
        make_paged_attention,
        isa,
        parameters | {"heads": 1, "scale": 1.0},
        np.ones((4, 1, 64), np.float32),
        to_physical(pages),
        np.arange(5, dtype=np.int32),
        np.ones(4, np.int32),
        np.arange(4, dtype=np.int32)[:, None],
        blank(4, 1, 64),
    )
    assert np.array_equal(read.reshape(-1), codes.astype(np.float32), equal_nan=True)


class Batch:
    """Sequences of (context length, new tokens) over shuffled pages; what no token has written is NaN."""

    def __init__(
        self, lengths: list[tuple[int, int]], heads: int, kv_heads: int, dim: int, dtype: str
    ) -> None:
        rng = np.random.default_rng(1)
        self.lengths = lengths
        pages = [-(-n // 16) for n, _ in lengths]
        order = rng.permutation(sum(pages)).astype(np.int32)
        self.table = np.zeros((len(lengths), max(pages) + 1), np.int32)
        kind = to_numpy(dtype)
        self.logical = np.full((2, sum(pages) + 1, 16, kv_heads, dim), np.nan, kind)
        used = 0
        for b, (n, _) in enumerate(lengths):
            own = order[used : used + pages[b]]
            used += pages[b]
            self.table[b, : pages[b]] = own
            flat = np.full((2, pages[b] * 16, kv_heads, dim), np.nan, kind)
            flat[:, :n] = rng.standard_normal((2, n, kv_heads, dim)).astype(kind)
            self.logical[:, own] = flat.reshape(2, pages[b], 16, kv_heads, dim)
        self.pages = to_physical(self.logical)
        self.start = np.cumsum([0] + [new for _, new in lengths]).astype(np.int32)
        self.context = np.array([n for n, _ in lengths], np.int32)
        self.q = rng.standard_normal((int(self.start[-1]), heads, dim)).astype(np.float32)
        self.sinks = rng.standard_normal(heads).astype(np.float32)


LENGTHS = [(1, 1), (40, 40), (16, 1), (33, 5), (5, 0), (64, 30), (17, 1), (48, 2)]
ATTENTION = [  # heads, kv_heads, head_dim, options
    (9, 3, 64, {}),
    (4, 4, 16, {}),
    (4, 1, 8, {}),
    (14, 2, 24, {"window": 7}),
    (2, 1, 80, {"window": 16, "softcap": 5.0}),
    (4, 2, 256, {"softcap": 30.0}),
    (8, 2, 16, {"sinks": True, "window": 1}),
    (3, 3, 32, {"causal": False}),
    (6, 2, 12, {"causal": False, "window": 9, "sinks": True}),
    (13, 1, 16, {}),
    (6, 3, 16, {"slopes": True}),
    (5, 5, 20, {"slopes": True, "window": 9, "softcap": 5.0}),
    (6, 3, 16, {"distances": DISTANCES, "causal": False}),
    (4, 4, 20, {"distances": DISTANCES, "softcap": 5.0}),
]


def attend(
    isa: str, batch: Batch, options: dict[str, Any], pick: tuple[int, int, int] | None = None
) -> np.ndarray:
    """The kernel on a whole batch, or on new rows [start, stop) of sequence b alone, as a chunk of its
    prompt.
    """
    heads, dim = batch.q.shape[1:]
    parameters = {"heads": heads, "kv_heads": batch.logical.shape[3], "head_dim": dim, "scale": 0.3}
    parameters |= {"kv_dtype": str(batch.logical.dtype)} | options
    q, start, context, table = batch.q, batch.start, batch.context, batch.table
    if pick is not None:
        b, first, stop = pick
        q = q[start[b] + first : start[b] + stop]
        left = batch.lengths[b][1] - stop
        start, context, table = (
            np.array([0, stop - first], np.int32),
            context[[b]] - np.int32(left),
            table[[b]],
        )
    sinks = [batch.sinks] if options.get("sinks") or options.get("slopes") else []
    sinks += [distance_table(heads)] if options.get("distances") else []
    return call(
        make_paged_attention, isa, parameters, q, batch.pages, start, context, table, *sinks, blank(*q.shape)
    )


def check_attention(
    isa: str, lengths: list[tuple[int, int]], case: Any, dtype: str, chunks: tuple[tuple[int, int, int], ...]
) -> None:
    """A batch against the reference; sequences alone, and chunks (sequence, start, stop), bit for bit.

    Where pairs of bfloat16 are multiplied, queries and weights are such: the reference is given such queries,
    and each weight is off by 2^-9 of itself at most.
    """
    heads, kv_heads, dim, options = case
    batch = Batch(lengths, heads, kv_heads, dim, dtype)
    whole = attend(isa, batch, options)
    fields = {key: v for key, v in options.items() if key not in ("sinks", "slopes", "distances")}
    arrays = (batch.q, batch.logical, batch.start, batch.context, batch.table)
    per_head = [batch.sinks if options.get(name) else None for name in ("sinks", "slopes")]
    per_head.append(distance_table(heads) if options.get("distances") else None)
    operands = [None if x is None else value(x) for x in per_head]
    op = cache_ops.PagedAttention(*map(value, arrays), *operands, scale=0.3, **fields)
    tolerance, level = 5e-6, get_isa(isa)
    in_tiles = level.tiles and dim % 32 == 0 and not (options.get("slopes") or options.get("distances"))
    if dtype == "bfloat16" and (in_tiles or (level.bfloat and dim % 16 == 0)):
        factor = np.float32(0.3 / options["softcap"] if "softcap" in options else 0.3 * math.log2(math.e))
        rounded = (batch.q * factor).astype(to_numpy("bfloat16")).astype(np.float32) / factor
        arrays, tolerance = (rounded, *arrays[1:]), 2**-9
    close(whole, meaning(op, *arrays, *per_head), tolerance)
    alone = [(b, 0, new) for b, (_, new) in enumerate(lengths) if new]
    for b, start, stop in (*alone, *(chunks if options.get("causal", True) else ())):
        first = batch.start[b]
        part = attend(isa, batch, options, (b, start, stop))
        assert np.array_equal(part, whole[first + start : first + stop])


@pytest.mark.parametrize("case", [(14, 2, 24, {}), (7, 1, 16, {"window": 40})], ids=str)
@vector_levels
def test_a_batch_of_single_rows_equals_its_reference_and_each_row_alone(case: Any, isa: str) -> None:
    lengths = [(1 + 7 * i % 90, 1) for i in range(20)]
    check_attention(isa, lengths, case, "bfloat16", ())


# Pages of float16 and of float8 are loaded by one function each: some of the cases are enough for it.
@vector_cases(
    "case,dtype",
    [
        *((c, "float32") for c in ATTENTION),
        *((c, "float16") for c in ATTENTION[:: 2 if LONG else 4]),
        *((c, "float8_e4m3fn") for c in (ATTENTION[0], ATTENTION[3], ATTENTION[8])),
    ],
)
def test_paged_attention_equals_its_reference_alone_in_a_batch_and_in_chunks(
    case: Any, dtype: str, isa: str
) -> None:
    check_attention(isa, LENGTHS, case, dtype, ((5, 0, 1), (5, 29, 30), (5, 3, 20), (5, 7, 30)))


IN_TILES = [  # heads that fill tiles, and those that fall back to vectors
    (9, 3, 64, {}),
    (14, 2, 64, {"window": 7}),
    (4, 2, 256, {"softcap": 30.0}),
    (3, 3, 32, {"causal": False}),
    (8, 1, 96, {"sinks": True, "window": 40}),
    (34, 2, 64, {"causal": False, "window": 9, "sinks": True}),
    (6, 2, 64, {"window": 30, "softcap": 20.0, "sinks": True}),
    (2, 1, 80, {}),
    (4, 4, 18, {"softcap": 5.0}),
    (4, 2, 64, {"slopes": True}),
    (4, 2, 64, {"distances": DISTANCES, "causal": False}),
]


@tile_cases("case", IN_TILES if LONG or "amx" in HERE else IN_TILES[::2])
def test_attention_over_pairs_of_bfloat16(case: Any, isa: str) -> None:
    chunks = ((5, 0, 1), (5, 29, 30), (5, 3, 20), (5, 7, 30), (8, 0, 1), (8, 5, 100))
    check_attention(isa, [*LENGTHS, (150, 101)], case, "bfloat16", chunks)


@tile_levels
def test_a_score_of_minus_infinity_has_no_weight(isa: str) -> None:
    batch = Batch([(40, 40), (70, 1)], 6, 2, 64, "bfloat16")
    batch.q = np.abs(batch.q)
    keys = batch.logical[0, batch.table[:, 0], 3]
    batch.logical[0, batch.table[:, 0], 3] = np.full_like(keys, -3e38)
    batch.pages = to_physical(batch.logical)
    out, own = attend(isa, batch, {}), attend(isa, batch, {}, (0, 39, 40))
    batch.logical[0, batch.table[:, 0], 3] = np.full_like(keys, -1e4)
    batch.pages = to_physical(batch.logical)
    assert np.array_equal(out, attend(isa, batch, {})) and np.isfinite(out).all()
    assert np.array_equal(own[0], out[39])


@pytest.mark.parametrize("case", [(6, 2, 64, {}), (2, 1, 32, {"window": 520, "sinks": True})], ids=str)
@tile_levels
def test_long_contexts_of_bfloat16_by_rows_and_by_segments(case: Any, isa: str) -> None:
    lengths = [(512, 1), (513, 2), (1100, 30), (3, 3), (1030, 9)]
    check_attention(isa, lengths, case, "bfloat16", ((2, 0, 1), (2, 5, 20), (2, 4, 30), (4, 8, 9)))


@pytest.mark.parametrize(
    "case",
    [
        (6, 2, 16, {}),
        (2, 1, 24, {"window": 520, "sinks": True}),
        (2, 2, 8, {"causal": False, "window": 300, "softcap": 4.0}),
    ],
    ids=str,
)
@vector_levels
def test_long_contexts_are_the_same_by_rows_and_by_segments(case: Any, isa: str) -> None:
    """Few rows are computed segment by segment in parallel, many rows are not."""
    lengths = [(512, 1), (513, 2), (1100, 30), (3, 3), (1030, 9)]
    check_attention(isa, lengths, case, "float32", ((2, 0, 1), (2, 5, 20), (2, 4, 30), (4, 8, 9)))


@vector_levels
def test_a_step_may_hold_no_tokens(isa: str) -> None:
    batch = Batch([(20, 0), (40, 0)], 4, 2, 16, "float32")
    assert attend(isa, batch, {}).shape == (0, 4, 16)
    empty = np.zeros((0, 16), np.float32)
    assert call(make_rms_norm, isa, {"width": 16, "eps": 1e-5}, empty, blank(16), empty).shape == (0, 16)
    parameters = {"n": 16, "k": 16}
    assert call(make_linear, isa, parameters, empty, pack_rows(normal(16, 16)), empty).shape == (0, 16)


def test_attend_of_the_ir_agrees_on_what_a_window_is() -> None:
    """The test above relies on it: window 1 sees the token itself only, so that the result is its value."""
    x = torch.from_numpy(normal(5, 1, 8))
    steps = torch.arange(5)
    out = attention.attend(x, x, x, None, (steps, steps), scale=1.0, causal=True, window=1, softcap=None)
    assert torch.allclose(out, x)
