"""--max-ram: sizes, what is predicted, what is refused, and the watch over the process tree."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from llmc.codegen import memory
from llmc.codegen.driver import compile_model
from llmc.codegen.memory import check_peak, parse_size, size_text, tree_bytes, watched
from llmc.codegen.peak import Peak, predict_peak
from llmc.codegen.verdict import VerdictOptions, with_verdict
from llmc.frontend.source import open_source
from llmc.frontend.trace import trace_source
from llmc.ir.errors import CompileError, InputError
from llmc.passes.quantize.scheme import weight_passes

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

HOLD = "import sys, time; held = bytearray({bytes}); print('held', flush=True); time.sleep(60)"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1.5GB", 1_500_000_000),
        ("4GiB", 4 << 30),
        ("4 gib", 4 << 30),
        ("800M", 800_000_000),
        ("512Ki", 512 << 10),
        ("2t", 2 * 10**12),
        ("900000000", 900_000_000),
    ],
)
def test_sizes_are_decimal_and_with_an_i_binary(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1.5.2GB", "1XB", "4iB", "1e9", "four"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"is no size; write 1\.5GB"):
        parse_size(text)


def test_a_printed_size_is_no_smaller_than_the_size_and_is_read_back() -> None:
    for size in (1, 999_999, 1_000_001, 1_499_999_999):
        assert size <= parse_size(size_text(size)) < size + 10**6


def predicted(folder: Path, scheme: str = "gptq-int4-g32", bits: float | None = None, **changes: Any) -> Peak:
    options = {"vocabulary": 384, "length": 256, "kernels": True, **changes}
    passes = with_verdict(scheme, weight_passes(scheme, None, bits), VerdictOptions())
    return predict_peak(trace_source(open_source(folder)), passes, **options)


@pytest.mark.slow
def test_the_peak_has_the_phases_of_what_is_done(tiny_folder: Any) -> None:
    folder = tiny_folder("llama")
    phases = {
        "none": {"tokenizer", "kernels"},
        "int4-g32": {"tokenizer", "kernels", "verdict"},
        "gguf-q4_k_m": {"tokenizer", "kernels", "verdict", "calibrating"},
        "gptq-int4-g32": {"tokenizer", "kernels", "verdict", "quantizing"},
        "awq-int4-g32": {"tokenizer", "kernels", "verdict", "quantizing"},
        "best-int4-g32": {"tokenizer", "kernels", "verdict", "quantizing", "tuning"},
    }
    for scheme, expected in phases.items():
        assert set(predicted(folder, scheme).phases) == expected, scheme
    assert set(predicted(folder, "best-int4-g32", 5.0).phases) == {*phases["best-int4-g32"], "sensitivity"}


@pytest.mark.slow
def test_the_peak_grows_with_what_is_done(tiny_folder: Any) -> None:
    folder = tiny_folder("llama")
    all_ = predicted(folder, "best-int4-g32", 5.0).phases
    assert predicted(folder, kernels=False).phases["kernels"] < all_["kernels"]
    assert predicted(folder, "int4-g32", vocabulary=500_000, kernels=False).phase == "tokenizer"
    fine = predicted(folder, "gptq-int4-g8", length=1)
    assert fine.phases["quantizing"] > predicted(folder, length=1).phases["quantizing"]
    longer = predicted(folder, "best-int4-g32", 5.0, length=2048).phases
    assert all(longer[name] > all_[name] for name in ("quantizing", "tuning", "sensitivity"))
    # Weights as [K, N]: the widest layer of tiny GPT-2 is [256, 64], with a moment of 256 x 256.
    wide = predicted(tiny_folder("gpt2"), length=1).phases["quantizing"]
    assert wide - predicted(folder, length=1).phases["quantizing"] > 4 * (256 * 256 - 96 * 96)


def test_a_cap_below_the_peak_is_refused_with_the_smallest_that_fits() -> None:
    peak = Peak({"tokenizer": 700_000_000, "quantizing": 1_200_000_001})
    said: list[str] = []
    check_peak(peak, 1_300_000_000, said.append)
    check_peak(peak, None, said.append)
    assert said == [
        "predicted peak of memory: 1201MB of 1300MB (--max-ram), while: quantizing",
        "predicted peak of memory: 1201MB, while: quantizing",
    ]
    with pytest.raises(InputError, match=r"--max-ram 1200MB is less than .* 1201MB .*give --max-ram 1201MB"):
        check_peak(peak, 1_200_000_000, said.append)
    assert len(said) == 3  # told before it is refused


def test_a_compilation_that_cannot_fit_leaves_nothing(tiny_folder: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--max-ram 100MB is less than this compilation takes"):
        compile_model(tiny_folder("llama"), tmp_path / "a.llmc", targets=["null"], max_ram=100_000_000)
    assert list(tmp_path.iterdir()) == []


@linux
def test_the_memory_of_children_counts() -> None:
    command = [sys.executable, "-c", HOLD.format(bytes=200 << 20)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        alone = tree_bytes(child.pid)
        import os

        both = tree_bytes(os.getpid())
        child.kill()
    assert alone > 200 << 20
    assert both > alone


@linux
@pytest.mark.parametrize("background", [False, True])
def test_a_tree_that_outgrows_its_cap_is_stopped(background: bool) -> None:
    """Also where SIGINT is ignored, as shells have it for what they run in the background."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN if background else signal.default_int_handler)
    usual = signal.getsignal(signal.SIGUSR1)
    command = [sys.executable, "-c", HOLD.format(bytes=300 << 20)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        try:
            with (
                pytest.raises(CompileError, match=r"memory reached \d+MB, above --max-ram 150MB: stopped"),
                watched(150_000_000, child.pid),
            ):
                time.sleep(50)
        finally:
            child.kill()
            signal.signal(signal.SIGINT, handler)
    assert signal.getsignal(signal.SIGUSR1) == usual


@linux
def test_a_tree_below_its_cap_is_left_alone_and_a_real_interrupt_stays_one() -> None:
    with watched(1 << 50):
        time.sleep(0.2)
    with pytest.raises(KeyboardInterrupt), watched(1 << 50):
        raise KeyboardInterrupt


def test_processes_run_side_by_side_as_cores_and_memory_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "processors", lambda: 4)
    monkeypatch.setattr(memory, "_memory", lambda: 14 << 30)
    assert memory.processes_at_once(3, 1 << 30) == 3
    assert memory.processes_at_once(9, 1 << 30) == 3  # a quarter of the memory
    assert memory.processes_at_once(9, 1 << 20) == 4  # the cores
    assert memory.processes_at_once(9, 1 << 40) == 1
    with watched(1 << 50):
        assert memory.processes_at_once(3, 1 << 30) == 1
        with watched(None):
            assert memory.processes_at_once(3, 1 << 30) == 3
    assert memory.processes_at_once(3, 1 << 30) == 3


@linux
@pytest.mark.slow
def test_qwen_stays_below_a_cap_and_its_codes_do_not_depend_on_it(tmp_path: Path) -> None:
    """By GPTQ, whose moments of 4,864 inputs are the peak whatever the text's length is and however many
    layers there are.
    """
    from llmc.codegen.artifact import Artifact

    from .conftest import LONG
    from .models import first_layers, real_model
    from .process_tree import run_measured

    cap = 1_500_000_000
    made: dict[str, dict[str, str]] = {}
    model = first_layers(real_model("qwen2.5-coder"), 2 if LONG else 1, tmp_path / "qwen")
    # What is measured of the result takes most of the time, and less memory than the moments.
    verdict = [] if LONG else ["--no-verdict"]
    for name, more in (("capped", ["--max-ram", "1.5GB", *verdict]), ("free", ["--no-verdict"])):
        out = tmp_path / name / "m.llmc"
        command = [sys.executable, "-m", "llmc.cli.main", "compile", str(model), "-o", str(out)]
        command += ["--target", "tvm-cpu:isa=avx2", "--quant", "gptq-int4-g128-sym"]
        command += ["--calib-tokens", "4096" if LONG else "2048", *more]
        status, peak, said = run_measured(command)
        assert status == 0, said
        if name == "capped":
            assert 400_000_000 < peak < cap
            assert "of 1500MB (--max-ram)" in said
        files = Artifact.open(out).manifest["files"]
        made[name] = {path: files[path] for path in files if path != "quality.json"}
    assert made["capped"] == made["free"] and len(made["free"]) > 2
