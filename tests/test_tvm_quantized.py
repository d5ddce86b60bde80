"""TIR kernels over quantized weights: every width, grid and codebook against the references, exact in
integers, the same bits for any number of rows and on all levels with FMA.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llmc.codegen.tvm.kernels import super_scales
from llmc.codegen.tvm.kernels.activation import (
    make_quantize_activation,
    reference_quantize_activation,
    whole_groups,
)
from llmc.codegen.tvm.kernels.codebook import make_codebook_linear, reference_codebook_linear
from llmc.codegen.tvm.kernels.elementwise import make_gated_mlp
from llmc.codegen.tvm.kernels.gather import make_quantized_embedding
from llmc.codegen.tvm.kernels.isa import get_isa
from llmc.codegen.tvm.kernels.layout import QuantLayout, has_bytes
from llmc.codegen.tvm.kernels.norms import make_rms_norm
from llmc.codegen.tvm.kernels.quantized import make_quantized_linear, reference_quantized_linear
from llmc.ir.errors import CompileError
from llmc.ir.hadamard import rotation
from llmc.ir.ops import quant
from llmc.ir.ops.nn import ACTIVATIONS, activate
from llmc.ir.types import Quantization

from .conftest import LONG
from .kernel_harness import (
    HERE,
    blank,
    call,
    close,
    level_cases,
    levels,
    meaning,
    normal,
    value,
    vector_levels,
)


@dataclass(frozen=True)
class Case:
    """A weight [n, k] by `types.Quantization`'s table."""

    n: int
    k: int
    bits: int
    group: int
    zero: str | None = None
    scale: str = "float16"
    codebook: str | None = None
    super_group: int = 0

    def __str__(self) -> str:
        form = self.codebook or self.zero or "sym"
        scale = f"{self.scale}-super{self.super_group}" if self.super_group else self.scale
        return f"{self.n}x{self.k}-{self.bits}bit-g{self.group}-{form}-{scale}"

    @property
    def form(self) -> dict[str, Any]:
        """The static parameters of a kernel."""
        return {
            "bits": self.bits,
            "group_size": self.group,
            "zero_point": self.zero,
            "codebook": self.codebook,
            "scale_dtype": self.scale,
            "super_group": self.super_group,
        }

    @property
    def layout(self) -> QuantLayout:
        return QuantLayout(n=self.n, k=self.k, **self.form)

    @property
    def quantization(self) -> Quantization:
        return Quantization(
            self.bits,
            self.group,
            self.zero is None,
            self.scale,
            codebook=self.codebook,
            super_group=self.super_group,
        )

    def parts(self) -> tuple[Any, Any, Any]:
        """q, scale and zero point."""
        rng = np.random.default_rng(self.n + self.k)
        groups = self.layout.groups
        q = rng.integers(0, 1 << self.bits, (self.n, self.k), dtype=np.uint8)
        q[0], q[-1] = 0, (1 << self.bits) - 1
        scale = (0.001 + 0.01 * rng.random((self.n, groups))).astype(self.scale)
        scale[1::3] *= -1
        if self.super_group:
            scale = self._two_levels(rng, groups, 64)
        if self.zero is None:
            return q, scale, None
        if self.zero == "uint8":
            return q, scale, rng.integers(0, 1 << self.bits, (self.n, groups), dtype=np.uint8)
        if self.super_group:
            return q, scale, self._two_levels(rng, groups, -64)
        low = -0.01 * rng.random((self.n, groups)) * (1 << self.bits)
        return q, scale, low.astype(self.zero)

    def _two_levels(self, rng: Any, groups: int, stop: int) -> np.ndarray:
        """A float16 a super-group times integers between 0 and `stop`."""
        per = self.super_group // self.group
        base = (0.0001 * rng.random((self.n, -(-groups // per)))).astype(np.float16).repeat(per, 1)
        whole = np.sign(stop) * rng.integers(0, abs(stop), (self.n, groups))
        return base[:, :groups].astype(np.float32) * whole.astype(np.float32)

    def packed(self) -> list[np.ndarray]:
        q, scale, zero = self.parts()
        lay = self.layout
        return [lay.pack(q), lay.pack_scales(scale), *([] if zero is None else [lay.pack_zero_points(zero)])]


CASES = [
    Case(40, 64, 4, 32),
    Case(33, 64, 4, 32, "uint8"),
    Case(16, 128, 4, 64, "uint8"),
    Case(48, 72, 4, 24, "uint8"),
    Case(7, 50, 4, 16),  # the last group of a row is short
    Case(24, 20, 4, 12, "uint8"),  # a group that 8 does not divide
    Case(40, 64, 8, 64),
    Case(20, 96, 8, 32, "uint8"),
    Case(17, 600, 8, 600, "uint8"),  # sums beyond 2^24: corrected in integers
    Case(5, 9, 8, 128),  # a group longer than the row
    Case(64, 512, 4, 512),
    # The K types of GGUF
    Case(20, 256, 2, 16, "float32", "float32", None, 256),  # Q2_K
    Case(33, 512, 3, 16, None, "float32", None, 256),  # Q3_K
    Case(40, 256, 4, 32, "float32", "float32", None, 256),  # Q4_K
    Case(24, 64, 5, 32, "float32", "float32"),  # Q5_K with scales of one level
    Case(33, 320, 6, 16, None, "float32", None, 256),  # Q6_K, a short last super-group
    Case(40, 96, 4, 32, codebook="iq4_nl"),
    # Its types with grids
    Case(40, 256, 4, 16, None, "float32", "iq2"),
    Case(24, 512, 4, 32, None, "float32", "iq3_xxs"),
    Case(33, 512, 4, 32, None, "float32", "iq3_s", 256),
    Case(20, 256, 2, 32, "float32", "float32"),  # IQ1_S
    Case(33, 256, 4, 16, None, "float32", "iq1_m"),
    Case(20, 192, 4, 16, None, "float32", "mxfp4"),  # NVFP4
    Case(24, 512, 2, 256, "float16"),  # TQ2_0
    # Other widths and groups
    Case(20, 64, 2, 32, "uint8"),
    Case(24, 128, 3, 128),
    Case(16, 60, 5, 12, "uint8"),  # a group that 16 does not divide
    Case(7, 50, 6, 24, "float16"),  # the same, and a short last group
    Case(33, 64, 7, 32, "uint8"),
    Case(17, 400, 7, 400, "float16"),
    # Wide enough for tile registers: minima, a depth below 64, tables of integers, a group of several tiles
    Case(33, 192, 4, 64, "float16"),
    Case(20, 96, 5, 48, "uint8"),
    Case(40, 128, 4, 64, codebook="iq4_nl"),
    Case(40, 96, 4, 32, None, "float32", "mxfp4"),
    Case(24, 128, 4, 64, None, "float32", "mxfp4"),
    Case(50, 256, 6, 128, "uint8"),
]
GENERAL = [  # products in floats
    Case(40, 128, 4, 64, codebook="nf4"),
    Case(33, 70, 4, 20, None, "float32", "nf4"),  # a group that 8 does not divide, and a short last one
    Case(5, 9, 4, 64, codebook="nf4"),
]
WITH_EXTRAS = {CASES[0], CASES[1], CASES[6], CASES[13], CASES[-1], GENERAL[0], GENERAL[2]}
"""Cases that are tried with bias and residual too; adding them is the same code for all."""


@settings(deadline=None, max_examples=60)
@given(
    bits=st.integers(2, 8),
    n=st.integers(1, 40),
    k=st.integers(1, 80),
    group=st.integers(1, 70),
    seed=st.integers(0, 99),
)
def test_every_layout_is_undone_and_may_be_packed_in_chunks(
    bits: int, n: int, k: int, group: int, seed: int
) -> None:
    layout = QuantLayout(n, k, bits, group)
    q = np.random.default_rng(seed).integers(0, 1 << bits, (n, k), np.uint8)
    packed = layout.pack(q)
    assert packed.shape == layout.weight_shape and np.array_equal(layout.unpack(packed), q)
    if n > 16:
        assert np.array_equal(np.concatenate([layout.pack(q[:16]), layout.pack(q[16:])]), packed)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", [16, 32, 64, 128])
def test_usual_groups_take_their_bits_and_no_more(bits: int, group: int) -> None:
    assert np.prod(QuantLayout(48, 256, bits, group).weight_shape) * 8 == 48 * 256 * bits


def test_zero_points_of_four_bits_stand_two_a_byte() -> None:
    layout = QuantLayout(20, 64, 4, 32, zero_point="uint8")
    zero = np.random.default_rng(0).integers(0, 16, (20, 2), np.uint8)
    packed = layout.pack_zero_points(zero)
    assert packed.shape == layout.zero_shape == (2, 2, 8)
    assert packed[0, 1, 3] == zero[3, 1] | zero[11, 1] << 4
    with pytest.raises(CompileError, match="a zero point of 16 beside codes of 4 bits"):
        layout.pack_zero_points(np.full((20, 2), 16, np.uint8))
    wide = QuantLayout(20, 64, 5, 32, zero_point="uint8")
    assert wide.pack_zero_points(zero).shape == wide.zero_shape == (2, 2, 16)
    minimum = QuantLayout(20, 64, 4, 32, zero_point="float16")
    assert minimum.pack_zero_points(zero.astype(np.float16)).shape == minimum.zero_shape == (2, 2, 16)
    assert minimum.pack_groups(zero)[0, 0, 1] == zero[1, 0]


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 9999), low=st.integers(-128, 0), high=st.integers(1, 127))
def test_factors_of_two_level_scales_are_found_again(seed: int, low: int, high: int) -> None:
    rng = np.random.default_rng(seed)
    base = (rng.standard_normal((9, 1)) * 2.0 ** rng.integers(-22, 4, (9, 1))).astype(np.float16)
    products = base.astype(np.float32) * rng.integers(low, high + 1, (9, 8)).astype(np.float32)
    products[0] = 0
    found, whole = super_scales.factors(products)
    assert np.array_equal(found[:, None].astype(np.float32) * whole, products)


def test_scales_that_have_no_two_levels_are_refused() -> None:
    with pytest.raises(CompileError, match="are no float16 times integers of 8 bits"):
        super_scales.factors(np.array([[1.0, 0.3]], np.float32))


@pytest.mark.parametrize("align", [8, 16])
@pytest.mark.parametrize(
    ("k", "group", "apart"),
    [
        *((64, 32, apart) for apart in (0, 1, 3)),
        *((576, 576, apart) for apart in (0, 1)),
        *((48, 16, apart) for apart in (0, 4)),
        *((k, group, 0) for k, group in ((50, 16), (20, 12), (9, 128), (1, 8))),
    ],
)
@pytest.mark.parametrize("rows", [1, 300])
@vector_levels
def test_quantize_activation_rounds_to_even_exactly(
    k: int, group: int, rows: int, align: int, apart: int, isa: str
) -> None:
    layout = QuantLayout(1, k, 8 if align == 8 else 6, group)
    x = normal(rows, k) * np.float32(3)
    x[0] = np.clip(np.arange(k) - k // 2, -253, 253)
    x[0, ::group] = 127 * 2  # a scale of 2 in every group: odd elements lie halfway between integers
    x[-1] = 0 if rows > 1 else x[-1]
    outputs = quantized_outputs(rows, layout, apart)
    parameters = {"k": k, "group_size": group, "align": align, "apart": apart}
    got = call(make_quantize_activation, isa, parameters, x, *outputs, outputs=3)
    for actual, expected in zip(got, reference_quantize_activation(x, group, align, apart), strict=True):
        assert np.array_equal(actual, expected)


def quantized_outputs(rows: int, layout: QuantLayout, apart: int) -> tuple[np.ndarray, ...]:
    """Where a, sums and a_scale go."""
    factors = (rows, layout.groups + apart)
    return np.full((rows, layout.k_padded), 99, np.int8), blank(*factors), blank(*factors)


@vector_levels
def test_quantize_activation_survives_what_is_no_number(isa: str) -> None:
    x = normal(4, 40)
    x[1, 35], x[2, 3], x[3] = np.nan, np.inf, 1e-42
    outputs = (np.zeros((4, 48), np.int8), blank(4, 3), blank(4, 3))
    a, sums, scale = call(make_quantize_activation, isa, {"k": 40, "group_size": 16}, x, *outputs, outputs=3)
    assert np.isnan(scale[1, 2]) and np.isinf(scale[2, 0]) and np.isfinite(scale[[0, 3]]).all()
    assert np.isfinite(scale[1, :2]).all() and np.isfinite(scale[2, 1:]).all()
    assert np.array_equal(a.reshape(4, 3, 16).sum(2, dtype=np.int32), sums)


@vector_levels
def test_what_is_no_number_is_what_is_kept_apart(isa: str) -> None:
    x = normal(4, 48)
    x[1, 35], x[2, 3], x[3, 47], x[3, 20] = np.nan, -np.inf, np.nan, np.inf
    sizes = {"k": 48, "group_size": 16, "apart": 1}
    outputs = quantized_outputs(4, QuantLayout(1, 48, 8, 16), 1)
    _, sums, scale = call(make_quantize_activation, isa, sizes, x, *outputs, outputs=3)
    assert sums[1:, 3].tolist() == [35, 3, 47]
    assert np.isnan(scale[1, 3]) and scale[2, 3] == -np.inf and np.isnan(scale[3, 3])
    assert np.isfinite(scale[:3, :3]).all() and np.isinf(scale[3, 1])


@pytest.mark.parametrize(
    ("width", "group", "align"), [(576, 32, 8), (64, 64, 8), (96, 16, 16), (256, 256, 8)]
)
@pytest.mark.parametrize("weight", [True, False])
@vector_levels
def test_what_is_quantized_as_it_is_made_has_the_same_bits(
    weight: bool, width: int, group: int, align: int, isa: str
) -> None:
    rows = 20
    x = normal(rows, width) * np.float32(2)
    x[1], x[2, 5], x[3, -1] = 0, np.nan, np.inf
    inputs = [x, normal(width, seed=1)] if weight else [x]
    parameters: dict[str, Any] = {"width": width, "eps": 1e-5, "weight": weight}
    floats = call(make_rms_norm, isa, parameters, *inputs, blank(rows, width))
    rotate = group if group >= 64 else 0
    apart = 0 if rotate else 2 if width > 64 else 1
    outputs = quantized_outputs(rows, QuantLayout(1, width, 8, group), apart)
    sizes = {"k": width, "group_size": group, "align": align, "apart": apart, "rotate": rotate}
    expected = call(make_quantize_activation, isa, sizes, floats, *outputs, outputs=3)
    parameters |= {"quantize": (group, align), "rotate": rotate}
    if apart:
        parameters["apart"] = apart
    fused = call(make_rms_norm, isa, parameters, *inputs, *outputs, outputs=3)
    for a, b in zip(fused, expected, strict=True):
        assert np.array_equal(a, b, equal_nan=a.dtype == np.float32)


@pytest.mark.parametrize("rotate", [0, 64, 192])
@vector_levels
def test_a_gated_mlp_quantizes_what_it_makes(rotate: int, isa: str) -> None:
    """To half a step of the result in float64, and the 3e-4 of the activation of what is rotated to it."""
    rows, width, group = 20, 576, 192
    x = normal(rows, 2 * width) * np.float32(2)
    x[1] = 0
    odd = x.copy()  # rows whose second groups are no numbers
    odd[2, 200], odd[3, 201], odd[4, 202], odd[4, width + 202] = np.nan, np.inf, 3e38, 3e38
    parameters = {"width": width, "activation": "silu", "quantize": (group, 8), "rotate": rotate}
    outputs = quantized_outputs(rows, QuantLayout(1, width, 8, group), 0)
    a, sums, scale = call(make_gated_mlp, isa, parameters, x, *outputs, outputs=3)
    gate, up = np.split(x.astype(np.float64), 2, 1)
    exact = gate / (1 + np.exp(-gate)) * up
    if rotate:
        exact = (exact.reshape(-1, rotate) @ rotation(rotate)).reshape(rows, width)
    got = a.reshape(rows, 3, group) * scale[:, :, None].astype(np.float64)
    exact = exact.reshape(rows, 3, group)
    size = np.abs(exact).max(2, keepdims=True)
    rough = 3e-4 * max(1, rotate) ** 0.5
    assert np.all(np.abs(got - exact) <= (0.5 / 127 + rough) * size + 1e-9)
    assert np.array_equal(sums, a.reshape(rows, 3, group).sum(2, dtype=np.int32))
    found = call(make_gated_mlp, isa, parameters, odd, *outputs, outputs=3)
    assert not np.isfinite(found[2][2:5, 1]).any() and not found[1][2:5, 1].any()
    for one, other in zip(found[1:], (sums, scale), strict=True):
        assert np.array_equal(np.delete(one, 1, 1), np.delete(other, 1, 1))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@vector_levels
def test_rough_activations(activation: str, isa: str) -> None:
    """A group of equal numbers has their result as the largest: to 3e-4."""
    line = np.concatenate([np.linspace(-12, 12, 501), np.logspace(-6, 0, 50), [-80, 80, -300, 300, 0, 4e9]])
    gate = np.repeat(line, 16).astype(np.float32)
    x = np.concatenate([gate, np.ones_like(gate)])[None]
    outputs = quantized_outputs(1, QuantLayout(1, gate.size, 8, 16), 0)
    parameters = {"width": gate.size, "activation": activation, "quantize": (16, 8)}
    _, _, scale = call(make_gated_mlp, isa, parameters, x, *outputs, outputs=3)
    exact = activate(activation, torch.from_numpy(line.astype(np.float32)).double()).abs().numpy()
    assert np.all(np.abs(scale[0] * 127.0 - exact) <= 3e-4 * exact + 1e-9)


def run(
    isa: str, case: Case, x: np.ndarray, extras: tuple[np.ndarray, ...] = (), apart: int = 0
) -> np.ndarray:
    parameters = {"n": case.n, "k": case.k, **case.form, "bias": bool(extras), "residual": bool(extras)}
    operands = [*case.packed(), *extras, blank(len(x), case.n)]
    if case.codebook is not None and not has_bytes(case.codebook):
        return call(make_codebook_linear, isa, parameters, x, *operands)
    activations = reference_quantize_activation(x, case.group, case.layout.align, apart)
    return call(make_quantized_linear, isa, {**parameters, "apart": apart}, *activations, *operands)


def check_rows(isa: str, case: Case, x: np.ndarray, whole: np.ndarray, apart: int) -> None:
    """Results of some rows are those of all, bias and residual added last."""
    for start, stop in ((0, 1), (26, 27), (5, 7), (2, 9), (3, 11), (8, 27)):
        assert np.array_equal(run(isa, case, x[start:stop], (), apart), whole[start:stop])
    if case not in WITH_EXTRAS:
        return
    bias, residual = normal(case.n, seed=5), normal(27, case.n, seed=6)
    assert np.array_equal(run(isa, case, x, (bias, residual), apart), whole + bias + residual)


def linear_meaning(case: Case, x: np.ndarray) -> np.ndarray:
    q, scale, zero = case.parts()
    typed = value(q, case.quantization)
    op = quant.QuantizedLinear(value(x), typed, value(scale), None if zero is None else value(zero), None)
    return meaning(op, x, q, scale, zero, None)


def kept_apart(cases: list[Case]) -> list[tuple[Case, int]]:
    """Each case without columns that are kept apart, or with one or four of them where its kernel can; where
    tests may be long, with all of these.
    """
    some = [(0, 1, 4)] * len(cases) if LONG else itertools.cycle([(4,), (0,), (1,), (0,)])
    return [
        (case, count)
        for case, counts in zip(cases, some, strict=False)
        for count in (counts if whole_groups(case.layout) else (0,))
    ]


@level_cases("case,apart", kept_apart(CASES))
def test_quantized_linear_is_exact_in_integers_and_rows_do_not_depend_on_their_number(
    case: Case, apart: int, isa: str
) -> None:
    x = normal(27, case.k)
    if apart:  # each in a column of its own: of every word and byte of a step
        x[np.arange(27), np.arange(27) * 37 % case.k] *= 40
    x[4] = 0
    whole = run(isa, case, x, (), apart)
    a, sums, a_scale = reference_quantize_activation(x, case.group, case.layout.align, apart)
    close(whole, reference_quantized_linear(case.layout, a, sums, a_scale, *case.parts()), 1e-6)
    assert not whole[4].any()
    check_rows(isa, case, x, whole, apart)
    # The op's own meaning takes x in float: what remains is the rounding of x to 8 bits.
    close(whole, linear_meaning(case, x), 0.02)


@pytest.mark.parametrize("case", GENERAL, ids=str)
@vector_levels
def test_codebook_linear_multiplies_in_floats(case: Case, isa: str) -> None:
    x = normal(27, case.k)
    whole = run(isa, case, x)
    q, scale, _ = case.parts()
    close(whole, reference_codebook_linear(case.layout, x, q, scale), 1e-6)
    close(whole, linear_meaning(case, x), 2e-6)
    check_rows(isa, case, x, whole, apart=0)


@pytest.mark.parametrize("bits", range(2, 9))
@levels
def test_the_largest_products_saturate_nowhere(bits: int, isa: str) -> None:
    n, k, top = 16, 128, (1 << bits) - 1
    layout = QuantLayout(n, k, bits, 64)
    weight, scale = layout.pack(np.full((n, k), top, np.uint8)), np.ones(layout.scale_shape, np.float16)
    parameters = {"n": n, "k": k, "bits": bits, "group_size": 64}
    for sign in (1, -1):
        a = np.full((1, k), sign * 127, np.int8)
        sums, one = np.full((1, 2), sign * 127 * 64, np.float32), np.ones((1, 2), np.float32)
        out = call(make_quantized_linear, isa, parameters, a, sums, one, weight, scale, blank(1, n))
        assert np.array_equal(out, np.full((1, n), sign * 127 * k * (top - (1 << (bits - 1))), np.float32))


@pytest.mark.parametrize("group", [192, 256, 320])
@levels
def test_the_largest_totals_of_8_bits_stay_exact(group: int, isa: str) -> None:
    """Where totals are counted from LIFT they must stay below 2^22: 256 · 127 · 128 just does."""
    n, k = 32, 2 * group
    layout = QuantLayout(n, k, 8, group)
    scale = np.ones(layout.scale_shape, np.float16)
    parameters = {"n": n, "k": k, "bits": 8, "group_size": group}
    for code, sign, rows in itertools.product((0, 255), (1, -1), (1, 3, 40)):
        weight = layout.pack(np.full((n, k), code, np.uint8))
        a = np.full((rows, k), sign * 127, np.int8)
        sums = np.full((rows, 2), sign * 127 * group, np.float32)
        one = np.ones((rows, 2), np.float32)
        out = call(make_quantized_linear, isa, parameters, a, sums, one, weight, scale, blank(rows, n))
        assert np.array_equal(out, np.full((rows, n), sign * 127 * k * (code - 128), np.float32))


@pytest.mark.parametrize("case", [*(CASES[i] for i in (0, 5, 7, 8, 12, 13, 16)), GENERAL[1]], ids=str)
def test_products_have_the_same_bits_on_all_levels_with_fma(case: Case) -> None:
    names = [name for name in HERE if get_isa(name).fma]
    if len(names) < 2:
        pytest.skip("this CPU runs fewer than two levels with FMA")
    x = normal(9, case.k)
    first = run(names[0], case, x)
    for name in names[1:]:
        assert np.array_equal(run(name, case, x), first)


@level_cases("case", [*CASES, *GENERAL])
def test_quantized_embedding_reads_rows_of_the_packed_table(case: Case, isa: str) -> None:
    q, scale, zero = case.parts()
    ids = np.array([0, case.n - 1, case.n // 2, 0, *range(case.n)], np.int32)
    parameters = {"rows": case.n, "width": case.k, **case.form}
    out = call(make_quantized_embedding, isa, parameters, ids, *case.packed(), blank(len(ids), case.k))
    typed = value(q, case.quantization)
    op = quant.QuantizedEmbedding(value(ids), typed, value(scale), None if zero is None else value(zero))
    expected = meaning(op, ids, q, scale, zero)
    if case.zero in (None, "uint8"):
        assert np.array_equal(out, expected)
    else:  # scale · code + minimum is rounded once, in the meaning twice
        close(out, expected, 2e-7)
