"""Target tvm-webgpu on whatever driver this machine has, a processor's (Mesa's lavapipe) among them: whole
models against transformers, the engine's answers, what is refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llmc
import numpy as np
import pytest
from llmc.codegen.artifact import Artifact
from llmc.codegen.tvm.stored import stored_graph
from llmc.codegen.tvm.wgsl.kernels import MAKERS, make
from llmc.ir.errors import ArtifactError, CompileError, InputError, LlmcError
from llmc.runtime.executor import StepInputs, choose_target, open_executor, webgpu, webgpu_driver
from llmc.runtime.executor.webgpu import WebGpuExecutor
from llmc.runtime.executor.webgpu_driver import WebGpuDriver

from .conftest import only_long
from .gpu_steps import TOLERANCE, check_recurrence, check_steps, interpreted, step
from .models import ids_of, save_tiny, tiny_model
from .moe_models import MOE, save_moe
from .state_models import MODELS as STATE_MODELS
from .state_models import save_state_model
from .webgpu_device import WebGpuDevice
from .webgpu_device import driver as any_driver


def compiled(name: str, folder: Path, **options: Any) -> Artifact:
    """A tiny model for tvm-webgpu."""
    source = folder / name
    if name in STATE_MODELS:
        source.mkdir()
        save_state_model(name, source)
    else:
        (save_moe if name in MOE else save_tiny)(name, source)
    given = {"targets": ["tvm-webgpu"], "quant": "none", "verdict": False, **options}
    return llmc.compile(str(source), folder / "out.llmc", **given)


@pytest.fixture(scope="module")
def driver() -> WebGpuDriver:
    return any_driver()


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("gemma3", "gpt_neox", "gpt_oss", "deepseek_v3")
        ),
        *(
            pytest.param(name, marks=[pytest.mark.slow, only_long])
            for name in ("mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt2", "olmo2", "granite", *MOE)
            if name not in ("gpt_oss", "deepseek_v3")
        ),
    ],
)
def test_models_equal_transformers(name: str, driver: WebGpuDriver, tmp_path: Path) -> None:
    check_steps(WebGpuExecutor(compiled(name, tmp_path), driver), name)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(STATE_MODELS))
def test_recurrent_models_equal_transformers(name: str, driver: WebGpuDriver, tmp_path: Path) -> None:
    check_recurrence(WebGpuExecutor(compiled(name, tmp_path), driver), name)


def test_functions_run(driver: WebGpuDriver, tmp_path: Path) -> None:
    """An encoder: generic tensor operations among them."""
    executor = WebGpuExecutor(compiled("bert", tmp_path), driver)
    executor.allocate_kv(8)
    model, ids = tiny_model("bert"), ids_of(20)
    import torch

    with torch.no_grad():
        wanted = model(torch.tensor([ids])).last_hidden_state[0].numpy()
    arrays = (ids, range(20), range(20), [0, 20], [20], [[0, 1]], range(20))
    given = StepInputs(*(np.array(a, np.int32) for a in arrays), token_type_ids=np.zeros(20, np.int32))
    assert np.abs(executor.step(given) - wanted).max() < TOLERANCE


@pytest.mark.parametrize(
    ("quant", "kv"),
    [
        ("int4-g32", "float16"),
        pytest.param("int8", "bfloat16", marks=pytest.mark.slow),
        pytest.param("nf4", "float32", marks=pytest.mark.slow),
        pytest.param("gguf-q4_k_m", "float16", marks=pytest.mark.slow),
    ],
)
def test_engine_answers_as_one_step_does(
    quant: str, kv: str, driver: WebGpuDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy answers of the whole engine; texts of more than a chunk of positions, and nearly a split."""
    artifact = compiled(
        "llama", tmp_path, quant=quant, kv_dtype=kv, targets=["tvm-webgpu", "tvm-cpu:isa=avx2"]
    )
    monkeypatch.setattr(webgpu, "WebGpuDriver", lambda: driver)
    prompts = [ids_of(n, seed=n) for n in (3, 70, 230)]
    with llmc.load(artifact.root, target="tvm-webgpu", kv_tokens=1024) as model:
        answers = [list(model.generate(p, max_tokens=12, temperature=0.0).token_ids) for p in prompts]
    executor = WebGpuExecutor(artifact, driver)
    executor.allocate_kv(20)
    graph, table = stored_graph(artifact), list(range(1, 17))
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = [*prompt, *answer[:-1]]
        ours = step(executor, [ids], [0], [table])
        assert ours[len(prompt) - 1 :].argmax(1).tolist() == answer  # token by token, or all at once
        wanted = interpreted(graph, ids, table)
        # A number in the cache that rounds the other way is off by more than its last bit.
        assert np.abs(ours - wanted).max() < (2 * TOLERANCE if kv == "bfloat16" else TOLERANCE)


def test_rows_that_are_more_than_an_axis_of_blocks(driver: WebGpuDriver) -> None:
    device = WebGpuDevice({"last": MAKERS["gather_last"](width=3)}, driver)
    x = np.random.default_rng(0).standard_normal((50, 3)).astype(np.float32)
    index = (np.arange(70_001) % 50).astype(np.int32)
    assert np.array_equal(device("last", x=x, index=index), x[index])


# -- what is compiled --------------------------------------------------------------------------------------
@pytest.mark.slow
def test_same_model_same_bytes(tmp_path: Path) -> None:
    texts: list[tuple[str, ...]] = []
    for i in range(2):
        (folder := tmp_path / str(i)).mkdir()
        artifact = compiled("gemma3", folder, quant="int8")
        entry = artifact.target("tvm-webgpu")
        texts.append((artifact.read_text(entry["source"]), artifact.read_text(entry["program"])))
    assert texts[0] == texts[1]
    modules = webgpu_driver.modules_of(texts[0][0])
    assert all("fn main(" in module for module in modules.values()) and len(modules) > 20


def test_what_there_are_no_kernels_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="float16 or bfloat16 or float32"):
        compiled("llama", tmp_path / "a", kv_dtype="int8")
    with pytest.raises(CompileError, match="tvm-webgpu has no kernel lora"):
        make("lora", {})


# -- what runs ---------------------------------------------------------------------------------------------
def test_where_there_is_no_gpu_another_target_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webgpu_driver, "why_absent", lambda: "no driver has a GPU")
    assert choose_target(["onnx-cpu", "tvm-webgpu"]) == "onnx-cpu"
    assert choose_target(["tvm-webgpu"]) == "tvm-webgpu"
    with pytest.raises(InputError, match="no driver has a GPU"):
        WebGpuDriver()
    monkeypatch.setattr(webgpu_driver, "why_absent", lambda: None)
    assert choose_target(["tvm-cpu", "tvm-webgpu"]) == "tvm-webgpu"


def test_a_processor_is_no_gpu_unless_it_is_asked_for(
    driver: WebGpuDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "llvmpipe" not in driver.name:
        pytest.skip("this machine has a GPU")
    monkeypatch.delenv(webgpu_driver.ON_CPU, raising=False)
    assert "has a GPU" in str(webgpu_driver.why_absent())
    monkeypatch.setenv(webgpu_driver.ON_CPU, "1")
    assert webgpu_driver.why_absent() is None


def test_kernels_that_a_driver_refuses_leave_the_processors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused() -> None:
        raise ArtifactError("it does not take kernel f", remedy="update it")

    artifact = compiled("llama", tmp_path, targets=["tvm-webgpu", "tvm-cpu:isa=avx2"])
    monkeypatch.setattr(webgpu_driver, "why_absent", lambda: None)
    monkeypatch.setattr(webgpu, "WebGpuDriver", refused)
    assert open_executor(artifact).target_name == "tvm-cpu"
    assert "tvm-webgpu is left out: it does not take kernel f" in caplog.text
    with pytest.raises(ArtifactError, match="does not take kernel f"):
        open_executor(artifact, "tvm-webgpu")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return compiled("llama", tmp_path_factory.mktemp("llama"), quant="int4-g32")


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.pop("slots"),
        lambda p: p["kernels"][0]["launches"][0].update(function="none"),
        lambda p: p["calls"][0][1].__setitem__(0, 10_000),
        lambda p: p["kernels"][0]["launches"][0].update(arguments=[["array", 99]]),
    ],
)
def test_damaged_program_is_an_error(
    change: Callable[[Any], Any], driver: WebGpuDriver, llama: Artifact, tmp_path: Path
) -> None:
    copy = tmp_path / "out.llmc"
    shutil.copytree(llama.root, copy)
    path = copy / llama.target("tvm-webgpu")["program"]
    program = json.loads(path.read_text())
    change(program)
    path.write_text(json.dumps(program))
    with pytest.raises(ArtifactError, match="compile the model again"):
        WebGpuExecutor(Artifact(copy, llama.manifest), driver)


def test_text_that_is_no_wgsl_names_the_kernel(driver: WebGpuDriver, llama: Artifact, tmp_path: Path) -> None:
    copy = tmp_path / "out.llmc"
    shutil.copytree(llama.root, copy)
    path = copy / llama.target("tvm-webgpu")["source"]
    path.write_text(path.read_text().replace("fn kernel(", "fn kern(", 1))
    with pytest.raises(ArtifactError, match=r"does not take kernel \w+.*compile the model again"):
        WebGpuExecutor(Artifact(copy, llama.manifest), driver)


def test_arrays_beyond_what_the_gpu_binds_are_refused(
    driver: WebGpuDriver, llama: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight by an error; the cache by fewer pages."""
    monkeypatch.setattr(driver, "most_bound", 40_000)
    with pytest.raises(LlmcError, match="arrays of at most"):
        driver.allocate(50_000)
    executor = WebGpuExecutor(llama, driver)
    page = executor.kv_bytes_per_page // len(llama.model["kv"])
    assert executor.max_pages == 40_000 // page
    with pytest.raises(InputError, match="pages"):
        executor.allocate_kv(executor.max_pages + 1)


def test_a_page_is_copied_within_its_layer_and_read_back(driver: WebGpuDriver, llama: Artifact) -> None:
    executor = WebGpuExecutor(llama, driver)
    executor.allocate_kv(8)
    step(executor, [ids_of(20)], [0], [[1, 2]])
    executor.copy_pages([1, 2], [5, 6])
    assert np.array_equal(executor.read_pages([1, 2]), executor.read_pages([5, 6]))
    assert executor.read_pages([1]).any() and not executor.read_pages([7]).any()
