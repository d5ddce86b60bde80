"""Quantized experts: each scheme's grid or its named fallback, the artifact beside its own meaning, what
experts that calibration did not reach become, and sizes.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import llmc
import numpy as np
import pytest
import torch
from llmc.cli.experts import one_step
from llmc.codegen.artifact import Artifact
from llmc.codegen.driver import check_model
from llmc.codegen.tvm.stored import stored_graph
from llmc.ir.core import Graph
from llmc.ir.errors import InputError
from llmc.ir.interpreter import run
from llmc.ir.ops.moe import Moe, QuantizedMoe
from llmc.ir.weights import ArrayTensor
from llmc.passes.base import PassContext
from llmc.passes.calibration import Calibration
from llmc.passes.manager import run_passes
from llmc.passes.quantize.by_rows import QuantizedRows, quantize_by_rows
from llmc.passes.quantize.grid import Grid, encode, search_scales
from llmc.passes.quantize.moe import nearest_experts
from llmc.passes.quantize.rtn import quantize_rtn
from llmc.passes.quantize.sensitivity import ChooseBits
from llmc.passes.registry import quantization_passes

from .conftest import LONG
from .graphs import lowered, traced
from .models import ids_of
from .moe_models import save_moe, tiny_moe
from .test_moe import artifact_logits
from .tvm_graphs import ISA

IDS = ids_of(40)
TOKENS = tuple(np.array(ids_of(120, seed=i)) for i in range(4))


@cache
def fused(name: str) -> Graph:
    return lowered(traced(tiny_moe(name), attention="eager" if name == "gpt_oss" else "sdpa"), "fused")[0]


def quantized(name: str, scheme: str, tokens: tuple[np.ndarray, ...] = TOKENS) -> tuple[Graph, list[str]]:
    held = (np.array(ids_of(60, seed=9)),)
    context = PassContext(calibration=Calibration(tokens, held, "text", "0"))
    graph, records = run_passes(fused(name).clone(), quantization_passes(scheme), context)
    return graph, [note for record in records for note in record.notes]


def error(name: str, graph: Graph) -> float:
    """Of the first mixture's result for the tokens that calibration saw, by the float graph's own input."""
    inputs: list[Any] = []

    def keep(op: Any, operands: list[Any], results: list[Any]) -> None:
        if isinstance(op, Moe) and not inputs:
            inputs.append((operands[:3], results[0]))

    run(fused(name), {"input_ids": torch.tensor(np.stack(TOKENS)[:1])}, observe=keep)
    (given, wanted) = inputs[0]
    op = next(op for op in graph if isinstance(op, QuantizedMoe))
    parts = [None if v is None else v for v in op.grouped(op.operands)][3:]
    arrays = [None if v is None else torch.from_numpy(v.weight.read()) for v in parts]
    got = op.reference({}, *given, *arrays)
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("scheme", "bits", "note"),
    [
        ("int8", 8, ""),
        ("int4-g32", 4, ""),
        ("nf4", 4, "experts are rounded to nearest (int4-g64): nf4 is for linear layers"),
        ("gguf-q8_0", 8, "experts are rounded to nearest (int8-g64-sym): q8_0 is for linear layers"),
        ("awq-int4-g32", 4, "experts are rounded to nearest (int4-g32): awq is for linear layers"),
    ],
)
def test_every_scheme_does_something_with_experts(scheme: str, bits: int, note: str) -> None:
    graph, notes = quantized("mixtral", scheme)
    mixtures = [op for op in graph if isinstance(op, QuantizedMoe)]
    assert len(mixtures) == 2 and not any(isinstance(op, Moe) for op in graph)
    for op in mixtures:
        for q in (op.up_q, op.down_q):
            assert q.type.quant is not None and q.type.quant.bits == bits
    assert not note or note in notes
    assert error("mixtral", graph) <= (0.02 if bits == 8 else 0.2)


@pytest.mark.slow
def test_gptq_of_experts_is_better_than_rounding_them() -> None:
    rounded, _ = quantized("mixtral", "int4-g32")
    coded, _ = quantized("mixtral", "gptq-int4-g32")
    assert error("mixtral", coded) < 0.85 * error("mixtral", rounded)


@pytest.mark.slow
def test_experts_that_calibration_did_not_reach_are_rounded_and_named() -> None:
    """With 8 tokens no expert sees 32: all are rounded, and the note says how many each saw."""
    graph, notes = quantized("mixtral", "gptq-int4-g32", (np.array(IDS[:8]),))
    named = [n for n in notes if "experts saw too few calibration tokens and are rounded to nearest" in n]
    assert len(named) == 2 and named[0].startswith("model.layers.0.mlp.experts: 8 of 8 experts")
    assert "expert (tokens) 0 (" in named[0]
    floats = [op for op in fused("mixtral") if isinstance(op, Moe)]
    mixtures = [op for op in graph if isinstance(op, QuantizedMoe)]
    for op, plain in zip(mixtures, floats, strict=True):
        for weight, parts in (
            (plain.gate_up, (op.up_q, op.up_scale, op.up_zero_point)),
            (plain.down, (op.down_q, op.down_scale, op.down_zero_point)),
        ):
            grid = Grid(4, 32, False)
            for e, w in enumerate(torch.from_numpy(weight.weight.read()).float()):
                scale, zero = search_scales(w, torch.ones(w.shape[1]), grid)
                spread = [grid.spread(one, w.shape[1]) for one in (scale, zero)]
                wanted = (encode(w, *spread, grid.top), scale, zero)
                for found, tensor in zip(parts, wanted, strict=True):
                    assert np.array_equal(found.weight.read()[e], tensor.numpy().astype(found.dtype))
    some, said = quantized("mixtral", "gptq-int4-g32")
    assert not [n for n in said if "8 of 8 experts" in n]
    coded = next(op for op in some if isinstance(op, QuantizedMoe)).up_q.weight
    assert not np.array_equal(coded.read(), mixtures[0].up_q.weight.read())


def test_an_expert_with_a_nan_is_refused_by_name() -> None:
    graph = fused("mixtral").clone()
    op = next(op for op in graph if isinstance(op, Moe))
    assert op.gate_up.weight is not None
    damaged = op.gate_up.weight.read().copy()
    damaged[3, 1, 2] = np.nan
    op.gate_up.weight = ArrayTensor(damaged, source="damaged.safetensors")
    context = PassContext(calibration=Calibration(TOKENS, TOKENS[:1], "text", "0"))
    with pytest.raises(InputError, match=r"damaged\.safetensors holds NaN or infinite values"):
        run_passes(graph, quantization_passes("gptq-int4-g32"), context)


def test_rounding_reads_experts_in_any_pieces() -> None:
    w = np.random.default_rng(0).standard_normal((3, 20, 24)).astype(np.float32)
    graph = Graph()
    parts = nearest_experts(graph.add_weight("w", ArrayTensor(w)), 4, 8, False)
    wanted = [quantize_rtn(one, bits=4, group_size=8, symmetric=False) for one in w]
    assert parts.zero_point is not None
    for tensor, name in ((parts.codes, "codes"), (parts.scale, "scale"), (parts.zero_point, "zero_point")):
        whole = np.stack([getattr(one, name) for one in wanted])
        assert tensor.shape == whole.shape and tensor.dtype == str(whole.dtype)
        assert np.array_equal(tensor.read(), whole)
        assert np.array_equal(tensor.read(1, 2), whole[1:2])
        assert tensor.read(2, 2).shape == (0, *whole.shape[1:])


@pytest.mark.parametrize("zero", ["", "uint8", "float16"])
def test_a_function_of_rows_quantizes_experts_too(zero: str) -> None:
    def function(rows: np.ndarray) -> QuantizedRows:
        q = quantize_rtn(rows, bits=4, group_size=16, symmetric=not zero)
        minimum = None if q.zero_point is None else -q.scale * q.zero_point.astype(np.float16)
        return QuantizedRows(q.codes, q.scale, minimum if zero == "float16" else q.zero_point)

    graph = fused("mixtral").clone()
    assert quantize_by_rows(graph, function, bits=4, group=16, zero_point=zero) >= 2
    assert error("mixtral", graph) <= 0.2


def test_bits_by_layer_are_refused() -> None:
    with pytest.raises(InputError, match="is a mixture of experts, which get the bits of the scheme"):
        ChooseBits(target=4.5).run(fused("mixtral").clone(), PassContext())


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("mixtral", "int4-g32"),
        *([pytest.param("qwen2_moe", "int8", marks=pytest.mark.slow)] if LONG else []),
        pytest.param("deepseek_v3", "int4-g16-sym", marks=pytest.mark.slow),
        pytest.param("gpt_oss", "gptq-int4-g32", marks=pytest.mark.slow),
    ],
)
def test_an_artifact_is_near_its_own_meaning(name: str, scheme: str, tmp_path: Path) -> None:
    """Kernels beside the interpreter on the weights that were shipped, out of the kernels' layouts: int8
    activations cost some percent in models this small, and a choice that falls the other way costs a row.
    """
    save_moe(name, tmp_path / "model")
    out = tmp_path / "m.llmc"
    target = f"tvm-cpu:isa={ISA}"
    llmc.compile(
        str(tmp_path / "model"), out, targets=[target], quant=scheme, verdict=False, kv_dtype="float32"
    )
    artifact = Artifact.open(out)
    graph = stored_graph(artifact)
    given = one_step(graph, artifact, np.array(IDS))
    given["output_index"] = torch.arange(len(IDS), dtype=torch.int32)
    wanted = run(graph, given)[0].numpy()
    rows = np.linalg.norm(artifact_logits(out, IDS, 17) - wanted, axis=1) / np.linalg.norm(wanted, axis=1)

    assert np.median(rows) <= 0.06  # a wrong expert or scale makes it a half

    report = check_model(str(tmp_path / "model"), targets=[target], quant=scheme, kv_dtype="float32")
    stored = artifact.manifest["quantization"]["weight_bytes"]

    beside = 16384  # names and places of the tensors, rows up to the next 16: they weigh in a tiny model only
    assert report.weight_bytes <= stored <= report.weight_bytes + beside
