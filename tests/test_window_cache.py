"""Layers that see a window keep only their window in the cache: compiled models beside the same models with
all pages of all layers, bit for bit on tvm-cpu.

`mistral`'s layers all see 12 tokens here, those of `gemma2` every other one; prompts are several windows
long, and steps of 24 tokens cut them across pages and windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llmc.cli.main import main
from llmc.codegen.artifact import Artifact
from llmc.codegen.driver import compile_model
from llmc.ir.errors import InputError
from llmc.ir.types import TensorType, sym
from llmc.runtime.engine import Engine, EngineOptions, ModelFacts
from llmc.runtime.executor import open_executor
from llmc.runtime.executor.base import StepInputs
from llmc.runtime.executor.windows import KeepsWindows, window_of
from llmc.runtime.memory import plan_kv_cache
from llmc.runtime.sampling_params import SamplingParams
from llmc.runtime.window_pages import most_pages

from .graphs import lowered, traced
from .models import VOCAB_SIZE, ids_of, save_tiny, tiny_model
from .tvm_graphs import ISA

PAGE = 16
FAMILIES = ("mistral", "gemma2")
TARGETS = (f"tvm-cpu:isa={ISA}", "onnx-cpu")


@pytest.fixture(scope="module", params=FAMILIES)
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny(request.param, folder / "model")
    compile_model(folder / "model", folder / "m.llmc", targets=TARGETS)
    return Artifact.open(folder / "m.llmc")


class AllPages:
    """Hides that an executor's layers with a window have pages of their own."""

    def __init__(self, executor: Any) -> None:
        self._executor = executor
        self.windows: tuple[int, ...] = ()
        self.window_bytes_per_page: tuple[int, ...] = ()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)


def engine(artifact: Artifact, target: str, *, own: bool, **options: Any) -> Engine:
    executor: Any = open_executor(artifact, target.partition(":")[0])
    sizes = {"max_batch_tokens": 24, "max_sequences": 3, **options}
    facts = ModelFacts(VOCAB_SIZE, int(artifact.model["context_length"]))
    return Engine(executor if own else AllPages(executor), None, facts, EngineOptions(**sizes))


def answers(run: Engine, prompts: list[list[int]], **params: Any) -> dict[str, list[int]]:
    """Greedy or seeded tokens of all prompts together; the books are checked after every step."""
    params = {"max_tokens": 20, "ignore_eos": True, **params}
    for number, prompt in enumerate(prompts):
        run.add_request(prompt, SamplingParams(**params), str(number))
    found: dict[str, list[int]] = {}
    while run.has_work:
        for output in run.step():
            found.setdefault(f"{output.request_id}/{output.index}", []).extend(output.token_ids)
        run.check()
    return found


SHARED = ids_of(70, seed=5)
PROMPTS = [ids_of(150), SHARED, [*SHARED[:50], *ids_of(60, seed=2)], ids_of(3, seed=4), SHARED]


@pytest.mark.parametrize("params", [{}, {"n": 2, "temperature": 1.0, "seed": 3}])
def test_tokens_are_those_of_a_cache_of_all_pages(artifact: Artifact, params: dict[str, Any]) -> None:
    target = TARGETS[0]
    own, everything = (engine(artifact, target, own=own, kv_tokens=800) for own in (True, False))
    window = own.blocks.windows[0]
    assert window.num_pages < own.blocks.num_pages and not everything.blocks.windows
    # Twice: prefixes that the first round left are claimed in the second.
    for _ in range(2):
        assert answers(own, PROMPTS, **params) == answers(everything, PROMPTS, **params)
    assert own.counters.tokens_from_cache > 0
    assert own.blocks.num_used == window.num_used == 0


@pytest.mark.parametrize("target", TARGETS)
def test_logits_of_a_text_are_those_of_a_cache_of_all_pages(artifact: Artifact, target: str) -> None:
    own, everything = (engine(artifact, target, own=own, kv_tokens=400) for own in (True, False))
    rows, wanted = (
        np.concatenate([part.copy() for part in run.score(ids_of(200))]) for run in (own, everything)
    )
    # onnxruntime's products depend on the number of pages that a step gathers.
    exact = target.startswith("tvm")
    assert (
        np.array_equal(rows, wanted) if exact else np.abs(rows - wanted).max() <= 1e-4 * np.abs(wanted).max()
    )


def test_preempted_sequences_come_back_right(artifact: Artifact) -> None:
    prompts = [ids_of(14, seed=seed) for seed in range(3)]  # few pages each, and many later
    own = engine(artifact, TARGETS[0], own=True, kv_tokens=144)
    roomy = engine(artifact, TARGETS[0], own=False, kv_tokens=800)
    assert answers(own, prompts, max_tokens=60) == answers(roomy, prompts, max_tokens=60)
    assert own.counters.preemptions > 0


class Half:
    """Guesses two tokens of a known text rightly, and the next ones wrongly."""

    def __init__(self, text: list[int]) -> None:
        self._text = text

    def propose(self, sequences: Sequence[Any], count: int) -> list[list[int]]:
        parts = [self._text[len(one.tokens) :][:count] for one in sequences]
        return [[*part[:2], *((token + 1) % VOCAB_SIZE for token in part[2:])] for part in parts]


def test_guesses_do_not_change_the_tokens(artifact: Artifact) -> None:
    prompt = ids_of(12, seed=9) * 5
    own = engine(artifact, TARGETS[0], own=True, kv_tokens=400, speculate=4)
    plain = engine(artifact, TARGETS[0], own=False, kv_tokens=400)
    wanted = answers(plain, [prompt])
    own.speculator.drafter = Half([*prompt, *wanted["0/0"]])
    assert answers(own, [prompt]) == wanted
    assert 0 < own.counters.guesses_accepted < own.counters.tokens_guessed


def test_an_executor_without_tables_of_windows_shares_the_others(artifact: Artifact) -> None:
    """What calls steps with one table, as before there were windows: the same logits."""
    ids = np.array(ids_of(40), np.int32)
    executor: Any = open_executor(artifact, "tvm-cpu")
    assert isinstance(executor, KeepsWindows) and executor.windows == (12,)
    executor.allocate_kv(4)
    positions = np.arange(40, dtype=np.int32)
    table = np.array([[2, 0, 3]], np.int32)
    slots = table[0][positions // PAGE] * PAGE + positions % PAGE
    inputs = StepInputs(
        ids,
        positions,
        slots.astype(np.int32),
        np.array([0, 40], np.int32),
        np.array([40], np.int32),
        table,
        positions,
    )
    got = executor.step(inputs).copy()
    run = engine(artifact, TARGETS[0], own=True, kv_tokens=400, max_batch_tokens=40)
    assert np.array_equal(got, next(run.score(ids.tolist())))


def test_tables_that_do_not_fit_are_refused(artifact: Artifact) -> None:
    one = np.zeros(1, np.int32)
    start, table = np.array([0, 1], np.int32), np.zeros((1, 1), np.int32)

    def inputs(windows: Any) -> StepInputs:
        return StepInputs(one, one, one, start, one + 1, table, one, windows=windows)

    for target in TARGETS:
        executor: Any = open_executor(artifact, target.partition(":")[0])
        executor.allocate_kv(4)
        with pytest.raises(InputError, match="have no pages of their own"):
            executor.step(inputs([(one, table)]))
        executor.allocate_windows([2])
        for windows, said in (
            (None, "wants tables for 1 windows"),
            ([(one, np.zeros((1, 2), np.int32))], "other shapes"),
            ([(one + 32, table)], r"slot_mapping of a window holds a value outside of 0 \.\. 31"),
            ([(one, table + 2)], r"block_table of a window holds a value outside of 0 \.\. 1"),
        ):
            with pytest.raises(InputError, match=said):
                executor.step(inputs(windows))


# The graph -------------------------------------------------------------------------------------------------


def test_layers_with_a_window_have_pages_and_tables_of_their_own() -> None:
    graph, _ = lowered(traced(tiny_model("gemma2"), attention="eager"), "paged")
    assert [window_of(graph.input(f"kv_pages.{i}").shape[1]) for i in range(2)] == [12, None]
    assert graph.input("block_table.12").type == TensorType("int32", (sym("B"), sym("P")))
    assert graph.input("slot_mapping.12").type == TensorType("int32", (sym("T"),))


def test_a_window_that_no_sequence_outgrows_is_none(tmp_path: Path) -> None:
    folder = save_tiny("gemma2", tmp_path / "model")
    compile_model(folder, tmp_path / "m.llmc", targets=("null",), context=12)
    names = {entry["name"] for entry in Artifact.open(tmp_path / "m.llmc").manifest["inputs"]}
    assert "block_table" in names and "block_table.12" not in names


def test_inspect_says_what_a_window_keeps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compile_model(save_tiny("gemma2", tmp_path / "model"), tmp_path / "m.llmc", targets=("null",))
    assert main(["inspect", str(tmp_path / "m.llmc")]) == 0
    assert (
        "cache a token  1.0 kB, float32; 512 B of it for the last 12 tokens only" in capsys.readouterr().out
    )


# Memory ----------------------------------------------------------------------------------------------------


def test_the_plan_counts_what_windows_save() -> None:
    sizes = {"page_size": 16, "bytes_per_page": 100, "context": 1600, "max_sequences": 4}
    plan = plan_kv_cache(**sizes, available=10**9, windows=[(30, 75)])
    assert (plan.pages, plan.windows, plan.bytes) == (400, (30,), 400 * 25 + 30 * 75)
    plan = plan_kv_cache(**sizes, available=10**9, windows=[(30, 75)], kv_bytes=12_250)
    assert (plan.pages, plan.windows, plan.bytes) == (400, (30,), 12_250)
    plan = plan_kv_cache(**sizes, available=10**9, windows=[(30, 75)], kv_bytes=12_249)
    assert (plan.pages, plan.windows) == (399, (30,))
    plan = plan_kv_cache(**sizes, available=10**9, windows=[(30, 75)], kv_bytes=999)
    assert (plan.pages, plan.windows, plan.bytes) == (9, (9,), 900)
    plan = plan_kv_cache(**sizes, available=10**9, windows=[(30, 100)], kv_bytes=5000)
    assert (plan.pages, plan.windows, plan.bytes) == (400, (30,), 3000), "all layers see the window"
    plan = plan_kv_cache(**sizes, available=10**9, windows=[(30, 75)], kv_tokens=160)
    assert (plan.pages, plan.windows) == (10, (10,))
    assert plan_kv_cache(**sizes, available=10**9).windows == ()


def test_few_pages_serve_many_tokens(artifact: Artifact) -> None:
    run = engine(artifact, TARGETS[0], own=True, kv_tokens=3 * 256)
    most = most_pages(12, PAGE, max_sequences=3, max_batch_tokens=24)
    assert run.kv.windows == (most,) and most < 3 * 256 // PAGE
    bytes_of_all = run.kv.pages * run.executor.kv_bytes_per_page
    assert run.kv.bytes < bytes_of_all * (0.7 if run.facts.context_length else 1)
