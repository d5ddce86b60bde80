"""Adapters chosen per request on tvm-cuda, without a GPU (`gpu_emulated.py`): the kernel of `lora` beside the
operation's own meaning and a product in float64, with what lies beyond its arrays out of reach.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import llmc
import numpy as np
import pytest
from llmc.codegen.artifact import Artifact
from llmc.codegen.tvm.gpu import kernels
from llmc.codegen.tvm.gpu.lora import columns_of_split
from llmc.codegen.tvm.gpu.source import Code
from llmc.codegen.tvm.placed import with_places
from llmc.codegen.tvm.stored import stored_graph
from llmc.frontend.lora import read_adapter
from llmc.ir import interpreter
from llmc.ir.dtypes import to_numpy
from llmc.ir.errors import InputError, LlmcError, UnsupportedError
from llmc.ir.ops.lora import Lora
from llmc.runtime.adapter_places import AdapterPlaces, Factor, Place
from llmc.runtime.adapters import check_places
from llmc.runtime.executor import StepInputs, cuda
from llmc.runtime.executor.adapter_memory import AdapterMemory
from llmc.runtime.executor.cuda_adapters import CudaAdapters
from llmc.runtime.executor.cuda_driver import Driver
from llmc.runtime.llm import LLM

from .conftest import LONG
from .gpu_emulated import Device
from .kernel_harness import close, meaning, normal, value
from .lora_files import adapter
from .models import ids_of, reference_logits, save_tiny, tiny_model
from .test_cuda_target import TOLERANCE, emulated, needs_compiler
from .test_lora_kernel import factors

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT still calls what transformers deprecates
PeftModel: Any = pytest.importorskip("peft").PeftModel

SHAPES: dict[str, tuple[tuple[int, ...], int]] = {
    "fused": ((48, 16, 20), 132),
    "ragged": ((40, 7, 16), 37),
    "tiny": ((5,), 3),
    "wide": ((1030,), 64),
    "split": ((24, 8), 2084),
}
"""Rows of each part and K: whole vectors of 16 bytes in x and y, or not; more columns than a block has; more
of x than one block takes.
"""
NAMES = ("rank", "scale", "a", "b")
RANKS = {"fused": [[8, 1, 64], [0, 5, 16], [256, 33, 17]], "split": [[16, 40], [3, 16], [17, 0]]}


def fenced(array: np.ndarray) -> np.ndarray:
    """The same at the end of its memory, from a multiple of 16 bytes on: who reads 16 bytes more than that
    ends the process.
    """
    page, size = mmap.PAGESIZE, -(-array.nbytes // 16) * 16
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(start + pages * page), ctypes.c_size_t(page), 0) == 0
    found: np.ndarray = np.ndarray(array.shape, array.dtype, buffer=memory, offset=pages * page - size)
    found[...] = array
    return found


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Device:
    codes: dict[str, Code] = {}
    for name, (parts, k) in SHAPES.items():
        for dtype in ("float32", "int8"):
            codes[f"{name}_{dtype}"] = kernels.MAKERS["lora"](parts=parts, k=k, dtype=dtype)
    return Device(codes, tmp_path_factory.mktemp("lora"))


def test_columns_are_shared_out_by_k_alone() -> None:
    assert [columns_of_split(k) for k in (3, 128, 576, 2047, 2084, 14336)] == [
        128,
        128,
        640,
        2048,
        1152,
        1792,
    ]


def expected_of(
    parts: tuple[int, ...], plain: Any, batch: list[int], x: np.ndarray, y: np.ndarray
) -> np.ndarray:
    """In float64; `plain`: A and B of each slot and part."""
    found = y.astype(np.float64)
    for t, s in enumerate(batch):
        start = 0
        for (down, up), rows in zip(plain[s], parts, strict=True):
            if s >= 0:
                found[t, start : start + rows] += up @ (down @ x[t].astype(np.float64))
            start += rows
    return found


BATCHES = [[1], [-1] * 3, [2, 2, -1, 0, 1], [0] * 7 + [1, -1, 2] + [2] * 20 + [-1] * 9 + [1] * 3]
"""Slots of a step's rows: alone, nobody, many adapters in few rows; tiles that several adapters share, one
adapter has, and nobody has, and a last one that is not full.
"""


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("name", SHAPES)
def test_is_the_product_and_rows_do_not_depend_on_their_batch(gpu: Device, name: str, dtype: str) -> None:
    parts, k = SHAPES[name]
    ranks = RANKS.get(name) or [[(5 + 7 * s + 11 * p) % 34 for p in range(len(parts))] for s in range(3)]
    blocks = -(-max(max(r) for r in ranks) // 16)
    plain, given = factors(parts, k, ranks, dtype, blocks)
    arrays = {name: fenced(array) for name, array in zip(NAMES, given, strict=True)}

    def run(x: np.ndarray, y: np.ndarray, slots: np.ndarray, arrays: dict[str, np.ndarray] = arrays) -> Any:
        return gpu(f"{name}_{dtype}", y=y, x=fenced(x), adapter=fenced(slots), **arrays)

    # The same adapters beside one more, of a larger rank than any.
    more = [*ranks, [16 * blocks + 1] * len(parts)] if blocks < 16 else [*ranks, ranks[0]]
    grown = factors(parts, k, more, dtype, max(blocks, -(-more[-1][0] // 16)))[1]
    wide = dict[str, np.ndarray](zip(NAMES, grown, strict=True))
    _put(arrays, wide)
    for batch in BATCHES:
        slots = np.array(batch, np.int32)
        x, y = normal(len(slots), k), normal(len(slots), sum(parts), seed=1)
        found = run(x, y, slots)
        close(found, expected_of(parts, plain, batch, x, y), 3e-6)
        op = Lora(*map(value, (y, x, slots, *given)), parts=parts)
        close(found, meaning(op, y, x, slots, *given, None, None, None), 3e-6)
        np.testing.assert_array_equal(found[slots < 0], y[slots < 0])
        for rows in (slice(9, 10), slice(3, 36)):  # alone, and by the other launches
            if x[rows].size:
                np.testing.assert_array_equal(run(x[rows], y[rows], slots[rows]), found[rows])
        if len(x) < 40:
            np.testing.assert_array_equal(run(x, y, slots, wide), found)


def _put(arrays: dict[str, np.ndarray], into: dict[str, np.ndarray]) -> None:
    """Slots of smaller arrays into larger ones."""
    for name, old in arrays.items():
        part = into[name][: len(old)]
        if name == "rank":
            part[...] = old
        else:
            part[:, :, : old.shape[2]] = old


# -- memory --------------------------------------------------------------------------------------------------
class Memory:
    """A driver that has memory alone, and finds whoever goes beyond what was allocated."""

    def __init__(self) -> None:
        self.held: dict[int, np.ndarray] = {}
        self.forgotten = False

    def allocate(self, size: int) -> int:
        found = np.full(size, 0xFF, np.uint8)
        self.held[found.ctypes.data] = found
        self.forgotten = False
        return found.ctypes.data

    def free(self, address: int) -> None:
        assert self.forgotten, "launches know this memory"
        self.held.pop(address)[:] = 0xFF

    def forget(self) -> None:
        self.forgotten = True

    def view(self, address: int, size: int) -> np.ndarray:
        if not size:
            return np.empty(0, np.uint8)
        for start, memory in self.held.items():
            if start <= address and address + size <= start + len(memory):
                return memory[address - start : address - start + size]
        raise AssertionError(f"{size} bytes at an address that is not allocated")

    def upload(self, address: int, array: np.ndarray) -> None:
        assert array.flags.c_contiguous
        self.view(address, array.nbytes)[:] = array.view(np.uint8).reshape(-1)

    def download(self, array: np.ndarray, address: int) -> None:
        array.view(np.uint8).reshape(-1)[:] = self.view(address, array.nbytes)

    def copy(self, to: int, source: int, size: int) -> None:
        self.view(to, size)[:] = self.view(source, size)

    def enter(self) -> None: ...

    def wait(self) -> None: ...


PLACES = AdapterPlaces(
    256, (Place(37, (("q", 24), ("k", 8), ("v", 8))), Place(16, (("o", 33),), "int8"), Place(8, (("up", 5),)))
)


def drawn(rng: np.random.Generator, rank: int) -> dict[int, list[Factor | None]]:
    """Factors of some parts of some places, of ranks up to `rank`."""
    found: dict[int, list[Factor | None]] = {}
    for number, place in enumerate(PLACES.places):
        if rng.random() < 0.7 or not number:
            found[number] = []
            for p, (_, rows) in enumerate(place.parts):
                r = rank if not number and not p else int(rng.integers(1, rank + 1))
                factor = rng.standard_normal((r, place.k)), rng.standard_normal((rows, r))
                there = rng.random() < 0.7 or not p
                found[number].append((factor[0].astype("f4"), factor[1].astype("f4")) if there else None)
    return found


def check_memory(
    ours: CudaAdapters, memory: Memory, bound: dict[str, int], host: dict[str, np.ndarray]
) -> None:
    """What the kernels read is, slot by slot, what tvm-cpu's read."""
    for number, place in enumerate(PLACES.places):
        ranks = np.zeros((ours.slots, len(place.parts)), np.int32)
        memory.download(ranks, bound[f"lora_rank.{number}"])
        theirs = host[f"lora_rank.{number}"]
        for slot in range(max(len(ranks), len(theirs))):
            own = ranks[slot] if slot < len(ranks) else np.zeros(len(place.parts), np.int32)
            assert np.array_equal(own, theirs[slot] if slot < len(theirs) else 0 * own)
            for name in ("scale", "a", "b") if own.any() else ():
                whole = host[f"lora_{name}.{number}"]
                room = ours.blocks * (16 if name == "b" else 1)
                got = np.zeros((whole.shape[1], room, *whole.shape[3:]), whole.dtype)
                memory.download(got, bound[f"lora_{name}.{number}"] + slot * got.nbytes)
                columns = np.repeat(own, [-(-rows // 16) for _, rows in place.parts]) if name == "b" else own
                for line, rank in enumerate(columns):
                    kept = rank if name == "b" else -(-rank // 16)
                    assert np.array_equal(got[line, :kept], whole[slot, line, :kept]), (name, number, slot)


@pytest.mark.parametrize("seed", range(4))
def test_memory_holds_what_is_loaded_whatever_comes_and_goes(seed: int) -> None:
    """Any order of loading and unloading, ranks that grow and shrink, and now and then no memory."""
    rng, memory = np.random.default_rng(seed), Memory()
    bound, host = dict[str, int](), dict[str, np.ndarray]()
    ours = CudaAdapters(PLACES, cast(Driver, memory), bound.__setitem__, memory.forget)
    theirs, loaded = AdapterMemory(PLACES, host.__setitem__), set[int]()
    for _ in range(60):
        if loaded and rng.random() < 0.45:
            slot = int(rng.choice(sorted(loaded)))
            loaded.remove(slot)
            for one in (ours, theirs):
                one.clear(slot)
        else:
            slot = next(slot for slot in range(99) if slot not in loaded)
            factors = drawn(rng, int(rng.choice([1, 8, 16, 17, 40])))
            packed = ours.packed(factors)
            if rng.random() < 0.2 and (slot >= ours.slots or 16 * ours.blocks < 40):
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(memory, "allocate", _full)
                    with pytest.raises(InputError, match="the GPU has no"):
                        ours.set(max(slot, ours.slots), packed)
            else:
                ours.set(slot, packed)
                theirs.set(slot, theirs.packed(factors))
                loaded.add(slot)
        if bound:
            check_memory(ours, memory, bound, host)
        assert len(memory.held) == bool(loaded) and max(loaded, default=-1) < ours.slots
    for slot in loaded:
        ours.clear(slot)
    assert not memory.held


def _full(size: int) -> int:
    raise LlmcError("the GPU's memory is full")


# -- whole models ------------------------------------------------------------------------------------------
SMALL: dict[str, Any] = {"num_hidden_layers": 1}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
KINDS: dict[str, dict[str, Any]] = {
    "one": {"target_modules": LINEAR, "r": 5},
    "two": {"target_modules": ["k_proj", "down_proj"], "r": 24, "lora_alpha": 12},
    "three": {"target_modules": ["q_proj", "o_proj"], "r": 16, "use_rslora": True},
}
"""Adapters; the second has a larger rank than there is room for when the first is loaded."""


def placed(source: Path, folder: Path, quant: str = "none", *others: str) -> tuple[Artifact, Driver]:
    """An artifact with places for adapters, for other targets too, and what runs it."""
    targets = ["tvm-cuda:arch=sm_80", *others]
    root = folder / "placed.llmc"
    artifact = llmc.compile(str(source), root, quant=quant, targets=targets, adapters=True, verdict=False)
    return artifact, emulated(artifact, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of each kind, as PEFT saves it."""
    path = tmp_path_factory.mktemp("adapters")
    for seed, (kind, options) in enumerate(KINDS.items()):
        adapter(tiny_model("qwen2", **SMALL), path / kind, seed=seed, **options)
    return path


@pytest.fixture(scope="module")
def opened(folder: Path) -> Iterator[tuple[LLM, Driver]]:
    artifact, driver = placed(save_tiny("qwen2", folder / "base", **SMALL), folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "Driver", lambda: driver)
        with llmc.load(artifact.root, adapters={"one": folder / "one"}, kv_tokens=4096, context=256) as llm:
            yield llm, driver


def peft_logits(folder: Path, kind: str, ids: list[int]) -> np.ndarray:
    model = tiny_model("qwen2", **SMALL)
    if kind:
        model = PeftModel.from_pretrained(model, str(folder / kind))
    return np.asarray(reference_logits(model, ids)).reshape(len(ids), -1)


def greedy(llm: LLM, prompts: list[tuple[str, list[int]]], count: int = 4) -> list[list[int]]:
    """Tokens of each (adapter, prompt), computed together."""
    streams = [
        llm.stream(prompt, adapter=name or None, max_tokens=count, ignore_eos=True)
        for name, prompt in prompts
    ]
    return [[token for output in stream for token in output.token_ids] for stream in streams]


def memory(llm: LLM) -> CudaAdapters:
    found = llm.engine.engine.executor._adapters  # pyright: ignore[reportPrivateUsage]
    assert isinstance(found, CudaAdapters)
    return found


@pytest.mark.slow
@needs_compiler
def test_adapters_come_and_go_between_steps(opened: tuple[LLM, Driver], folder: Path) -> None:
    """Logits are PEFT's as nearly as the base's are transformers'; each answer of a batch is the one that its
    request gets alone; and it stays so where memory for adapters moves while answers are under way and their
    launches are recorded. What was freed holds NaNs here.
    """
    llm, driver = opened
    ids, own = ids_of(40), memory(llm)
    mixed = [(name, ids_of(3 + 5 * i, seed=i)) for i, name in enumerate(["one", "", "two", "one"])]
    assert (own.slots, own.blocks) == (1, 1)
    before = {name: llm.logits(ids, adapter=name or None) for name in ("", "one")}
    (long,) = greedy(llm, [("one", ids)], 14)

    running = llm.stream(ids, adapter="one", max_tokens=14, ignore_eos=True)
    got = [token for _ in range(6) for token in next(running).token_ids]
    replays = driver._cuda.emulated_replays()  # pyright: ignore[reportPrivateUsage]
    assert replays > 0
    llm.load_adapter("two", folder / "two")
    assert (own.slots, own.blocks) == (2, 2)
    got += [token for output in running for token in output.token_ids]
    assert got == long
    assert driver._cuda.emulated_replays() > replays  # pyright: ignore[reportPrivateUsage]

    for name in ("", "one", "two"):
        found = llm.logits(ids, adapter=name or None)
        assert np.abs(found - peft_logits(folder, name, ids)).max() < TOLERANCE
        assert np.array_equal(before.setdefault(name, found), found)
    assert min(np.abs(before[""] - before[name]).max() for name in ("one", "two")) > 10 * TOLERANCE
    alone = [greedy(llm, [one])[0] for one in mixed]
    assert greedy(llm, mixed) == alone
    assert len({tuple(tokens) for tokens in alone}) == len(mixed)

    llm.unload_adapter("one")  # a slot in the middle is empty, and is taken again
    llm.load_adapter("three", folder / "three")
    assert greedy(llm, [one for one in mixed if one[0] != "one"]) == [
        tokens for tokens, (name, _) in zip(alone, mixed, strict=True) if name != "one"
    ]
    assert np.abs(llm.logits(ids, adapter="three") - peft_logits(folder, "three", ids)).max() < TOLERANCE
    llm.unload_adapter("two")
    assert (own.slots, own.blocks) == (1, 1)
    llm.unload_adapter("three")
    assert (own.slots, own._address) == (0, 0)  # pyright: ignore[reportPrivateUsage]
    assert np.array_equal(llm.logits(ids), before[""])
    llm.load_adapter("one", folder / "one")
    assert np.array_equal(llm.logits(ids, adapter="one"), before["one"])


@needs_compiler
@pytest.mark.slow
def test_chunks_and_company_leave_logits_as_they_are(opened: tuple[LLM, Driver]) -> None:
    """Bit for bit, by all launches: rows alone, and in tiles."""
    llm, _ = opened
    ids = ids_of(45)
    whole = llm.logits(ids, adapter="one")
    for chunk in (9, 33):
        parts = [part.copy() for part in llm.iter_logits(ids, chunk, "one")]
        assert np.array_equal(np.concatenate(parts), whole)


@needs_compiler
def test_steps_without_adapters_launch_nothing_for_them(opened: tuple[LLM, Driver]) -> None:
    llm, driver = opened

    def launches(name: str | None) -> int:
        begun = driver._cuda.emulated_launches()  # pyright: ignore[reportPrivateUsage]
        llm.logits(ids_of(9), adapter=name)
        return driver._cuda.emulated_launches() - begun  # pyright: ignore[reportPrivateUsage]

    places = llm.engine.engine.executor.adapter_places  # type: ignore[attr-defined]
    assert launches("one") == launches(None) + 2 * len(places.places)


@needs_compiler
def test_where_memory_is_full_nothing_changes(
    opened: tuple[LLM, Driver], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, driver = opened
    before = llm.logits(ids_of(9), adapter="one")

    with monkeypatch.context() as patch:
        patch.setattr(driver, "allocate", _full)
        with pytest.raises(InputError, match=r"no \d+ MB for 2 adapters of rank 32") as caught:
            llm.load_adapter("two", folder / "two")
    assert "kv_tokens" in caught.value.remedy
    assert llm.adapters == ["one"]
    assert np.array_equal(llm.logits(ids_of(9), adapter="one"), before)


@needs_compiler
def test_kernels_without_places_name_the_command(opened: tuple[LLM, Driver]) -> None:
    llm, driver = opened
    artifact = llm.artifact
    assert artifact is not None
    entry = {key: v for key, v in artifact.target("tvm-cuda").items() if key != "adapters"}
    for others, remedy in (([], "compile it with --adapters: llmc"), (["tvm-cpu"], "--target tvm-cpu, or")):
        targets = {"tvm-cuda": entry, **{name: {} for name in others}}
        bare = Artifact(artifact.root, {**artifact.manifest, "targets": targets})
        executor = cuda.CudaExecutor(bare, driver)
        with pytest.raises(UnsupportedError, match="have no places for adapters") as caught:
            check_places(bare, executor)
        assert remedy in caught.value.remedy
        with pytest.raises(InputError, match="take no adapters"):
            executor.clear_adapter(0)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("quant", ["int4-g32", *(["nf4"] if LONG else [])])
def test_over_a_quantized_base(quant: str, folder: Path, tmp_path: Path) -> None:
    """Beside the same graph by the ops' meanings, over the same codes; factors are int8 where codes are whole
    numbers.
    """
    artifact, driver = placed(
        save_tiny("qwen2", tmp_path / "base", **SMALL), tmp_path, quant, "tvm-cpu:isa=avx2"
    )
    executor = cuda.CudaExecutor(artifact, driver)
    executor.allocate_kv(8)
    places = executor.adapter_places
    assert places is not None
    dtypes = [place.dtype for place in places.places]
    assert dtypes[:-1] == ["int8" if quant == "int4-g32" else "float32"] * (len(dtypes) - 1)
    graph = with_places(stored_graph(artifact), gains=False, embeddings=False)
    feed: dict[str, Any] = {}
    host = AdapterMemory(places, feed.__setitem__)
    for slot, kind in enumerate(KINDS):
        factors = places.factors(read_adapter(folder / kind))
        executor.set_adapter(slot, executor.packed_adapter(factors))
        host.set(slot, host.packed(factors))
    slots = np.repeat(np.array([1, -1, 0, 2], np.int32), 10)
    inputs = one_sequence(ids_of(40), slots)
    found = executor.step(inputs).copy()
    feed |= inputs.given()
    for v in graph.inputs:
        if v.name.startswith("kv_pages."):
            feed[v.name] = np.zeros([8 if not isinstance(d, int) else d for d in v.shape], to_numpy(v.dtype))
    tensors = {name: interpreter.to_torch(array) for name, array in feed.items()}
    wanted = interpreter.run(graph, tensors)[0].numpy()
    assert np.abs(found - wanted).max() < TOLERANCE
    plain = executor.step(one_sequence(ids_of(40), None))
    assert np.abs(found - plain).max() > 10 * TOLERANCE


def one_sequence(ids: list[int], slots: np.ndarray | None) -> StepInputs:
    count, at = len(ids), range(len(ids))
    arrays = (ids, at, [16 + p for p in at], [0, count], [count], [range(1, 1 + -(-count // 16))], at)
    return StepInputs(*(np.array(a, np.int32) for a in arrays), adapter=slots)
