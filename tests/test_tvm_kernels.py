"""TIR kernels of `tvm-cpu` against the reference meanings of their ops, on every instruction-set level of this machine."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from llmc.codegen.tvm.kernels.activation import make_quantize_activation, reference_quantize_activation
from llmc.codegen.tvm.kernels.attention import make_paged_attention
from llmc.codegen.tvm.kernels.cache import make_append_kv, to_logical, to_physical
from llmc.codegen.tvm.kernels.elementwise import make_activation, make_gated_mlp, make_rope
from llmc.codegen.tvm.kernels.gather import make_embedding, make_gather_last, make_quantized_embedding
from llmc.codegen.tvm.kernels.isa import LEVELS, get_isa
from llmc.codegen.tvm.kernels.layout import QuantLayout, pack_rows, unpack_rows
from llmc.codegen.tvm.kernels.linear import make_linear
from llmc.codegen.tvm.kernels.norms import make_layer_norm, make_rms_norm
from llmc.codegen.tvm.kernels.quantized import make_quantized_linear, reference_quantized_linear
from llmc.ir.core import Value
from llmc.ir.errors import CompileError, InputError
from llmc.ir.ops import attention, cache as cache_ops, nn, quant
from llmc.ir.types import Quantization, TensorType
from llmc.runtime import cpu

tvm = pytest.importorskip("tvm")

HERE = cpu.supported_isas()


def _marks(name: str) -> list[Any]:
    """Levels between the least and the best that this CPU runs are left to the slow tests: compiling takes the time."""
    absent = pytest.mark.skipif(name not in HERE, reason=f"this CPU does not run {name}")
    return [absent] if name in (HERE[0], HERE[-1]) else [absent, pytest.mark.slow]


levels = pytest.mark.parametrize("isa", [pytest.param(name, marks=_marks(name)) for name in LEVELS])


def compiled(function: Any, isa: str) -> Any:
    target = tvm.target.Target(get_isa(isa).target)
    with tvm.transform.PassContext(disabled_pass=["s_tir.CompactBufferAllocation"]):
        return tvm.compile(tvm.IRModule({"f": function.with_attr("global_symbol", "f")}), target=target)


@cache
def _build(maker: Callable[..., Any], isa: str, parameters: tuple[tuple[str, Any], ...]) -> Any:
    return compiled(maker(**dict(parameters), isa=isa), isa)["f"]


def call(
    maker: Callable[..., Any], isa: str, parameters: dict[str, Any], *arrays: np.ndarray, outputs: int = 1
) -> Any:
    """Run a kernel; its last `outputs` arrays are written and returned."""
    tensors = [tvm.runtime.tensor(np.ascontiguousarray(a)) for a in arrays]
    _build(maker, isa, tuple(sorted(parameters.items())))(*tensors)
    results = [t.numpy() for t in tensors[-outputs:]]
    return results[0] if outputs == 1 else results


def value(array: np.ndarray, quantization: Quantization | None = None) -> Value:
    return Value(TensorType(str(array.dtype), array.shape, quantization))


def meaning(op: Any, *arrays: np.ndarray | None) -> np.ndarray:
    """The op's reference on numpy arrays."""
    return op.reference({}, *(None if a is None else torch.from_numpy(a) for a in arrays)).numpy()


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def blank(*shape: int) -> np.ndarray:
    """An output that a kernel must overwrite."""
    return np.full(shape, np.nan, np.float32)


def close(actual: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """|difference| ≤ tolerance · largest |expected|."""
    scale = max(float(np.abs(expected).max(initial=0)), 1e-30)
    worst = float(np.abs(actual.astype(np.float64) - expected).max(initial=0))
    assert worst <= tolerance * scale, f"off by {worst / scale:.2e} of the largest value"


# Weights: float


@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 5), (16, 33), (40, 24), (48, 16), (96, 70)])
@pytest.mark.parametrize("extras", [False, True])
@levels
def test_linear_equals_its_reference_and_rows_do_not_depend_on_their_number(
    n: int, k: int, extras: bool, isa: str
) -> None:
    x, w, b, r = normal(29, k), normal(n, k, seed=1), normal(n, seed=2), normal(29, n, seed=3)
    parameters = {"n": n, "k": k, "bias": extras, "residual": extras}

    def run(rows: slice) -> np.ndarray:
        more = [b, r[rows]] if extras else []
        part = x[rows]
        return call(make_linear, isa, parameters, part, pack_rows(w), *more, blank(len(part), n))

    whole = run(slice(0, 29))
    expected = meaning(nn.Linear(value(x), value(w), value(b)), x, w, b if extras else None)
    close(whole, expected + r if extras else expected, 2e-6 * math.sqrt(k))
    for start, stop in ((0, 1), (28, 29), (3, 5), (3, 10), (1, 14)):
        assert np.array_equal(run(slice(start, stop)), whole[start:stop])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@levels
def test_linear_widens_half_precision_weights_exactly(dtype: str, isa: str) -> None:
    import ml_dtypes

    kind = np.dtype(np.float16) if dtype == "float16" else np.dtype(ml_dtypes.bfloat16)
    x, w = normal(3, 24), normal(20, 24, seed=1).astype(kind)
    narrow = call(
        make_linear, isa, {"n": 20, "k": 24, "weight_dtype": dtype}, x, pack_rows(w), blank(3, 20)
    )
    wide = call(
        make_linear, isa, {"n": 20, "k": 24}, x, pack_rows(w.astype(np.float32)), blank(3, 20)
    )
    assert np.array_equal(narrow, wide)


def test_float_layout_is_undone_and_may_be_packed_in_chunks() -> None:
    w = normal(40, 9)
    packed = pack_rows(w)
    assert packed.shape == (3, 9, 16) and np.array_equal(unpack_rows(packed, 40), w)
    assert np.array_equal(np.concatenate([pack_rows(w[:32]), pack_rows(w[32:])]), packed)
    assert packed[1, 4, 3] == w[19, 4] and not packed[2, :, 8:].any()


# Weights: quantized


QUANTIZED = [  # n, k, bits, group_size, zero_point
    (40, 64, 4, 32, False),
    (33, 64, 4, 32, True),
    (16, 128, 4, 64, True),
    (48, 72, 4, 24, True),
    (7, 50, 4, 16, False),  # the last group of a row is short
    (24, 20, 4, 12, True),  # a group that 8 does not divide
    (40, 64, 8, 64, False),
    (20, 96, 8, 32, True),
    (17, 600, 8, 600, True),  # sums beyond 2^24: corrected in integers
    (5, 9, 8, 128, False),  # a group longer than the row
    (64, 512, 4, 512, False),
]


def quantized_weight(n: int, k: int, bits: int, group: int, zero: bool) -> tuple[QuantLayout, Any, Any, Any]:
    rng = np.random.default_rng(n + k)
    layout = QuantLayout(n, k, bits, group)
    q = rng.integers(0, 1 << bits, (n, k), dtype=np.uint8)
    q[0], q[-1] = 0, (1 << bits) - 1
    scale = (0.001 + 0.01 * rng.random((n, layout.groups))).astype(np.float16)
    zeros = rng.integers(0, 1 << bits, (n, layout.groups), dtype=np.uint8) if zero else None
    return layout, q, scale, zeros


@pytest.mark.parametrize("case", QUANTIZED)
def test_quantized_layout_is_undone_and_may_be_packed_in_chunks(case: Any) -> None:
    layout, q, scale, _ = quantized_weight(*case)
    packed = layout.pack(q)
    assert packed.shape == layout.weight_shape and np.array_equal(layout.unpack(packed), q)
    if len(q) > 16:
        assert np.array_equal(np.concatenate([layout.pack(q[:16]), layout.pack(q[16:])]), packed)
    groups = layout.pack_groups(scale)
    assert groups.shape == layout.scale_shape and groups[0, 0, 1] == scale[1, 0]


@pytest.mark.parametrize(("k", "group"), [(64, 32), (576, 576), (50, 16), (20, 12), (9, 128), (1, 8), (48, 16)])
@pytest.mark.parametrize("rows", [1, 300])
@levels
def test_quantize_activation_rounds_to_even_exactly(k: int, group: int, rows: int, isa: str) -> None:
    x = normal(rows, k) * np.float32(3)
    x[0, -1] = 127 * 2  # a scale of 2: odd elements below lie halfway between integers
    x[0, : k - 1] = np.clip(np.arange(k - 1) - k // 2, -253, 253)
    x[-1] = 0 if rows > 1 else x[-1]
    layout = QuantLayout(1, k, 8, group)
    outputs = (
        np.full((rows, layout.k_padded), 99, np.int8),
        np.full((rows, layout.groups), 99, np.int32),
        blank(rows),
    )
    got = call(make_quantize_activation, isa, {"k": k, "group_size": group}, x, *outputs, outputs=3)
    for actual, expected in zip(got, reference_quantize_activation(x, group), strict=True):
        assert np.array_equal(actual, expected)


@levels
def test_quantize_activation_survives_what_is_no_number(isa: str) -> None:
    x = normal(4, 40)
    x[1, 35], x[2, 3], x[3] = np.nan, np.inf, 1e-42
    outputs = (np.zeros((4, 48), np.int8), np.zeros((4, 3), np.int32), blank(4))
    a, sums, scale = call(
        make_quantize_activation, isa, {"k": 40, "group_size": 16}, x, *outputs, outputs=3
    )
    assert np.isnan(scale[1]) and np.isinf(scale[2]) and np.isfinite(scale[[0, 3]]).all()
    assert np.array_equal(a.reshape(4, 3, 16).sum(2, dtype=np.int32), sums)


def run_quantized(isa: str, case: Any, x: np.ndarray, extras: tuple[np.ndarray, ...] = ()) -> np.ndarray:
    n, k, bits, group, zero = case
    layout, q, scale, zeros = quantized_weight(*case)
    a, sums, a_scale = reference_quantize_activation(x, group)
    operands = [layout.pack(q), layout.pack_groups(scale)]
    operands += [layout.pack_groups(zeros)] if zero else []
    parameters = {"n": n, "k": k, "bits": bits, "group_size": group, "zero_point": zero}
    parameters |= {"bias": bool(extras), "residual": bool(extras)}
    out = blank(len(x), n)
    return call(make_quantized_linear, isa, parameters, a, sums, a_scale, *operands, *extras, out)


@pytest.mark.parametrize("case", QUANTIZED)
@levels
def test_quantized_linear_is_exact_in_integers_and_rows_do_not_depend_on_their_number(
    case: Any, isa: str
) -> None:
    n, k, bits, group, zero = case
    layout, q, scale, zeros = quantized_weight(*case)
    x = normal(27, k)
    x[4] = 0
    a, sums, a_scale = reference_quantize_activation(x, group)
    whole = run_quantized(isa, case, x)
    close(whole, reference_quantized_linear(layout, a, sums, a_scale, q, scale, zeros), 1e-6)
    assert not whole[4].any()
    for start, stop in ((0, 1), (26, 27), (5, 7), (2, 9), (3, 11), (8, 27)):
        assert np.array_equal(run_quantized(isa, case, x[start:stop]), whole[start:stop])
    # The op's own meaning takes x in float: what remains is the rounding of x to 8 bits.
    kind = Quantization(bits, group, not zero)
    op = quant.QuantizedLinear(
        value(x), value(q, kind), value(scale), value(zeros) if zero else None, None
    )
    close(whole, meaning(op, x, q, scale, zeros, None), 0.02)
    bias, residual = normal(n, seed=5), normal(27, n, seed=6)
    assert np.array_equal(run_quantized(isa, case, x, (bias, residual)), whole + bias + residual)


@pytest.mark.parametrize("case", QUANTIZED[:9])
def test_quantized_linear_gives_the_same_bits_on_all_levels_with_fma(case: Any) -> None:
    names = [name for name in HERE if get_isa(name).fma]
    if len(names) < 2:
        pytest.skip("this CPU runs fewer than two levels with FMA")
    x = normal(9, case[1])
    first = run_quantized(names[0], case, x)
    for name in names[1:]:
        assert np.array_equal(run_quantized(name, case, x), first)


@pytest.mark.parametrize("case", QUANTIZED)
@levels
def test_quantized_embedding_reads_rows_of_the_packed_table(case: Any, isa: str) -> None:
    n, k, bits, group, zero = case
    layout, q, scale, zeros = quantized_weight(*case)
    ids = np.array([0, n - 1, n // 2, 0, *range(n)], np.int32)
    tables = [layout.pack(q), layout.pack_groups(scale), *([layout.pack_groups(zeros)] if zero else [])]
    parameters = {"rows": n, "width": k, "bits": bits, "group_size": group, "zero_point": zero}
    out = call(make_quantized_embedding, isa, parameters, ids, *tables, blank(len(ids), k))
    kind = Quantization(bits, group, not zero)
    op = quant.QuantizedEmbedding(
        value(ids), value(q, kind), value(scale), value(zeros) if zero else None
    )
    assert np.array_equal(out, meaning(op, ids, q, scale, zeros))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@levels
def test_embedding_and_gather_copy_rows(packed: bool, dtype: str, isa: str) -> None:
    table = normal(37, 41).astype(dtype)
    ids = np.array([36, 0, 5, 5, 17], np.int32)
    stored = pack_rows(table) if packed else table
    parameters = {"rows": 37, "width": 41, "packed": packed, "weight_dtype": dtype}
    out = call(make_embedding, isa, parameters, ids, stored, blank(5, 41))
    assert np.array_equal(out, meaning(nn.Embedding(value(ids), value(table)), ids, table).astype(np.float32))
    x = table.astype(np.float32)
    op = cache_ops.GatherLast(value(x), value(ids))
    assert np.array_equal(call(make_gather_last, isa, {"width": 41}, x, ids, blank(5, 41)), meaning(op, x, ids))


@levels
def test_embedding_of_a_bad_id_stays_inside_the_table(isa: str) -> None:
    table, ids = normal(20, 16), np.array([-5, 20, 2**31 - 1], np.int32)
    out = call(make_embedding, isa, {"rows": 20, "width": 16}, ids, table, blank(3, 16))
    assert np.array_equal(out, table[[0, 19, 19]])


# Elementwise


@pytest.mark.parametrize("width", [1, 8, 16, 20, 576])
@pytest.mark.parametrize("rows", [1, 70])
@levels
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


@levels
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
@levels
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
@levels
def test_activations_are_accurate_to_a_millionth(activation: str, isa: str) -> None:
    # Around 0, through the tails, and values at which an exponential overflows.
    line = np.concatenate([np.linspace(-12, 12, 4001), np.logspace(-6, 0, 50), [-80, 80, -300, 300, 0, 4e9]])
    x = line.astype(np.float32)[None, :]
    out = call(make_activation, isa, {"width": x.shape[1], "activation": activation}, x, blank(*x.shape))
    exact = nn.activate(activation, torch.from_numpy(x).double()).numpy()
    if activation == "gelu":  # torch's own formula cancels for x ≪ 0, in double as well
        exact = np.array([[v * 0.5 * math.erfc(-v / math.sqrt(2)) for v in x[0].tolist()]])
    # Far out on the left side of gelu the argument of exp is large, and its rounding with it: there in absolute terms.
    assert np.all(np.abs(out - exact) <= 1e-6 * np.abs(exact) + 1e-9)
    nan = call(make_activation, isa, {"width": 3, "activation": activation}, blank(1, 3), blank(1, 3))
    assert np.isnan(nan).all() or activation == "relu"


@pytest.mark.parametrize("width", [1, 8, 17, 64])
@pytest.mark.parametrize("activation", nn.ACTIVATIONS)
@levels
def test_gated_mlp_equals_its_reference(width: int, activation: str, isa: str) -> None:
    x = normal(31, 2 * width) * 3
    parameters = {"width": width, "activation": activation}
    out = call(make_gated_mlp, isa, parameters, x, blank(31, width))
    close(out, meaning(nn.GatedMlp(value(x), activation=activation), x), 1e-6)
    assert np.array_equal(call(make_gated_mlp, isa, parameters, x[30:], blank(1, width)), out[30:])


# Cache and attention


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("dim", [8, 16, 24, 64])
@levels
def test_append_kv_writes_slots_and_nothing_else(dtype: str, dim: int, isa: str) -> None:
    merged = normal(6, 2 * 2 * dim + 3)
    merged[0, :8] = [1e-8, 6e-8, 3e-5, -1e-6, 65519, 65520, np.inf, -np.nan]  # edges of float16
    k, v = (np.ascontiguousarray(merged[:, s : s + 2 * dim].reshape(6, 2, dim)) for s in (0, 2 * dim + 3))
    slots = np.array([0, 17, 31, 79, 64, 5], np.int32)
    before = to_physical(normal(2, 5, 16, 2, dim, seed=1).astype(dtype))
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


class Batch:
    """Sequences of (context length, new tokens) over shuffled pages; what no token has written is NaN."""

    def __init__(self, lengths: list[tuple[int, int]], heads: int, kv_heads: int, dim: int, dtype: str) -> None:
        rng = np.random.default_rng(1)
        self.lengths = lengths
        pages = [-(-n // 16) for n, _ in lengths]
        order = rng.permutation(sum(pages)).astype(np.int32)
        self.table = np.zeros((len(lengths), max(pages) + 1), np.int32)
        self.logical = np.full((2, sum(pages) + 1, 16, kv_heads, dim), np.nan, dtype)
        used = 0
        for b, (n, _) in enumerate(lengths):
            own = order[used : used + pages[b]]
            used += pages[b]
            self.table[b, : pages[b]] = own
            flat = np.full((2, pages[b] * 16, kv_heads, dim), np.nan, dtype)
            flat[:, :n] = rng.standard_normal((2, n, kv_heads, dim)).astype(dtype)
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
]


def attend(isa: str, batch: Batch, options: dict[str, Any], pick: tuple[int, int, int] | None = None) -> np.ndarray:
    """The kernel on a whole batch, or on new rows [start, stop) of sequence b alone, as a chunk of its prompt."""
    heads, dim = batch.q.shape[1:]
    parameters = {"heads": heads, "kv_heads": batch.logical.shape[3], "head_dim": dim, "scale": 0.3}
    parameters |= {"kv_dtype": str(batch.logical.dtype)} | options
    q, start, context, table = batch.q, batch.start, batch.context, batch.table
    if pick is not None:
        b, first, stop = pick
        q = q[start[b] + first : start[b] + stop]
        left = batch.lengths[b][1] - stop
        start, context, table = np.array([0, stop - first], np.int32), context[[b]] - np.int32(left), table[[b]]
    sinks = [batch.sinks] if options.get("sinks") else []
    return call(
        make_paged_attention, isa, parameters, q, batch.pages, start, context, table, *sinks, blank(*q.shape)
    )


@pytest.mark.parametrize("case", ATTENTION, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@levels
def test_paged_attention_equals_its_reference_alone_in_a_batch_and_in_chunks(
    case: Any, dtype: str, isa: str
) -> None:
    heads, kv_heads, dim, options = case
    batch = Batch(LENGTHS, heads, kv_heads, dim, dtype)
    whole = attend(isa, batch, options)
    fields = {key: v for key, v in options.items() if key != "sinks"}
    arrays = (batch.q, batch.logical, batch.start, batch.context, batch.table)
    sinks = batch.sinks if options.get("sinks") else None
    op = cache_ops.PagedAttention(
        *map(value, arrays), None if sinks is None else value(sinks), scale=0.3, **fields
    )
    close(whole, meaning(op, *arrays, sinks), 5e-6)
    for b, (_, new) in enumerate(LENGTHS):
        alone = attend(isa, batch, options, (b, 0, new)) if new else np.zeros((0, heads, dim), np.float32)
        assert np.array_equal(alone, whole[batch.start[b] : batch.start[b + 1]])
    if options.get("causal", True):
        first = batch.start[5]
        for start, stop in ((0, 1), (29, 30), (3, 20), (7, 30)):
            chunk = attend(isa, batch, options, (5, start, stop))
            assert np.array_equal(chunk, whole[first + start : first + stop])


def test_attend_of_the_ir_agrees_on_what_a_window_is() -> None:
    """The test above relies on it: window 1 sees the token itself only, so that the result is its value."""
    x = torch.from_numpy(normal(5, 1, 8))
    steps = torch.arange(5)
    out = attention.attend(x, x, x, None, (steps, steps), scale=1.0, causal=True, window=1, softcap=None)
    assert torch.allclose(out, x)


# Levels


@pytest.mark.parametrize(
    ("isa", "pattern"),
    [
        ("avx512vnni", r"vpdpbusd\s.*%zmm"),
        ("avxvnni", r"\{vex\}\s+vpdpbusd\s.*%ymm"),
        ("avx2", r"vpmaddubsw\s.*%ymm"),
        ("generic", r"pmaddwd\s.*%xmm"),
    ],
)
def test_a_level_multiplies_with_its_own_instruction(isa: str, pattern: str) -> None:
    """Assembled for levels that this machine lacks, too."""
    function = make_quantized_linear(n=32, k=64, bits=4, group_size=32, zero_point=False, isa=isa)
    module = compiled(function, isa)
    assembly = module.mod.inspect_source("asm")
    assert re.search(pattern, assembly)
    if isa != "avx512vnni":
        assert "zmm" not in assembly
    if isa == "generic":
        assert "ymm" not in assembly and "fmaf" not in assembly


@pytest.mark.parametrize("isa", list(LEVELS))
def test_half_precision_needs_no_runtime_library(isa: str) -> None:
    function = make_append_kv(kv_heads=1, head_dim=16, kv_dtype="float16", isa=isa)
    assembly = compiled(function, isa).mod.inspect_source("asm")
    assert not re.search(r"(call|jmp)\w*\s+\S*__(extend|trunc)\w+f2", assembly)


def test_levels_are_those_of_the_runtime() -> None:
    assert tuple(LEVELS) == cpu.ISA_LEVELS
    with pytest.raises(InputError, match="no instruction-set level is named 'neon'"):
        get_isa("neon")


def test_what_has_no_kernel_is_refused() -> None:
    with pytest.raises(CompileError, match="3 bits"):
        QuantLayout(16, 16, 3, 8)
    with pytest.raises(CompileError, match="no kernel for the activation 'mish'"):
        make_gated_mlp(width=16, activation="mish", isa="generic")
