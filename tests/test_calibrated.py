"""Quantization through the quantized prefix: blocks, the head in pieces, the walk, and tuning."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llmc.ir import interpreter
from llmc.ir.core import Graph, Value
from llmc.ir.ops import nn
from llmc.ir.ops.math import Add
from llmc.ir.ops.quant import QuantizedLinear
from llmc.ir.types import TensorType, sym
from llmc.ir.weights import ArrayTensor
from llmc.passes.base import PassContext
from llmc.passes.calibration import Calibration
from llmc.passes.quantize import calibrated as calibrated_module
from llmc.passes.quantize import head as head_module
from llmc.passes.quantize.awq_pass import QuantizeAwq
from llmc.passes.quantize.best_pass import QuantizeBest, split_sequences
from llmc.passes.quantize.blocks import (
    Activations,
    read_weight,
    run_ops,
    split_blocks,
    whole_weights,
)
from llmc.passes.quantize.calibrated import (
    Inputs,
    Walked,
    as_coded,
    layers_of,
    measure_inputs,
    read_of_exact,
    walk,
)
from llmc.passes.quantize.gptq_pass import QuantizeGptq, quantize_layer
from llmc.passes.quantize.grid import Grid
from llmc.passes.quantize.head import find_head, token_losses
from llmc.passes.quantize.products import short_factors
from llmc.passes.quantize.tune import BATCH, Tuning, divergence, scaled, tune
from llmc.passes.quantize.walk import QuantizeRtn
from llmc.passes.work import WorkFolder
from transformers import XGLMConfig, XGLMForCausalLM

from .conftest import LONG
from .graphs import fused_once, logits_of
from .models import TINY, ids_of, tiny_model


def visited_twice() -> Graph:
    """Two layers that are gone through one after the other, and once more (as HRM's)."""
    rng, width = np.random.default_rng(0), 32
    graph = Graph()
    ids = graph.add_input("ids", TensorType("int64", (1, sym("T"))))

    def weight(name: str, rows: int) -> Value:
        data = rng.standard_normal((rows, width)).astype(np.float32) / width**0.5
        return graph.add_weight(name, ArrayTensor(data, name))

    def add(op: Any, loc: str) -> Value:
        op.loc = loc
        return graph.append(op).result

    layers = [(f"layers.{i}.mlp", weight(f"layers.{i}.mlp.weight", width)) for i in range(2)]
    x = add(nn.Embedding(ids, weight("embedding", 384)), "embedding")
    for loc, w in layers * 2:
        x = add(Add(x, add(nn.Linear(x, w, None), loc)), loc)
    graph.outputs = [add(nn.Linear(x, weight("head", 384), None), "head")]
    graph.output_names, graph.stage = ["logits"], "fused"
    graph.facts["kind"] = "causal_lm"
    return graph


@pytest.mark.parametrize(
    "one", [QuantizeGptq(4, 16), QuantizeAwq(4, 16), QuantizeBest(4, 16)], ids=lambda p: p.name
)
def test_layers_that_are_gone_through_twice(one: Any) -> None:
    graph = visited_twice()
    blocks = split_blocks(graph)
    assert [op for block in blocks for op in block.ops] == graph.ops
    assert [b.name for b in blocks][1:5] == ["layers.0", "layers.1", "layers.0 (2)", "layers.1 (2)"]
    ids = {"ids": torch.tensor([ids_of(40)])}
    wanted = interpreter.run(graph, ids)[0]
    one.run(graph, PassContext(calibration=calibration(6)))
    quantized = [op for op in graph if isinstance(op, QuantizedLinear)]
    assert len(quantized) == 4 and len({op.q for op in quantized}) == 2
    got = interpreter.run(graph, ids)[0]
    assert float((got - wanted).norm() / wanted.norm()) < 0.15


FAMILIES = sorted(TINY)[:: 1 if LONG else 2]


def fused(name: str, **changes: Any) -> Graph:
    attention = "eager" if name == "gemma2" else "sdpa"  # scores with a soft cap
    key = ("tiny", name, *sorted(changes.items()))
    options = {"encoder": not TINY[name].causal, "attention": attention}
    return fused_once(key, lambda: tiny_model(name, **changes), **options)


def scaled_queries() -> Graph:
    """Of a model that multiplies its queries by one number in each layer: merged, the first one makes it."""
    sizes = {"d_model": 120, "attention_heads": 4, "ffn_dim": 128, "num_layers": 2, "vocab_size": 384}
    torch.manual_seed(0)
    return fused_once(("scaled queries",), lambda: XGLMForCausalLM(XGLMConfig(**sizes, init_std=0.2)).eval())


def calibration(count: int, held: int = 2, length: int = 48) -> Calibration:
    sequences = [np.array(ids_of(length, seed=i), np.int64) for i in range(count + held)]
    return Calibration(tuple(sequences[:count]), tuple(sequences[count:]), "test", "0" * 64)


def kl_to(reference: Graph, graph: Graph, seed: int = 99) -> float:
    ids = ids_of(64, seed=seed)
    p, q = (torch.log_softmax(logits_of(g, ids).double(), -1) for g in (reference, graph))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_are_the_whole_graph_and_run_like_it(name: str, tmp_path: Path) -> None:
    graph = fused(name)
    blocks = split_blocks(graph)
    assert [op for b in blocks for op in b.ops] == graph.ops
    for block in blocks:
        for segment in block.segments:
            assert len({id(layer.x) for layer in segment.layers}) <= 1
    ids = ids_of(21)
    activations = Activations(tmp_path / "values")
    activations.begin(graph, [np.array(ids)])
    for block in blocks:
        for segment in block.segments:
            activations.advance(segment)
    rows = activations.load(0, graph.outputs)[graph.outputs[0]][0]
    torch.testing.assert_close(rows, logits_of(graph, ids), rtol=1e-5, atol=1e-5)
    assert activations.alive == set(graph.outputs)  # nothing dead was kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int64])
def test_values_of_any_dtype_are_kept_in_files(dtype: torch.dtype, tmp_path: Path) -> None:
    (ids,) = fused("llama").inputs
    activations = Activations(tmp_path / "values")
    given = torch.arange(42).reshape(2, 3, 7).to(dtype).transpose(0, 1)  # not contiguous
    activations.save(0, {ids: given})
    assert len(list((tmp_path / "values").iterdir())) == 1
    found = activations.load(0, [ids])[ids]
    assert found.dtype == dtype and torch.equal(found, given)


def test_values_stay_in_memory_as_far_as_it_goes(tmp_path: Path) -> None:
    graph = fused("llama")
    (ids,) = graph.inputs
    one = Activations(tmp_path / "one", memory=2 * 7 * 8)
    one.begin(graph, [np.arange(7) + i for i in range(3)])
    assert len(list((tmp_path / "one").iterdir())) == 1
    other = Activations(tmp_path / "other", memory=7 * 8)
    other.adopt(one, [ids], 3)
    one.drop([ids])
    one.save(2, {ids: torch.zeros(1, 14, dtype=torch.int64)[:, 7:]})
    for i in range(3):
        assert other.load(i, [ids])[ids].tolist() == [list(range(i, 7 + i))]
    kept = one.load(2, [ids])[ids]
    assert kept.tolist() == [[0] * 7]
    assert kept.untyped_storage().nbytes() == 7 * 8  # not the whole that it was a part of


def test_files_of_dead_values_are_written_over_but_not_those_of_others(tmp_path: Path) -> None:
    graph = fused("llama")
    (ids,) = graph.inputs
    one, other = Activations(tmp_path / "one"), Activations(tmp_path / "other")
    one.begin(graph, [np.arange(7), np.arange(7)])
    other.adopt(one, [ids], 1)
    assert len(other) == 1
    one.drop([ids])
    one.save(0, {ids: torch.full((1, 7), 9)})
    assert other.load(0, [ids])[ids].tolist() == [list(range(7))]
    assert one.load(0, [ids])[ids].tolist() == [[9] * 7]
    assert len(list((tmp_path / "one").iterdir())) == 1  # that of the second sequence


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_losses_in_pieces_of_the_vocabulary(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64 softmax over whole logits; gemma2 caps its logits after the head."""
    monkeypatch.setattr(head_module, "CHUNK", 37)
    graph = fused(name)
    head = find_head(graph)
    rng = torch.Generator().manual_seed(1)
    width = head.x.shape[-1]
    assert isinstance(width, int)
    source = torch.randn(9, width, generator=rng)
    other = source + 0.3 * torch.randn(9, width, generator=rng)
    targets = torch.arange(9) * 3
    p, q = (torch.cat(list(head.logits(x, {"T": 9})), -1).double().log_softmax(-1) for x in (source, other))
    losses = token_losses((head, source), (head, other), targets, {"T": 9})
    torch.testing.assert_close(losses.kl.double(), (p.exp() * (p - q)).sum(-1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses.nll.double(), -q[range(9), targets], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses.nll_source.double(), -p[range(9), targets], rtol=1e-5, atol=1e-6)
    assert losses.agree.tolist() == (p.argmax(-1) == q.argmax(-1)).tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_gptq_loses_less_than_round_to_nearest(name: str) -> None:
    graph = fused(name)
    if graph.facts["kind"] != "causal_lm":
        pytest.skip("no logits to compare")
    nearest, better = graph.clone(), graph.clone()
    QuantizeRtn(bits=3, group=16).run(nearest, PassContext())
    context = PassContext(calibration=calibration(12))
    result = QuantizeGptq(bits=3, group=16).run(better, context)
    assert result.changed
    assert kl_to(graph, better) < kl_to(graph, nearest)


def walked(graph: Graph, work: WorkFolder, data: Calibration, counter: list[str]) -> Walked:
    def method(inputs: Inputs, grid: Grid, name: str) -> Any:
        counter.append(name)
        return quantize_layer(inputs, grid, name, sweeps=1)

    def grid_of(weight: Value) -> Grid:
        return Grid(4, 16, False)

    return walk(graph, PassContext(), work, grid_of, method, sequences=data.sequences, others=data.held)


def inputs_of(activations: Activations, segment: Any) -> torch.Tensor:
    """What the segment's layers read, float64 [tokens, K]."""
    x = segment.layers[0].x
    rows = [activations.load(i, [x])[x].flatten(0, -2) for i in range(len(activations))]
    return torch.cat(rows).double()


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox"])
def test_inputs_are_what_the_definition_says(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float64 over all tokens, for layers whose outputs are fewer than half of their inputs, and for
    the others: what they lack is summed in two ways. In float32 throughout: `short_factors` has a test of its
    own.
    """
    monkeypatch.setattr(calibrated_module, "short_factors", nullcontext)
    graph, data = fused(name, intermediate_size=160), calibration(3)
    exact, quantized = Activations(tmp_path / "a"), Activations(tmp_path / "b")
    exact.begin(graph, data.sequences)
    quantized.begin(graph, data.sequences)
    rng = torch.Generator().manual_seed(0)
    shapes: set[bool] = set()
    for block in split_blocks(graph):
        for segment in block.segments:
            targets = layers_of(graph, segment)
            reads = read_of_exact(segment, targets)
            x_f, x_q = (inputs_of(a, segment) if targets else None for a in (exact, quantized))
            exact.advance(segment, also=reads)
            for weight, inputs in measure_inputs(segment, exact, quantized, targets).items():
                assert x_f is not None and x_q is not None
                w = read_weight(weight).double()
                missing = w @ (x_f - x_q).T @ x_q / len(x_q)
                assert inputs.tokens == len(x_q)
                torch.testing.assert_close(
                    inputs.hessian.double(), x_q.T @ x_q / len(x_q), rtol=1e-4, atol=1e-5
                )
                scale = float(missing.abs().max())
                # It is a difference of products, where it is 0 as well.
                whole = float((w @ inputs.hessian.double()).abs().max())
                loose = 1e-4 * scale + 2e-6 * whole
                torch.testing.assert_close(inputs.missing.double(), missing, rtol=0, atol=loose)
                if scale:
                    shapes.add(2 * len(w) < w.shape[1])
            exact.drop(v for v in reads if v not in segment.outputs)
            assert exact.alive == set(segment.outputs)
            noise = {v: read_weight(v) for v in whole_weights(segment.ops)}
            for v, w in noise.items():
                if w.ndim == 2:
                    noise[v] = w + 0.1 * w.std() * torch.randn(w.shape, generator=rng)
            quantized.advance(segment, lambda v, noise=noise: noise[v] if v in noise else read_weight(v))
    assert shapes == {False, True}


def test_short_factors_round_factors_alone_and_leave_nothing_behind() -> None:
    """Each product of two is off by at most 2⁻⁸ of itself and a little, their sum by no more than that of
    all; afterwards float32 is float32, after an error too.
    """
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(512, 96, generator=rng) * torch.logspace(-1, 1, 96)
    plain = x.T @ x
    with short_factors():
        short = x.T @ x
    wide = x.double()
    assert bool(((short - wide.T @ wide).abs() <= 1.01 * 2**-8 * (wide.abs().T @ wide.abs())).all())
    assert float(torch.linalg.eigvalsh(short.double()).min()) > 0
    with pytest.raises(KeyError), short_factors():
        raise KeyError
    assert torch.equal(x.T @ x, plain)


def test_a_walk_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    graph, data = fused("llama"), calibration(4)
    work = WorkFolder.open(tmp_path / "work", {}, resume=False)
    whole: list[str] = []
    first = walked(graph, work, data, whole)
    pieces = work.names()
    assert len(pieces) > 1
    work.remove(pieces[-1])
    again = WorkFolder.open(tmp_path / "work", {}, resume=True)
    rest: list[str] = []
    second = walked(graph, again, data, rest)
    assert 0 < len(rest) < len(whole) and rest == whole[-len(rest) :]
    for weight, parts in first.coded.items():
        for part, array in parts.items():
            np.testing.assert_array_equal(array, second.coded[weight][part])


def tuning_of(tmp_path: Path, name: str = "llama") -> tuple[Tuning, Calibration]:
    graph, data = fused(name) if name in TINY else scaled_queries(), calibration(4, held=2 * BATCH)
    work = WorkFolder.open(tmp_path / "work", {}, resume=False)
    return Tuning.start(graph, walked(graph, work, data, [])), data


def source_of(tuning: Tuning, number: int) -> torch.Tensor:
    return tuning.found.exact.load(number, [tuning.head.x])[tuning.head.x][0]


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2", "scaled queries"])
def test_gradients_by_blocks_are_those_of_the_whole_model(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_module, "CHUNK", 29)
    tuning, data = tuning_of(tmp_path, name)
    ids, source = data.held[0], source_of(tuning, 4)
    leaves = {v: torch.zeros_like(p.value).requires_grad_(True) for v, p in tuning.parameters.items()}
    found = tuning.found

    def fetch(v: Value) -> torch.Tensor:
        if v not in leaves:
            return read_weight(v)
        if v in found.coded:
            return scaled(found.coded[v], found.grids[v], leaves[v])
        return read_weight(v) * leaves[v].exp()

    tokens = tuning.graph.inputs[0]
    ops = [op for b in tuning.blocks for op in b.ops]
    dims = {"T": len(ids)}
    hidden = run_ops(ops, {tokens: torch.tensor(ids)[None]}, [tuning.head.x], dims, fetch)[tuning.head.x][0]
    p, q = (torch.cat(list(tuning.head.logits(x, dims)), -1).log_softmax(-1) for x in (source, hidden))
    loss = (p.exp() * (p - q)).sum(-1).mean()
    loss.backward()
    monkeypatch.setattr("llmc.passes.quantize.tune.BATCH", 1)
    gradients: dict[Value, torch.Tensor] = {}
    for value, parameter in tuning.parameters.items():
        monkeypatch.setattr(
            parameter,
            "step",
            lambda rate, count, v=value, p=parameter: gradients.__setitem__(v, p.gradient.clone()),
        )
    told: list[float] = []
    tune(tuning, [ids], lambda i: source, after=told.append)
    assert told[0] == pytest.approx(float(loss.detach()), rel=1e-3)
    assert len(gradients) == len(leaves)
    for value, leaf in leaves.items():
        expected = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        scale = float(expected.abs().max())
        torch.testing.assert_close(gradients[value], expected, rtol=1e-3, atol=1e-3 * scale + 1e-9)


def test_tuning_lowers_the_loss_and_goes_on_from_its_arrays(tmp_path: Path) -> None:
    tuning, data = tuning_of(tmp_path)
    before = divergence(tuning, data.held[0], source_of(tuning, 4))
    saved: list[dict[str, Any]] = []

    def after(loss: float) -> None:
        if tuning.seen == BATCH + 1:
            saved.append({name: array.copy() for name, array in tuning.arrays().items()})

    rows = [data.held[0]] * (2 * BATCH)
    tune(tuning, rows, lambda i: source_of(tuning, 4), rate=3e-3, after=after)
    assert divergence(tuning, data.held[0], source_of(tuning, 4)) < before
    other = Tuning.start(tuning.graph, tuning.found)
    other.restore(saved[0])
    assert other.seen == BATCH + 1
    tune(other, rows, lambda i: source_of(tuning, 4), rate=3e-3)
    for value, parameter in tuning.parameters.items():
        torch.testing.assert_close(other.parameters[value].value, parameter.value, rtol=0, atol=0)


def test_finishing_applies_the_share_that_was_chosen(tmp_path: Path) -> None:
    tuning, data = tuning_of(tmp_path)
    tune(tuning, data.held, lambda i: source_of(tuning, 4 + i), rate=1e-2)
    tuning.share = 0.5
    chosen = divergence(tuning, data.held[1], source_of(tuning, 5))
    tuning.finish()
    plain = Tuning.start(tuning.graph, tuning.found)
    # Scales are rounded to float16 when they are stored.
    assert divergence(plain, data.held[1], source_of(tuning, 5)) == pytest.approx(chosen, rel=2e-2)
    for weight, parts in tuning.found.coded.items():
        assert parts["scale"].dtype == np.float16
        assert bool(torch.isfinite(as_coded(parts).weight(tuning.found.grids[weight])).all())


@pytest.mark.slow
def test_best_is_no_worse_on_held_text_than_its_first_step() -> None:
    graph = fused("llama")
    data = calibration(4 * BATCH, held=3)
    plain, best = graph.clone(), graph.clone()
    QuantizeBest(bits=3, group=16, tune=False).run(plain, PassContext(calibration=data))
    result = QuantizeBest(bits=3, group=16).run(best, PassContext(calibration=data))
    (note,) = [n for n in result.notes if "held text" in n]
    losses = [float(part.split(": ")[1]) for part in note.split(";")[0].split("tuning: ")[1].split(", ")]
    assert len(losses) == 3 and min(losses) <= losses[0]
    assert kl_to(graph, best) < 1.1 * kl_to(graph, plain)


def test_sequences_to_tune_on_are_other_ones() -> None:
    data = calibration(20, held=2)
    first, rest = split_sequences(data.sequences, data.held)
    assert len(rest) == BATCH and len(first) == 20 - BATCH
    assert not {id(one) for one in first} & {id(one) for one in rest}
    assert split_sequences(data.sequences, ()) == (list(data.sequences), [])
    assert split_sequences(data.sequences[:7], data.held) == (list(data.sequences[:7]), [])


def test_non_finite_weights_are_refused_by_name() -> None:
    from llmc.ir.errors import InputError
    from llmc.ir.weights import ArrayTensor

    graph = fused("llama")
    name = next(n for n in graph.weights if "down_proj" in n)
    weight = graph.weights[name]
    assert weight.weight is not None
    damaged = weight.weight.read().copy()
    damaged[1, 2] = np.nan
    weight.weight = ArrayTensor(damaged, f"model.safetensors:{name}")
    with pytest.raises(InputError, match=f"model.safetensors:{name} holds NaN or infinite values"):
        QuantizeGptq().run(graph, PassContext(calibration=calibration(2)))


def test_without_text_there_is_no_calibrated_quantization() -> None:
    from llmc.ir.errors import InputError

    with pytest.raises(InputError, match="quantize-gptq needs text to calibrate on"):
        QuantizeGptq().run(fused("llama"), PassContext())
