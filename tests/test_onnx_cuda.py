"""Target onnx-cuda without a GPU: what the artifact says, which provider is asked for, what is said where it
is missing, and that a step which sends its own pages alone gives what one over the whole cache gives.

The CUDA kernels themselves are onnxruntime's and are not run here.
"""

from __future__ import annotations

import logging
from typing import Any

import llmc
import numpy as np
import onnx
import onnxruntime
import pytest
from llmc.codegen.artifact import Artifact
from llmc.codegen.onnx.cuda import PROVIDER, OnnxCuda
from llmc.ir.errors import InputError, LlmcError
from llmc.runtime.executor import StepInputs, choose_target, open_executor
from llmc.runtime.executor.onnx_cuda import OnnxCudaExecutor
from llmc.runtime.sampling_params import SamplingParams

from .models import save_tiny

GREEDY = SamplingParams(max_tokens=20, temperature=0.0)


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("cuda")
    source = save_tiny(request.param, folder / "model")
    targets = ["onnx-cuda:fallback=cpu", "onnx-cpu"]
    quant = "int8" if request.param == "llama" else "none"
    return llmc.compile(source, folder / "m.llmc", targets=targets, quant=quant)


def _strict(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """The artifact as it is without fallback=cpu."""
    entry = artifact.target("onnx-cuda")
    changed = {**entry, "options": {**entry["options"], "fallback": "none"}}
    targets = {**artifact.manifest["targets"], "onnx-cuda": changed}
    monkeypatch.setitem(artifact.manifest, "targets", targets)


def test_the_artifact_holds_the_model_of_onnx_cpu(artifact: Artifact) -> None:
    ours, theirs = (artifact.target(name) for name in ("onnx-cuda", "onnx-cpu"))
    assert ours["provider"] == PROVIDER and ours["options"]["fallback"] == "cpu"
    assert "provider" not in theirs
    graphs = [onnx.load(artifact.path(e["model"]), load_external_data=False).graph for e in (ours, theirs)]
    assert list(graphs[0].node) == list(graphs[1].node) and len(graphs[0].node) > 50
    assert choose_target(artifact.targets) == "onnx-cpu"  # a GPU is used where it is asked for


def test_options() -> None:
    with pytest.raises(InputError, match="onnx-cuda: fallback=gpu"):
        OnnxCuda(fallback="gpu")


def test_a_missing_provider_is_an_error_with_its_remedy(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    _strict(artifact, monkeypatch)
    with pytest.raises(InputError, match=f"has no {PROVIDER}, only CPUExecutionProvider") as caught:
        open_executor(artifact, "onnx-cuda")
    assert "onnxruntime-gpu" in caught.value.remedy and "onnx-cpu" in caught.value.remedy


@pytest.mark.skipif(
    PROVIDER in onnxruntime.get_available_providers(), reason="this onnxruntime has the provider"
)
def test_a_provider_that_does_not_start_is_an_error_too(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime goes on with the CPU then, and only warns."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [PROVIDER, "CPUExecutionProvider"])
    _strict(artifact, monkeypatch)
    with (
        pytest.warns(UserWarning, match=PROVIDER),
        pytest.raises(InputError, match="did not start: there is no"),
    ):
        open_executor(artifact, "onnx-cuda")


def test_where_there_is_a_gpu_it_is_asked_first_and_the_cpu_for_what_it_lacks(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    real = onnxruntime.InferenceSession

    class Session:
        def __init__(self, model: bytes, options: Any, providers: list[str], **_: Any) -> None:
            asked.append(providers)
            self._real = real(model, options, providers=["CPUExecutionProvider"])

        def get_providers(self) -> list[str]:
            return asked[-1]

        def __getattr__(self, name: str) -> Any:
            return getattr(self._real, name)

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [PROVIDER, "CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    _strict(artifact, monkeypatch)
    executor = open_executor(artifact, "onnx-cuda")
    assert isinstance(executor, OnnxCudaExecutor)
    assert asked == [[PROVIDER, "CPUExecutionProvider"]] == [executor.providers]
    assert executor.identity()["provider"] == PROVIDER


def test_a_provider_that_fails_while_it_starts_is_named_with_the_reason(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = onnxruntime.InferenceSession

    def session(model: bytes, options: Any, providers: list[str], **how: Any) -> Any:
        if providers[0] == PROVIDER:
            raise RuntimeError("CUDA failure 2: out of memory")
        return real(model, options, providers=providers, **how)

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [PROVIDER, "CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    with caplog.at_level(logging.WARNING):
        assert open_executor(artifact, "onnx-cuda")
    assert "out of memory); its CPU kernels run instead" in caplog.text
    _strict(artifact, monkeypatch)
    with pytest.raises(InputError, match=r"did not start: .* out of memory"):
        open_executor(artifact, "onnx-cuda")


def test_a_provider_that_fails_in_a_step_ends_the_step(
    artifact: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    """By custom onnxruntime would print a line, and answer by the CPU from then on."""
    from onnxruntime.capi import onnxruntime_pybind11_state as states

    class Failing:
        def __init__(self, real: Any) -> None:
            self._real = real

        def __getattr__(self, name: str) -> Any:
            return getattr(self._real, name)

        def run(self, *_: Any) -> Any:
            raise states.EPFail("the GPU is gone")

    with llmc.load(artifact.root, target="onnx-cuda", kv_tokens=512) as llm:
        session: Any = llm.executor._session  # type: ignore[attr-defined]
        session._sess = Failing(session._sess)
        with pytest.raises(LlmcError, match="the GPU is gone"):
            llm.generate([5, 6, 7], GREEDY)
    assert capsys.readouterr().out == ""


def test_asked_for_the_cpu_answers_are_those_of_onnx_cpu(
    artifact: Artifact, caplog: pytest.LogCaptureFixture
) -> None:
    answers: list[list[list[int]]] = []
    prompts = [[(7 * i + k) % 90 + 5 for i in range(n)] for k, n in enumerate((1, 16, 17, 40))]
    for target in ("onnx-cuda", "onnx-cpu"):
        with caplog.at_level(logging.WARNING), llmc.load(artifact.root, target=target, kv_tokens=512) as llm:
            found = [llm.generate(prompt, GREEDY).token_ids for prompt in (*prompts, *prompts)]
            answers.append([list(ids) for ids in found])
    assert answers[0] == answers[1]
    assert "its CPU kernels run instead" in caplog.text


def test_a_step_sends_the_pages_of_its_sequences(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = open_executor(artifact, "onnx-cuda")
    assert isinstance(executor, OnnxCudaExecutor)
    sent: list[int] = []
    run = executor._session.run

    def counted(outputs: Any, feed: dict[str, np.ndarray]) -> Any:
        sent.append(next(array.shape[1] for name, array in feed.items() if name.startswith("k_pages")))
        return run(outputs, feed)

    monkeypatch.setattr(executor, "_session", type("Counted", (), {"run": staticmethod(counted)})())
    executor.allocate_kv(500)
    whole = lambda *values: np.array(values, np.int32)  # noqa: E731
    executor.step(
        StepInputs(
            whole(7, 8), whole(0, 0), whole(33 * 16, 470 * 16), whole(0, 1, 2), whole(1, 1),
            whole(33, 470).reshape(2, 1), whole(0, 1),
        )
    )  # fmt: skip
    assert sent == [2]
