"""The loader and the public object, on an artifact of target `null` and on the fake executor."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llmc.codegen.artifact import Artifact, ArtifactWriter
from llmc.ir.errors import ArtifactError, InputError
from llmc.runtime import cpu
from llmc.runtime.chat_template import ChatTemplate
from llmc.runtime.engine import Engine, EngineOptions, ModelFacts
from llmc.runtime.executor import choose_isa, choose_target, open_executor
from llmc.runtime.llm import LLM
from llmc.runtime.loader import load
from llmc.runtime.sampling_params import SamplingParams

from .fake_executor import FakeExecutor, generate_alone, reference_logits
from .test_runtime_detokenizer import byte_level

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{{ bos_token }}<assistant>"


def write_artifact(out: Path, **changes: Any) -> Path:
    """An artifact of target `null` with a byte-level tokenizer and a chat template."""
    tokenizer = byte_level()
    manifest: dict[str, Any] = {
        "kind": "causal_lm",
        "model": {
            "name": "tiny",
            "vocab_size": tokenizer.vocab_size,
            "hidden_size": 8,
            "context_length": 64,
            "eos_token_ids": [2],
            "kv": [{"heads": 2, "head_dim": 4, "window": None}] * 3,
            "generation": {"do_sample": True, "temperature": 0.6, "top_k": 20, "max_length": 99},
        },
        "page_size": 16,
        "kv_dtype": "float32",
        "targets": {"null": {"options": {}}},
        "tokenizer": {
            "path": "tokenizer.json",
            "chat_template": "chat_template.jinja",
            "special_tokens": {"bos_token": "<|end|>"},
        },
    }
    manifest |= changes
    with ArtifactWriter(out) as writer:
        tokenizer._inner.save(str(writer.path("tokenizer.json")))
        writer.path("chat_template.jinja").write_text(TEMPLATE)
        writer.finish(manifest)
    return out


def fake_llm(**options: Any) -> LLM:
    tokenizer = byte_level()
    executor = FakeExecutor(vocab_size=tokenizer.vocab_size)
    facts = ModelFacts(tokenizer.vocab_size, 200, ())
    engine = Engine(executor, tokenizer, facts, EngineOptions(kv_tokens=1000, **options))
    return LLM(executor, engine=engine, template=ChatTemplate(TEMPLATE, {"bos_token": "<|end|>"}))


# Loader
# ------------------------------------------------------------------------------------------------------


def test_load_reads_what_the_manifest_says(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = write_artifact(tmp_path / "m.llmc")
    with caplog.at_level(logging.INFO, "llmc.runtime"), load(path, kv_tokens=100) as llm:
        assert llm.kind == "causal_lm"
        assert llm.context_length == 64
        assert llm.executor.kv_bytes_per_page == 3 * 2 * 2 * 4 * 4 * 16
        assert llm.decode(llm.encode("héllo")) == "héllo"
        assert llm.chat_prompt([{"role": "user", "content": "hi"}]) == "<user>hi\n<|end|><assistant>"
        assert llm.generate("hi", max_tokens=3, temperature=0.0).token_ids == [0, 0, 0]
    assert "kv cache: 7 pages = 112 tokens, 0.0 MB" in caplog.text


def test_the_models_own_sampling_settings_are_the_defaults(tmp_path: Path):
    with load(write_artifact(tmp_path / "m.llmc"), kv_tokens=100) as llm:
        assert llm.sampling() == SamplingParams(temperature=0.6, top_k=20)
        assert llm.sampling(temperature=0.0, stop="x") == SamplingParams(top_k=20, stop=("x",))
        with pytest.raises(InputError, match="unknown sampling option 'temprature'"):
            llm.sampling(temprature=1.0)  # pyright: ignore[reportCallIssue]
    with fake_llm() as llm:
        assert llm.sampling() == SamplingParams()


def test_context_and_cache_options(tmp_path: Path):
    path = write_artifact(tmp_path / "m.llmc")
    with load(path, context=20, kv_cache_bytes=10 * 3072) as llm:
        assert llm.context_length == 20
        assert llm.stats.pages_total == 10
    with load(path) as llm:
        assert llm.stats.pages_total == 64 * 4  # max_sequences full contexts: less than the free memory
    with pytest.raises(InputError, match="context is 65"):
        load(path, context=65)


@pytest.mark.parametrize("key", ["vocab_size", "context_length"])
def test_incomplete_model_facts_are_named(tmp_path: Path, key: str):
    path = write_artifact(tmp_path / "m.llmc")
    manifest = json.loads((path / "manifest.json").read_text())
    if key == "context_length":
        del manifest["model"][key]
    else:
        manifest["model"][key] = {}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises((ArtifactError, TypeError)) as caught:
        load(path)
    assert isinstance(caught.value, ArtifactError)


def test_a_tokenizer_that_is_none(tmp_path: Path):
    path = write_artifact(tmp_path / "m.llmc")
    data = b"{}"
    (path / "tokenizer.json").write_bytes(data)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["tokenizer.json"]["size"] = len(data)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"tokenizer\.json is not a tokenizer"):
        load(path, verify="size")


def test_targets_and_isas_are_chosen_for_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    assert choose_target(["null", "onnx-cpu", "tvm-cpu"]) == "tvm-cpu"
    assert choose_target(["null", "onnx-cpu", "tvm-cpu"], "null") == "null"
    with pytest.raises(ArtifactError, match="not compiled for target 'tvm-cpu', only for null"):
        choose_target(["null"], "tvm-cpu")
    with pytest.raises(InputError, match="no executor for any of the targets someones"):
        choose_target(["someones"])
    levels = [isa for isa in cpu.ISA_LEVELS if cpu.ISA_MACHINES[isa] == "x86_64"]
    kernels = [{"isa": isa, "path": f"{isa}.so"} for isa in levels]
    monkeypatch.setattr(cpu, "supported_isas", lambda: ["generic", "avx2"])
    assert choose_isa(kernels) == "avx2"
    assert choose_isa(kernels[:1]) == "generic"
    assert choose_isa(kernels, "generic") == "generic"
    assert choose_isa([]) is None
    with pytest.raises(ArtifactError, match="kernels for amx, this CPU runs generic, avx2"):
        choose_isa(kernels[-1:])
    with pytest.raises(ArtifactError, match=r"asked for avxvnni"):
        choose_isa(kernels, "avxvnni")
    artifact = Artifact.open(write_artifact(tmp_path / "m.llmc"))
    assert open_executor(artifact).batch_invariant


def test_better_kernels_than_an_artifact_has_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    artifact = Artifact.open(write_artifact(tmp_path / "m.llmc"))
    monkeypatch.setitem(artifact.target("null"), "kernels", [{"isa": "generic"}, {"isa": "avx2"}])
    monkeypatch.setattr(cpu, "supported_isas", lambda: ["generic", "avx2"])
    for best, isa, told in (("avx2", None, False), ("amx", "avx2", False), ("amx", None, True)):
        monkeypatch.setattr(cpu, "best_isa", lambda best=best: best)
        open_executor(artifact, isa=isa)
        assert (f"{artifact.root} has no kernels for amx" in caplog.text) is told
    assert "--target null:isa=generic+avx2+amx" in caplog.text


# Generation
# --------------------------------------------------------------------------------------------------


def test_generate_takes_text_ids_and_messages():
    with fake_llm() as llm:
        messages = [{"role": "user", "content": "hi"}]
        text = llm.chat_prompt(messages)
        ids = llm.encode(text)
        answers = [llm.generate(prompt, max_tokens=12) for prompt in (text, ids, messages)]
        expected = generate_alone(ids, 12, vocab_size=llm.executor.vocab_size)
        assert [answer.token_ids for answer in answers] == [expected] * 3
        assert answers[0].text == llm.decode(expected)
        assert (answers[0].finish_reason, answers[0].prompt_tokens) == ("length", len(ids))
        assert answers[1].cached_tokens > 0
        for empty in ("", [], ()):
            with pytest.raises(InputError, match="empty"):
                llm.generate(empty)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (None, "the prompt is of type NoneType"),
        (5, "the prompt is of type int"),
        ([], "the prompt is empty"),
        ([{"role": "user", "content": "Hi"}, "and more"], "the prompt mixes messages with other things"),
    ],
)
def test_prompts_that_are_none_are_refused(prompt: Any, said: str):
    with fake_llm() as llm, pytest.raises(InputError, match=said):
        llm.generate(prompt)


def test_streams_give_what_generate_gives():
    async def collect(llm: LLM) -> str:
        return "".join([output.text async for output in llm.astream("hello", max_tokens=40)])

    with fake_llm() as llm:
        whole = llm.generate("hello", max_tokens=40)
        assert "".join(output.text for output in llm.stream("hello", max_tokens=40)) == whole.text
        assert asyncio.run(collect(llm)) == whole.text


def test_a_stream_keeps_its_model_alive():
    stream = fake_llm().stream("hello", max_tokens=30)
    assert len(list(stream)) == 30


def test_several_prompts_and_several_choices():
    with fake_llm() as llm:
        prompts = ["a", "bc", "def"]
        together = llm.generate_batch(prompts, max_tokens=9)
        assert [c.token_ids for c in together] == [llm.generate(p, max_tokens=9).token_ids for p in prompts]
        many = llm.generate("a", n=3, temperature=1.5, seed=1, max_tokens=6)
        assert [choice.index for choice in many.choices] == [0, 1, 2]
        assert many.generated_tokens == 18
        with pytest.raises(InputError, match="top_p"):
            llm.generate_batch(["a", "b"], top_p=2.0)
        assert llm.stats.pages_used == 0


def test_without_template_or_tokenizer_the_way_out_is_named():
    executor = FakeExecutor()
    llm = LLM(executor, engine=Engine(executor, None, ModelFacts(97, 64), EngineOptions(kv_tokens=64)))
    with pytest.raises(InputError, match="no tokenizer"):
        llm.generate("text")
    with pytest.raises(InputError, match="no chat template"):
        llm.generate([{"role": "user", "content": "x"}])
    llm.close()


# Numbers
# -----------------------------------------------------------------------------------------------------


def test_logits_and_token_logprobs():
    with fake_llm(max_batch_tokens=64) as llm:
        ids = list(range(100))
        vocab = llm.executor.vocab_size
        expected = np.array(
            [reference_logits(np.array(ids[: t + 1]), np.arange(t + 1), vocab) for t in range(100)]
        )
        assert np.array_equal(llm.logits(ids), expected)
        wide = expected.astype(np.float64)
        logprobs = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
        found = llm.token_logprobs(ids, chunk=7)
        assert found == pytest.approx(logprobs[np.arange(99), ids[1:]], abs=1e-6)
        assert llm.token_logprobs(ids[:1]).shape == (0,)
        with pytest.raises(InputError, match="no encoder"):
            llm.embed(["x"])
        with pytest.raises(InputError, match="no function"):
            llm.run(x=np.zeros(1))


class _Encoder(FakeExecutor):
    """Refuses a text in pieces, as attention in both directions must."""

    def step(self, inputs):
        assert (inputs.context_len == np.diff(inputs.query_start)).all()
        return super().step(inputs)


def test_an_encoder_sees_each_text_whole(tmp_path: Path):
    artifact = Artifact.open(write_artifact(tmp_path / "m.llmc", kind="encoder"))
    tokenizer = byte_level()
    executor = _Encoder(vocab_size=8)
    facts = ModelFacts(tokenizer.vocab_size, 200, ())
    engine = Engine(executor, tokenizer, facts, EngineOptions(kv_tokens=400, max_batch_tokens=64))
    with LLM(executor, artifact=artifact, engine=engine) as llm:
        states = llm.embed(["x" * 150, "abc"])
        assert [state.shape for state in states] == [(150, 8), (3, 8)]
        with pytest.raises(InputError, match="is an encoder and generates nothing"):
            llm.generate("abc")


def test_functions_take_and_give_named_arrays(tmp_path: Path):
    inputs = [
        {"name": "x", "dtype": "float32", "shape": [2, "n"]},
        {"name": "m", "dtype": "int32", "shape": [3]},
    ]
    path = write_artifact(tmp_path / "f.llmc", kind="function", inputs=inputs, model={"vocab_size": 0})
    llm = LLM(FakeExecutor(), artifact=Artifact.open(path))
    x, m = np.ones((2, 5), np.float32), np.arange(3, dtype=np.int32)
    result = llm.run(x=x, m=m)
    assert np.array_equal(result["x_doubled"], 2 * x)
    for wrong, message in [
        ({"x": x}, "inputs given: x; expected: x, m"),
        ({"x": x.astype(np.float64), "m": m}, r"input x is float64\[2, 5\]; expected: float32\[2, 'n'\]"),
        ({"x": x.T, "m": m}, r"input x is float32\[5, 2\]"),
        ({"x": x, "m": m[:2]}, r"input m is int32\[2\]"),
    ]:
        with pytest.raises(InputError, match=message):
            llm.run(**wrong)
    with pytest.raises(InputError, match="is a function"):
        llm.generate("x")
    llm.close()
