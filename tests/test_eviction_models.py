"""Generation beyond the context on compiled models: logits beside transformers, whose cache is cut and turned
by hand (Xiao et al. 2023, arXiv:2309.17453, section 3.2); tokens the same in any company, bit for bit.
"""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import llmc
import numpy as np
import pytest
from llmc.cli.main import main
from llmc.codegen.artifact import Artifact
from llmc.ir.errors import InputError
from llmc.runtime.engine import Engine, EngineOptions, ModelFacts
from llmc.runtime.executor import open_executor
from llmc.runtime.executor.cuda import CudaExecutor
from llmc.runtime.sampling_params import SamplingParams

from .conftest import LONG, only_long
from .families import save_family
from .graphs import worst
from .models import VOCAB_SIZE, ids_of, real_model, save_tiny, save_tokenizer, tiny_model
from .schedules import check_schedule, endless, random_schedule
from .test_cuda_target import TOLERANCE, emulated, needs_compiler
from .test_cuda_target import compiled as cuda_artifact
from .tvm_graphs import ISA

PAGE = 16
LENGTH = 96
"""Of the cache in tokens: a page of sinks, and two of the other five stay."""
FACTS = ModelFacts(VOCAB_SIZE, LENGTH, (2,))


def streamed(model: Any, ids: list[int], *, length: int = LENGTH, sinks: int = PAGE) -> np.ndarray:
    """Logits [T, vocab] of transformers in float32 where, whenever `length` tokens are in the cache, all but
    the first `sinks` and the newest half of the other pages are cut out of it and the keys behind the gap are
    turned to their new positions, in float64.
    """
    import torch
    from transformers import DynamicCache

    kept = (length - sinks) // PAGE // 2 * PAGE
    held, rows, past = 0, list[Any](), DynamicCache()
    # Latent attention keeps what all heads share as keys, and as values the part that turns.
    turns = "values" if hasattr(model.config, "kv_lora_rank") else "keys"
    for start in range(0, len(ids), 8):
        if held == length:
            for index, layer in enumerate(past.layers):
                for name in ("keys", "values"):
                    old = getattr(layer, name)
                    new = old[:, :, length - kept :]
                    if name == turns:
                        new = turned_back(model, index, new, length - sinks - kept)
                    setattr(layer, name, torch.cat([old[:, :, :sinks], new], dim=2))
            held = sinks + kept
        chunk = torch.tensor([ids[start : start + 8]])
        places = torch.arange(held, held + chunk.shape[1])[None]
        with torch.no_grad():
            out = model(input_ids=chunk, position_ids=places, past_key_values=past, use_cache=True)
        rows.append(out.logits[0].float())
        held += chunk.shape[1]
    return torch.cat(rows).numpy()


def turned_back(model: Any, layer: int, keys: Any, shift: int) -> Any:
    """keys [1, heads, T, D] of a layer, turned by -shift in pairs (i, i + R / 2) of the first R elements."""
    import torch

    rotary = next(m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding"))
    kinds = getattr(model.config, "layer_types", None)
    named = f"{kinds[layer]}_inv_freq" if kinds else "inv_freq"
    angles = getattr(rotary, named if hasattr(rotary, named) else "inv_freq").double() * shift
    cos, sin, half = angles.cos(), angles.sin(), len(angles)
    a, b, rest = keys.double().split([half, half, keys.shape[-1] - 2 * half], dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin, rest], dim=-1).to(keys.dtype)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(family, kv_dtype, target) → artifact, made once."""
    folder = tmp_path_factory.mktemp("eviction")

    @cache
    def make(family: str, kv_dtype: str = "float32", target: str = "tvm-cpu") -> Path:
        source, out = folder / family, folder / f"{family}-{kv_dtype}-{target}.llmc"
        if not source.exists():
            save_tiny(family, source, **CHANGES.get(family, {}))
        chosen = f"{target}:isa={ISA}" if target == "tvm-cpu" else target
        llmc.compile(source, out, targets=[chosen], kv_dtype=kv_dtype)
        return out

    return make


# Halves that turn; a part of the head; windows of 12 tokens in every other layer; two tables; a window that
# sees all that is in the cache.
CASES = [
    pytest.param(name, target, marks=[] if (name, target) == ("llama", "tvm-cpu") else pytest.mark.slow)
    for target, names in {
        "tvm-cpu": ("llama", "gpt_neox", "gemma2", "gemma3", "mistral"),
        "onnx-cpu": ("llama", "gemma3"),
    }.items()
    for name in names
]
CHANGES: dict[str, dict[str, Any]] = {"mistral": {"sliding_window": 128}}


# Some of transformers' classes are to call this argument otherwise; it is the one that all of them take now.
@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
@pytest.mark.parametrize(("family", "target"), CASES)
def test_logits_beyond_the_context_equal_transformers(family: str, target: str, compiled: Any) -> None:
    """Bar: largest difference ≤ 1e-4 of the largest logit, as without eviction (tests/test_families.py)."""
    ids = ids_of(5 * LENGTH)
    wanted = streamed(tiny_model(family, **CHANGES.get(family, {})), ids)
    with llmc.load(compiled(family, target=target), context=LENGTH, sinks=4) as llm:
        assert worst(llm.logits(ids), wanted) <= 1e-4


# Halves written apart, and a window in every other layer; behind a part that is alike for all heads, from
# every other element.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_other_forms_of_rotary_embedding(family: str, tmp_path: Path) -> None:
    model, _ = save_family(family, tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    llmc.compile(tmp_path / "model", tmp_path / "m.llmc", targets=[f"tvm-cpu:isa={ISA}"], context=2 * LENGTH)
    ids = ids_of(4 * LENGTH)
    with llmc.load(tmp_path / "m.llmc", context=LENGTH, sinks=4) as llm:
        assert worst(llm.logits(ids), streamed(model, ids)) <= 1e-4


def generated(llm: Any, count: int, **options: Any) -> list[list[int]]:
    found = llm.generate(ids_of(40), SamplingParams(max_tokens=count, ignore_eos=True, **options))
    return [choice.token_ids for choice in found.choices]


def test_answers_beyond_the_context_are_what_their_scores_say(compiled: Any) -> None:
    """Greedy tokens of a generation are the largest logits of the text that it made, scored in one go; alone,
    with guesses, and as one of two choices. Bit for bit, so ties do not matter.
    """
    path = compiled("llama")
    with llmc.load(path, context=LENGTH, sinks=4, speculate=6) as llm:
        (answer,) = generated(llm, 300)
        rows = llm.logits([*ids_of(40), *answer])
        assert rows[39:-1].argmax(axis=1).tolist() == answer
        assert generated(llm, 300, n=2) == [answer, answer]
        assert llm.context_length == LENGTH and llm.stats.pages_used == 0
        with pytest.raises(InputError, match="the prompt has 200 tokens, the context holds 96"):
            llm.generate(ids_of(200))
    with llmc.load(path, context=LENGTH, sinks=4, max_batch_tokens=7, max_sequences=2) as llm:
        assert generated(llm, 300) == [answer]
        assert llm.kv_cache.tokens == 2 * LENGTH
    with llmc.load(path, context=LENGTH) as llm:
        assert generated(llm, 300) == [answer[: LENGTH - 40]]


def test_commands_take_sinks(compiled: Any, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(compiled("llama")), "abc", "--no-chat-template", "--context", "96", "--ignore-eos", "--json"]
    assert main(["run", *words, "--max-tokens", "200", "--sinks", "4"]) == 0
    out, _ = capsys.readouterr()
    assert '"generated_tokens": 200' in out or '"completion_tokens": 200' in out, out
    assert main(["run", *words, "--sinks", "96"]) == 2
    assert "sinks: of a context of 96 tokens" in capsys.readouterr().out


def test_texts_longer_than_the_cache_are_measured(
    compiled: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, file = compiled("llama"), tmp_path / "text.txt"
    with llmc.load(path, context=LENGTH, sinks=4) as llm:
        file.write_text(llm.decode(ids_of(700)), encoding="utf-8")
        ids = llm.encode(file.read_text(encoding="utf-8"))[:300]
        wanted = float(np.exp(-llm.token_logprobs(ids).mean()))
    words = ["eval", str(path), "--ppl", str(file), "--window", "300", "--windows", "1", "--json"]
    assert main([*words, "--context", str(LENGTH), "--sinks", "4"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 299 and found["ppl"] == pytest.approx(wanted, rel=1e-5)
    for wrong, said in (
        (words, "pass --window 256"),
        ([*words, "--context", "96"], "--context is the cache of --sinks"),
        (["eval", str(path), "--mcq", str(file), "--sinks", "4"], "--sinks is for windows of a text"),
    ):
        assert main(wrong) == 2
        assert said in "".join(capsys.readouterr())


def test_prefixes_on_disk_hold_nothing_that_was_turned(compiled: Any, tmp_path: Path) -> None:
    path = compiled("llama")
    options = {"context": LENGTH, "sinks": 4, "prefix_cache_dir": tmp_path / "kept"}
    prompt = ids_of(LENGTH - 4)
    params = SamplingParams(max_tokens=150, ignore_eos=True)
    with llmc.load(path, **options) as llm:
        first, again = (llm.generate(prompt, params).token_ids for _ in range(2))
    with llmc.load(path, **options) as llm:
        found = llm.generate(prompt, params)
        assert found.cached_tokens == 80  # all full pages of the prompt
    with llmc.load(path, context=LENGTH, sinks=4, prefix_cache=False) as llm:
        cold = llm.generate(prompt, params).token_ids
    assert first == again == found.token_ids == cold and len(cold) == 150


@pytest.mark.slow
@needs_compiler
@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
def test_kernels_of_a_gpu_go_on_beyond_the_context(tmp_path: Path) -> None:
    """tvm-cuda, its kernels run by this processor; tolerance as in tests/test_cuda_target.py."""
    artifact = cuda_artifact("llama", tmp_path)
    executor = CudaExecutor(artifact, emulated(artifact, tmp_path))
    engine = Engine(executor, None, FACTS, EngineOptions(sinks=4, kv_tokens=LENGTH, max_sequences=1))
    ids = ids_of(3 * LENGTH)
    found = np.concatenate([part.copy() for part in engine.score(ids)])
    assert np.abs(found - streamed(tiny_model("llama"), ids)).max() < TOLERANCE


# Bits of every cache type, and of layers with a window, on schedules that preempt, fork, cancel and share.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "kv_dtype"),
    [("llama", "int8"), ("gemma2", "float32"), *([("llama", "bfloat16")] if LONG else [])],
)
def test_schedules_beyond_the_context_give_each_request_its_own_tokens(
    family: str, kv_dtype: str, compiled: Any
) -> None:
    executor = open_executor(Artifact.open(compiled(family, kv_dtype)), "tvm-cpu")
    events = sum(
        (
            check_schedule(executor, FACTS, endless(random_schedule(seed, FACTS, PAGE), FACTS, PAGE))
            for seed in range(15)
        ),
        Counter[str](),
    )
    assert events["preempted"] and events["from_cache"] and events["forked"], events


@only_long
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
def test_a_published_model_beyond_its_cache_equals_transformers(tmp_path: Path, shared_data: Path) -> None:
    """SmolLM2-135M with its codes as floats, over 600 tokens of a book in a cache of 256. Bar as above; 4e-6
    of the largest logit was seen, before the first eviction and after it.
    """
    from llmc.cli.peer import load_transformers

    source = real_model("smollm2")
    llmc.compile(source, tmp_path / "m.llmc", targets=[f"tvm-cpu:isa={ISA}"])
    with llmc.load(tmp_path / "m.llmc", context=256, sinks=4) as llm:
        text = (shared_data / "longtext" / "alice_in_wonderland.txt").read_text(encoding="utf-8")
        ids = llm.encode(text)[:600]
        found = llm.logits(ids)
    wanted = streamed(load_transformers(str(source), "float32"), ids, length=256)
    assert worst(found, wanted) <= 1e-4
