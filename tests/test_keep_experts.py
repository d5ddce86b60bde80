"""`--quant keep` of mixtures in GGUF files: the blocks of stacked experts are what the kernels read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import llmc
import numpy as np
import pytest
import torch
from llmc.codegen.driver import compile_model
from llmc.codegen.tvm.emit_activations import kept_apart
from llmc.codegen.tvm.weights import expert_layouts, quant_layout
from llmc.frontend.source import open_source
from llmc.frontend.trace import trace_source
from llmc.frontend.weights import TurnedTensor
from llmc.ir.core import Graph, Op, Value
from llmc.ir.ops.moe import Moe, QuantizedMoe
from llmc.ir.ops.nn import Linear
from llmc.ir.ops.quant import QuantizedLinear, dequantized
from llmc.ir.ops.shape import Concat, Reshape, Transpose
from llmc.ir.types import TensorType, sym
from llmc.ir.weights import ArrayTensor, LazyTensor, quantized_of
from llmc.passes.base import PassContext
from llmc.passes.canonicalize.expert_weights import Stacked, Turned
from llmc.passes.canonicalize.fold import FoldConstants
from llmc.passes.canonicalize.moe import NormalizeExperts
from llmc.passes.derived import SliceRows
from llmc.passes.manager import run_passes
from llmc.passes.quantize.keep import KeepQuantized
from llmc.passes.quantize.scheme import weight_passes
from transformers import GPTJConfig, GPTJForCausalLM

from .graphs import lowered, traced
from .llama_cpp import LlamaCpp
from .models import ids_of
from .test_ggml import gguf_with, random_blocks
from .test_gguf_architectures import tiny, written

# Blocks of each layer's experts, as llama.cpp mixes them: gate and up alike, down with more bits or fewer.
MIXED: list[tuple[str, str]] = [("Q4_K", "Q6_K"), ("Q8_0", "Q5_1"), ("Q4_0", "Q5_K")]
GRIDS = [
    ("IQ2_XXS", "IQ3_XXS"),
    ("IQ2_XS", "IQ3_S"),
    ("IQ2_S", "IQ4_XS"),
    ("IQ1_S", "TQ2_0"),
    ("IQ1_M", "NVFP4"),
]
"""As large mixtures are published for small machines."""


def file_of(path: Path, kind: str, mixed: list[tuple[str, str]], others: str = "Q8_0") -> Path:
    """A small mixture whose experts lie in blocks, by layer: (gate and up, down). Every token takes all of
    them: of random weights, rounded activations choose others.
    """
    sizes: dict[str, Any] = {
        "hidden_size": 256,
        "moe_intermediate_size": 256,
        "num_hidden_layers": len(mixed),
    }
    sizes["num_experts_per_tok"] = 4
    if kind == "qwen3_moe":
        sizes["layer_types"] = ["full_attention"] * len(mixed)
    elif kind == "deepseek_v3":
        sizes["first_k_dense_replace"] = 0
    else:
        sizes["intermediate_size"] = sizes.pop("moe_intermediate_size")
    if kind == "gpt_oss":
        sizes["layer_types"] = ["sliding_attention", "full_attention"]
    model = tiny(kind, **sizes)

    def stored(name: str) -> str:
        if "_exps" not in name:
            # What a latent is projected to is narrower than a block.
            return "F32" if "gate_inp" in name or kind == "deepseek_v3" else others
        up, down = mixed[int(name.split(".")[1])]
        return down if "down" in name else up

    return written(model, kind, path, quantize=stored)


@pytest.mark.parametrize(
    ("kind", "mixed"),
    [
        *((kind, MIXED) for kind in ("qwen3_moe", "granitemoe", "mixtral")),
        pytest.param("qwen3_moe", GRIDS, marks=pytest.mark.slow),
        ("deepseek_v3", MIXED[:2]),
        ("gpt_oss", [("MXFP4", "MXFP4")] * 2),
    ],
)
def test_experts_are_kept_as_they_are_stored(kind: str, mixed: list[tuple[str, str]], tmp_path: Path) -> None:
    """Codes by the IR's meaning are the numbers that ggml has, bit for bit; gpt-oss computes with matrices
    that are turned, gates and ups in turns, and is read as it lies.
    """
    path = file_of(tmp_path / "m.gguf", kind, mixed)
    fused, _ = lowered(trace_source(open_source(path)), "fused")
    floats = [weight.weight.read() for op in fused if isinstance(op, Moe) for weight in (op.gate_up, op.down)]
    graph, records = lowered(trace_source(open_source(path)), "fused", [KeepQuantized()])
    codes: list[np.ndarray] = []
    for op in graph:
        if isinstance(op, QuantizedMoe):
            for parts in (
                (op.up_q, op.up_scale, op.up_zero_point),
                (op.down_q, op.down_scale, op.down_zero_point),
            ):
                read = [None if p is None else torch.from_numpy(p.weight.read()) for p in parts]
                codes.append(dequantized(parts[0].type.quant, *read).numpy())
    assert len(codes) == len(floats) == 2 * len(mixed)
    for one, other in zip(codes, floats, strict=True):
        assert np.array_equal(one, other)
    assert not any("experts" in note for record in records for note in record.notes)


@pytest.mark.parametrize(
    ("kind", "mixed"),
    [
        pytest.param("qwen3_moe", MIXED, marks=pytest.mark.slow),
        pytest.param("qwen3_moe", GRIDS[:3], marks=pytest.mark.slow),
        pytest.param("gpt_oss", [("MXFP4", "MXFP4")] * 2, marks=pytest.mark.slow),
    ],
)
def test_the_artifact_is_the_files_model(kind: str, mixed: list[tuple[str, str]], tmp_path: Path) -> None:
    """But for activations of 8 bits: 2.6 % of the logits' norm for the first random model; llama.cpp, which
    rounds them too, is 3.1 % away from what the file means.
    """
    path, ids = file_of(tmp_path / "m.gguf", kind, mixed), ids_of(40)
    logits: dict[str, np.ndarray] = {}
    for scheme in ("none", "keep"):
        compile_model(path, tmp_path / scheme, quant=scheme, context=64)
        llm = llmc.load(tmp_path / scheme)
        logits[scheme] = llm.logits(ids)
        # Experts of few rows are read as they lie in memory, those of many are spread first.
        assert np.array_equal(llm.logits(ids[:3]), logits[scheme][:3])
    stored = sum(p.stat().st_size for p in (tmp_path / "keep" / "weights").iterdir())
    assert stored < 0.4 * sum(p.stat().st_size for p in (tmp_path / "none" / "weights").iterdir())
    gap = np.linalg.norm(logits["keep"] - logits["none"]) / np.linalg.norm(logits["none"])
    assert gap < 0.03
    if kind == "gpt_oss":  # whose blocks at this size abort llama.cpp
        return
    with LlamaCpp(path) as opened:
        theirs = opened.logits(ids)
    assert gap < np.linalg.norm(theirs - logits["none"]) / np.linalg.norm(logits["none"]) < 0.05


def test_experts_without_codes_of_their_own_stay_floats_and_say_why(tmp_path: Path) -> None:
    """A down weight in floats."""
    path = file_of(tmp_path / "m.gguf", "qwen3_moe", [("Q4_0", "Q8_0"), ("Q8_0", "F16")])
    graph, records = lowered(trace_source(open_source(path)), "fused", [KeepQuantized()])
    assert [type(op) for op in graph if isinstance(op, Moe | QuantizedMoe)] == [QuantizedMoe, Moe]
    notes = [note for record in records for note in record.notes]
    assert any(
        "the experts of 1 mixtures stay floats: model.layers.1.mlp.experts.down_proj (stored as" in note
        for note in notes
    )


# -- experts that are put together in the graph, as of a loop of a model's own

_E, _I, _D = 3, 256, 512


def _together(folder: Path, up: str, down: str, form: str) -> Graph:
    """A mixture of three matrices in blocks, experts one below the other: gate and up, joined, of types
    "A B", down of another. "turned": the model has the matrices transposed, as stacks that lie straight;
    "crossed": down is stored transposed, experts one below the other.
    """
    graph = Graph()
    x = graph.add_input("x", TensorType("float32", (sym("T"), _D)))
    indices = graph.add_input("i", TensorType("int64", (sym("T"), 2)))
    weights = graph.add_input("w", TensorType("float32", (sym("T"), 2)))

    def stored(name: str, kind: str, rows: int, k: int, seed: int) -> LazyTensor:
        if kind == "F32":
            return ArrayTensor(np.random.default_rng(seed).random((_E * rows, k), np.float32), name)
        path = folder / f"{name}.gguf"
        return gguf_with(path, kind, random_blocks(kind, _E * rows, k, seed), k)["t"]

    def put(op: Op) -> Value:
        graph.append(op)
        return op.results[0]

    kinds = up.split()
    halves = [stored(n, k, _I, _D, i) for i, (n, k) in enumerate(zip(("gate", "up"), kinds, strict=True))]
    last = stored("down", down, *((_I, _D) if form == "crossed" else (_D, _I)), 2)
    if form == "turned":
        turned = [graph.add_weight(f"w{i}", TurnedTensor(Stacked(h, _E))) for i, h in enumerate(halves)]
        both = put(Concat(turned, axis=-1))
        second = graph.add_weight("down", TurnedTensor(Stacked(last, _E)))
    else:
        parts = [graph.add_weight(f"w{i}", h) for i, h in enumerate(halves)]
        both = put(Concat([put(Reshape(p, shape=(_E, _I, _D))) for p in parts], axis=-2))
        shape = (_E, _I, _D) if form == "crossed" else (_E, _D, _I)
        second = put(Reshape(graph.add_weight("down", last), shape=shape))
        second = put(Transpose(second, perm=(-1, -2))) if form == "crossed" else second
    op = Moe(x, indices, weights, both, second, None, None, transposed=form == "turned")
    graph.outputs, graph.output_names = [put(op)], ["y"]
    graph.stage = "fused"
    return graph


def test_some_matrices_of_a_turned_stack_have_its_codes(tmp_path: Path) -> None:
    blocks = gguf_with(tmp_path / "m.gguf", "Q4_K", random_blocks("Q4_K", _E * _I, _D, 0), _D)["t"]
    whole = Stacked(blocks, _E)
    some = Turned(SliceRows(Turned(whole), 1, 3))
    stored, kept = quantized_of(whole), quantized_of(some)
    assert stored is not None and kept is not None
    assert np.array_equal(kept.codes.read(), stored.codes.read(1, 3))
    assert np.array_equal(kept.scale.read(), stored.scale.read(1, 3))
    assert np.array_equal(some.read(), whole.read(1, 3))


@pytest.mark.parametrize("form", ["flat", "turned"])
@pytest.mark.parametrize(("up", "down"), [("Q4_K", "Q6_K"), ("Q8_0", "Q5_1"), ("IQ4_XS", "IQ2_XXS")])
def test_codes_of_experts_that_are_put_together_are_kept(
    up: str, down: str, form: str, tmp_path: Path
) -> None:
    """The blocks' own numbers, bit for bit."""
    graph = _together(tmp_path, f"{up} {up}", down, form)
    floats, _ = run_passes(graph.clone(), [FoldConstants(), NormalizeExperts()], PassContext())
    (one,) = [op for op in floats if isinstance(op, Moe)]
    wanted = [one.gate_up.weight.read(), one.down.weight.read()]
    kept, _ = run_passes(graph, [FoldConstants(), NormalizeExperts(), KeepQuantized()], PassContext())
    (op,) = [op for op in kept if isinstance(op, QuantizedMoe)]
    parts = ((op.up_q, op.up_scale, op.up_zero_point), (op.down_q, op.down_scale, op.down_zero_point))
    for three, floats_of in zip(parts, wanted, strict=True):
        read = [None if p is None else torch.from_numpy(p.weight.read()) for p in three]
        assert np.array_equal(dequantized(three[0].type.quant, *read).numpy(), floats_of)
        for start, stop in ((0, 1), (1, 3), (3, None)):  # an expert is read for itself
            assert np.array_equal(three[0].weight.read(start, stop), three[0].weight.read()[start:stop])


@pytest.mark.parametrize(
    ("up", "down", "form", "why"),
    [
        ("Q4_K Q6_K", "Q8_0", "flat", r"w0\.rows \(stored as gates and ups in codes of two kinds\)"),
        ("Q4_K F32", "Q8_0", "flat", r"w0\.rows \(stored as floats in part\)"),
        ("Q4_K Q4_K", "F32", "flat", r"down\.reshape \(stored as floats, or in codes that no kernel reads"),
        (
            "Q4_K Q4_K",
            "Q8_0",
            "crossed",
            r"down\.rows \(stored transposed, with codes in groups along the axis",
        ),
    ],
)
def test_codes_that_are_not_kept_say_why(up: str, down: str, form: str, why: str, tmp_path: Path) -> None:
    graph = _together(tmp_path, up, down, form)
    other = graph.add_weight(
        "other", gguf_with(tmp_path / "o.gguf", "Q8_0", random_blocks("Q8_0", 64, _D), _D)["t"]
    )
    layer = Linear(graph.inputs[0], other, None)
    graph.append(layer)
    graph.outputs.append(layer.result)
    graph.output_names.append("z")
    kept, records = run_passes(graph, [FoldConstants(), NormalizeExperts(), KeepQuantized()], PassContext())
    assert not [op for op in kept if isinstance(op, QuantizedMoe)]
    notes = [note for record in records for note in record.notes]
    assert any(re.search(f"the experts of 1 mixtures stay floats: {why}", note) for note in notes), notes


def test_the_largest_activations_are_kept_apart_of_norms_and_of_rows_that_logits_are_wanted_of() -> None:
    sizes = {"hidden_size": 256, "moe_intermediate_size": 256, "layer_types": ["full_attention"] * 2}
    graph, _ = lowered(traced(tiny("qwen3_moe", **sizes)), "paged", weight_passes("int4-g64", None, None))
    kept = {op.q.name: kept_apart(op.x, quant_layout(op)) for op in graph if isinstance(op, QuantizedLinear)}
    kept |= {o.up_q.name: kept_apart(o.x, expert_layouts(o)[0]) for o in graph if isinstance(o, QuantizedMoe)}
    found = {
        name: {n for key, n in kept.items() if name in key}
        for name in ("q_proj", "o_proj", "gate_up", "head")
    }
    assert found == {"q_proj": {1}, "o_proj": {0}, "gate_up": {1}, "head": {4}} and len(kept) == 7


def test_rows_that_are_chosen_of_a_norm_are_a_norms() -> None:
    """Attention and MLP read one norm, of which the last layer's MLP needs the wanted rows."""
    torch.manual_seed(0)
    sizes = {"n_embd": 64, "n_inner": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 16, "n_positions": 64}
    model = GPTJForCausalLM(GPTJConfig(vocab_size=384, **sizes)).eval()
    graph, _ = lowered(traced(model), "paged", weight_passes("int4-g64", None, None))
    layers = [op for op in graph if isinstance(op, QuantizedLinear)]
    kept = {op.q.name: kept_apart(op.x, quant_layout(op)) for op in layers}
    (last,) = [op for op in layers if "h.1.mlp.fc_in" in op.q.name]
    assert last.x.producer is not None and last.x.producer.opname == "gather_last"
    assert kept[last.q.name] == 1 and [n for name, n in kept.items() if "lm_head" in name] == [4]
