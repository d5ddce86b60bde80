"""The pass that makes places for adapters: where it applies, what it refuses, and its numbers through the
interpreter beside PEFT's.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llmc.frontend.lora import read_adapter
from llmc.frontend.source import open_source
from llmc.frontend.trace import trace_source
from llmc.ir.core import Graph
from llmc.ir.errors import InputError, UnsupportedError
from llmc.ir.interpreter import run
from llmc.ir.ops.lora import MOST_RANK, Lora
from llmc.ir.ops.quant import Hadamard
from llmc.ir.parser import parse
from llmc.ir.printer import print_graph
from llmc.passes.adapt.lora_places import PlaceAdapters
from llmc.passes.base import PassContext
from llmc.passes.manager import run_passes
from llmc.passes.quantize.rotate import RotateLinears
from llmc.passes.quantize.walk import QuantizeRtn
from llmc.runtime.adapter_places import AdapterPlaces, Place
from llmc.runtime.executor.adapter_memory import AdapterMemory
from safetensors.numpy import load_file, save_file

from .families import reference, save_family
from .family_configs import token_ids
from .graphs import lowered, traced, worst
from .lora_files import adapter, write_adapter
from .models import ids_of, reference_logits, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT still calls what transformers deprecates


def placed(graph: Graph) -> Graph:
    return run_passes(graph, [PlaceAdapters()], PassContext())[0]


def places_of(graph: Graph) -> AdapterPlaces:
    found = AdapterPlaces.parse({"adapters": {**graph.facts["adapters"], "most_rank": MOST_RANK}})
    assert found is not None
    return found


def logits(graph: Graph, ids: Sequence[int], slots: Sequence[int], arrays: dict[str, np.ndarray]) -> Any:
    """Of one sequence on fresh pages, a slot a token."""
    count, size = len(ids), int(graph.facts["page_size"])
    pages = -(-count // size)
    given = {
        "token_ids": ids,
        "positions": range(count),
        "slot_mapping": range(count),
        "query_start": [0, count],
        "context_len": [count],
        "block_table": [list(range(pages))],
        "output_index": range(count),
        "adapter": slots,
    }
    inputs = {n: torch.tensor(list(v), dtype=torch.int32) for n, v in given.items()}
    inputs |= {name: torch.from_numpy(array) for name, array in arrays.items()}
    for i, kv in enumerate(graph.facts["kv"]):
        inputs[f"kv_pages.{i}"] = torch.zeros(2, pages, size, kv["heads"], kv["head_dim"])
    for value in graph.inputs:
        if value.name.startswith(("slot_mapping.", "block_table.")):  # a window's, whose pages are all here
            inputs[value.name] = inputs[value.name.partition(".")[0]]
        elif value.name.startswith("state"):  # a sequence's, which begins with zeros
            shape = [d if isinstance(d, int) else 1 for d in value.shape]
            inputs[value.name] = torch.zeros(shape, dtype=getattr(torch, value.dtype))
    return run(graph, inputs)[0]


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "phi3"])
def test_numbers_are_those_of_peft(family: str, tmp_path: Path) -> None:
    """Merged projections and residuals, weights that were transposed, modules that are fused by design."""
    pytest.importorskip("peft")
    graph = placed(lowered(traced(tiny_model(family)), "paged")[0])
    assert print_graph(parse(print_graph(graph))) == print_graph(graph)
    options = {"gpt2": {"fan_in_fan_out": True, "target_modules": ["c_attn", "c_proj", "c_fc"]}}
    adapted = adapter(tiny_model(family), tmp_path, **options.get(family, {"target_modules": "all-linear"}))
    arrays: dict[str, np.ndarray] = {}
    memory = AdapterMemory(places_of(graph), arrays.__setitem__)
    memory.set(1, memory.packed(places_of(graph).factors(read_adapter(tmp_path))))
    ids = ids_of(21)
    base, wanted = reference_logits(tiny_model(family), ids), reference_logits(adapted, ids)
    assert worst(logits(graph, ids, [1] * 21, arrays), wanted) < 2e-5
    assert worst(logits(graph, ids, [-1] * 21, arrays), base) < 2e-5
    assert worst(wanted, base) > 1e-2


# One projection has layers of attention and MLP, of which wanted rows are chosen in part (phi), with two that
# were merged before (cohere); layers are gone through several times (hrm_text), see a window (exaone4), keep
# a state (bamba).
@pytest.mark.parametrize("family", ["phi", "cohere", "hrm_text", "exaone4", "bamba"])
def test_every_linear_layer_has_its_places(family: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model, task = save_family(family, tmp_path / "model")
    ids = token_ids(21)
    base = reference(model, ids, task)
    linear = {n.rpartition(".")[2] for n, m in model.named_modules() if type(m) is torch.nn.Linear}
    adapted = adapter(model, tmp_path / "adapter", scale=0.05, target_modules=sorted(linear - {"lm_head"}))
    wanted = reference(adapted.eval(), ids, task)
    graph = placed(lowered(trace_source(open_source(tmp_path / "model")), "paged")[0])
    arrays: dict[str, np.ndarray] = {}
    memory = AdapterMemory(places_of(graph), arrays.__setitem__)
    memory.set(1, memory.packed(places_of(graph).factors(read_adapter(tmp_path / "adapter"))))
    assert worst(logits(graph, ids, [1] * 21, arrays), wanted) < 2e-5 and worst(wanted, base) > 1e-2


@pytest.mark.parametrize("family", ["phi", "cohere"])
def test_rotated_layers_give_adapters_what_was_not_rotated(family: str, tmp_path: Path) -> None:
    """Of the last layer also the wanted rows, where attention reads all of the same norm."""
    pytest.importorskip("peft")
    model, task = save_family(family, tmp_path / "model")
    ids = token_ids(21)
    linear = {n.rpartition(".")[2] for n, m in model.named_modules() if type(m) is torch.nn.Linear}
    adapted = adapter(model, tmp_path / "adapter", scale=0.05, target_modules=sorted(linear - {"lm_head"}))
    wanted = reference(adapted.eval(), ids, task)
    traced_once = trace_source(open_source(tmp_path / "model"))
    graph = placed(lowered(traced_once, "paged", [RotateLinears(16)])[0])
    assert any(isinstance(op, Hadamard) for op in graph)
    arrays: dict[str, np.ndarray] = {}
    memory = AdapterMemory(places_of(graph), arrays.__setitem__)
    memory.set(1, memory.packed(places_of(graph).factors(read_adapter(tmp_path / "adapter"))))
    assert worst(logits(graph, ids, [1] * 21, arrays), wanted) < 2e-5


def test_tied_blocks_have_no_places(tmp_path: Path) -> None:
    """An adapter changes each module by itself, and the graph has one weight of several."""
    blocks = {"layers_block_type": ["hybrid", "hybrid"], "hybrid_layer_ids": [0, 1]}
    save_family("zamba2", tmp_path, changed=blocks)
    graph = placed(lowered(trace_source(open_source(tmp_path)), "paged")[0])
    kinds = {module.rpartition(".")[2] for place in places_of(graph).places for module, _ in place.parts}
    assert "in_proj" in kinds and not kinds & {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_up_proj",
        "down_proj",
    }


def test_where_it_applies() -> None:
    graph, records = lowered(traced(tiny_model("qwen2")), "paged")
    assert records
    layers = placed(graph).facts["adapters"]["places"]
    assert {place["dtype"] for place in layers} == {"float32"}
    names = [[module.rpartition(".")[2] for module, _ in place["parts"]] for place in layers]
    assert names == [
        *2 * [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
        ["lm_head"],
        ["embed_tokens"],
    ]
    assert [rows for _, rows in layers[0]["parts"]] == [64, 32, 32]
    assert layers[-1] == {
        "k": 384,
        "parts": [["model.embed_tokens", 64]],
        "dtype": "float32",
        "embedding": True,
        "tied": [],
    }
    # The sums with the residual come before, where the linear layers' kernels do them.
    after = [op.y.producer.opname for op in graph if isinstance(op, Lora) if op.y.producer is not None]
    assert after == [*2 * ["linear", "add", "linear", "add"], "linear"]


FIRST = 'linear(%0, @"a.q_proj.weight+k_proj+v_proj.part0", _)'


def in_pieces(made: str, edge: int) -> Graph:
    """q, k and v of 4, edge - 4 and 8 - edge rows, in pieces of 6 and 2; what is `made` of the first is put
    before the second.
    """
    return parse(
        f"""graph "g" stage="paged"
        input %token_ids : int32[T]
        weight @"e" : float32[9, 8]
        weight @"a.q_proj.weight+k_proj+v_proj.part0" : float32[6, 8]
        weight @"a.q_proj.weight+k_proj+v_proj.part1" : float32[2, 8]
        weight @"b.part1.weight" : float32[8, 8]
        %0 : float32[T, 8] = embedding(%token_ids, @"e")
        %1 : float32[T, 6] = {made}
        %2 : float32[T, 2] = linear(%0, @"a.q_proj.weight+k_proj+v_proj.part1", _)
        %3 : float32[T, 8] = concat([%1, %2]) {{axis = -1}}
        %4 : float32[T, 4] = slice(%3) {{axis = -1, start = 0, stop = 4, step = 1}}
        %5 : float32[T, {edge - 4}] = slice(%3) {{axis = -1, start = 4, stop = {edge}, step = 1}}
        %6 : float32[T, {8 - edge}] = slice(%3) {{axis = -1, start = {edge}, stop = 8, step = 1}}
        %7 : float32[T, 8] = concat([%4, %5, %6]) {{axis = -1}}
        %8 : float32[T, 8] = linear(%7, @"b.part1.weight", _)
        return "logits" = %8"""
    )


@pytest.mark.parametrize(
    ("made", "edge", "expected"),
    [
        (FIRST, 6, [[["a.q_proj", 4], ["a.k_proj", 2]], [["a.v_proj", 2]]]),
        (FIRST, 7, []),  # k lies in both pieces
        ("slice(%0) {axis = -1, start = 0, stop = 6, step = 1}", 6, []),  # columns of something else
    ],
)
def test_pieces_of_a_merged_weight_have_their_own_places(made: str, edge: int, expected: list[Any]) -> None:
    places = placed(in_pieces(made, edge)).facts["adapters"]["places"]
    # A module that is called as pieces are is one as any other.
    assert [place["parts"] for place in places] == [*expected, [["b.part1", 8]], [["e", 8]]]


def test_factors_over_whole_codes_are_8_bits_wide() -> None:
    graph, _ = lowered(traced(tiny_model("llama")), "paged", [QuantizeRtn(bits=8, group=32)])
    places = placed(graph).facts["adapters"]["places"]
    # Neither the head nor the embedding is quantized here.
    assert [place["dtype"] for place in places] == [*8 * ["int8"], *2 * ["float32"]]


def test_a_graph_without_linear_layers_is_refused() -> None:
    graph = parse(
        """graph "g" stage="paged"
        input %token_ids : int32[T]
        weight @"w" : float32[4, 8]
        %0 : float32[T, 8] = embedding(%token_ids, @"w")
        return "logits" = %0"""
    )
    with pytest.raises(UnsupportedError, match="g has no linear layer that an adapter could change"):
        placed(graph)


def memory_of(dtype: str) -> tuple[AdapterMemory, dict[str, np.ndarray]]:
    places = AdapterPlaces.parse(
        {
            "adapters": {
                "most_rank": 64,
                "places": [{"k": 5, "parts": [["a", 3], ["b", 20]], "dtype": dtype}],
            }
        }
    )
    assert places is not None
    arrays: dict[str, np.ndarray] = {}
    return AdapterMemory(places, arrays.__setitem__), arrays


def product(arrays: dict[str, np.ndarray], slot: int, part: int) -> np.ndarray:
    """B A of a part, read back from blocks."""
    rank = int(arrays["lora_rank.0"][slot, part])
    rows, first = (3, 0) if part == 0 else (20, 1)
    a = arrays["lora_a.0"][slot, part].astype(np.float64).transpose(0, 2, 1).reshape(-1, 5)[:rank]
    b = arrays["lora_b.0"][slot, first : first + -(-rows // 16)].astype(np.float64).transpose(0, 2, 1)
    scale = arrays["lora_scale.0"][slot, part].reshape(-1)[:rank, None]
    return b.reshape(-1, b.shape[2])[:rows, :rank] @ (scale * a)


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-6), ("int8", 0.03)])
def test_memory_grows_and_keeps_what_was_in_it(dtype: str, error: float) -> None:
    memory, arrays = memory_of(dtype)
    rng = np.random.default_rng(0)
    kept: dict[tuple[int, int], np.ndarray] = {}
    for slot, rank, scale in ((0, 3, 1.0), (1, 17, 1e-6), (5, 40, 1e4), (0, 2, 1e-4)):
        given: list[Any] = []
        for part, rows in enumerate((3, 20)):
            a = rng.standard_normal((rank, 5)).astype(np.float32)
            b = (scale * rng.standard_normal((rows, rank))).astype(np.float32)
            kept[slot, part] = b.astype(np.float64) @ a
            given.append((a, b))
        memory.set(slot, memory.packed({0: given}))
        for (known, part), wanted in kept.items():
            found = product(arrays, known, part)
            assert np.abs(found - wanted).max() < error * np.abs(wanted).max()
    memory.clear(1)
    assert not arrays["lora_a.0"][1].any() and not arrays["lora_b.0"][1].any()
    assert not arrays["lora_rank.0"][1].any() and arrays["lora_rank.0"][5].tolist() == [40, 40]


def test_gains_come_and_go_with_their_slots() -> None:
    arrays: dict[str, np.ndarray] = {}
    place = Place(5, (("a", 3), ("b", 20)), gains=True)
    memory = AdapterMemory(AdapterPlaces(64, (place,)), arrays.__setitem__)
    down, up, gain = (np.full(shape, 2, np.float32) for shape in ((1, 5), (20, 1), (2, 20)))
    memory.set(1, memory.packed({0: [None, (down, up, gain)]}))
    memory.set(6, memory.packed({0: [(down, up[:3], gain[:, :3]), None]}))
    assert arrays["lora_gained.0"][[1, 6]].tolist() == [[0, 1], [1, 0]]
    assert arrays["lora_gain.0"][1, :, 3:].all() and not arrays["lora_gain.0"][1, :, :3].any()
    memory.set(1, memory.packed({0: [None, (down, up)]}))
    assert arrays["lora_gained.0"][[1, 6]].tolist() == [[0, 0], [1, 0]]
    memory.clear(6)
    assert not arrays["lora_gained.0"].any()
    with pytest.raises(InputError, match="the adapter's change of b is beyond what float32 holds"):
        memory.packed({0: [None, (down, up, gain * np.float32(np.inf))]})


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_factors_beyond_floats_are_refused(dtype: str) -> None:
    memory, _ = memory_of(dtype)
    large = np.full((1, 5), 1e30, np.float32), np.full((3, 1), np.inf, np.float32)
    with pytest.raises(InputError, match="the adapter's change of a is beyond what float32 holds"):
        memory.packed({0: [large, None]})
    nothing = np.zeros((2, 5), np.float32), np.zeros((3, 2), np.float32)
    memory.set(0, memory.packed({0: [nothing, None]}))


@pytest.mark.parametrize(
    ("tensor", "config", "refused"),
    [
        ("a.base_layer.weight", {}, ""),
        ("a.weight", {}, ""),  # as PEFT wrote it before 0.6
        ("a.base_layer.bias", {}, ""),
        ("a.base_layer.bias", {"bias": "lora_only"}, "has biases, which these kernels have no places for"),
        ("a.weight", {"modules_to_save": ["a"]}, r"a\.weight .*per request"),
        ("b.weight", {}, r"b\.weight .*per request"),
        ("b.bias", {"bias": "all"}, r"b\.bias .*per request"),
    ],
)
def test_whole_tensors_are_the_bases_own_or_refused(
    tensor: str, config: dict[str, Any], refused: str, tmp_path: Path
) -> None:
    """PEFT saves the base's weight beside the change of an embedding or a head, which changes nothing."""
    places = AdapterPlaces(16, (Place(5, (("a", 3),)),))
    write_adapter(tmp_path, {"a": (np.ones((2, 5), np.float32), np.ones((3, 2), np.float32))}, **config)
    file = tmp_path / "adapter_model.safetensors"
    save_file({**load_file(file), f"base_model.model.{tensor}": np.ones(3, np.float32)}, file)
    adapter = read_adapter(tmp_path)
    if refused:
        with pytest.raises(UnsupportedError, match=refused):
            places.factors(adapter)
    else:
        assert list(places.factors(adapter)) == [0]


def one_place(k: int) -> tuple[AdapterMemory, dict[str, np.ndarray]]:
    arrays: dict[str, np.ndarray] = {}
    return AdapterMemory(AdapterPlaces(256, (Place(k, (("a", 16),)),)), arrays.__setitem__), arrays


def ones(rank: int, k: int) -> Any:
    return {0: [(np.ones((rank, k), np.float32), np.ones((16, rank), np.float32))]}


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_adapters_that_go_give_their_memory_back() -> None:
    """16 MB each; what stays is as it was, though slots share pages at their edges."""
    k = (1 << 18) + 3
    memory, arrays = one_place(k)
    packed = memory.packed(ones(1, k))
    memory.set(3, packed)
    before = resident()
    for slot in (0, 1, 2):
        memory.set(slot, packed)
    assert resident() - before > 40 << 20
    for slot in (0, 2):
        memory.clear(slot)
    assert resident() - before < 24 << 20
    a, rank = arrays["lora_a.0"], arrays["lora_rank.0"]
    assert rank[:, 0].tolist()[:4] == [0, 1, 0, 1]
    assert a[[1, 3], 0, 0, :, 0].all() and not a[[0, 2]].any()
    memory.set(2, packed)
    assert a[2, 0, 0, :, 0].all()


def test_a_large_rank_that_went_costs_the_others_nothing() -> None:
    """16 MB with rank 256, 1 MB with rank 16, also after slots were added."""
    k = 1 << 14
    memory, _ = one_place(k)
    memory.set(0, memory.packed(ones(256, k)))
    memory.clear(0)
    packed, before = memory.packed(ones(16, k)), resident()
    for slot in range(9):
        memory.set(slot, packed)
    assert memory.blocks == 16 and resident() - before < 40 << 20


def test_slots_that_a_kernel_cannot_count_are_refused() -> None:
    """As many as it can count are made, though twice as many would be too many."""
    k = 1 << 22
    memory, _ = one_place(k)  # 2³¹ / (16 · 2²²) = 32, less one
    memory.set(20, memory.packed(ones(1, k)))
    assert memory.slots == 31
    with pytest.raises(InputError, match="32 slots of rank 16 are more than a kernel can count"):
        memory.set(31, memory.packed(ones(1, k)))
    assert memory.slots == 31
