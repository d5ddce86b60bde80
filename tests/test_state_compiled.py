"""Compiled models with recurrent layers: logits and answers of the engine, with prompts in chunks, sequences
beside each other, forks and preemption, are those of transformers in float32. Bar: difference ≤ 1e-4.

One model is compiled for the fast tests, the others for the slow ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import llmc
import numpy as np
import pytest
from llmc.codegen.artifact import Artifact
from llmc.ir.errors import InputError, UnsupportedError
from llmc.runtime.engine import Engine, EngineOptions, ModelFacts
from llmc.runtime.executor import open_executor
from llmc.runtime.sampling_params import SamplingParams

from .models import CONTEXT, VOCAB_SIZE, ids_of
from .state_models import MODELS, greedy, save_state_model, state_logits
from .tvm_graphs import ISA

TOLERANCE = 1e-4
PROMPTS = [ids_of(9), ids_of(37, seed=1), ids_of(50, seed=2), ids_of(1, seed=3)]
NAMES = [n if n == "selective" else pytest.param(n, marks=pytest.mark.slow) for n in MODELS]
Compiled = Callable[[str], Artifact]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """Name → artifact, made once."""

    @cache
    def artifact(name: str) -> Artifact:
        folder = tmp_path_factory.mktemp(MODELS[name][0])
        model = save_state_model(name, folder / "model")
        return llmc.compile(model, folder / "m.llmc", targets=[f"tvm-cpu:isa={ISA}"], context=CONTEXT)

    return artifact


def engine_of(artifact: Artifact, **options: Any) -> Engine:
    return Engine(
        open_executor(artifact, threads=2), None, ModelFacts(VOCAB_SIZE, CONTEXT), EngineOptions(**options)
    )


def answers(engine: Engine, prompts: list[list[int]], **params: Any) -> dict[tuple[str, int], list[int]]:
    given = SamplingParams(ignore_eos=True, **params)
    for i, prompt in enumerate(prompts):
        engine.add_request(prompt, given, str(i))
    found: dict[tuple[str, int], list[int]] = {}
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            found.setdefault((output.request_id, output.index), []).extend(output.token_ids)
        engine.check()
    assert engine.blocks.states is not None
    assert engine.blocks.states.num_free == engine.blocks.states.count
    return found


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_transformers(name: str, compiled: Compiled) -> None:
    with llmc.load(compiled(name).root) as llm:
        for ids in PROMPTS:
            assert np.abs(llm.logits(ids) - state_logits(name, ids)).max() <= TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_chunks_neighbours_and_preemption_change_no_bit(name: str, compiled: Compiled) -> None:
    wanted = {(str(i), 0): greedy(name, prompt, 8) for i, prompt in enumerate(PROMPTS)}
    roomy = engine_of(compiled(name))
    assert answers(roomy, PROMPTS, max_tokens=8, temperature=0) == wanted
    tight = engine_of(compiled(name), max_batch_tokens=16, max_sequences=3, kv_tokens=80)
    assert answers(tight, PROMPTS, max_tokens=8, temperature=0) == wanted
    whole, parts = ([rows.copy() for rows in e.score(PROMPTS[2], n)] for e, n in ((roomy, 64), (tight, 7)))
    assert np.array_equal(np.concatenate(whole), np.concatenate(parts))


@pytest.mark.parametrize("name", NAMES)
def test_forks_go_on_from_a_copy_of_the_state(name: str, compiled: Compiled) -> None:
    engine = engine_of(compiled(name), max_sequences=4)
    params = SamplingParams(max_tokens=8, temperature=1.0, seed=5, n=3, logprobs=0, ignore_eos=True)
    engine.add_request(PROMPTS[1], params)
    tokens: dict[int, list[int]] = {i: [] for i in range(3)}
    logprobs: dict[int, list[float]] = {i: [] for i in range(3)}
    while engine.has_work:
        for output in engine.step():
            tokens[output.index] += output.token_ids
            logprobs[output.index] += [one.logprob for one in output.logprobs or [] if one is not None]
        engine.check()
    assert len({tuple(one) for one in tokens.values()}) == 3
    for i, chosen in tokens.items():
        rows = state_logits(name, [*PROMPTS[1], *chosen]).astype(np.float64)
        rows -= np.log(np.exp(rows).sum(-1, keepdims=True))
        wanted = rows[len(PROMPTS[1]) - 1 : -1][np.arange(8), chosen]
        assert np.abs(np.array(logprobs[i]) - wanted).max() <= TOLERANCE


def test_preempted_sequence_begins_anew(compiled: Compiled) -> None:
    engine = engine_of(compiled("selective"), max_batch_tokens=64, max_sequences=3, kv_tokens=80)
    prompts = [ids_of(20, seed=s) for s in (4, 5, 6)]
    found = answers(engine, prompts, max_tokens=24, temperature=0)
    assert engine.stats.preemptions
    assert found == {(str(i), 0): greedy("selective", prompt, 24) for i, prompt in enumerate(prompts)}


def test_manifest_lists_the_states(compiled: Compiled) -> None:
    artifact = compiled("selective")
    assert artifact.model["state"] == [[3, 96], [12, 96]] * 2
    assert artifact.model["num_layers"] == 2
    assert [i["name"] for i in artifact.manifest["inputs"] if "state" in i["name"]] == [
        "state_slot",
        *(f"state.{i}" for i in range(4)),
    ]
    executor: Any = open_executor(artifact, threads=1)
    assert executor.state_bytes == 4 * 2 * (3 + 12) * 96
    with pytest.raises(InputError, match="a state cache of 0 rows"):
        executor.allocate_states(0)


def test_bad_requests_are_refused_before_anything_runs(compiled: Compiled, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="recurrent layers, whose state does not go back"):
        engine_of(compiled("selective"), speculate=3)
    model = save_state_model("selective", tmp_path / "model")
    with pytest.raises(UnsupportedError, match="cannot emit causal_conv1d"):
        llmc.compile(model, tmp_path / "m.llmc", targets=["onnx-cpu"], context=CONTEXT)
    assert not (tmp_path / "m.llmc").exists()
