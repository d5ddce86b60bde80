"""The parts of `benchmarks/speed.py` that need no peer: processes in turns, rates, tables, plots."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import speed
from benchmarks.environments import Tools
from benchmarks.peers_quantization.models import Shared
from benchmarks.peers_speed import report
from benchmarks.peers_speed.protocol import Order
from benchmarks.peers_speed.systems import Measure, System

PROGRAM = """
import sys, time
sys.path.insert(0, {folder!r})
from protocol import serve

class Fake:
    def __init__(self, order):
        assert order.threads == 2
        print("libraries print what they like")

    def generate(self, prompts, tokens):
        if tokens == 13:
            raise RuntimeError("thirteen tokens")
        return len(prompts) * tokens / 100

    def decode(self, prompts, tokens):
        return len(prompts[0]) / 1000

def prepare(folder, out):
    if folder.name == "broken":
        raise RuntimeError("no model")
    (out / "made").write_text(folder.name)

serve(Fake, ("numpy", "no-such-package"), prepare)
"""
ORDER = Order(model="m", threads=2, context=64, sequences=4, tokens=256)


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "run_fake.py"
    path.write_text(PROGRAM.format(folder=str(Path(report.__file__).parent)))
    return path


def state(system: System) -> str:
    """One letter: T stands for stopped."""
    return Path(f"/proc/{system.pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.skipif(sys.platform != "linux", reason="states of processes are read from /proc")
def test_a_system_runs_while_it_is_measured_only(program: Path, tmp_path: Path) -> None:
    systems = [System(name, Path(sys.executable), program, Path("m")) for name in ("one", "two")]
    try:
        for system in systems:
            system.start(ORDER, tmp_path)
        assert systems[0].versions["numpy"] and systems[0].versions["no-such-package"] is None
        deadline = time.monotonic() + 10
        while {state(system) for system in systems} != {"T"} and time.monotonic() < deadline:
            time.sleep(0.01)
        assert [state(system) for system in systems] == ["T", "T"]
        prompts = [[1] * 20, [2] * 20]
        assert systems[0].measure(Measure("p", "prefill", 2, 20, 1), prompts) == 2 * 20 / 0.02
        assert systems[0].measure(Measure("d", "decode", 2, 20, 5), prompts) == 2 / 0.02
        assert systems[1].measure(Measure("a", "answers", 2, 20, 5), prompts) == 2 * 5 / 0.1
        systems[1].alone = True  # one prompt is computed, and counts as one
        assert systems[1].measure(Measure("a", "answers", 2, 20, 5), prompts) == 5 / 0.05
        with pytest.raises(RuntimeError, match=r"one ended: [\s\S]*thirteen tokens"):
            systems[0].measure(Measure("a", "answers", 1, 20, 13), prompts)
    finally:
        for system in systems:
            system.stop()


def test_a_model_is_converted_once_and_only_as_a_whole(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "SPEED", Tools(tmp_path / "pins", tmp_path, {"fake": program.name}))
    broken = Shared("m", tmp_path / "m.gguf", tmp_path / "broken", None)
    with pytest.raises(subprocess.CalledProcessError):
        speed._converted("fake", Path(sys.executable), broken, tmp_path)
    assert not (tmp_path / "m" / "fake").exists()
    model = Shared("m", tmp_path / "m.gguf", tmp_path / "float", None)
    folder = speed._converted("fake", Path(sys.executable), model, tmp_path)
    assert (folder / "made").read_text() == "float"
    (folder / "made").write_text("kept")
    assert speed._converted("fake", Path(sys.executable), model, tmp_path) == folder
    assert (folder / "made").read_text() == "kept"


def record() -> dict[str, Any]:
    measures = [Measure("prefill 512", "prefill", 1, 512, 1), *(m for m in speed.CURVES)]
    rates = {m.name: [10.0 * m.streams, 12.0 * m.streams, 11.0 * m.streams] for m in measures}
    common = {"alone": False, "bits": 4.5, "versions": {"numpy": "2", "gone": None}}
    return {
        "machine": "a machine",
        "model": "m.gguf",
        "threads": 2,
        "repeat": 3,
        "others_cpu": 0.01,
        "read_gb_s": [10.0, 12.0, 11.0],
        "measures": [vars(m) for m in measures],
        "systems": {
            "llmc keep": {**common, "ours": True, "rates": rates, "weight_bytes_per_token": 10**9},
            "peer": {**common, "ours": False, "rates": {n: [x / 2 for x in v] for n, v in rates.items()}},
            "slow": {
                **common,
                "alone": True,
                "ours": False,
                "bits": None,
                "rates": {"prefill 512": [1.0, 1.0, 1.0]},
            },
        },
    }


def test_tables_give_medians_spreads_and_ratios(tmp_path: Path) -> None:
    found = report.text([record()])
    assert "### m.gguf" in found and "reading in the same minutes: 11.0 GB/s" in found.replace("\n", " ")
    lines = found.splitlines()
    (ours,) = (line for line in lines if line.startswith("| llmc keep | 4.50 |"))
    assert ours.split(" | ")[2] == "11.0 ± 9 %"
    (ratio,) = (line for line in lines if line.startswith("| llmc keep / peer |"))
    assert ratio.count("2.00 ×") == len(record()["measures"])
    (slow,) = (line for line in lines if line.startswith("| llmc keep / slow |"))
    assert slow.split(" | ")[1] == "| 11.00 ×" and slow.count("–") == len(record()["measures"]) - 1

    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.write(found, page)
    report.write(found, page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert text.count("### m.gguf") == 1
    page.write_text("no marks")
    with pytest.raises(SystemExit, match="has no lines"):
        report.write(found, page)


def test_curves_are_drawn_the_same_way_twice(tmp_path: Path) -> None:
    for name in ("one.svg", "two.svg"):
        report.plot([record()], tmp_path / name)
    drawn = (tmp_path / "one.svg").read_text()
    assert drawn == (tmp_path / "two.svg").read_text()
    assert all(f"<!-- {name} -->" in drawn for name in ("llmc keep", "peer", "m.gguf"))
    assert "<!-- slow -->" not in drawn


def test_the_memory_gives_something() -> None:
    assert speed.read_gb_s(1) > 0
