"""AWQ: the search against a float64 reference, never worse than round to nearest, and the pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llmc.ir.core import Graph
from llmc.ir.errors import InputError
from llmc.ir.interpreter import run
from llmc.ir.ops.nn import Linear
from llmc.ir.ops.quant import QuantizedLinear
from llmc.ir.types import Quantization
from llmc.ir.verifier import verify
from llmc.ir.weights import ArrayTensor
from llmc.passes.base import PassContext
from llmc.passes.calibration import Calibration
from llmc.passes.quantize.awq import (
    Layer,
    Rounded,
    balanced,
    candidates,
    clip,
    nearest,
    output_error,
    relative_magnitude,
    scaled_error,
    search_scale,
)
from llmc.passes.quantize.awq_pass import ActivationAware, QuantizeAwq, ScaleChannels
from llmc.passes.quantize.grid import Grid
from llmc.passes.quantize.rtn import dequantize, quantize_rtn
from llmc.passes.quantize.walk import QuantizeRtn
from llmc.passes.work import WorkFolder

from .family_configs import random_model, small_config, token_ids
from .graphs import fused_once
from .small_models import FAMILIES

Array = np.ndarray[Any, Any]
GRIDS = [Grid(4, 16, False), Grid(4, 16, True), Grid(3, 8, False), Grid(8, 32, True)]


def problem(seed: int, n: int = 12, k: int = 40, tokens: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and inputs of which a few channels are much larger than the others."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, k)) * np.exp(rng.normal(size=k) * 1.5)
    return (
        torch.from_numpy(rng.normal(size=(n, k)).astype(np.float32)),
        torch.from_numpy(x.astype(np.float32)),
    )


def layer(w: torch.Tensor) -> Layer:
    return Layer(w, torch.ones(len(w)))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_nearest_is_round_to_nearest(grid: Grid) -> None:
    w, _ = problem(0)
    q = quantize_rtn(w.numpy(), bits=grid.bits, group_size=grid.group, symmetric=grid.symmetric)
    wanted = dequantize(q, bits=grid.bits, group_size=grid.group)
    np.testing.assert_allclose(nearest(w, grid).numpy(), wanted, rtol=1e-6, atol=1e-7)


def reference_error(w: Array, x: Array, scale: Array, grid: Grid) -> float:
    """Equation 4 of the paper in float64: ‖Q(W · diag(s)) (x / s) − W x‖² over all tokens."""
    scaled = (w * scale).astype(np.float32)
    q = quantize_rtn(scaled, bits=grid.bits, group_size=grid.group, symmetric=grid.symmetric)
    rounded = dequantize(q, bits=grid.bits, group_size=grid.group).astype(np.float64)
    return float((((x / scale) @ rounded.T - x @ w.T) ** 2).sum())


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), number=st.integers(0, len(GRIDS) - 1))
def test_the_error_is_the_papers(seed: int, number: int) -> None:
    grid = GRIDS[number]
    w, x = problem(seed)
    scale = balanced(torch.from_numpy(np.random.default_rng(seed).uniform(0.3, 3, 40).astype(np.float32)))
    got = scaled_error([layer(w)], x.T @ x, scale, grid)
    wanted = reference_error(
        w.numpy().astype(np.float64), x.numpy().astype(np.float64), scale.numpy().astype(np.float64), grid
    )
    assert got == pytest.approx(wanted, rel=2e-3)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), number=st.integers(0, len(GRIDS) - 1))
def test_the_search_takes_the_best_and_never_loses(seed: int, number: int) -> None:
    """The choice is the least of the reference's errors over the grid of α, never above round to nearest."""
    grid = GRIDS[number]
    w, x = problem(seed)
    hessian, mean_abs = x.T @ x, x.abs().mean(0)
    layers = [layer(w[:5]), layer(w[5:])]
    found = search_scale(layers, hessian, mean_abs, grid)
    wide = x.numpy().astype(np.float64)
    errors = [
        reference_error(w.numpy().astype(np.float64), wide, s.numpy().astype(np.float64), grid)
        for _, s in [*candidates(mean_abs, relative_magnitude(layers, grid)), (0.0, torch.ones(40))]
    ]
    assert found.error <= found.error_nearest
    assert found.error == pytest.approx(min(errors), rel=5e-3)
    assert float(found.scale.max() * found.scale.min()) == pytest.approx(1, rel=1e-3)


def test_large_channels_get_large_scales() -> None:
    """The paper's example: 1 % of the channels carry most."""
    rng = np.random.default_rng(3)
    w = torch.from_numpy(rng.normal(size=(64, 128)).astype(np.float32))
    size = np.ones(128)
    size[[5, 77]] = 50
    x = torch.from_numpy((rng.normal(size=(256, 128)) * size).astype(np.float32))
    found = search_scale([layer(w)], x.T @ x, x.abs().mean(0), Grid(3, 128, False))
    assert found.error < 0.5 * found.error_nearest
    assert set(found.scale.topk(2).indices.tolist()) == {5, 77}


def test_constrained_scales_are_searched_among_what_can_be_absorbed() -> None:
    w, x = problem(1)

    def constrain(scale: torch.Tensor) -> torch.Tensor:
        return scale.log().reshape(-1, 2).mean(1).exp().repeat_interleave(2)

    found = search_scale([layer(w)], x.T @ x, x.abs().mean(0), GRIDS[0], constrain)
    torch.testing.assert_close(found.scale[::2], found.scale[1::2])
    assert found.error < found.error_nearest


def test_inputs_that_never_occur_and_rows_that_do_not_matter() -> None:
    w, x = problem(2)
    x[:, 3] = 0
    found = search_scale([Layer(w, torch.zeros(len(w)))], x.T @ x, x.abs().mean(0), GRIDS[0])
    assert found.error == found.error_nearest == 0 and bool((found.scale == 1).all())
    silent = search_scale([layer(w)], torch.zeros(40, 40), torch.zeros(40), GRIDS[0])
    assert bool(torch.isfinite(silent.scale).all())
    usual = search_scale([layer(w)], x.T @ x, x.abs().mean(0), GRIDS[0])
    assert bool(torch.isfinite(usual.scale).all()) and float(usual.scale.min()) > 0


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), number=st.integers(0, len(GRIDS) - 1))
def test_clipping_never_loses(seed: int, number: int) -> None:
    """By row, E[x²]-weighted error of the clipped range against that of the whole one."""
    grid = GRIDS[number]
    w, x = problem(seed)
    hessian = x.T @ x
    clipped = clip(w, hessian, grid)
    weights = hessian.diagonal().double()
    got = ((clipped.weight(w, grid) - w).double().square() * weights).sum(1)
    whole = ((nearest(w, grid) - w).double().square() * weights).sum(1)
    assert bool((got <= whole * (1 + 1e-5)).all())


def test_rows_that_are_scaled_keep_their_codes() -> None:
    w, x = problem(4)
    grid = GRIDS[0]
    clipped = clip(w, x.T @ x, grid)
    factors = torch.linspace(0.5, 2, len(w))
    moved = clipped.rows_scaled(factors)
    same = (moved.codes(w * factors[:, None], grid) == clipped.codes(w, grid)).float().mean()
    assert float(same) > 0.995  # the scale is rounded to float16 anew
    torch.testing.assert_close(
        moved.weight(w * factors[:, None], grid),
        clipped.weight(w, grid) * factors[:, None],
        rtol=2e-2,
        atol=2e-2,
    )


def test_output_error_counts_rows_by_importance() -> None:
    error, x = problem(5, n=3)
    hessian = x.T @ x
    parts = [output_error(error[i : i + 1], hessian, torch.ones(1)) for i in range(3)]
    assert output_error(error, hessian, torch.tensor([1.0, 0.0, 2.0])) == pytest.approx(
        parts[0] + 2 * parts[2], rel=1e-5
    )


# -- the pass
def tiny(name: str) -> Graph:
    return fused_once(("small", name), FAMILIES[name].build)


def outlier_graph() -> Graph:
    """A tiny llama whose norms make some channels large, as real models do."""
    graph = tiny("llama")
    for label, value in list(graph.weights.items()):
        if label.endswith("layernorm.weight") and value.weight is not None:
            w = value.weight.read().copy()
            w[[3, 17, 40]] *= 20
            graph.set_weight(value, ArrayTensor(w, label))
    return graph


def calibration(count: int = 6) -> Calibration:
    rng = np.random.default_rng(0)
    return Calibration(tuple(rng.integers(10, 384, 64) for _ in range(count)), (), "test", "0")


def relative_error(graph: Graph, source: Graph) -> float:
    ids = {source.inputs[0].name: torch.tensor([token_ids(48)])}
    got, wanted = run(graph, ids)[0], run(source, ids)[0]
    return float((got - wanted).norm() / wanted.norm())


def test_the_pass_beats_round_to_nearest_where_channels_differ() -> None:
    source = outlier_graph()
    awq, rtn = source.clone(), source.clone()
    result = QuantizeAwq(4, 16).run(awq, PassContext(calibration=calibration()))
    awq.stage = "quantized"
    verify(awq)
    assert result.changed
    layers = [op for op in awq if isinstance(op, QuantizedLinear)]
    assert len(layers) == 8 and {op.q.type.quant for op in layers} == {Quantization(4, 16, False)}
    assert sum(isinstance(op, Linear) for op in awq) == 1, "the head stays for its own pass"
    QuantizeRtn(4, 16).run(rtn, PassContext())
    assert relative_error(awq, source) < 0.8 * relative_error(rtn, source)


def test_scales_alone_keep_the_function_and_help_rounding() -> None:
    source = outlier_graph()
    scaled, rtn = source.clone(), source.clone()
    assert ScaleChannels(4, 16).run(scaled, PassContext(calibration=calibration())).changed
    assert scaled.stage == "fused" and relative_error(scaled, source) < 1e-4
    for graph in (scaled, rtn):
        QuantizeRtn(4, 16).run(graph, PassContext())
    assert relative_error(scaled, source) < 0.9 * relative_error(rtn, source)


def weights_of(graph: Graph) -> dict[str, Array]:
    return {name: v.weight.read() for name, v in graph.weights.items() if v.weight is not None}


def test_a_resumed_run_gives_the_same_bytes(tmp_path: Path) -> None:
    source = outlier_graph()
    whole, first, second = source.clone(), source.clone(), source.clone()
    QuantizeAwq(4, 16).run(whole, PassContext(calibration=calibration()))
    work = WorkFolder.open(tmp_path / "work", {"a": "b"}, resume=False)
    QuantizeAwq(4, 16).run(first, PassContext(calibration=calibration(), work=work))
    blocks = work.names()
    assert len(blocks) == 2
    work.remove(blocks[-1])  # killed in the last block
    again = WorkFolder.open(tmp_path / "work", {"a": "b"}, resume=True)
    assert again.resumed == 1
    QuantizeAwq(4, 16).run(second, PassContext(calibration=calibration(), work=again))
    wanted = weights_of(whole)
    for graph in (first, second):
        got = weights_of(graph)
        assert got.keys() == wanted.keys()
        for name, array in wanted.items():
            np.testing.assert_array_equal(got[name], array)


def test_layers_that_cannot_be_scaled_are_named_and_clipped() -> None:
    graph = tiny("gpt2")
    result = QuantizeAwq(4, 16, symmetric=True).run(graph, PassContext(calibration=calibration()))
    assert len(result.notes) == 2
    assert result.notes[0] == (
        "transformer.h.0.mlp.c_proj is not scaled: gelu in transformer.h.0.mlp.act lets no scale of channels "
        "pass"
    )
    assert sum(isinstance(op, QuantizedLinear) for op in graph) == 8


def test_layers_that_read_nothing_but_embeddings() -> None:
    """No input of their block has a gradient."""
    from transformers import MobileBertModel

    config = small_config("mobilebert", {"num_hidden_layers": 1, "num_feedforward_networks": 1})
    graph = fused_once(
        ("awq", config.model_type), lambda: random_model(config, MobileBertModel), encoder=True
    )
    first = next(op for op in graph if isinstance(op, Linear))
    source = graph.clone()
    QuantizeAwq(4, 16).run(graph, PassContext(calibration=calibration(1)))
    quantized = [op for op in graph if isinstance(op, QuantizedLinear)]
    assert any(op.q.name == f"{first.weight.name}.q" for op in quantized)
    assert relative_error(graph, source) < 0.4


def test_bits_by_layer() -> None:
    graph = tiny("llama")
    name = "model.layers.1.mlp.down_proj.weight"
    context = PassContext(calibration=calibration(2))
    context.bits[name] = 6
    QuantizeAwq(4, 16).run(graph, context)
    bits = {
        op.q.name: op.q.type.quant.bits for op in graph if isinstance(op, QuantizedLinear) if op.q.type.quant
    }
    assert bits.pop(f"{name}.q") == 6 and set(bits.values()) == {4}


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("awq-int4-g64", QuantizeAwq(4, 64, False)),
        ("awq-int4", QuantizeAwq(4, 32, False)),
        ("awq-int3-g128-sym", QuantizeAwq(3, 128, True)),
    ],
)
def test_schemes(scheme: str, expected: QuantizeAwq) -> None:
    assert ActivationAware().passes(scheme) == [expected]
    assert ActivationAware().passes("gptq-int4-g32") is None


def test_bad_options() -> None:
    with pytest.raises(InputError, match="group size 12"):
        ActivationAware().passes("awq-int4-g12")
    for options in ({"bits": 1}, {"group": -1}):
        with pytest.raises(InputError, match=next(iter(options))):
            QuantizeAwq(**options)
    with pytest.raises(InputError, match="needs text to calibrate on"):
        QuantizeAwq().run(tiny("llama"), PassContext())


def test_damaged_weights_are_named() -> None:
    graph = tiny("llama")
    value = graph.weights["model.layers.0.mlp.down_proj.weight"]
    assert value.weight is not None
    w = value.weight.read().copy()
    w[1, 2] = np.nan
    graph.set_weight(value, ArrayTensor(w, "file:down_proj"))
    with pytest.raises(InputError, match="file:down_proj holds NaN or infinite values"):
        QuantizeAwq(4, 16).run(graph, PassContext(calibration=calibration(2)))


def test_rounded_weights_stand_for_their_codes() -> None:
    w, x = problem(6)
    grid = GRIDS[2]
    rounded = clip(w, x.T @ x, grid)
    assert isinstance(rounded, Rounded)
    k = w.shape[1]
    codes = rounded.codes(w, grid)
    assert float(codes.max()) <= 7 and float(codes.min()) >= 0
    again = (codes - grid.spread(rounded.zero, k)) * grid.spread(rounded.scale, k)
    torch.testing.assert_close(rounded.weight(w, grid), again)
