"""Adapters of requests that change experts: PEFT, llama.cpp and changed checkpoints are the oracles of their
logits, each request alone the oracle of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llmc
import numpy as np
import pytest
import torch
from llmc.codegen.artifact import Artifact
from llmc.frontend.gguf_architectures import ARCHITECTURES
from llmc.ir.adapters import Adapter, LowRank, OfParameters
from llmc.ir.errors import ArtifactError, InputError, UnsupportedError
from llmc.ir.expert_parts import ExpertParts, by_experts
from llmc.ir.weights import ArrayTensor
from llmc.runtime.adapter_places import AdapterPlaces, Place
from llmc.runtime.executor import adapter_memory
from llmc.runtime.executor.adapter_memory import AdapterMemory
from llmc.runtime.llm import LLM
from safetensors.torch import load_file, save_file

from .families import reference, save_family
from .family_configs import token_ids
from .llama_cpp import LlamaCpp
from .lora_files import adapter, edit, write_adapter, write_lora
from .models import save_tokenizer
from .quantized_files import save_bnb
from .test_gguf_architectures import tiny, written
from .test_lora_experts import per_expert
from .test_lora_gguf import factors_of
from .tvm_graphs import ISA

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT still calls what transformers deprecates
peft = pytest.importorskip("peft")

HERE = f"tvm-cpu:isa={ISA}"
IDS = token_ids(21)
BOTH = {"target_modules": [], "target_parameters": ["gate_up_proj", "down_proj"]}
KINDS: dict[str, dict[str, Any]] = {
    "both": BOTH,
    "one": {"target_modules": [], "target_parameters": ["experts.down_proj"], "use_rslora": True, "r": 20},
    "beside modules": {
        "target_modules": ["q_proj"],
        "target_parameters": ["gate_up_proj", "gate.weight"],
        "alpha_pattern": {"gate.weight": 32, "q_proj": 5},
        "rank_pattern": {"gate.weight": 2},
    },
}


def compiled(folder: Path, family: str, stored: str = "float32", **options: Any) -> tuple[Any, str, Artifact]:
    """A family's model, its task and an artifact that was compiled without a thought of adapters."""
    changed = options.pop("changed", {})
    model, task = save_family(family, folder / "model", stored, changed=changed)
    save_tokenizer(folder / "model")
    made = llmc.compile(folder / "model", folder / "a.llmc", targets=[HERE], kv_dtype="float32", **options)
    return model, task, made


def opened(artifact: Artifact, **adapters: Path) -> LLM:
    return llmc.load(artifact.root, adapters=adapters, threads=2, kv_tokens=1024, context=128)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, np.ndarray], LLM]]:
    """A folder with the model and an adapter of each kind; PEFT's logits with each; the artifact."""
    folder = tmp_path_factory.mktemp("mixtral")
    model, task, made = compiled(folder, "mixtral")
    wanted = {"": reference(model, IDS, task).numpy()}
    for seed, (kind, options) in enumerate(KINDS.items()):
        fresh = type(model).from_pretrained(folder / "model", dtype=torch.float32)
        adapted = adapter(fresh, folder / kind, seed=seed, scale=0.1, **options).eval()
        wanted[kind] = reference(adapted, IDS, task).numpy()
    modules = per_expert(folder / "model", r".*\.experts\.\d+\.\w+\.weight")
    write_adapter(folder / "names", modules, target_modules=["w1", "w2", "w3"], task_type="CAUSAL_LM")
    fresh = type(model).from_pretrained(folder / "model", dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(fresh, str(folder / "names")).eval()
    wanted["names"] = reference(adapted, IDS, task).numpy()
    with opened(made, **{kind: folder / kind for kind in [*KINDS, "names"]}) as llm:
        yield folder, wanted, llm


@pytest.mark.parametrize("kind", ["", *KINDS, "names"])
def test_logits_are_those_of_peft(mixtral: tuple[Path, dict[str, np.ndarray], LLM], kind: str) -> None:
    _, wanted, llm = mixtral
    found = llm.logits(IDS, adapter=kind or None)
    assert np.abs(found - wanted[kind]).max() < 1e-4
    assert not kind or np.abs(found - wanted[""]).max() > 1e-2


def test_a_batch_of_several_gives_each_its_own(mixtral: tuple[Path, dict[str, np.ndarray], LLM]) -> None:
    """Rows of one expert are of several adapters and of none."""
    llm = mixtral[2]

    def greedy(prompts: list[tuple[str, list[int]]]) -> list[list[int]]:
        streams = [llm.stream(p, adapter=name or None, max_tokens=8, ignore_eos=True) for name, p in prompts]
        return [[token for output in stream for token in output.token_ids] for stream in streams]

    prompts = [(name, token_ids(3 + 5 * i)) for i, name in enumerate([*KINDS, "", "names", "", "both"])]
    alone = [greedy([one])[0] for one in prompts]
    assert greedy(prompts) == alone and greedy(prompts[::-1]) == alone[::-1]
    assert len({tuple(tokens) for tokens in alone}) > 4


def test_logits_of_chunks_are_bit_for_bit_those_of_the_whole(
    mixtral: tuple[Path, dict[str, np.ndarray], LLM],
) -> None:
    """Chunks of other sizes take other rows together."""
    llm, ids = mixtral[2], token_ids(90)
    whole = llm.logits(ids, adapter="both").copy()
    for chunk in (1, 7, 64):
        parts = [part.copy() for part in llm.iter_logits(ids, chunk, "both")]
        np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_what_does_not_fit_is_refused(
    mixtral: tuple[Path, dict[str, np.ndarray], LLM], tmp_path: Path
) -> None:
    folder, _, llm = mixtral

    def refused(why: str, path: Path, kind: type[Exception] = InputError) -> None:
        with pytest.raises(kind, match=why):
            llm.load_adapter("bad", path)
        assert "bad" not in llm.adapters

    stack = tmp_path / "stack"
    stack.mkdir()
    for file in (folder / "both").iterdir():
        (stack / file.name).write_bytes(file.read_bytes())
    edit(stack, r=2)
    refused(r"no change of model\.layers\.\d\.mlp\.experts\.\w+ of 4 × \[\d+, \d+\] of rank 2", stack)
    edit(stack, r=4, target_parameters=["down_proj"])
    refused(
        r"has 2 changes of parameters of .*experts .* places are there for .*down_proj",
        stack,
        UnsupportedError,
    )
    modules = per_expert(folder / "model", r".*\.experts\.0\.w1\.weight")
    strangers = {name.replace("experts.0", "experts.9"): parts for name, parts in modules.items()}
    refused(
        r"changes .*experts\.9\.w1.*, which this model has no place for",
        write_adapter(tmp_path / "2", strangers),
    )
    smaller = {name: (a[:, :-1].copy(), b) for name, (a, b) in modules.items()}
    refused(r"of other sizes: .*gate_up_proj\.gate\[0\]", write_adapter(tmp_path / "3", smaller))
    shorter = {name: (a, b[1:].copy()) for name, (a, b) in modules.items()}
    refused(r"of other sizes: .*experts\.0\.w1", write_adapter(tmp_path / "4", shorter))
    norms = write_adapter(tmp_path / "5", modules) / "adapter_model.safetensors"
    part = "lora_magnitude_vector"
    magnitudes = {f"base_model.model.{m}.{part}": torch.ones(len(b)) for m, (_, b) in modules.items()}
    save_file({**load_file(norms), **magnitudes}, norms)
    refused(
        r"magnitudes \(DoRA\) of experts, .*gate\[0\]: none can be chosen", norms.parent, UnsupportedError
    )


# Matrices stored turned, gates and ups in turns; without a gate, all sizes equal; beside shared experts.
@pytest.mark.parametrize(
    ("family", "changed", "options"),
    [
        ("gpt_oss", {}, BOTH),
        pytest.param("gpt_oss", {"hidden_size": 32, "intermediate_size": 32}, BOTH, marks=pytest.mark.slow),
        pytest.param(
            "nemotron_h",
            {"hidden_size": 32, "moe_intermediate_size": 32, "intermediate_size": 32},
            {"target_modules": [], "target_parameters": ["experts.up_proj", "down_proj"]},
            marks=pytest.mark.slow,
        ),
        pytest.param("deepseek_v3", {}, BOTH, marks=pytest.mark.slow),
        pytest.param("qwen3_moe", {}, BOTH, marks=pytest.mark.slow),
        pytest.param("llama4_text", {}, BOTH, marks=pytest.mark.slow),
        pytest.param(
            "llama4_text", {"hidden_size": 32, "intermediate_size": 32}, BOTH, marks=pytest.mark.slow
        ),
    ],
)
def test_other_forms_of_experts(
    family: str, changed: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    model, task, made = compiled(tmp_path, family, changed=changed)
    plain = reference(model, IDS, task).numpy()
    wanted = reference(adapter(model, tmp_path / "one", scale=0.1, **options).eval(), IDS, task).numpy()
    with opened(made, one=tmp_path / "one") as llm:
        assert np.abs(llm.logits(IDS, adapter="one") - wanted).max() < 1e-4
        assert np.abs(llm.logits(IDS) - plain).max() < 1e-4
    assert np.abs(wanted - plain).max() > 1e-2


def test_experts_by_the_names_of_the_checkpoint(tmp_path: Path) -> None:
    """Some of them alone, gates and no ups."""
    model, task, made = compiled(tmp_path, "qwen2_moe")
    modules = per_expert(tmp_path / "model", r".*\.experts\.[02]\.(gate|down)_proj\.weight")
    write_adapter(tmp_path / "one", modules)
    with opened(made, one=tmp_path / "one") as llm:
        found, plain = llm.logits(IDS, adapter="one").copy(), llm.logits(IDS).copy()
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    for module, (a, b) in modules.items():
        weight = tensors[f"{module}.weight"]
        tensors[f"{module}.weight"] = (
            weight.double() + torch.from_numpy(b).double() @ torch.from_numpy(a).double()
        ).float()
    save_file(tensors, file, metadata={"format": "pt"})
    wanted = reference(
        type(model).from_pretrained(tmp_path / "model", dtype=torch.float32), IDS, task
    ).numpy()
    assert np.abs(found - wanted).max() < 1e-4 and np.abs(plain - wanted).max() > 1e-2


# Every token chooses all experts: a router that chooses others than the float model's would say nothing of
# the adapter.
@pytest.mark.slow
def test_over_experts_of_8_bits(tmp_path: Path) -> None:
    model, task, made = compiled(
        tmp_path, "mixtral", changed={"num_experts_per_tok": 4}, quant="int8", adapters=True
    )
    places = AdapterPlaces.parse(made.target("tvm-cpu"))
    assert places is not None
    assert {place.dtype for place in places.places if place.stack is not None} == {"int8"}
    plain = reference(model, IDS, task).numpy()
    wanted = reference(adapter(model, tmp_path / "one", scale=0.1, **BOTH).eval(), IDS, task).numpy()
    with opened(made, one=tmp_path / "one") as llm:
        found, base = llm.logits(IDS, adapter="one").copy(), llm.logits(IDS)
    change = np.linalg.norm(wanted - plain)
    assert change > 0.3 * np.linalg.norm(plain)
    lost = np.linalg.norm(base - plain) / np.linalg.norm(plain)
    # What the weights themselves lose moves what the adapter changes too.
    assert np.linalg.norm((found - base) - (wanted - plain)) < (2 * lost + 0.02) * change


def test_places_say_what_they_are_of() -> None:
    entry = {"k": 8, "parts": [["s.gate", 3], ["s.up", 3]], "dtype": "float32", "experts": 2, "of": "s"}
    whole = {**entry, "interleaved": True, "unsaid": False}
    place = Place.parse(whole)
    assert place.parts == (("s.gate[0]", 3), ("s.up[0]", 3), ("s.gate[1]", 3), ("s.up[1]", 3))
    assert place.stack is not None
    assert {part: rows.tolist() for part, rows in place.stack.rows_of_parts()} == {
        "s.gate": [0, 2, 4],
        "s.up": [1, 3, 5],
    }
    with pytest.raises(KeyError):
        Place.parse(entry)
    for bad in ({"experts": -1}, {"experts": 10**9}, {"experts": float("inf")}, {"parts": [["s", 0]]}):
        with pytest.raises(ArtifactError, match="adapters are incomplete"):
            AdapterPlaces.parse({"adapters": {"most_rank": 256, "places": [{**whole, **bad}]}})


# Gates and ups apart in the file; every expert with biases, matrices turned and in turns in the model.
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_a_gguf_file_over_a_gguf_model(kind: str, tmp_path: Path) -> None:
    base = written(tiny(kind), kind, tmp_path / "model.gguf")
    parts = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "ffn_gate_inp", "attn_q")
    path = tmp_path / "one.gguf"
    factors, architecture = factors_of(base, parts, 3, seed=1), ARCHITECTURES[kind].name
    assert any(array.ndim == 3 for array in factors.values())
    write_lora(path, factors, architecture=architecture)
    made = llmc.compile(base, tmp_path / "a.llmc", targets=[HERE])
    with LlamaCpp(base) as oracle:
        plain = oracle.logits(IDS)
        oracle.adapt([(path, 1.0)])
        wanted = oracle.logits(IDS)
    assert np.abs(wanted - plain).max() > 0.1
    with opened(made, one=path) as llm:
        # llama.cpp keeps its cache in float16.
        assert np.abs(llm.logits(IDS) - plain).max() <= 0.01 * np.abs(plain).max()
        assert np.abs(llm.logits(IDS, adapter="one") - wanted).max() <= 0.01 * np.abs(wanted).max()
        name = "blk.0.ffn_up_exps.weight"
        bad = {**factors, f"{name}.lora_a": factors[f"{name}.lora_a"][:, :-1].copy()}
        fewer = {n: array[:-1].copy() if array.ndim == 3 else array for n, array in factors.items()}
        with pytest.raises(InputError, match=r"changes blk\.0\.ffn_\w+_exps\.0/\d.*no place for"):
            llm.load_adapter("bad", write_lora(tmp_path / "few.gguf", fewer, architecture=architecture))
        with pytest.raises(InputError, match="are no factors of experts"):
            llm.load_adapter("bad", write_lora(tmp_path / "bad.gguf", bad, architecture=architecture))


def test_a_stack_that_does_not_say_that_it_is_transposed() -> None:
    """PEFT adds B A to the matrix as it is stored, [K, N]; where no size tells, that decides."""
    generator = np.random.default_rng(1)
    rank, size, experts = 2, 4, 3
    a, b = generator.normal(size=(rank * experts, size)), generator.normal(size=(size, rank * experts))
    factors = ArrayTensor(a.astype("f")), ArrayTensor(b.astype("f"))

    def itself() -> LowRank:
        raise InputError("of another rank", remedy="none")

    of = OfParameters([factors], lambda name: (rank, 0.5) if name == "down_proj" else None, itself)
    given = Adapter("a", {}, {}, parameters={"m": of})
    for unsaid in (False, True):
        stack = ExpertParts("m.down_proj", experts, size, (("m.down_proj", size),), unsaid=unsaid)
        changes = by_experts(given, [stack], ()).changes
        for e in range(experts):
            own = b.reshape(size, rank, experts)[:, :, e] @ a[rank * e : rank * (e + 1)] * 0.5
            found = changes[f"m.down_proj[{e}]"]
            product = found.b.read() @ found.a.read() * found.scaling
            np.testing.assert_allclose(product, own.T if unsaid else own, rtol=1e-5)
    assert list(by_experts(given, [], ()).parameters) == ["m"]


def test_slots_of_experts_are_those_of_adapters_that_change_some() -> None:
    """Others take no room there; what an adapter leaves alone stays untouched as slots move."""
    layer = Place(8, (("q", 32),))
    entry = {"k": 8, "parts": [["s.gate", 16], ["s.up", 16]], "dtype": "float32", "experts": 40}
    experts = Place.parse({**entry, "of": "s", "interleaved": False, "unsaid": False})
    arrays: dict[str, np.ndarray] = {}
    memory = AdapterMemory(AdapterPlaces(256, (layer, experts)), arrays.__setitem__)

    def slots(*adapters: int) -> list[int]:
        found = memory.expert_slots(np.array(adapters, np.int32))
        assert found is not None
        return found.tolist()

    ones = (np.ones((3, 8), "f"), np.ones((32, 3), "f"))
    for slot in range(5):
        memory.set(slot, memory.packed({0: [ones]}))
    assert memory.sizes() == {"A": 6, "L": 1, "AE": 0, "LE": 1}
    assert slots(-1, 0, 4) == [-1, -1, -1]
    part = (np.full((20, 8), 2, "f"), np.full((16, 20), 3, "f"))
    for number, slot in enumerate((3, 1, 4)):
        parts: list[Any] = [None] * 80
        parts[7 + number] = part
        memory.set(slot, memory.packed({0: [ones], 1: parts}))
    assert memory.sizes() == {"A": 6, "L": 1, "AE": 6, "LE": 2}
    assert slots(-1, 1, 3, 4, 0) == [-1, 1, 0, 2, -1]
    for number in range(3):
        rank, a, b = (arrays[f"lora_{kind}.1"][number] for kind in ("rank", "a", "b"))
        assert np.flatnonzero(rank).tolist() == [7 + number] and rank.max() == 20
        assert (a[7 + number, 0] == 2).all() and (a[7 + number, 1, :, :4] == 2).all()
        assert (b[7 + number, :20] == 3).all() and a.sum() == 2 * 20 * 8 and b.sum() == 3 * 20 * 16
    memory.clear(1)
    memory.set(0, memory.packed({0: [None], 1: [part, *[None] * 79]}))
    assert slots(1, 0, 4) == [-1, 1, 2]
    assert np.flatnonzero(arrays["lora_rank.1"][1]).tolist() == [0]


@pytest.mark.slow
def test_a_mixture_without_kernels_leaves_other_layers_their_places(tmp_path: Path) -> None:
    """Experts that stay NF4 are computed otherwise: they have no places, attention has."""
    save_family("qwen3_moe", tmp_path / "model")
    save_bnb(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    made = llmc.compile(tmp_path / "model", tmp_path / "a.llmc", targets=[HERE], quant="keep")
    assert "quantized_moe" in made.read_text("ir.txt")
    module, factors = "model.layers.0.self_attn.q_proj", (np.ones((2, 64), "f"), np.ones((64, 2), "f"))
    with opened(made, one=write_adapter(tmp_path / "one", {module: factors})) as llm:
        assert np.abs(llm.logits(IDS, adapter="one") - llm.logits(IDS)).max() > 1e-3
        expert = write_adapter(tmp_path / "bad", {"model.layers.0.mlp.experts.0.gate_proj": factors})
        with pytest.raises(InputError, match="which this model has no place for"):
            llm.load_adapter("bad", expert)


def test_room_that_was_kept_is_given_up_where_a_kernel_cannot_count_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For more slots that nobody has asked for, and for a rank that went."""
    entry = {"k": 8, "parts": [["s", 16]], "dtype": "float32", "experts": 4, "of": "s"}
    experts = Place.parse({**entry, "interleaved": False, "unsaid": False})
    layer = Place(8, (("q", 16),))
    memory = AdapterMemory(AdapterPlaces(256, (layer, experts)), lambda *_: None)
    monkeypatch.setattr(adapter_memory, "_MOST", 64 * 16 * 8)  # 8 slots of rank 16: 64 columns of each

    def put(slot: int, rank: int) -> None:
        part = (np.ones((rank, 8), "f"), np.ones((16, rank), "f"))
        memory.set(slot, memory.packed({1: [part, None, None, None]}))

    for slot in range(3):
        put(slot, 16)
    assert memory.sizes()["AE"] == 6
    put(3, 32)  # 4 slots of rank 32, not 6
    assert (memory.sizes()["AE"], memory.sizes()["LE"]) == (4, 2)
    with pytest.raises(InputError, match="more than a kernel can count"):
        put(4, 16)
    memory.clear(3)
    for slot in range(3, 8):  # as many of rank 16 as ever
        put(slot, 16)
    assert (memory.sizes()["AE"], memory.sizes()["LE"]) == (8, 1)
    with pytest.raises(InputError, match="more than a kernel can count"):
        put(8, 16)
    assert memory.expert_slots(np.arange(memory.slots, dtype=np.int32)) is not None


def test_a_module_of_another_rank_is_told_of(
    mixtral: tuple[Path, dict[str, np.ndarray], LLM], tmp_path: Path
) -> None:
    """Beside parameters too: that is no change of a parameter without places."""
    one = tmp_path / "one"
    factors = np.ones((3, 64), "f"), np.ones((64, 3), "f")
    write_adapter(one, {"model.layers.0.self_attn.q_proj": factors}, target_parameters=["down_proj"], r=4)
    with pytest.raises(InputError, match=r"has the rank 3, adapter_config\.json says 4"):
        mixtral[2].load_adapter("bad", one)
