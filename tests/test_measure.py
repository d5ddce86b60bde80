"""What `llmc bench` measures with: every token is computed, and counted once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from llmc.cli import bench, measure
from llmc.cli.peer import Peer
from llmc.ir.errors import InputError, LlmcError
from llmc.runtime.engine import Engine, EngineOptions, ModelFacts
from llmc.runtime.executor.null import NullExecutor


@pytest.fixture
def engine() -> Engine:
    executor = NullExecutor(vocab_size=300)
    facts = ModelFacts(vocab_size=300, context_length=1024, eos_token_ids=(0,))
    return Engine(executor, None, facts, EngineOptions(kv_tokens=8192))


def test_speeds_computes_what_it_says(engine: Engine) -> None:
    turns: list[tuple[str, int]] = []
    found = measure.speeds(
        engine,
        prompt_tokens=600,
        output_tokens=9,
        concurrency=(1, 3),
        repeat=2,
        between=lambda what, tokens: turns.append((what, tokens)),
        progress=lambda what, share: None,
    )
    assert turns == [("prefill", 600), ("decode", 9)] * 2
    assert [row["concurrency"] for row in found["batch"]] == [1, 3]
    for row in found["batch"]:
        assert row["total_tok_s"] == pytest.approx(row["output_tok_s"] * (128 + 9) / 9, rel=1e-3)
    stats = engine.stats
    # A request's first token comes with its prompt; the null executor always gives EOS, which is ignored.
    prefills, decodes, batches = 3 * 600, 2 * (16 + 9), 4 * (128 + 8)
    assert stats.tokens_computed == prefills + decodes + batches
    assert stats.tokens_from_cache == 0, "a prompt was seen before"
    assert not engine.has_work


def test_prompts_repeat_from_run_to_run_and_never_within() -> None:
    first, second = measure.Prompts(1000), measure.Prompts(1000)
    taken = [first.take(20) for _ in range(3)]
    assert taken == [second.take(20) for _ in range(3)]
    assert len({tuple(prompt) for prompt in taken}) == 3
    assert all(0 <= token < 1000 for prompt in taken for token in prompt)


@pytest.fixture
def strangers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with modules of our names; the file that they would leave when imported."""
    folder, trace = tmp_path / "here", tmp_path / "trace"
    (folder / "llmc").mkdir(parents=True)
    for name in ("json.py", "llmc/__init__.py"):
        (folder / name).write_text(f"open({str(trace)!r}, 'w'); raise SystemExit(7)")
    monkeypatch.chdir(folder)
    return trace


def test_starts_import_nothing_from_the_current_directory(strangers: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.llmc"):
        bench._starts(Path("nothing.llmc"), {}, repeat=1)
    assert not strangers.exists()


@pytest.mark.slow
def test_a_peer_imports_nothing_from_the_current_directory(strangers: Path) -> None:
    with pytest.raises(LlmcError, match="transformers could not be measured"):
        Peer("nothing", 1)
    assert not strangers.exists()


@pytest.mark.slow
def test_peer_measures_transformers_in_its_own_process(tiny_folder: Any) -> None:
    pytest.importorskip("transformers")
    with Peer(str(tiny_folder("llama")), threads=1) as peer:
        assert peer.seconds("prefill", 32) > 0
        assert peer.seconds("decode", 4) > 0


@pytest.mark.slow
def test_peer_says_why_it_could_not_start(tmp_path: Path) -> None:
    with pytest.raises(LlmcError, match=r"transformers could not be measured: .*nothing does not exist"):
        Peer(str(tmp_path / "nothing"), threads=1)
