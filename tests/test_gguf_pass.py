"""GGUF's schemes over the graph: which weight gets which type, what importance is measured, what runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from llmc.ir.core import Value
from llmc.ir.errors import InputError
from llmc.ir.interpreter import run
from llmc.ir.ops.nn import Linear
from llmc.ir.ops.quant import QuantizedEmbedding, QuantizedLinear
from llmc.ir.types import TensorType
from llmc.ir.weights import ArrayTensor
from llmc.passes.base import PassContext
from llmc.passes.calibration import Calibration
from llmc.passes.derived import CastTensor, ConcatRows
from llmc.passes.merged_names import merged_name, merged_names
from llmc.passes.quantize.gguf.encode import encode
from llmc.passes.quantize.gguf.importance import FLOOR, importances
from llmc.passes.quantize.gguf.mixture import Role, block_type, more_bits
from llmc.passes.quantize.gguf.names import named_parts
from llmc.passes.quantize.gguf.walk import EncodedTensor, EncodeGguf, QuantizeGguf
from llmc.passes.registry import quantization_passes
from llmc.passes.work import WorkFolder

from .graphs import fused_once, logits_of
from .models import ids_of, tiny_model

WIDE = {"hidden_size": 256, "intermediate_size": 512}


def fused(name: str = "llama", **changes: Any) -> Any:
    return fused_once(("tiny", name, *sorted(changes.items())), lambda: tiny_model(name, **changes))


def calibration(count: int = 3, length: int = 32) -> Calibration:
    sequences = tuple(np.array(ids_of(length, seed=i), np.int64) for i in range(count))
    return Calibration(sequences, sequences[:1], "ids", "0" * 64)


def encoded_types(graph: Any) -> dict[str, str]:
    """Block type by the name of each weight's codes."""
    found: dict[str, str] = {}
    for op in graph:
        if isinstance(op, (QuantizedLinear, QuantizedEmbedding)):
            part: Any = op.q.weight
            while hasattr(part, "parts"):
                part = part.parts[0]
            found[op.q.name] = part.tensor.ggml_type
    return found


@pytest.mark.parametrize(
    ("scheme", "role", "wanted"),
    [
        ("q4_k_m", Role("model.layers.1.self_attn.q_proj.weight", 512), "Q4_K"),
        ("q4_k_m", Role("model.layers.0.self_attn.v_proj.weight", 512), "Q6_K"),
        ("q4_k_m", Role("model.layers.4.self_attn.v_proj.weight", 512), "Q4_K"),
        ("q4_k_m", Role("model.layers.7.mlp.down_proj.weight", 512), "Q6_K"),
        ("q4_k_m", Role("model.layers.4.mlp.down_proj.weight", 576), "Q5_0"),
        ("q4_k_m", Role("transformer.h.1.attn.c_attn.weight", 512), "Q5_K"),
        ("q5_k_m", Role("model.layers.4.mlp.gate_proj.weight", 512), "Q5_K"),
        ("q5_k_m", Role("model.layers.4.mlp.gate_proj.weight", 576), "Q5_1"),
        ("q4_k_m", Role("lm_head.weight", 512, head=True), "Q6_K"),
        ("q4_k_m", Role("lm_head.weight", 576, head=True), "Q8_0"),
        ("q4_k_m", Role("model.embed_tokens.weight", 512), "Q4_K"),
        ("q4_0", Role("model.layers.0.mlp.down_proj.weight", 512), "Q4_0"),
        ("q8_0", Role("lm_head.weight", 512, head=True), "Q8_0"),
        ("q6_k", Role("model.layers.0.mlp.down_proj.weight", 48), None),
        ("q8_0", Role("transformer.wpe.weight", 64), None),
    ],
)
def test_types_are_llama_cpps(scheme: str, role: Role, wanted: str | None) -> None:
    assert block_type(scheme, role, layers=8) == wanted


def test_layers_with_more_bits() -> None:
    assert [i for i in range(16) if more_bits(i, 16)] == [0, 1, 4, 7, 10, 13, 14, 15]


def test_names_of_merged_weights() -> None:
    assert merged_names("m.layers.0.attn.q_proj.weight+k_proj+v_proj") == [
        f"m.layers.0.attn.{part}.weight" for part in ("q_proj", "k_proj", "v_proj")
    ]
    assert merged_names("model.norm.weight.add") == ["model.norm.weight.add"]


@pytest.mark.parametrize(
    ("others", "name"),
    [
        (["m.layers.0.attn.k_proj.bias", "m.layers.0.mlp.fc1.bias"], "k_proj+-mlp-fc1"),
        (["m.other.k.bias"], "---other-k"),
        (["m.layers.0.attn.inner.k.bias"], "-attn-inner-k"),
        (["m.layers.0.k.bias"], "-k"),
    ],
)
def test_names_of_merged_parts_of_other_modules(others: list[str], name: str) -> None:
    first = "m.layers.0.attn.q_proj.bias"
    assert merged_name([first, *others]) == f"{first}+{name}"
    assert merged_names(f"{first}+{name}") == [first, *others]
    assert merged_names(f"{first}+{name}_.q") == [first, *others]


def test_parts_of_merged_weights_have_names_of_their_own() -> None:
    """Of two merges too, the inner one cast because another part is wider; whatever names are left."""
    parts = [ArrayTensor(np.full((n, 32), n, np.float32), f"w{n}") for n in (1, 2, 3)]
    inner = CastTensor(ConcatRows(parts[1:]), "float32")
    value = Value(TensorType("float32", (6, 32)), "m.0.attn.q.weight+-mlp-gate+-mlp-up")
    value.weight = ConcatRows([parts[0], inner])
    names = ["m.0.attn.q.weight", "m.0.mlp.gate.weight", "m.0.mlp.up.weight"]
    assert [(name, len(part.read())) for name, part in named_parts(value)] == list(
        zip(names, (1, 2, 3), strict=True)
    )
    value.name = "other"
    assert len({name for name, _ in named_parts(value)}) == 3


def test_mixture_splits_merged_projections() -> None:
    graph = fused(**WIDE, num_hidden_layers=3)
    before = logits_of(graph, ids_of(24))
    QuantizeGguf("q4_k_m").run(graph, PassContext(calibration=calibration()))
    types = encoded_types(graph)
    value = {name: kind for name, kind in types.items() if ".self_attn.q_proj" in name}
    # The last layer's value projection is Q6_K: it no longer shares a weight with q and k.
    assert sorted(kind for name, kind in value.items() if "layers.2." in name) == ["Q4_K", "Q6_K"]
    assert not any(isinstance(op, Linear) for op in graph)
    after = logits_of(graph, ids_of(24))
    assert 0 < (after - before).std() < 0.5 * before.std()  # random weights: nothing averages out


def test_rows_of_64_take_the_fallbacks() -> None:
    graph = fused()
    EncodeGguf("q4_k_m").run(graph, PassContext())
    assert set(encoded_types(graph).values()) == {"Q5_0", "Q8_0"}


def test_eight_bits_change_little() -> None:
    graph = fused("qwen2")
    before = logits_of(graph, ids_of(24))
    (only,) = quantization_passes("gguf-q8_0")
    assert not only.needs_calibration
    only.run(graph, PassContext())
    after = logits_of(graph, ids_of(24))
    assert 0 < (after - before).std() < 0.05 * before.std()


def test_importance_is_the_mean_square_of_inputs() -> None:
    graph = fused()
    data = calibration()
    found = importances(graph, data.sequences, None, lambda what, share: None)
    sums: dict[str, Any] = {}

    def observe(op: Any, operands: Any, results: Any) -> None:
        if isinstance(op, Linear):
            rows = operands[0].double().reshape(-1, operands[0].shape[-1])
            sums[op.weight.name] = sums.get(op.weight.name, 0) + (rows * rows).sum(0)

    for ids in data.sequences:
        run(graph, {graph.inputs[0].name: torch.from_numpy(ids)[None]}, observe=observe)
    assert found.keys() == sums.keys()
    for name, total in sums.items():
        mean = (total / (3 * 32)).numpy()
        assert np.allclose(found[name], np.maximum(mean, FLOOR * mean.mean()), rtol=1e-5)


@pytest.mark.slow
def test_work_is_resumed_with_the_same_bytes(tmp_path: Any) -> None:
    def blocks(work: WorkFolder | None) -> list[np.ndarray]:
        graph = fused(**WIDE)
        QuantizeGguf("q4_k_m").run(graph, PassContext(calibration=calibration(), work=work))
        return [op.q.weight.read() for op in graph if isinstance(op, QuantizedLinear)]  # pyright: ignore

    plain = blocks(None)
    first = WorkFolder.open(tmp_path / "w", {"a": "b"}, resume=False)
    written = blocks(first)
    names = first.names()
    first.remove(names[-1])  # as if the process had been killed before its last piece
    again = WorkFolder.open(tmp_path / "w", {"a": "b"}, resume=True)
    assert again.resumed == len(names) - 1 and "gguf.importance" in names
    for one, two, three in zip(plain, written, blocks(again), strict=True):
        assert np.array_equal(one, two) and np.array_equal(one, three)


def test_an_encoded_tensor_reads_what_its_parts_say() -> None:
    from llmc.ir.weights import ArrayTensor

    w = np.random.default_rng(0).standard_normal((10, 256)).astype(np.float32)
    tensor = EncodedTensor(ArrayTensor(w), "Q4_K", None, None, "w")
    assert np.array_equal(tensor.blocks(3, 7), encode("Q4_K", w)[3:7])
    assert tensor.blocks(4, 4).shape == (0, 144) and tensor.read(4, 4).shape == (0, 256)
    assert np.array_equal(tensor.read(2, 5), tensor.read()[2:5])
    assert np.abs(tensor.read() - w).max() < 0.4


def test_unknown_schemes_are_refused() -> None:
    with pytest.raises(InputError, match="--quant gguf-q3_k_s is not written"):
        quantization_passes("gguf-q3_k_s")
    with pytest.raises(InputError, match="pass quantize-gguf: scheme='q9'"):
        QuantizeGguf("q9")
