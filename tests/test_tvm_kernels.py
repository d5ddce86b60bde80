"""TIR kernels of `tvm-cpu` against the reference meanings of their ops: weights, rows, levels."""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any

import numpy as np
import pytest
from llmc.codegen.tvm.kernels.activation import make_quantize_activation
from llmc.codegen.tvm.kernels.attention import make_paged_attention
from llmc.codegen.tvm.kernels.builder import Kernel, in_turns, let, put, vec
from llmc.codegen.tvm.kernels.cache import make_append_kv
from llmc.codegen.tvm.kernels.elementwise import make_gated_mlp
from llmc.codegen.tvm.kernels.gather import make_embedding, make_gather_last
from llmc.codegen.tvm.kernels.isa import LEVELS, get_isa
from llmc.codegen.tvm.kernels.layout import QuantLayout, pack_rows, unpack_rows
from llmc.codegen.tvm.kernels.linear import make_linear
from llmc.codegen.tvm.kernels.quantized import make_quantized_linear
from llmc.ir.errors import CompileError, InputError
from llmc.ir.ops import cache as cache_ops
from llmc.ir.ops import nn
from llmc.runtime import cpu
from tvm.script.ir_builder import tirx as T

from .kernel_harness import blank, call, close, compiled, meaning, normal, value, vector_levels

# Weights: float


@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 5), (16, 33), (40, 24), (48, 16), (96, 70)])
@pytest.mark.parametrize("extras", [False, True])
@vector_levels
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
@vector_levels
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


# Rows by index


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@vector_levels
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


@vector_levels
def test_embedding_of_a_bad_id_stays_inside_the_table(isa: str) -> None:
    table, ids = normal(20, 16), np.array([-5, 20, 2**31 - 1], np.int32)
    out = call(make_embedding, isa, {"rows": 20, "width": 16}, ids, table, blank(3, 16))
    assert np.array_equal(out, table[[0, 19, 19]])


# Levels


@pytest.mark.parametrize(
    ("isa", "pattern"),
    [
        ("amx", r"tdpbssd\s.*%tmm"),
        ("zen4", r"vpdpbusd\s.*%zmm"),
        ("avx512vnni", r"vpdpbusd\s.*%zmm"),
        ("avxvnni", r"\{vex\}\s+vpdpbusd\s.*%ymm"),
        ("avx2", r"vpmaddubsw\s.*%ymm"),
        ("generic", r"pmaddwd\s.*%xmm"),
    ],
)
def test_a_level_multiplies_with_its_own_instruction(isa: str, pattern: str) -> None:
    """Assembled for levels that this machine lacks, too."""
    function = make_quantized_linear(n=32, k=64, bits=4, group_size=64, isa=isa)
    module = compiled(function, isa)
    assembly = module.inspect_source("asm")
    assert re.search(pattern, assembly)
    if isa != "amx":
        assert "tmm" not in assembly
    if isa not in ("amx", "zen4", "avx512vnni"):
        assert "zmm" not in assembly
    if isa == "generic":
        assert "ymm" not in assembly and "fmaf" not in assembly


def _polynomials_in_turns(*, loops: bool, isa: str) -> Any:
    kernel = Kernel("polynomials", isa)
    with kernel:
        x, out = (kernel.argument(name, (64,), "float32") for name in ("x", "out"))

        def body(i: int) -> None:
            square = let(vec(x, i) * vec(x, i))
            put(out, square * square + square, i)
            if loops:
                with T.serial(0, 2) as j:
                    put(out, square, i + j)

        with kernel.body():
            in_turns([partial(body, i) for i in range(0, 64, 16)])
    return kernel.function


def test_bodies_in_turns_give_what_they_give_alone() -> None:
    stores = re.findall(
        r"^ *(\w+)\[.*\] = ", _polynomials_in_turns(loops=False, isa="generic").script(), re.M
    )
    assert len(stores) == 8 and "out" not in stores[:4] and stores[4:] == ["out"] * 4
    x = normal(64)
    out = call(_polynomials_in_turns, "generic", {"loops": False}, x, blank(64))
    close(out, (x * x) ** 2 + x * x, 1e-6)
    with pytest.raises(AssertionError, match="a loop or a condition"):
        _polynomials_in_turns(loops=True, isa="generic")


def test_attention_of_bfloat16_multiplies_in_tiles() -> None:
    heads = {"heads": 2, "kv_heads": 1, "head_dim": 32, "scale": 1.0}
    for kind, tiles in (("bfloat16", True), ("float16", False)):
        function = make_paged_attention(**heads, kv_dtype=kind, isa="amx")
        assembly = compiled(function, "amx").inspect_source("asm")
        assert bool(re.search(r"tdpbf16ps\s.*%tmm", assembly)) == tiles


@pytest.mark.parametrize(
    ("isa", "kind", "head_dim", "words"),
    [
        ("zen4", "bfloat16", 32, True),
        ("zen4", "bfloat16", 24, False),
        ("zen4", "float16", 32, False),
        ("avx512vnni", "bfloat16", 32, False),
    ],
)
def test_attention_of_bfloat16_multiplies_pairs(isa: str, kind: str, head_dim: int, words: bool) -> None:
    function = make_paged_attention(heads=2, kv_heads=1, head_dim=head_dim, scale=1.0, kv_dtype=kind, isa=isa)
    assembly = compiled(function, isa).inspect_source("asm")
    assert bool(re.search(r"vdpbf16ps\s.*%zmm", assembly)) == words


@pytest.mark.parametrize(("isa", "second"), [("zen4", True), ("avx512vnni", False), ("amx", False)])
def test_weights_are_fetched_to_the_cache_of_the_level(isa: str, second: bool) -> None:
    """What will be written, to the nearest one."""
    function = make_quantized_linear(n=32, k=64, bits=4, group_size=64, isa=isa)
    found = set(re.findall(r"prefetch(t\d)", compiled(function, isa).inspect_source("asm")))
    assert found == ({"t0", "t1"} if second else {"t0"})


@pytest.mark.parametrize("isa", list(LEVELS))
def test_half_precision_needs_no_runtime_library(isa: str) -> None:
    function = make_append_kv(kv_heads=1, head_dim=16, kv_dtype="float16", isa=isa)
    assembly = compiled(function, isa).inspect_source("asm")
    assert not re.search(r"(call|jmp|bl?)\w*\s+\S*__(extend|trunc)\w+f2", assembly)


@pytest.mark.parametrize("k", [9, 17, 25])
def test_bytes_are_not_stored_under_a_mask_of_one_lane(k: int) -> None:
    """LLVM 22.1.0 stores four then (llvm-project#179489). It makes such masks of conditions on a loop's
    variable, where 8 divides k - 1: our loops end where there is no more to do.
    """
    function = make_quantize_activation(k=k, group_size=128, isa="avx512vnni")
    text = compiled(function, "avx512vnni").inspect_source("ll")
    assert " store " in text
    masks = re.findall(r"masked\.store\.v\d+i8.*x i1> <([^>]*)>\)", text)
    assert not [mask for mask in masks if mask.count("true") == 1]


def test_levels_are_those_of_the_runtime() -> None:
    assert tuple(LEVELS) == cpu.ISA_LEVELS
    with pytest.raises(InputError, match="no instruction-set level is named 'sse9'"):
        get_isa("sse9")


def test_what_has_no_kernel_is_refused() -> None:
    with pytest.raises(CompileError, match="9 bits"):
        QuantLayout(16, 16, 9, 8)
    with pytest.raises(CompileError, match="no kernel for the activation 'mish'"):
        make_gated_mlp(width=16, activation="mish", isa="generic")
