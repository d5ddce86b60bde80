"""The driver: what it counts, predicts and refuses, whatever the target."""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from llmc.codegen import driver
from llmc.codegen.calibrate import CalibrationOptions
from llmc.codegen.driver import Plan, check_model, compile_model, count_weights, lower, trace
from llmc.codegen.null import Null
from llmc.codegen.peak import WORKER_BYTES
from llmc.codegen.tvm.kernels.isa import LEVELS
from llmc.codegen.verdict import VerdictOptions
from llmc.frontend.source import open_source
from llmc.ir.errors import InputError, LlmcError, UnsupportedError
from llmc.ir.ops.quant import QuantizedLinear
from llmc.passes.base import PassContext
from llmc.passes.quantize import quality
from llmc.passes.quantize.verdict import measure

from .models import save_tiny

pytest.importorskip("torch")


@pytest.mark.parametrize("family", ["gpt2", "llama"])  # weights as [K, N] and [N, K]; head untied and tied
def test_every_scheme_counts_the_same_weights(family: str, tiny_folder: Any) -> None:
    traced = trace(open_source(tiny_folder(family)), None)

    def count(scheme: str) -> int:
        plan = Plan.make(["null"], scheme, None, ())
        return count_weights(lower(traced.clone(), plan, PassContext())[0])

    counted = {scheme: count(scheme) for scheme in ("none", "int8", "int4-g32", "int4-g32-sym")}
    assert len(set(counted.values())) == 1, counted
    assert counted["none"] > 50_000


def test_predicted_weights_are_those_that_are_written(tiny_folder: Any, tmp_path: Path) -> None:
    folder = tiny_folder("llama")
    # Not onnx-cpu: onnxruntime's operator wants scales in float32, twice as large as they are counted.
    written = compile_model(folder, tmp_path / "a.llmc", targets=["tvm-cpu:isa=avx2"], quant="int8")
    predicted = check_model(folder, targets=["tvm-cpu:isa=avx2"], quant="int8").weight_bytes
    header = 8192  # names and places of the tensors, which weigh in a tiny model only
    assert predicted <= written.weight_bytes <= predicted + header
    assert 8 < written.bits_per_weight < 9.5


def test_check_finds_what_a_target_cannot_emit(tiny_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Null, "emitted", lambda self: Null.operations - {"paged_attention"})
    with pytest.raises(
        UnsupportedError, match=r"cannot emit paged_attention \(from model\.layers\.0\.self_attn"
    ):
        check_model(tiny_folder("llama"), targets=["null"])


@pytest.mark.parametrize("quant", ["gptq-int4-g32", "gguf-q4_k_m"])
def test_a_target_refuses_before_anything_is_calibrated(
    quant: str, tiny_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def long_work(*arguments: Any) -> None:
        raise AssertionError("calibration began")

    monkeypatch.setattr(driver, "begin_calibration", long_work)
    with pytest.raises(AssertionError, match="calibration began"):
        compile_model(tiny_folder("gpt_neox"), tmp_path / "a.llmc", targets=["null"], quant=quant)
    with pytest.raises(UnsupportedError, match="gguf does not write the architecture 'gpt_neox'"):
        compile_model(tiny_folder("gpt_neox"), tmp_path / "a.llmc", targets=["gguf"], quant=quant)
    monkeypatch.setattr(Null, "emitted", lambda self: Null.operations - {"paged_attention"})
    with pytest.raises(UnsupportedError, match="target null cannot emit paged_attention"):
        compile_model(tiny_folder("llama"), tmp_path / "a.llmc", targets=["null"], quant=quant)


@pytest.mark.parametrize("quant", ["gptq-int4-g16", "awq-int4-g16"])
def test_a_limit_of_the_loss_and_a_target_without_operations_hinder_nothing_before(
    quant: str, tiny_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Null, "emitted", lambda self: frozenset())  # as another package's may be
    made = compile_model(
        tiny_folder("llama"),
        tmp_path / "a.llmc",
        targets=["null"],
        quant=quant,
        verdict=VerdictOptions(max_kl=50.0),
        calibration=CalibrationOptions(tokens=2048),
    )
    assert made.quality is not None and 0 < made.quality["kl"] <= 50


@pytest.mark.parametrize("max_ram", [None, 10**12])
def test_what_quantization_cost_is_measured_beside_a_target_that_has_begun(
    max_ram: int | None, tiny_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def measured(*arguments: Any) -> Any:
        order.append("measured")
        return measure(*arguments)

    def compiled(self: Null, *arguments: Any, **options: Any) -> dict[str, Any]:
        order.append("compiled")
        return written(self, *arguments, **options)

    @contextmanager
    def begun(*arguments: Any) -> Generator[None]:
        order.append("begun")
        try:
            yield
        finally:
            order.append("left")

    written = Null.compile
    monkeypatch.setattr(quality, "measure", measured)
    monkeypatch.setattr(Null, "compile", compiled)
    monkeypatch.setattr(Null, "begun", begun)
    shares: list[float] = []
    asked: dict[str, Any] = {"targets": ["null"], "quant": "int4-g16", "max_ram": max_ram}
    folder, out = tiny_folder("llama"), tmp_path / "a.llmc"
    made = compile_model(folder, out, **asked, progress=lambda _, share: shares.append(share))
    assert shares == sorted(shares)
    assert made.quality is not None and made.quality["kl"] > 0
    assert made.artifact.quality == made.quality
    around = ["begun"] if max_ram is None else []
    assert order == [*around, "measured", "compiled", *(["left"] if around else [])]

    order.clear()
    with pytest.raises(LlmcError, match="lost too much"):
        compile_model(folder, tmp_path / "b.llmc", **asked, verdict=VerdictOptions(max_kl=1e-5))
    assert order == [*around, "measured", *(["left"] if around else [])]
    assert not (tmp_path / "b.llmc").exists()


def test_check_says_what_a_file_for_llama_cpp_cannot_say(tiny_folder: Any) -> None:
    with pytest.raises(UnsupportedError, match="gguf does not write the architecture 'gpt_neox'"):
        check_model(tiny_folder("gpt_neox"), targets=["gguf"])
    check_model(tiny_folder("llama"), targets=["gguf"], quant="gguf-q4_k_m")


def test_codes_of_a_last_group_count_as_many_as_those_of_a_whole_one(tmp_path: Path) -> None:
    from llmc.codegen.tvm.weights import quant_layout

    folder = save_tiny("llama", tmp_path / "model", intermediate_size=80)
    graph = lower(trace(open_source(folder), None), Plan.make(["null"], "int4-g32", None, ()), PassContext())[
        0
    ]
    bits = driver._stored_bits(graph)
    ops = [op for op in graph if isinstance(op, QuantizedLinear) and int(str(op.q.shape[0])) % 16 == 0]
    assert any(op.q.shape[1] == 80 for op in ops)
    for op in ops:
        n, k = (int(str(d)) for d in op.q.shape)
        assert n * k * bits[op.q] == 8 * math.prod(quant_layout(op).weight_shape)


@pytest.mark.parametrize(
    ("targets", "most"),
    [
        (["tvm-cpu:isa=all"], len(LEVELS)),
        (["tvm-cpu:isa=avx2+amx", "null"], 2),
        (["tvm-cpu:isa=avx2+avx2"], 1),
        (["null"], 0),
    ],
)
def test_a_kernel_compiler_is_predicted_for_each_level(
    targets: list[str], most: int, tiny_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(driver, "processes_at_once", lambda count, each: asked.append(count) or count)
    report = check_model(tiny_folder("llama"), targets=targets)
    assert asked == [most] and report.peak_bytes > most * WORKER_BYTES


def test_a_model_without_a_context_length_needs_one(
    tiny_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmc.codegen.driver.context_length", lambda _: None)
    folder = tiny_folder("llama")
    with pytest.raises(InputError, match=r"does not say how many tokens .*--context"):
        compile_model(folder, tmp_path / "a.llmc", targets=["null"])
    artifact = compile_model(folder, tmp_path / "a.llmc", targets=["null"], context=32).artifact
    assert artifact.model["context_length"] == 32
