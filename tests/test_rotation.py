"""Keys turned back in the caches of all targets and element types, against float64; what the compiler reads
off a graph, and what it refuses to move.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llmc.codegen.artifact import Artifact
from llmc.codegen.tvm.kernels.cache import to_logical, to_physical
from llmc.frontend.source import open_source
from llmc.frontend.trace import trace_source
from llmc.ir.core import Graph, Op
from llmc.ir.dtypes import to_numpy
from llmc.ir.errors import ArtifactError, InputError
from llmc.ir.ops.cache import AppendKv, quantize_heads
from llmc.ir.ops.math import Cast, Cos, Mul, Neg, Sin
from llmc.ir.ops.nn import Linear, Rope
from llmc.ir.ops.shape import Reshape
from llmc.passes.cache.rotary import rotary_facts
from llmc.runtime.executor.gpu import _turned
from llmc.runtime.executor.rotation import Rotary, read_rotary, turn_pages, turn_rows

from .families import save_family
from .graphs import lowered, traced
from .models import tiny_model

PAGES, SIZE, HEADS, SHIFT = 5, 16, 3, 1000
CHOSEN = [3, 0]
DTYPES = ("float32", "float16", "bfloat16", "int8", "float8_e4m3fn")
FREQUENCIES = tuple(float(np.float32(10000.0 ** (-i / 6))) for i in range(6))
WAYS = {
    "halves": (Rotary(0, 12, False, FREQUENCIES), 12),
    "pairs": (Rotary(0, 12, True, FREQUENCIES), 16),
    "behind": (Rotary(4, 12, False, FREQUENCIES), 18),
    "odd": (Rotary(0, 12, True, FREQUENCIES), 13),
}


def stored(dtype: str, head_dim: int) -> np.ndarray:
    """Pages [2, N, 16, heads, width] as the IR has them; one head's keys are not finite, one's nearly 0."""
    x = np.random.default_rng(0).normal(size=(2, PAGES, SIZE, HEADS, head_dim)).astype(np.float32)
    x[0, 0, 3, 1, 2] = np.inf
    x[0, 0, 4, 1] = 1e-34
    if dtype == "int8":
        return quantize_heads(torch.from_numpy(x)).numpy()
    return x.astype(to_numpy(dtype))


def floats(pages: np.ndarray, head_dim: int) -> np.ndarray:
    """What stored pages mean, float64."""
    if pages.dtype != np.int8:
        return pages.astype(np.float64)
    scales = np.ascontiguousarray(pages[..., head_dim:]).view(np.float32).astype(np.float64)
    return pages[..., :head_dim] * scales


def exact(keys: np.ndarray, rotary: Rotary) -> np.ndarray:
    """Keys [.., head_dim] as complex numbers, each times exp(-i · shift · f), float64."""
    out, end = keys.copy(), rotary.start + rotary.dim
    if rotary.interleaved:
        first, second = slice(rotary.start, end, 2), slice(rotary.start + 1, end, 2)
    else:
        half = rotary.start + rotary.dim // 2
        first, second = slice(rotary.start, half), slice(half, end)
    turned = (keys[..., first] + 1j * keys[..., second]) * np.exp(-1j * SHIFT * np.array(rotary.frequencies))
    out[..., first], out[..., second] = turned.real, turned.imag
    return out


def check(before: np.ndarray, after: np.ndarray, rotary: Rotary, head_dim: int) -> None:
    """Values and pages that were not chosen keep their bits; the keys of the others are the exact ones up to
    a rounding to the cache's type: half a step of int8's 127, 2^-11 of a float16, 2^-8 of a bfloat16, 2^-4 of
    a float8; and 2e-7 of the head's largest for arithmetic in float32 (a few roundings of 6e-8).
    """
    others = [i for i in range(PAGES) if i not in CHOSEN]
    assert np.array_equal(after[1], before[1]) and np.array_equal(after[0, others], before[0, others])
    old, new = floats(before, head_dim)[0, CHOSEN], floats(after, head_dim)[0, CHOSEN]
    usable = np.isfinite(old).all(axis=-1)
    assert usable.sum() == usable.size - 1, "one head is not finite"
    assert not np.isfinite(new[~usable]).all(), "what is broken stays broken"
    old, new = old[usable], new[usable]
    wanted = exact(old, rotary)
    largest = np.abs(wanted).max(axis=-1, keepdims=True)
    rounding = {
        "float32": 0.0,
        "float16": np.abs(wanted) * 2.0**-11 + 2.0**-25,
        "bfloat16": np.abs(wanted) * 2.0**-8,
        "float8_e4m3fn": np.abs(wanted) * 2.0**-4 + 2.0**-10,
        "int8": largest * (0.5 / 127 * (1 + 1e-5)) + 1e-30,
    }[after.dtype.name]
    assert (np.abs(new - wanted) <= rounding + 2e-7 * largest).all()
    assert np.abs(new - old).max() > 0.5, "keys did turn"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_turn_in_pages_of_tvm_cpu(way: str, dtype: str) -> None:
    rotary, head_dim = WAYS[way]
    before = stored(dtype, head_dim)
    pages = to_physical(before)
    turn_pages(rotary, pages[0], CHOSEN, SHIFT, head_dim=head_dim)
    check(before, to_logical(pages), rotary, head_dim)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_turn_in_pages_of_tvm_cuda(way: str, dtype: str) -> None:
    """Bytes of the keys of some pages as `read_pages` gives them: [heads, 16, width] a page."""
    rotary, head_dim = WAYS[way]
    before = stored(dtype, head_dim)
    after = before.copy()
    rows = np.ascontiguousarray(before[0, CHOSEN].swapaxes(1, 2))
    item = {"dtype": dtype, "shape": [2, "N", HEADS, SIZE, before.shape[-1]]}
    found = _turned(rows.reshape(len(CHOSEN), -1).view(np.uint8), item, rotary, SHIFT, head_dim)
    after[0, CHOSEN] = found.view(before.dtype).reshape(rows.shape).swapaxes(1, 2)
    check(before, after, rotary, head_dim)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_keys_turn_in_pages_of_onnx_cpu(way: str, dtype: str) -> None:
    """Codes and scales apart, [heads, N, 16, head_dim] and [heads, N, 16]."""
    rotary, head_dim = WAYS[way]
    before = stored(dtype, head_dim)
    keys = np.ascontiguousarray(np.moveaxis(before[0, ..., :head_dim], 2, 0))
    behind = np.ascontiguousarray(np.moveaxis(before[0, ..., head_dim:], 2, 0))
    scales = behind.view(np.float32)[..., 0] if dtype == "int8" else None
    turn_rows(rotary, keys, scales, CHOSEN, SHIFT)
    after = before.copy()
    after[0, ..., :head_dim] = np.moveaxis(keys, 0, 2)
    if scales is not None:
        after[0, ..., head_dim:] = np.moveaxis(scales[..., None].view(np.int8), 0, 2)
    check(before, after, rotary, head_dim)


def test_int8_is_rounded_as_the_kernel_that_writes_keys_rounds() -> None:
    rotary, head_dim = WAYS["halves"]
    pages = to_physical(stored("int8", head_dim))
    keys = floats(to_logical(pages), head_dim)[0, CHOSEN].astype(np.float32)
    turn_pages(rotary, pages[0], CHOSEN, SHIFT, head_dim=head_dim)
    columns = np.ascontiguousarray(keys.swapaxes(-1, -2))
    rotary.turn_back(columns, SHIFT)
    wanted = quantize_heads(torch.from_numpy(np.ascontiguousarray(columns.swapaxes(-1, -2)))).numpy()
    assert np.array_equal(to_logical(pages)[0, CHOSEN], wanted)


# What the compiler says ------------------------------------------------------------------------------------


def facts_of(family: str, **changes: Any) -> dict[str, Any]:
    return rotary_facts(lowered(traced(tiny_model(family, **changes), attention="eager"), "paged")[0])


def test_frequencies_are_the_models_own_to_the_last_bit() -> None:
    model = tiny_model("gemma3")
    facts = rotary_facts(lowered(traced(model, attention="eager"), "paged")[0])
    rotary = next(m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding"))
    wanted = [
        getattr(rotary, f"{kind}_inv_freq").double().tolist()
        for kind in ("sliding_attention", "full_attention")
    ]
    assert [table["frequencies"] for table in facts["tables"]] == wanted and wanted[0] != wanted[1]
    assert facts["layers"] == [0, 1]
    assert {(t["start"], t["dim"], t["interleaved"]) for t in facts["tables"]} == {(0, 32, False)}


def test_scaled_frequencies_are_read_without_the_scale_of_the_attention() -> None:
    """YaRN multiplies cosines and sines by a number; a rotation has none. Bar: a rounding of float32."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
    model = tiny_model("llama", rope_parameters=scaling)
    assert model.model.rotary_emb.attention_scaling > 1.1
    facts = rotary_facts(lowered(traced(model, attention="eager"), "paged")[0])
    wanted = model.model.rotary_emb.inv_freq.double().numpy()
    np.testing.assert_allclose(facts["tables"][0]["frequencies"], wanted, rtol=2**-23)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "part"),
    [
        ("gpt_neox", (0, 4, False)),
        ("cohere", (0, 16, True)),
        ("minicpm3", (8, 8, False)),  # behind what is alike for all heads
        ("bloom", None),  # only the distance counts
        ("hunyuan_v1_dense", "rms_norm in model.layers.0.self_attn.key_layernorm changes keys"),
        ("mamba", "its recurrent states keep what was evicted"),
    ],
)
def test_what_families_do_with_keys(family: str, part: Any, tmp_path: Path) -> None:
    save_family(family, tmp_path)
    facts = rotary_facts(lowered(trace_source(open_source(tmp_path)), "paged")[0])
    if isinstance(part, str):
        assert facts["refused"].startswith(part)
    else:
        tables = {(t["start"], t["dim"], t["interleaved"]) for t in facts["tables"]}
        assert tables == (set() if part is None else {part})


def test_learned_positions_are_refused_by_what_they_enter() -> None:
    refused = facts_of("gpt2")["refused"]
    assert refused == "absolute positions, learned ones, enter add in transformer"


@cache
def _paged() -> Graph:
    return lowered(traced(tiny_model("llama"), attention="eager"), "paged")[0]


def _of(graph: Graph, kind: type[Op], number: int = 0) -> Any:
    return [op for op in graph if isinstance(op, kind)][number]


def test_keys_without_positions_need_no_turning() -> None:
    graph = _paged().clone()
    append, rope = _of(graph, AppendKv), _of(graph, Rope, 1)
    assert append.k is rope.result
    graph.set_operand(append, 0, rope.x)
    assert rotary_facts(graph)["layers"] == [None, 0]


def test_keys_that_are_changed_after_they_turned_are_refused() -> None:
    graph = _paged().clone()
    append = _of(graph, AppendKv, 1)
    changed = Neg(append.k)
    changed.loc = "model.layers.1.norm"
    graph.set_operand(append, 0, graph.insert(changed, before=append).result)
    refused = "neg in model.layers.1.norm changes keys after their rotary embedding"
    assert rotary_facts(graph) == {"refused": refused}


def test_positions_that_enter_anything_else_are_refused() -> None:
    graph = _paged().clone()
    linear = _of(graph, Linear)
    number = graph.insert(Cast(graph.input("positions"), dtype="float32"), before=linear)
    column = graph.insert(Reshape(number.result, shape=(*number.result.shape, 1)), before=linear)
    scaled = Mul(linear.x, column.result)
    scaled.loc = "model.scale"
    graph.set_operand(linear, 0, graph.insert(scaled, before=linear).result)
    assert rotary_facts(graph) == {"refused": "positions enter mul in model.scale"}
    graph.set_operand(scaled, 1, graph.insert(Cos(column.result), before=scaled).result)
    assert "model.scale takes cosines of positions, in no form" in rotary_facts(graph)["refused"]


def test_angles_that_do_not_grow_with_the_position_are_refused() -> None:
    graph = _paged().clone()
    for kind in (Cos, Sin):
        table = _of(graph, kind)
        squared = graph.insert(Mul(table.x, table.x), before=table)
        graph.set_operand(table, 0, squared.result)
    assert "does not turn in proportion to the position" in rotary_facts(graph)["refused"]


class Manifest(Artifact):
    """An artifact of which only the model's facts are there."""

    def __init__(self, rotary: Any) -> None:
        model = {"kv": [{"head_dim": 4}], **({} if rotary is None else {"rotary": rotary})}
        super().__init__(Path("m.llmc"), {"model": model})


TABLE = {"start": 0, "dim": 4, "interleaved": False, "frequencies": [1.0, 0.01]}


def test_an_artifact_that_does_not_say_how_keys_turn_is_refused() -> None:
    with pytest.raises(InputError, match=r"m\.llmc does not say how.*compile it again"):
        read_rotary(Manifest(None))
    with pytest.raises(InputError, match=r"cannot be evicted from its cache: because"):
        read_rotary(Manifest({"refused": "because"}))
    assert read_rotary(Manifest({"tables": [], "layers": [None]})) == [None]
    assert read_rotary(Manifest({"tables": [TABLE], "layers": [0]})) == [Rotary(0, 4, False, (1.0, 0.01))]


@pytest.mark.parametrize(
    "damaged",
    [
        {"tables": [TABLE], "layers": []},
        {"tables": [TABLE], "layers": [1]},
        {"tables": [{**TABLE, "start": 1}], "layers": [0]},
        {"tables": [{**TABLE, "frequencies": [1.0]}], "layers": [0]},
        {"tables": [{**TABLE, "frequencies": [1.0, float("nan")]}], "layers": [0]},
        {"tables": [{**TABLE, "frequencies": "none"}], "layers": [0]},
        {"tables": 7},
    ],
)
def test_a_damaged_manifest_is_named(damaged: Any) -> None:
    with pytest.raises(ArtifactError, match=r"model\.rotary makes no sense"):
        read_rotary(Manifest(damaged))
