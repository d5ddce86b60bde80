"""Target tvm-cuda without a GPU: what is compiled, for which architectures with which registers; whole models
by the kernels' own text, run on this processor (`gpu_emulated`), against transformers; what is refused.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import llmc
import numpy as np
import pytest
from llmc.codegen.artifact import Artifact
from llmc.codegen.target import get_target
from llmc.codegen.tvm.gpu.headers import headers
from llmc.codegen.tvm.gpu.nvrtc import compile_text, compiler_name, resources
from llmc.codegen.tvm.stored import stored_graph
from llmc.ir.errors import ArtifactError, CompileError, InputError, LlmcError
from llmc.runtime.executor import StepInputs, choose_target, cuda, cuda_driver
from llmc.runtime.executor.cuda import CudaExecutor, choose_image
from llmc.runtime.executor.cuda_driver import Driver
from llmc.runtime.executor.gpu_program import size_of

from . import gpu_emulated
from .conftest import LONG, only_long
from .gpu_steps import TOLERANCE, check_recurrence, check_steps, interpreted, step
from .models import ids_of, save_tiny, tiny_model
from .moe_models import MOE, save_moe
from .state_models import MODELS as STATE_MODELS
from .state_models import save_state_model

HOT = re.compile(r"(linear|moe_product)\d*_by|paged_attention\d*_|lora\d*_(down|up)")
"""Products, attention and adapters: where the time of a step goes."""

USUAL = ("int4-g32", "float16")
"""Scheme and element type of the cache of the artifact that tests of the executor share."""

needs_compiler = pytest.mark.skipif(compiler_name() is None, reason="neither NVRTC nor nvcc")


def compiled(
    name: str, folder: Path, *, quant: str = "none", targets: Sequence[str] = (), **options: Any
) -> Artifact:
    """A tiny model for tvm-cuda."""
    source = folder / name
    (save_moe if name in MOE else save_tiny)(name, source)
    chosen = ["tvm-cuda:arch=sm_80", *targets]
    return llmc.compile(
        str(source), folder / "out.llmc", quant=quant, targets=chosen, verdict=False, **options
    )


def emulated(artifact: Artifact, folder: Path) -> Driver:
    """A driver whose kernels are the artifact's, run by this processor."""
    text = artifact.read_text(artifact.target("tvm-cuda")["source"])
    return Driver(str(gpu_emulated.build(f"{headers('')}\n{text}", folder / "emulated")))


def check_model(name: str, folder: Path) -> None:
    artifact = compiled(name, folder)
    check_steps(CudaExecutor(artifact, emulated(artifact, folder)), name)


@needs_compiler
@pytest.mark.parametrize("name", ["llama"])
def test_models_equal_transformers(name: str, tmp_path: Path) -> None:
    check_model(name, tmp_path)


@needs_compiler
# One of each kind; the others are alike, and come with LLMC_LONG_TESTS=1.
@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("gemma3", "gpt_neox", "gpt_oss", "deepseek_v3"),
        *(
            pytest.param(name, marks=only_long)
            for name in ("mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt2", "olmo2", "granite")
        ),
        *(pytest.param(name, marks=only_long) for name in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")),
    ],
)
def test_more_models_equal_transformers(name: str, tmp_path: Path) -> None:
    check_model(name, tmp_path)


@needs_compiler
@pytest.mark.parametrize(
    ("quant", "kv"),
    [
        USUAL,
        pytest.param("int8", "int8", marks=pytest.mark.slow),
        pytest.param("nf4", "bfloat16", marks=[pytest.mark.slow, only_long]),
        pytest.param("gguf-q4_k_m", "float16", marks=[pytest.mark.slow, only_long]),
    ],
)
def test_engine_answers_as_one_step_does(
    quant: str, kv: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Greedy answers of the whole engine, launches recorded and repeated among them."""
    if (quant, kv) == USUAL:
        artifact, driver = request.getfixturevalue("llama")
    else:
        artifact = compiled("llama", tmp_path, quant=quant, targets=["tvm-cpu:isa=avx2"], kv_dtype=kv)
        driver = emulated(artifact, tmp_path)
    monkeypatch.setattr(cuda, "Driver", lambda: driver)
    prompts = [ids_of(n, seed=n) for n in (3, 70)]
    with llmc.load(artifact.root, target="tvm-cuda", kv_tokens=1024) as model:
        answers = [list(model.generate(p, max_tokens=12, temperature=0.0).token_ids) for p in prompts]
    executor = CudaExecutor(artifact, driver)
    executor.allocate_kv(8)
    graph, table = stored_graph(artifact), [1, 2, 3, 4, 5, 6]
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = [*prompt, *answer[:-1]]
        ours = step(executor, [ids], [0], [table])
        assert ours[len(prompt) - 1 :].argmax(1).tolist() == answer  # token by token, or all at once
        wanted = interpreted(graph, ids, table)
        # A number in the cache that rounds the other way is off by more than float16's last bit.
        assert np.abs(ours - wanted).max() < (TOLERANCE if kv == "float16" else 2 * TOLERANCE)
    assert driver._cuda.emulated_replays() > 10  # pyright: ignore[reportPrivateUsage]


@needs_compiler
def test_functions_run(tmp_path: Path) -> None:
    """An encoder: generic tensor operations, softmax in several stages among them."""
    artifact = compiled("bert", tmp_path)
    executor = CudaExecutor(artifact, emulated(artifact, tmp_path))
    executor.allocate_kv(8)
    model, ids = tiny_model("bert"), ids_of(20)
    import torch

    with torch.no_grad():
        wanted = model(torch.tensor([ids])).last_hidden_state[0].numpy()
    arrays = (ids, range(20), range(20), [0, 20], [20], [[0, 1]], range(20))
    given = StepInputs(*(np.array(a, np.int32) for a in arrays), token_type_ids=np.zeros(20, np.int32))
    assert np.abs(executor.step(given) - wanted).max() < TOLERANCE


# -- what is compiled --------------------------------------------------------------------------------------
@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    "quant", ["int4-g32", "none", *(pytest.param(quant, marks=only_long) for quant in ("int8", "nf4"))]
)
def test_every_architecture_is_assembled_without_spills(quant: str, tmp_path: Path) -> None:
    """Products, attention and adapters keep everything in registers, on each architecture."""
    source = str(save_moe("qwen3_moe", tmp_path / "moe"))
    targets = ["tvm-cuda:arch=all"]
    artifact = llmc.compile(
        source, tmp_path / "out.llmc", quant=quant, targets=targets, adapters=True, verdict=False
    )
    images = artifact.target("tvm-cuda")["images"]
    assert [image["arch"] for image in images] == ["sm_80", "sm_86", "sm_89", "sm_90", "ptx"]
    for image in images[:-1]:
        taken = resources(artifact.path(image["path"]).read_bytes())
        hot = {name: r for name, r in taken.items() if HOT.search(name)}
        assert len(hot) > 10 and sum("lora" in name for name in hot) >= 8
        assert not {name: r for name, r in hot.items() if r.stack}
        assert max(r.registers for r in taken.values()) == image["most_registers"] <= 255


@needs_compiler
def test_what_a_kernel_takes_is_read_from_the_machine_code() -> None:
    kept = 'extern "C" __global__ void plain(float* x) { x[threadIdx.x] += 1.0f; }'
    spilt = """extern "C" __global__ void held(float* x, const int* at) {
      float own[64];
      for (int i = 0; i < 64; i++) own[at[i]] = x[i];
      x[0] = own[at[64]];
    }"""
    taken = resources(compile_text(f"{kept}\n{spilt}", "sm_80"))
    assert taken["plain"].stack == 0
    assert taken["held"].stack >= 256
    assert 0 < taken["plain"].registers < 32


@needs_compiler
def test_refused_text_names_the_compiler_and_the_architecture() -> None:
    with pytest.raises(CompileError, match=r"sm_80.*no_such_name"):
        compile_text('extern "C" __global__ void f(int* x) { *x = no_such_name; }', "sm_80")
    with pytest.raises(CompileError, match="sm_12"):
        compile_text("", "sm_12")


@pytest.mark.slow
def test_same_model_same_bytes(tmp_path: Path) -> None:
    if compiler_name() is None:
        pytest.skip("neither NVRTC nor nvcc")
    texts: list[tuple[str, ...]] = []
    for i in range(2):
        artifact = compiled("gemma3", tmp_path / str(i), quant="int8")
        entry = artifact.target("tvm-cuda")
        texts.append((artifact.read_text(entry["source"]), artifact.read_text(entry["program"])))
    assert texts[0] == texts[1]


def test_architecture_that_there_is_not_is_refused() -> None:
    with pytest.raises(InputError, match="no architecture 'sm_70'"):
        get_target("tvm-cuda:arch=sm_70+sm_80")
    assert get_target("tvm-cuda:arch=all").architectures()[-1] == "ptx"  # type: ignore[attr-defined]


def test_without_a_compiler_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmc.codegen.tvm.gpu import nvrtc

    monkeypatch.setattr(nvrtc, "_nvrtc", lambda: None)
    monkeypatch.setattr(nvrtc, "_nvcc", lambda: None)
    with pytest.raises(CompileError, match=r"llmc\[cuda\]"):
        compile_text("", "sm_80")


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", list(STATE_MODELS)[:: 1 if LONG else 2])
def test_recurrent_models_equal_transformers(name: str, tmp_path: Path) -> None:
    """And a state that was copied in the middle of a text goes on with the same bits."""
    source = tmp_path / "source"
    source.mkdir()
    save_state_model(name, source)
    chosen = ["tvm-cuda:arch=sm_80"]
    artifact = llmc.compile(str(source), tmp_path / "out.llmc", targets=chosen, verdict=False)
    executor = CudaExecutor(artifact, emulated(artifact, tmp_path))
    check_recurrence(executor, name)


# -- what runs ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("capability", "arch"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_86"),
        ((8, 7), "sm_86"),
        ((9, 0), "sm_90"),
        ((12, 0), "ptx"),
        ((10, 0), "ptx"),
    ],
)
def test_the_newest_kernels_that_a_gpu_runs_are_taken(capability: tuple[int, int], arch: str) -> None:
    images = [{"arch": a} for a in ("sm_80", "sm_86", "sm_90", "ptx")]
    assert choose_image(images, capability)["arch"] == arch


def test_gpu_without_kernels_is_refused() -> None:
    with pytest.raises(ArtifactError, match="kernels for sm_90, the GPU is sm_86"):
        choose_image([{"arch": "sm_90"}], (8, 6))
    with pytest.raises(ArtifactError, match="the GPU is sm_75"):
        choose_image([{"arch": "sm_80"}, {"arch": "ptx"}], (7, 5))


def test_where_there_is_no_gpu_another_target_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_driver, "why_absent", lambda: "there is no NVIDIA GPU")
    assert choose_target(["onnx-cpu", "tvm-cuda"]) == "onnx-cpu"
    assert choose_target(["tvm-cuda"]) == "tvm-cuda"
    with pytest.raises(InputError, match="there is no NVIDIA GPU"):
        Driver()
    monkeypatch.setattr(cuda_driver, "why_absent", lambda: None)
    assert choose_target(["onnx-cpu", "tvm-cuda"]) == "tvm-cuda"


def test_sizes_are_numbers_names_and_six_operations() -> None:
    assert size_of("min(T, 32) * ((P * 16 + 255) // 256) % 7 - max(2, B)")({"T": 40, "P": 40, "B": 3}) == (
        32 * 3 % 7 - 3
    )


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "T.x",
        "T ** 9",
        "[T]",
        "min(T)",
        "f(T, 1)",
        "1.5",
        "True",
        "T if T else 1",
        "",
        "(",
        "T < 1",
        "1 // P",  # of no size known before
        "T % (B - B)",
        "T // 0",
        "+".join("1" * 3000),
    ],
)
def test_anything_else_in_place_of_a_size_is_refused(text: str) -> None:
    with pytest.raises(ArtifactError, match="where a size is due"):
        size_of(text)


@needs_compiler
@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.pop("slots"),
        lambda p: p["kernels"].clear(),
        lambda p: p["calls"][0].pop(),
        lambda p: p["kernels"][0]["launches"][0].update(function="none"),
        lambda p: p["calls"][0][1].__setitem__(0, 10_000),
        lambda p: p["calls"][0][1].__setitem__(0, -10_000),
        lambda p: p["kernels"][0]["launches"][0].update(arguments=[["array", 99]]),
    ],
)
def test_damaged_program_is_an_error(
    change: Callable[[Any], Any], tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> None:
    """Numbers that lead out of a program's tables are found when it is opened, not when it runs."""
    artifact, driver = request.getfixturevalue("llama")
    copy = tmp_path_factory.mktemp("damaged") / "out.llmc"
    shutil.copytree(artifact.root, copy)
    path = copy / artifact.target("tvm-cuda")["program"]
    program = json.loads(path.read_text())
    change(program)
    path.write_text(json.dumps(program))
    with pytest.raises(ArtifactError, match="compile the model again"):
        CudaExecutor(Artifact(copy, artifact.manifest), driver)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Driver]:
    folder = tmp_path_factory.mktemp("llama")
    quant, kv = USUAL
    artifact = compiled("llama", folder, quant=quant, targets=["tvm-cpu:isa=avx2"], kv_dtype=kv)
    return artifact, emulated(artifact, folder)


@needs_compiler
def test_steps_that_lead_out_of_the_cache_are_refused(llama: tuple[Artifact, Driver]) -> None:
    executor = CudaExecutor(*llama)
    with pytest.raises(InputError, match="at least one page"):
        executor.allocate_kv(0)
    executor.allocate_kv(4)
    with pytest.raises(InputError, match="slot_mapping"):
        step(executor, [[1, 2]], [0], [[4]])
    with pytest.raises(InputError, match="token_ids"):
        step(executor, [[1, 1 << 20]], [0], [[1]])
    with pytest.raises(InputError, match="language model, not a function"):
        executor.run({})


@needs_compiler
def test_cache_is_sized_by_the_gpus_memory(
    llama: tuple[Artifact, Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, driver = llama
    monkeypatch.setattr(cuda, "Driver", lambda: driver)
    monkeypatch.setattr(driver, "free_bytes", lambda: 1_000_000)
    with llmc.load(artifact.root, target="tvm-cuda") as model:
        assert model.engine.engine.kv.bytes <= 600_000
    with pytest.raises(InputError, match="MB that are free"):
        llmc.load(artifact.root, target="tvm-cuda", kv_cache_bytes=2_000_000)


@needs_compiler
def test_step_that_found_no_memory_leaves_nothing_behind(
    llama: tuple[Artifact, Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one takes memory anew; what was freed is used by nobody."""
    artifact, driver = llama
    executor = CudaExecutor(artifact, driver)
    executor.allocate_kv(8)
    wanted = step(executor, [ids_of(5)], [0], [[1]])
    real, freed = driver.allocate, list[int]()

    def full(size: int) -> int:
        raise LlmcError("the GPU's memory is full")

    monkeypatch.setattr(driver, "allocate", full)
    monkeypatch.setattr(driver, "free", freed.append)
    with pytest.raises(LlmcError, match="memory is full"):
        step(executor, [ids_of(100)], [0], [[2, 3, 4, 5, 6, 7, 1]])
    monkeypatch.setattr(driver, "allocate", real)
    assert np.array_equal(step(executor, [ids_of(5)], [0], [[1]]), wanted)
    held = {executor._inbox.address, *executor._outbox.addresses([1])}  # pyright: ignore[reportPrivateUsage]
    assert freed and not held & set(freed)
    assert len(freed) == len(set(freed))


@needs_compiler
def test_launches_that_cannot_be_recorded_go_one_by_one(
    llama: tuple[Artifact, Driver], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    artifact, driver = llama
    executor = CudaExecutor(artifact, driver)
    executor.allocate_kv(8)
    wanted = step(executor, [ids_of(5)], [0], [[1]])

    def refused(launches: object) -> None:
        raise LlmcError("cuStreamEndCapture: refused")

    monkeypatch.setattr(driver, "recorded", refused)
    for _ in range(4):
        assert np.array_equal(step(executor, [ids_of(5)], [0], [[1]]), wanted)
    assert "launches are not recorded" in caplog.text
