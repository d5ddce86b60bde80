"""The kernels of routers and experts against their ops' meanings, in float64 where sums are long."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from llmc.codegen.tvm import kernels
from llmc.codegen.tvm.kernels.layout import QuantLayout, pack_rows
from llmc.codegen.tvm.kernels.quantized import reference_quantized_linear
from llmc.ir.ops.moe import Gate
from llmc.ir.ops.select import TopK

from .conftest import LONG
from .kernel_harness import HERE, blank, call, meaning, normal, value

# These kernels add no instructions of their own: the best level here stands for the others.
levels = pytest.mark.parametrize(
    "isa", [pytest.param(name, marks=() if name == HERE[-1] else pytest.mark.slow) for name in HERE]
)


@levels
@pytest.mark.parametrize(("rows", "width", "k"), [(1, 5, 5), (3, 16, 1), (40, 130, 8)])
def test_top_k_equals_a_stable_sort(isa: str, rows: int, width: int, k: int) -> None:
    x = np.round(normal(rows, width), 1)  # with many equal values
    x[0, 1], x[-1, 0] = -np.inf, np.nan
    x[:, 2], x[:, 3] = 0.0, -0.0
    got = call(kernels.make_top_k, isa, {"width": width, "k": k}, x, np.full((rows, k), -1, np.int64))
    assert np.array_equal(got, meaning(TopK(value(x), k=k), x))


def test_equal_values_come_in_their_order() -> None:
    x = np.array([[1, 2, 2, 1, 2]], np.float32)
    assert meaning(TopK(value(x), k=4), x).tolist() == [[1, 2, 4, 0]]


def sorted_pairs(isa: str, indices: np.ndarray, experts: int) -> list[np.ndarray]:
    pairs = indices.size
    made = [np.full(n, -1, np.int32) for n in (pairs, pairs, experts + 1, experts + 1)]
    return call(
        kernels.make_moe_rows,
        isa,
        {"experts": experts},
        indices.reshape(-1).astype(np.int32),
        *made,
        outputs=4,
    )


@levels
@pytest.mark.parametrize(("rows", "k", "experts"), [(1, 1, 1), (1, 3, 7), (23, 2, 5), (0, 2, 4)])
def test_pairs_are_sorted_by_expert(isa: str, rows: int, k: int, experts: int) -> None:
    indices = np.random.default_rng(rows).integers(0, experts, (rows, k))
    place, source, offsets, active = sorted_pairs(isa, indices, experts)
    flat = indices.reshape(-1)
    assert np.array_equal(source, np.argsort(flat, kind="stable"))
    assert np.array_equal(source[place], np.arange(flat.size))
    assert np.array_equal(offsets, np.cumsum([0, *np.bincount(flat, minlength=experts)]))
    assert active[1 : 1 + active[0]].tolist() == sorted(set(flat.tolist()))


def test_an_index_that_is_no_expert_reads_no_memory_that_is_not_ours() -> None:
    _, _, offsets, _ = sorted_pairs("generic", np.array([[-5, 9]]), 3)
    assert offsets.tolist() == [0, 1, 1, 2]


SIZES = [
    ("float32", 1, 5, 7, 3, 3),
    ("float32", 37, 40, 24, 5, 2),
    ("float32", 0, 16, 32, 4, 2),
    ("bfloat16", 70, 33, 64, 2, 1),
]
"""(dtype of the weights, tokens, N, K, experts, k)"""


@levels
@pytest.mark.parametrize(("dtype", "rows", "n", "k", "experts", "top_k"), SIZES)
def test_products_by_experts(
    isa: str, dtype: str, rows: int, n: int, k: int, experts: int, top_k: int
) -> None:
    import ml_dtypes

    w = normal(experts, n, k, seed=1).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
    x, indices = normal(rows, k), _chosen(rows, experts, top_k)
    _, source, offsets, active = sorted_pairs(isa, indices, experts)
    packed = np.concatenate([pack_rows(one) for one in w])
    form = {"n": n, "k": k, "experts": experts, "top_k": top_k, "weight_dtype": dtype}
    got = call(kernels.make_moe_linear, isa, form, x, source, offsets, active, packed, blank(rows * top_k, n))
    expert = indices.reshape(-1)[source]
    wanted = np.einsum("sk,snk->sn", x[source // top_k].astype(np.float64), w[expert].astype(np.float64))
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    alone = call(  # rows that are there already: the second product
        kernels.make_moe_linear,
        isa,
        {**form, "top_k": 0},
        x[source // top_k],
        source,
        offsets,
        active,
        packed,
        blank(rows * top_k, n),
    )
    assert np.array_equal(alone, got)


def _chosen(rows: int, experts: int, k: int) -> np.ndarray:
    rng = np.random.default_rng(7)
    return np.array([rng.permutation(experts)[:k] for _ in range(rows)], np.int64).reshape(rows, k)


@levels
@pytest.mark.parametrize(
    ("bits", "group", "zero"),
    [(8, 64, None), (8, 128, None), (4, 32, "uint8"), (4, 64, None), (5, 16, "float16")],
)
@pytest.mark.parametrize(
    ("rows", "n", "k", "apart"),
    [(1, 48, 64, 0), (90, 40, 128, 1), *([(1, 48, 64, 1), (90, 40, 128, 0)] if LONG else [])],
)
def test_products_by_quantized_experts(
    isa: str, bits: int, group: int, zero: str | None, rows: int, n: int, k: int, apart: int
) -> None:
    experts, top_k = 3, 2
    rng = np.random.default_rng(bits)
    lay = QuantLayout(n, k, bits, group, zero_point=zero)
    q = rng.integers(0, 1 << bits, (experts, n, k), np.uint8)
    scale = rng.uniform(0.01, 0.02, (experts, n, lay.groups)).astype(np.float16)
    zeros = None
    if zero is not None:
        zeros = rng.integers(0, 1 << bits, scale.shape).astype(zero)
    form = {"bits": bits, "group_size": group, "apart": apart}
    acts = {"k": k, "group_size": group, "align": lay.align, "apart": apart}
    shapes = [
        ((rows, lay.k_padded), np.int8),
        ((rows, lay.groups + apart), np.float32),
        ((rows, lay.groups + apart), np.float32),
    ]
    x = normal(rows, k)
    given = call(kernels.make_quantize_activation, isa, acts, x, *(np.zeros(*s) for s in shapes), outputs=3)
    indices = _chosen(rows, experts, top_k)
    _, source, offsets, active = sorted_pairs(isa, indices, experts)
    wide = [np.zeros((rows * top_k, s[0][1]), s[1]) for s in shapes]
    gathered = call(
        kernels.make_moe_gather, isa, {"k": k, **form, "top_k": top_k}, *given, source, *wide, outputs=3
    )
    for one, whole in zip(gathered, given, strict=True):
        assert np.array_equal(one, whole[source // top_k])
    weights = [
        np.concatenate([lay.pack(one) for one in q]),
        np.concatenate([lay.pack_scales(s) for s in scale]),
    ]
    if zeros is not None:
        weights.append(np.concatenate([lay.pack_zero_points(z) for z in zeros]))
    static = {"n": n, "k": k, "experts": experts, **form, "zero_point": zero}
    got = call(
        kernels.make_moe_quantized_linear,
        isa,
        static,
        *gathered,
        offsets,
        active,
        *weights,
        blank(rows * top_k, n),
    )
    expert = indices.reshape(-1)[source]
    for e in range(experts):
        mine = expert == e
        own = [part[mine] for part in gathered]
        z = None if zeros is None else zeros[e]
        wanted = reference_quantized_linear(lay, own[0], own[1], own[2], q[e], scale[e], z)
        np.testing.assert_allclose(got[mine], wanted, rtol=2e-5, atol=2e-4)


GATES = [
    Gate("gelu_tanh"),
    Gate("swish", alpha=1.702, limit=7.0, offset=1.0),
    Gate("silu", limit=0.5),
    Gate("silu", limit=0.5, limits_active=True),
    Gate("relu2", limit=1.5, offset=0.5, limits_active=True),
    Gate("relu2", gated=False),
    Gate("relu2", limit=1.5),
    Gate("gelu", gated=False),
]


@levels
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gate", GATES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 7), (9, 40)])
def test_gates(isa: str, gate: Gate, bias: bool, rows: int, width: int) -> None:
    import torch

    experts, top_k = 3, 2
    indices = _chosen(rows, experts, top_k)
    _, source, _, _ = sorted_pairs(isa, indices, experts)
    wide = gate.products * width
    x, b = normal(rows * top_k, wide) * 4, normal(experts, wide, seed=3)
    static: dict[str, Any] = {
        "width": width,
        "experts": experts,
        "activation": gate.activation,
        "alpha": gate.alpha,
        "limit": gate.limit,
        "offset": gate.offset,
        "bias": bias,
        "gated": gate.gated,
        "limits_active": gate.limits_active,
    }
    more = [source, indices.reshape(-1).astype(np.int32), b] if bias else []
    got = call(kernels.make_moe_gate, isa, static, x, *more, blank(rows * top_k, width))
    whole = x + b[indices.reshape(-1)[source]] if bias else x
    wanted = gate(torch.from_numpy(whole.astype(np.float64))).numpy()
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


@levels
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(1, 5), (9, 40)])
def test_results_are_added_in_the_order_of_the_choice(isa: str, bias: bool, rows: int, width: int) -> None:
    experts, top_k = 4, 3
    indices = _chosen(rows, experts, top_k)
    place, _, _, _ = sorted_pairs(isa, indices, experts)
    y, b, w = normal(rows * top_k, width), normal(experts, width, seed=2), normal(rows, top_k, seed=5)
    more = [indices.reshape(-1).astype(np.int32), b] if bias else []
    static = {"width": width, "experts": experts, "top_k": top_k, "bias": bias}
    got = call(kernels.make_moe_combine, isa, static, y, place, w, *more, blank(rows, width))
    parts = y[place].reshape(rows, top_k, width) + (b[indices] if bias else 0)
    np.testing.assert_allclose(got, (parts * w[..., None]).sum(1), rtol=1e-5, atol=1e-5)
