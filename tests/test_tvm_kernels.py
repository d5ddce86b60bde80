"""TIR kernels of `tvm-cpu` against the reference meanings of their ops: weights, rows, levels."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
from llmc.codegen.tvm.kernels.activation import make_quantize_activation, reference_quantize_activation
from llmc.codegen.tvm.kernels.cache import make_append_kv
from llmc.codegen.tvm.kernels.elementwise import make_gated_mlp
from llmc.codegen.tvm.kernels.gather import make_embedding, make_gather_last, make_quantized_embedding
from llmc.codegen.tvm.kernels.isa import LEVELS, get_isa
from llmc.codegen.tvm.kernels.layout import QuantLayout, pack_rows, unpack_rows
from llmc.codegen.tvm.kernels.linear import make_linear
from llmc.codegen.tvm.kernels.quantized import make_quantized_linear, reference_quantized_linear
from llmc.ir.errors import CompileError, InputError
from llmc.ir.ops import cache as cache_ops
from llmc.ir.ops import nn, quant
from llmc.ir.types import Quantization
from llmc.runtime import cpu

from .kernel_harness import HERE, blank, call, close, compiled, levels, meaning, normal, value

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
    narrow = call(make_linear, isa, {"n": 20, "k": 24, "weight_dtype": dtype}, x, pack_rows(w), blank(3, 20))
    wide = call(make_linear, isa, {"n": 20, "k": 24}, x, pack_rows(w.astype(np.float32)), blank(3, 20))
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


@pytest.mark.parametrize(
    ("k", "group"), [(64, 32), (576, 576), (50, 16), (20, 12), (9, 128), (1, 8), (48, 16)]
)
@pytest.mark.parametrize("rows", [1, 300])
@levels
def test_quantize_activation_rounds_to_even_exactly(k: int, group: int, rows: int, isa: str) -> None:
    x = normal(rows, k) * np.float32(3)
    x[0] = np.clip(np.arange(k) - k // 2, -253, 253)
    x[0, ::group] = 127 * 2  # a scale of 2 in every group: odd elements lie halfway between integers
    x[-1] = 0 if rows > 1 else x[-1]
    layout = QuantLayout(1, k, 8, group)
    outputs = (
        np.full((rows, layout.k_padded), 99, np.int8),
        np.full((rows, layout.groups), 99, np.int32),
        blank(rows, layout.groups),
    )
    got = call(make_quantize_activation, isa, {"k": k, "group_size": group}, x, *outputs, outputs=3)
    for actual, expected in zip(got, reference_quantize_activation(x, group), strict=True):
        assert np.array_equal(actual, expected)


@levels
def test_quantize_activation_survives_what_is_no_number(isa: str) -> None:
    x = normal(4, 40)
    x[1, 35], x[2, 3], x[3] = np.nan, np.inf, 1e-42
    outputs = (np.zeros((4, 48), np.int8), np.zeros((4, 3), np.int32), blank(4, 3))
    a, sums, scale = call(make_quantize_activation, isa, {"k": 40, "group_size": 16}, x, *outputs, outputs=3)
    assert np.isnan(scale[1, 2]) and np.isinf(scale[2, 0]) and np.isfinite(scale[[0, 3]]).all()
    assert np.isfinite(scale[1, :2]).all() and np.isfinite(scale[2, 1:]).all()
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
    op = quant.QuantizedLinear(value(x), value(q, kind), value(scale), value(zeros) if zero else None, None)
    close(whole, meaning(op, x, q, scale, zeros, None), 0.02)
    bias, residual = normal(n, seed=5), normal(27, n, seed=6)
    assert np.array_equal(run_quantized(isa, case, x, (bias, residual)), whole + bias + residual)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sign", [1, -1])
@levels
def test_the_largest_products_saturate_nowhere(bits: int, sign: int, isa: str) -> None:
    n, k, top = 16, 128, (1 << bits) - 1
    layout = QuantLayout(n, k, bits, 64)
    a = np.full((1, k), sign * 127, np.int8)
    sums, one = np.full((1, 2), sign * 127 * 64, np.int32), np.ones((1, 2), np.float32)
    weight, scale = layout.pack(np.full((n, k), top, np.uint8)), np.ones(layout.scale_shape, np.float16)
    parameters = {"n": n, "k": k, "bits": bits, "group_size": 64, "zero_point": False}
    out = call(make_quantized_linear, isa, parameters, a, sums, one, weight, scale, blank(1, n))
    assert np.array_equal(out, np.full((1, n), sign * 127 * k * (top - (1 << (bits - 1))), np.float32))


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
    op = quant.QuantizedEmbedding(value(ids), value(q, kind), value(scale), value(zeros) if zero else None)
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
    assert np.array_equal(
        call(make_gather_last, isa, {"width": 41}, x, ids, blank(5, 41)), meaning(op, x, ids)
    )


@levels
def test_embedding_of_a_bad_id_stays_inside_the_table(isa: str) -> None:
    table, ids = normal(20, 16), np.array([-5, 20, 2**31 - 1], np.int32)
    out = call(make_embedding, isa, {"rows": 20, "width": 16}, ids, table, blank(3, 16))
    assert np.array_equal(out, table[[0, 19, 19]])


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
