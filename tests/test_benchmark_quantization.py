"""The pure parts of benchmarks/quantization.py: scoring against a direct computation, the table, schemes and
pins, our dequantized graph against transformers, and what a peer's checkpoint stands for.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llmc.passes.base import PassContext
from llmc.passes.manager import run_passes
from llmc.passes.pipelines import canonicalize, fuse
from llmc.passes.registry import quantization_passes
from llmc.passes.stage import MarkStage

from benchmarks.environments import QUANTIZATION, SPEED, Tools
from benchmarks.peers_quantization import ours, report
from benchmarks.peers_quantization.models import cut
from benchmarks.peers_quantization.protocol import forget_peak, peak_bytes
from benchmarks.peers_quantization.scoring import (
    WindowScore,
    compare,
    joined,
    logits_of,
    relative_error,
    summarize,
)
from benchmarks.quantization import method

from .graphs import traced
from .models import ids_of, tiny_model


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(2, 40), st.integers(0, 10_000), st.floats(0.0, 3.0))
def test_score_equals_the_definitions_in_float64(rows: int, vocab: int, seed: int, noise: float) -> None:
    random = np.random.default_rng(seed)
    exact = (4 * random.standard_normal((rows, vocab))).astype(np.float32)
    other = (exact + noise * random.standard_normal((rows, vocab))).astype(np.float32)
    targets = random.integers(0, vocab, rows)
    got = compare(torch.from_numpy(exact), torch.from_numpy(other), torch.from_numpy(targets))
    p, q = log_probabilities(exact), log_probabilities(other)
    at = (np.arange(rows), targets)
    assert got.float_nll == pytest.approx(-p[at].mean(), abs=1e-5)
    assert got.nll == pytest.approx(-q[at].mean(), abs=1e-5)
    assert got.kl == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), abs=1e-5)
    assert got.top1 == (exact.argmax(-1) == other.argmax(-1)).mean()


def test_parts_of_a_window_join_by_their_rows() -> None:
    random = torch.Generator().manual_seed(1)
    exact, other = (torch.randn(10, 7, generator=random) for _ in range(2))
    targets = torch.arange(10) % 7
    parts = [
        (stop - start, compare(exact[start:stop], other[start:stop], targets[start:stop]))
        for start, stop in ((0, 4), (4, 8), (8, 10))
    ]
    whole = compare(exact, other, targets)
    for name, value in whole.record().items():
        assert getattr(joined(parts), name) == pytest.approx(value, abs=1e-6)


def test_summary_gives_the_ratio_of_perplexities_and_its_paired_error() -> None:
    scores = [
        WindowScore(3.0, 3.1, 0.1, 0.9),
        WindowScore(3.4, 3.54, 0.2, 0.8),
        WindowScore(2.9, 3.02, 0.3, 0.7),
    ]
    got = summarize(scores)
    assert got.windows == 3
    assert got.ppl_increase == pytest.approx(100 * (got.ppl / got.float_ppl - 1))
    # The windows differ by 0.1, 0.14 and 0.12: their spread, not that of the perplexities, is the error.
    assert got.ppl_increase_se == pytest.approx(100 * math.exp(0.12) * 0.02 / math.sqrt(3))
    assert (got.kl, got.top1) == (pytest.approx(0.2), pytest.approx(0.8))
    assert got.kl_se == pytest.approx(0.1 / math.sqrt(3))
    assert math.isnan(summarize(scores[:1]).kl_se)


def row(**changes: Any) -> dict[str, Any]:
    return {
        "model": "m.gguf",
        "tool": "llmc",
        "scheme": "int4-g32",
        "calibration": "wikitext",
        "calibration_tokens": 1024,
        "machine": "a machine",
        "bits": 4.625,
        "cpu_seconds": 12.4,
        "peak_bytes": 1_500_000_000,
        "note": "",
        "weights_unchanged": 0.01,
        "windows": [vars(WindowScore(3.0, 3.1, 0.1, 0.9)), vars(WindowScore(3.0, 3.1, 0.2, 0.8))],
        **changes,
    }


def test_table_sorts_by_bits_and_kl_and_warns_of_the_sources_grid() -> None:
    better = [vars(WindowScore(3.0, 3.05, 0.05, 0.95))]
    text = report.tables(
        [row(), row(tool="peer", windows=better, weights_unchanged=0.5), row(tool="small", bits=4.25)]
    )
    lines = [line for line in text.splitlines() if line.startswith("| ") and "tool" not in line]
    assert [line.split("|")[1].strip() for line in lines] == ["small", "peer", "**llmc**"]
    assert (
        "`int4-g32` | 4.625 | wikitext, 1 K | +10.5 ±0.0% | 0.1500 ±0.0500 | 0.850 | 12 | 1,500 |" in lines[2]
    )
    assert "50% of the weights lay on this grid before" in lines[1]
    assert "grid" not in lines[2]
    assert "grid" not in report.tables([row(weights_unchanged=0.5, weights_zero=0.49)])
    assert "Float perplexity 20.09" in text and "Machine: a machine." in text


def test_rows_of_an_earlier_record_join_with_their_machine() -> None:
    new = [row(), row(scheme="int4-g64", bits=4.3125)]
    earlier = [report.summary(row(machine="another")), report.summary(row(tool="peer", machine="another"))]
    rows = report.merged(new, earlier)
    assert [(r["tool"], r["scheme"]) for r in rows] == [
        ("llmc", "int4-g32"),
        ("llmc", "int4-g64"),
        ("peer", "int4-g32"),
    ]
    assert report.summary(rows[2]) is rows[2]
    text = report.tables(rows)
    peer = next(line for line in text.splitlines() if line.startswith("| peer"))
    assert "+10.5 ±0.0% | 0.1500" in peer and peer.endswith("machine 2 |")
    assert text.count("machine 1 |") == 2
    assert "Machine 1: a machine." in text and "Machine 2: another." in text


def test_table_goes_between_the_marks_of_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"above\n{report.BEGIN}\nold\n{report.END}\nbelow\n", encoding="utf-8")
    report.write("new\n", page)
    assert page.read_text(encoding="utf-8") == f"above\n{report.BEGIN}\nnew\n{report.END}\nbelow\n"
    report.write("alone\n", tmp_path / "other.md")
    assert (tmp_path / "other.md").read_text(encoding="utf-8") == "alone\n"


def test_plot_names_every_scheme_and_repeats_its_bytes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [row(), row(tool="peer", scheme="iq4_nl", bits=4.5), row(model="n.gguf")]
    report.plot(rows, tmp_path / "plot.svg")
    report.plot(rows, tmp_path / "again.svg")
    drawn = (tmp_path / "plot.svg").read_text(encoding="utf-8")
    assert all(
        f"<!-- {text} -->" in drawn for text in ("int4-g32", "iq4_nl", "m.gguf", "n.gguf", "llmc", "peer")
    )
    assert drawn == (tmp_path / "again.svg").read_text(encoding="utf-8")


def test_schemes_of_peers() -> None:
    assert method("gptq-int4-g64-sym") == {"method": "gptq", "bits": 4, "group": 64, "symmetric": True}
    assert method("int3-g32") == {"method": "rtn", "bits": 3, "group": 32, "symmetric": False}
    assert method("iq4_nl")["method"] == "iq4_nl"


@pytest.mark.parametrize("tools", [QUANTIZATION, SPEED], ids=["quantization", "speed"])
def test_each_peer_has_a_program_and_pins(tools: Tools) -> None:
    for tool in tools.programs:
        assert tools.program(tool).is_file()
        pins = [pin for pin in tools.pins(tool) if not pin.startswith("--")]
        assert pins and all("==" in pin for pin in pins)
    with pytest.raises(ValueError, match="no section for nobody"):
        tools.pins("nobody")


def test_what_an_environment_is_to_be_without() -> None:
    text = "# [one]\n# Why.\n# without: torchaudio torchcodec\none==1\n# [two]\ntwo==2\n"
    assert SPEED.unwanted("one", text) == ["torchaudio", "torchcodec"]
    assert SPEED.pins("one", text) == ["one==1"]
    assert SPEED.unwanted("two", text) == []


def test_windows_begin_with_bos_and_take_one_token_less() -> None:
    assert cut(list(range(10)), 4, 2, None).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert cut(list(range(10)), 4, 3, 99).tolist() == [[99, 0, 1, 2], [99, 3, 4, 5], [99, 6, 7, 8]]
    with pytest.raises(ValueError, match="10 tokens"):
        cut(list(range(10)), 4, 3, None)


@pytest.mark.parametrize("scheme", ["int4-g16", "int4-g32-sym"])
def test_our_dequantized_graph_scores_as_transformers_with_the_same_weights(scheme: str) -> None:
    model = tiny_model("llama")
    graph = traced(model)
    passes = [*canonicalize(), MarkStage(stage="canonical"), *fuse(), *quantization_passes(scheme)]
    exact = {name: value.detach() for name, value in model.named_parameters()}
    found = ours.with_float_linears(run_passes(graph, passes, PassContext())[0], exact)
    assert found.bits == 4 + (20 / 16 if scheme == "int4-g16" else 16 / 32)
    linears = {name for name in exact if "_proj" in name}
    assert set(found.weights) == linears
    error, same, _ = relative_error({name: exact[name] for name in linears}, found.weights)
    assert 0.02 < error < 0.2 and same < 0.1

    ids = torch.tensor([ids_of(24)])
    model.load_state_dict(found.weights, strict=False)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits[0]
    torch.testing.assert_close(logits_of(found.graph)(ids), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak cannot be forgotten elsewhere")
def test_the_peak_of_memory_is_that_since_it_was_forgotten() -> None:
    size = 256 << 20
    large = np.ones(size, np.uint8)
    reached = peak_bytes()
    del large
    forget_peak()
    start = peak_bytes()
    assert start < reached - size // 2
    large = np.ones(size // 2, np.uint8)
    assert size // 4 < peak_bytes() - start < size
    assert large.all()


def test_error_of_untouched_weights_is_none() -> None:
    weights = {"a": torch.randn(3, 8, generator=torch.Generator().manual_seed(2))}
    assert relative_error(weights, weights) == (0.0, 1.0, 0.0)
    weights["a"][0, :6] = 0
    assert relative_error(weights, weights) == (0.0, 1.0, 0.25)


def test_gptqmodels_checkpoint_is_read_as_its_format_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file

    monkeypatch.syspath_prepend(QUANTIZATION.program("gptqmodel").parent)
    import run_gptqmodel  # pyright: ignore[reportMissingImports]  # a program beside which it is found

    random = np.random.default_rng(3)
    n, k, groups = 8, 16, 2
    codes, zeros = random.integers(0, 16, (n, k)), random.integers(0, 16, (n, groups))
    scales = random.random((n, groups)).astype(np.float32)
    shifts = 4 * np.arange(8)
    qweight = (codes.T.reshape(k // 8, 8, n) << shifts[None, :, None]).sum(1)
    qzeros = (zeros.T.reshape(groups, n // 8, 8) << shifts).sum(-1)
    state = {
        "layer.qweight": torch.from_numpy(qweight.astype(np.uint32).view(np.int32)),
        "layer.qzeros": torch.from_numpy(qzeros.astype(np.uint32).view(np.int32)),
        "layer.scales": torch.from_numpy(np.ascontiguousarray(scales.T)),
        "layer.g_idx": torch.arange(k, dtype=torch.int32) // (k // groups),
    }
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "model.safetensors")
    got = run_gptqmodel.dequantized(tmp_path, 4)["layer.weight"]
    expected = np.repeat(scales, k // groups, 1) * (codes - np.repeat(zeros, k // groups, 1))
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-6)
