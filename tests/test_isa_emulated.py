"""Kernel libraries on processors that are not here, emulated by qemu: an x86-64 with nothing beyond AVX2,
which must meet no instruction that it lacks, and aarch64 with and without `i8mm`. Tokens are those of this
machine.
"""

from __future__ import annotations

from pathlib import Path

import llmc
import numpy as np
import pytest
from llmc.runtime import cpu

from benchmarks.published_models import FetchError, fetch

from . import emulated
from .conftest import LONG
from .models import save_tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not LONG, reason="LLMC_LONG_TESTS=1 emulates processors: minutes"),
    pytest.mark.skipif("avx2" not in cpu.supported_isas(), reason="the tokens compared with are AVX2's"),
]

LEVELS = "tvm-cpu:isa=avx2+avx512vnni+neon+i8mm"
PROMPT = [5, 17, 3, 90, 41, 7, 7, 12, 66, 31, 2, 19, 88, 45, 23, 10, 4, 71, 29]
COUNT = 24


@pytest.fixture(scope="module", params=["none", "int4-g32"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers with random weights; int4-g32 has a head of 8 bits."""
    folder = tmp_path_factory.mktemp(request.param)
    model = save_tiny("llama", folder / "model")
    llmc.compile(str(model), str(folder / "m.llmc"), targets=[LEVELS], quant=request.param)
    return folder / "m.llmc"


def _close(actual: list[float], expected: list[float]) -> None:
    """Sums of floats may be fused in other places: 1e-4 of the largest."""
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * scale)


def test_avx2_alone_meets_no_instruction_that_it_lacks(artifact: Path) -> None:
    wanted = emulated.greedy(emulated.native(), artifact, "avx2", PROMPT, COUNT)
    assert len(set(wanted["tokens"])) > 3  # not one token again and again
    found = emulated.greedy(emulated.haswell(), artifact, "avx2", PROMPT, COUNT)
    assert found["tokens"] == wanted["tokens"]
    assert found["first"] == wanted["first"] and found["last"] == wanted["last"]  # bit for bit
    # Such a machine does not run what is beyond it, so the run above means something.
    with pytest.raises(AssertionError, match="status -4"):
        emulated.greedy(emulated.haswell(), artifact, "avx512vnni", PROMPT, 1)


@pytest.mark.parametrize(("processor", "level"), [("neoverse-n1", "neon"), ("neoverse-n2", "i8mm")])
def test_aarch64_takes_its_best_level_and_gives_the_same_tokens(
    processor: str, level: str, artifact: Path
) -> None:
    wanted = emulated.greedy(emulated.native(), artifact, "avx2", PROMPT, COUNT)
    command, variables = emulated.aarch64(processor)
    found = emulated.greedy(command, artifact, None, PROMPT, COUNT, **variables)
    assert found["isa"] == level
    assert found["tokens"] == wanted["tokens"]
    _close(found["first"], wanted["first"])
    _close(found["last"], wanted["last"])


def test_aarch64_without_dot_products_is_refused_in_a_sentence(artifact: Path) -> None:
    command, variables = emulated.aarch64("cortex-a72")
    with pytest.raises(AssertionError, match="this CPU runs none; compile it with --target onnx-cpu"):
        emulated.greedy(command, artifact, None, PROMPT, 1, **variables)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        model = fetch("smollm2")
    except FetchError as error:
        pytest.skip(str(error))
    out = tmp_path_factory.mktemp("smollm2") / "m.llmc"
    llmc.compile(str(model), str(out), targets=["tvm-cpu:isa=all"], quant="keep")
    return out


def test_one_artifact_of_all_levels_on_three_machines(published: Path) -> None:
    llm = llmc.load(str(published))
    assert llm.executor.isa == cpu.best_isa()
    prompt = llm.tokenizer.encode("The capital of France is")
    wanted = emulated.greedy(emulated.native(), published, "avx2", prompt, 8)
    assert " Paris" in llm.tokenizer.decode(wanted["tokens"])
    assert emulated.greedy(emulated.haswell(), published, "avx2", prompt, 8)["tokens"] == wanted["tokens"]
    for processor, level in (("neoverse-n1", "neon"), ("neoverse-n2", "i8mm")):
        command, variables = emulated.aarch64(processor)
        found = emulated.greedy(command, published, None, prompt, 8, **variables)
        assert (found["isa"], found["tokens"]) == (level, wanted["tokens"])
