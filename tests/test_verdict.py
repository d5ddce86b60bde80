"""The verdict: its numbers against whole models run by the interpreter, its limits, and what a user sees."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llmc.codegen.artifact import Artifact
from llmc.codegen.verdict import VerdictOptions, is_measured, with_verdict
from llmc.ir.core import Graph
from llmc.ir.errors import ArtifactError, InputError, LlmcError
from llmc.ir.types import Quantization
from llmc.ir.weights import LazyTensor
from llmc.passes.base import PassContext
from llmc.passes.calibration import Calibration
from llmc.passes.quantize.attach import attach_quantized, is_quantizable
from llmc.passes.quantize.head import HeadRows, find_head
from llmc.passes.quantize.nearest import QuantizedPart, QuantizedWeight
from llmc.passes.quantize.quality import (
    MeasureQuality,
    TakeReference,
    advice,
    parse_percent,
    percent,
    report,
)
from llmc.passes.quantize.rotate import RotateLinears
from llmc.passes.quantize.verdict import LayerError, Measured, measure
from llmc.passes.registry import quantization_passes

from .command_line import Capture, run
from .graphs import fused_once, logits_of
from .models import ids_of, tiny_model


def sequences(count: int = 3, length: int = 24) -> list[np.ndarray]:
    return [np.array(ids_of(length, seed=seed), np.int64) for seed in range(count)]


def fused(name: str) -> Graph:
    attention = "eager" if name == "gemma2" else "sdpa"  # all that transformers has for it
    options = {"attention": attention, "encoder": name == "bert"}
    return fused_once(("tiny", name), lambda: tiny_model(name), **options)


def quantize(graph: Graph, only: str = "") -> None:
    """2 bits for the weights whose name holds `only`: an error that no rounding hides."""
    for weight in list(graph.weights.values()):
        if is_quantizable(weight) and only in weight.name:
            assert weight.weight is not None
            quant = Quantization(2, 16, False)
            data = QuantizedWeight(weight.weight, quant)
            parts = (QuantizedPart(data, part) for part in ("codes", "scale", "zero_point"))
            attach_quantized(graph, weight, quant, *parts)
    graph.drop_dead()


def test_numbers_do_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    graph = fused("llama")
    source = graph.clone()
    quantize(graph)
    before = torch.get_num_threads()
    try:
        found: list[Measured] = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(measure(source, graph, sequences(5), tmp_path))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_numbers_are_those_of_the_whole_models(name: str, tmp_path: Path) -> None:
    graph = fused(name)
    source = graph.clone()
    quantize(graph)
    held = sequences()
    found = measure(source, graph, held, tmp_path)
    nll = nll_source = agree = 0.0
    gaps, kls = [], []
    for ids in held:
        p, q = (
            torch.log_softmax(logits_of(g, ids.tolist()).double(), -1).numpy()[:-1] for g in (source, graph)
        )
        rows = np.arange(len(ids) - 1)
        nll -= q[rows, ids[1:]].sum()
        nll_source -= p[rows, ids[1:]].sum()
        gaps.append((p - q)[rows, ids[1:]])
        kls.append((np.exp(p) * (p - q)).sum(-1))
        agree += (p.argmax(-1) == q.argmax(-1)).sum()
    count = sum(len(ids) - 1 for ids in held)
    assert found.tokens == count
    assert found.ppl == pytest.approx(math.exp(nll / count), rel=1e-4)
    assert found.ppl_source == pytest.approx(math.exp(nll_source / count), rel=1e-4)
    kl, gap = np.concatenate(kls), np.concatenate(gaps)
    assert found.kl == pytest.approx(kl.mean(), rel=1e-3)
    assert found.kl_stderr == pytest.approx(kl.std(ddof=1) / math.sqrt(count), rel=1e-3)
    increase = 100 * (found.ppl / found.ppl_source) * gap.std(ddof=1) / math.sqrt(count)
    assert found.increase_stderr == pytest.approx(increase, rel=1e-3)
    assert found.agreement == pytest.approx(agree / count)
    assert found.kl > 0.01, "two bits lose something"
    assert [one.name.rsplit(".")[-1] for one in found.layers] == ["embedding", "0", "1", "head"]
    assert not list(tmp_path.iterdir()), "what lay on disk is gone"


def test_an_error_is_put_down_to_the_layer_that_made_it(tmp_path: Path) -> None:
    graph = fused("llama")
    source = graph.clone()
    quantize(graph, "layers.0.mlp.down_proj")
    found = {one.name: one.error for one in measure(source, graph, sequences(), tmp_path).layers}
    assert found["embedding"] == found["model.layers.1"] == found["head"] == 0
    first = found["model.layers.0"]
    assert first is not None and 0.01 < first < 1


def test_errors_weigh_tokens_alike(tmp_path: Path) -> None:
    """The error of an embedding table, from its rows: each token counts by its own length. Of four sequences
    two are looked at.
    """
    graph = fused("qwen2")
    source = graph.clone()
    quantize(graph, "embed_tokens")
    held = sequences(4)
    before, after = (
        {name: value.weight for name, value in g.weights.items() if "embed_tokens" in name}
        for g in (source, graph)
    )
    (table,) = [one.read() for one in before.values() if one is not None]
    data = {name.rsplit(".", 1)[1]: one.read() for name, one in after.items() if one is not None}
    spread = {k: np.repeat(data[k].astype(np.float64), 16, 1) for k in ("scale", "zero_point")}
    quantized = (data["q"] - spread["zero_point"]) * spread["scale"]
    ids = np.concatenate(held[:2])
    ratio = np.square(quantized[ids] - table[ids]).sum(1) / np.square(table[ids].astype(np.float64)).sum(1)
    found = {one.name: one.error for one in measure(source, graph, held, tmp_path).layers}
    assert found["embedding"] == pytest.approx(math.sqrt(ratio.mean()), rel=1e-4)


def test_a_model_against_itself_loses_nothing(tmp_path: Path) -> None:
    graph = fused("qwen2")
    found = measure(graph.clone(), graph, sequences(2), tmp_path)
    assert (found.kl, found.agreement, found.output_error) == (0, 1, 0)
    assert found.ppl == found.ppl_source
    assert {one.error for one in found.layers} == {0.0}


def test_what_is_rounded_is_read_once(tmp_path: Path) -> None:
    """Both models' matrices come of one read of a block's weight, and so do rows of the head."""
    graph = fused("llama")
    read: dict[str, int] = {}
    for name, value in graph.weights.items():
        base = value.weight
        assert base is not None
        if is_quantizable(value) and "embed_tokens" not in name:
            value.weight = CountingTensor(base, name, read)
    source = graph.clone()
    quantize(graph)
    measure(source, graph, sequences(), tmp_path)
    assert len(read) > 4
    assert read == {name: source.weights[name].shape[0] for name in read}


class CountingTensor:
    """Counts the rows that are read."""

    def __init__(self, base: LazyTensor, name: str, read: dict[str, int]) -> None:
        self.base, self.name, self.rows_read = base, name, read
        self.shape, self.dtype, self.source = base.shape, base.dtype, base.source

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        rows = self.base.read(start, stop)
        self.rows_read[self.name] = self.rows_read.get(self.name, 0) + len(rows)
        return rows


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_rows_of_a_head_are_those_of_the_whole(name: str) -> None:
    """Rounded from the source's rows, or read: the same bits."""
    graph = fused(name)
    source = find_head(graph.clone())
    quantize(graph)
    head = find_head(graph)
    width = head.x.shape[-1]
    assert isinstance(width, int)
    hidden = torch.randn(5, width, generator=torch.Generator().manual_seed(3))
    read, dims = HeadRows(head, 10, 90), {"T": 5}
    taken = HeadRows(head, 10, 90, HeadRows(source, 10, 90))
    assert torch.equal(read.matrix, taken.matrix)
    for rows, whole in ((read, head), (taken, head), (HeadRows(source, 10, 90), source)):
        wanted = torch.cat(list(whole.logits(hidden, dims)), -1)[:, 10:90]
        torch.testing.assert_close(rows.logits(hidden, dims), wanted, rtol=1e-5, atol=1e-6)
    assert not torch.equal(read.matrix, HeadRows(source, 10, 90).matrix)


def test_a_rotated_head_reads_what_the_model_makes(tmp_path: Path) -> None:
    """Errors are of hidden states before they are rotated: rotation alone changes nothing but rounding, nor
    do the rows of such a head.
    """
    graph = fused("llama")
    source = graph.clone()
    RotateLinears(16, head=True).run(graph, PassContext())
    found = measure(source, graph, sequences(), tmp_path)
    assert max(found.output_error, *(one.error or 0.0 for one in found.layers)) < 1e-5
    assert abs(found.kl) < 1e-6
    head = find_head(graph)
    hidden = torch.randn(5, int(head.x.shape[-1]), generator=torch.Generator().manual_seed(3))
    wanted = torch.cat(list(find_head(source).logits(hidden, {"T": 5})), -1)
    torch.testing.assert_close(
        torch.cat(list(head.logits(hidden, {"T": 5})), -1), wanted, rtol=1e-4, atol=1e-5
    )


def test_an_encoder_has_an_output_error_alone(tmp_path: Path) -> None:
    graph = fused("bert")
    source = graph.clone()
    quantize(graph)
    found = measure(source, graph, sequences(), tmp_path)
    wanted = []
    for ids in sequences():
        x, y = (logits_of(g, ids.tolist()).double() for g in (source, graph))
        wanted.append(((y - x).square().sum(-1) / x.square().sum(-1)).mean())
    assert found.output_error == pytest.approx(math.sqrt(np.mean(wanted)), rel=1e-4)
    written = report(found, {"name": "x"})
    assert written["kl"] is written["ppl"] is written["top1_agreement"] is None
    assert "hidden states" in written["reason"]
    json.dumps(written, allow_nan=False)


# Limits --------------------------------------------------------------------------------------------------


def context() -> PassContext:
    held = tuple(sequences(2))
    return PassContext(calibration=Calibration((), held, "a text", "0" * 64), context_length=16)


def judged(verdict: MeasureQuality, name: str = "llama") -> PassContext:
    graph, state = fused(name), context()
    TakeReference().run(graph, state)
    quantize(graph)
    verdict.run(graph, state)
    return state


def test_the_pass_leaves_the_verdict_in_the_context() -> None:
    quality = judged(MeasureQuality("int4-g32")).quality
    assert quality is not None
    assert quality["text"] == {"name": "a text", "sha256": "0" * 64, "sequences": 2, "length": 16}
    assert quality["tokens"] == 2 * 15, "held-out text is cut to the model's context"
    assert quality["ppl_increase_percent"] == pytest.approx(
        percent(quality["ppl"], quality["ppl_source"]), abs=0.01
    )
    shorter = judged(MeasureQuality("int4-g32", 1, 9)).quality
    assert shorter is not None
    assert (shorter["tokens"], shorter["text"]["length"]) == (8, 9)


def test_a_scheme_of_seconds_is_judged_on_less_text_unless_a_limit_asks_for_more() -> None:
    def tokens(scheme: str, **limits: float) -> int:
        options = VerdictOptions(**limits)
        verdict = with_verdict(scheme, quantization_passes(scheme), options)[-1]
        assert isinstance(verdict, MeasureQuality)
        return verdict.sequences * verdict.length

    assert tokens("int4-g64") == 2 * 256
    assert tokens("int4-g64", max_kl=0.5) == tokens("gptq-int4-g64") == 8 * 512


def test_a_limit_that_is_passed_is_a_sentence_and_exit_1() -> None:
    said = r"--quant int4-g64 lost too much: KL [\d.]+ nats, --max-kl allows 0.001"
    with pytest.raises(LlmcError, match=said) as caught:
        judged(MeasureQuality("int4-g64", max_kl=0.001), "gemma2")
    assert caught.value.exit_code == 1
    assert "the largest errors are those of " in caught.value.message
    assert "model.layers." in caught.value.message
    assert "--quant best-int4-g64" in caught.value.remedy or "--quant int8" in caught.value.remedy


def test_both_limits_are_named_and_the_worst_layers() -> None:
    layers = tuple(LayerError(f"model.layers.{i}", i / 100) for i in range(6))
    lost = Measured(9, 22.0, 20.0, 0.5, 0.7, 0.01, 0.5, 0.2, layers)
    with pytest.raises(LlmcError) as caught:
        MeasureQuality("int8", max_kl=0.25, max_ppl_increase=9.0)._judge(lost)  # pyright: ignore[reportPrivateUsage]
    assert caught.value.message == (
        "--quant int8 lost too much: KL 0.5 nats, --max-kl allows 0.25; perplexity +10.0 % (20.00 → 22.00), "
        "--max-ppl-increase allows 9 %; the largest errors are those of model.layers.5 (5.0%), "
        "model.layers.4 (4.0%), model.layers.3 (3.0%)"
    )
    MeasureQuality("int8", max_kl=0.5, max_ppl_increase=10.1)._judge(lost)  # pyright: ignore[reportPrivateUsage]


def test_limits_that_hold_refuse_nothing() -> None:
    quality = judged(MeasureQuality("int4-g64", max_kl=1e9, max_ppl_increase=1e9)).quality
    assert quality is not None
    assert 0 < quality["kl"] < 1e9, "something was lost, and less than what is allowed"


def test_numbers_that_are_none_pass_every_limit() -> None:
    broken = Measured(
        3, math.nan, 1.0, math.nan, 0.0, math.nan, math.nan, math.nan, (LayerError("a", math.nan),)
    )
    with pytest.raises(LlmcError, match="KL nan"):
        MeasureQuality("int8", max_kl=5.0)._judge(broken)  # pyright: ignore[reportPrivateUsage]
    assert report(broken, {})["kl"] is None


def test_what_cannot_be_measured_is_refused_where_a_limit_was_given() -> None:
    state = PassContext()
    graph = fused("llama")
    TakeReference().run(graph, state)
    result = MeasureQuality("int8").run(graph, state)
    assert result.notes == ["quality was not measured: there is no held-out text"]
    assert state.quality is not None
    assert state.quality["reason"] == "there is no held-out text"
    with pytest.raises(InputError, match="cannot be measured: there is no held-out text"):
        MeasureQuality("int8", max_kl=1.0).run(graph, state)
    with pytest.raises(InputError, match="predicts no tokens"):
        judged(MeasureQuality("int8", max_kl=1.0), "bert")


@pytest.mark.parametrize(
    ("scheme", "first"),
    [("int8", "use --quant none"), ("int4-g128-sym", "try --quant "), ("gguf-q4_0", "try --quant ")],
)
def test_advice_names_schemes_that_exist(scheme: str, first: str) -> None:
    text = advice(scheme, [])
    assert text.startswith(first) or text == "try --quant none"
    for word in text.replace("try ", "").split(" or "):
        if word.startswith("--quant "):
            quantization_passes(word.removeprefix("--quant "))


def test_one_layer_far_above_the_others_gets_advice_of_its_own() -> None:
    even = [LayerError(f"model.layers.{i}", 0.01) for i in range(5)]
    assert "--bits-per-weight for more bits in model.layers.9" in advice(
        "int4-g32", [*even, LayerError("model.layers.9", 0.2)]
    )
    assert "--quant-head int8" in advice("int4-g32", [*even, LayerError("head", 0.2)])


@pytest.mark.parametrize(("text", "value"), [("5%", 5.0), ("7.5", 7.5), (" 0 % ", 0.0)])
def test_percentages(text: str, value: float) -> None:
    assert parse_percent(text) == value


@pytest.mark.parametrize("text", ["", "%", "-1%", "five", "1e3", "nan", "5%%"])
def test_what_is_no_percentage(text: str) -> None:
    with pytest.raises(InputError, match="is no percentage"):
        parse_percent(text)


def test_options_that_contradict_each_other() -> None:
    with pytest.raises(InputError, match="nothing would be measured"):
        VerdictOptions(measure=False, max_kl=1.0)
    with pytest.raises(InputError, match="--max-kl"):
        _ = VerdictOptions(max_kl=math.nan).limits


def test_only_what_loses_something_is_measured() -> None:
    assert not is_measured(with_verdict("none", [], VerdictOptions()))
    lossy = quantization_passes("int8")
    assert is_measured(with_verdict("int8", lossy, VerdictOptions()))
    assert not is_measured(with_verdict("int8", lossy, VerdictOptions(measure=False)))
    assert not is_measured(with_verdict("keep", quantization_passes("keep"), VerdictOptions()))


# The command ---------------------------------------------------------------------------------------------


def test_compile_measures_and_refuses(capsys: Capture, tmp_path: Path, tiny_folder: Any) -> None:
    output = tmp_path / "a.llmc"
    words = ["compile", tiny_folder("llama"), "-o", output, "--target", "null", "--quant", "int4-g32"]
    code, out, err = run(capsys, *words, "--json")
    assert code == 0, err
    quality = json.loads(out)["quality"]
    written = (output / "quality.json").read_bytes()
    assert json.loads(written) == quality == Artifact.open(output).quality
    assert quality["kl"] > 0
    assert quality["tokens"] > 100
    code, out, err = run(capsys, *words, "--max-kl", "0.00001", "--max-ppl-increase", "900%")
    assert (code, out) == (1, "")
    assert "--max-kl allows 1e-05; the largest errors are those of" in err.splitlines()[-1]
    assert (output / "quality.json").read_bytes() == written, "the artifact that was there stays"
    assert {path.name for path in tmp_path.iterdir()} == {"a.llmc"}
    code, out, _ = run(capsys, "inspect", output)
    assert code == 0
    assert "KL from source" in out
    assert "worst layer" in out


def test_compile_without_a_verdict(capsys: Capture, tmp_path: Path, tiny_folder: Any) -> None:
    output = tmp_path / "a.llmc"
    words = ["compile", tiny_folder("llama"), "-o", output, "--target", "null", "--quant", "int8"]
    code, out, _ = run(capsys, *words, "--no-verdict", "--json")
    assert code == 0
    assert json.loads(out)["quality"] is None
    assert Artifact.open(output).quality is None
    code, _, err = run(capsys, *words, "--no-verdict", "--max-kl", "1")
    assert code == 2
    assert "nothing would be measured" in err


def test_a_damaged_quality_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "quality.json").write_text("[1]")
    artifact = Artifact(tmp_path, {"files": {"quality.json": {}}})
    with pytest.raises(ArtifactError, match=r"quality\.json is damaged"):
        _ = artifact.quality
