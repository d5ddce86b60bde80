"""The engine: admission, stopping, choices, cancelling, and faults that stay with their request."""

from __future__ import annotations

import numpy as np
import pytest
from llmc.ir.errors import InputError
from llmc.runtime.engine import ContextLengthError, Engine, EngineOptions, ModelFacts
from llmc.runtime.generation import StepOutput
from llmc.runtime.sampling_params import SamplingParams

from .fake_executor import FakeExecutor, generate_alone, reference_logits
from .test_runtime_detokenizer import byte_level

FACTS = ModelFacts(vocab_size=97, context_length=64, eos_token_ids=(3,))
PROMPT = [10, 20, 30, 40, 50]


def make(executor: FakeExecutor | None = None, **options: object) -> Engine:
    sizes = {"kv_tokens": 256, "max_sequences": 8, "max_batch_tokens": 32, **options}
    return Engine(executor or FakeExecutor(), None, FACTS, EngineOptions(**sizes))


def finish(engine: Engine) -> dict[tuple[str, int], list[StepOutput]]:
    outputs: dict[tuple[str, int], list[StepOutput]] = {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault((output.request_id, output.index), []).append(output)
        engine.check()
    return outputs


def tokens_of(outputs: list[StepOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


# Admission
# ---------------------------------------------------------------------------------------------------


def test_a_prompt_longer_than_the_context_is_refused_with_both_counts():
    engine = make()
    engine.add_request([1] * 63)
    for length in (64, 1000):
        with pytest.raises(
            ContextLengthError, match=rf"context_length_exceeded.*{length} tokens.*64"
        ) as caught:
            engine.add_request([1] * length)
        assert (caught.value.prompt_tokens, caught.value.limit) == (length, 64)
        assert caught.value.exit_code == 2


def test_what_can_never_fit_in_the_cache_is_refused():
    engine = make(kv_tokens=40)
    with pytest.raises(ContextLengthError, match="KV cache holds 40"):
        engine.add_request([1] * 40)
    with pytest.raises(
        InputError, match=r"can never fit: 30 prompt tokens and 20 more, the KV cache holds 40"
    ):
        engine.add_request([1] * 30, SamplingParams(max_tokens=20))
    engine.add_request([1] * 30, SamplingParams(max_tokens=None, ignore_eos=True), "all")
    outputs = finish(engine)["all", 0]
    assert len(tokens_of(outputs)) == 10
    assert outputs[-1].finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty"),
        ([97], "prompt token 97 is no id"),
        ([-1], "prompt token -1 is no id"),
        ([2**40], "no token id"),
        ([1.5], "no token id"),
        ("text", "there is no tokenizer"),
    ],
)
def test_prompts_that_are_none(prompt: list[int] | str, message: str):
    with pytest.raises(InputError, match=message):
        make().add_request(prompt)


def test_sampling_values_are_checked_at_admission_and_ids_are_unique():
    engine = make()
    with pytest.raises(InputError, match="temperature is -1"):
        engine.add_request(PROMPT, SamplingParams(temperature=-1))
    with pytest.raises(InputError, match="n is 9"):
        engine.add_request(PROMPT, SamplingParams(n=9))
    engine.add_request(PROMPT, request_id="a")
    with pytest.raises(InputError, match="'a' is in use"):
        engine.add_request(PROMPT, request_id="a")
    assert engine.request_ids() == ["a"]


@pytest.mark.parametrize(
    "options",
    [
        {"max_sequences": 0},
        {"max_sequences": 64},
        {"context": 0},
        {"context": 65},
        {"kv_tokens": 0},
        {"kv_tokens": None, "kv_cache_bytes": 1},
        {"kv_tokens": 10**15},
    ],
)
def test_impossible_sizes_are_refused(options: dict[str, int]):
    with pytest.raises(InputError) as caught:
        make(**options)
    assert caught.value.remedy


# Stopping
# ----------------------------------------------------------------------------------------------------


def test_max_tokens_and_context_end_with_length():
    engine = make()
    engine.add_request(PROMPT, SamplingParams(max_tokens=4, ignore_eos=True), "short")
    engine.add_request(PROMPT, SamplingParams(max_tokens=1000, ignore_eos=True), "long")
    outputs = finish(engine)
    assert tokens_of(outputs["short", 0]) == generate_alone(PROMPT, 4)
    assert tokens_of(outputs["long", 0]) == generate_alone(PROMPT, 59)
    assert {outputs[key][-1].finish_reason for key in outputs} == {"length"}
    assert all(output.finish_reason is None for output in outputs["long", 0][:-1])


def _with_stop(stop: int, **more: object) -> list[StepOutput]:
    facts = ModelFacts(97, 64, (stop,))
    engine = Engine(FakeExecutor(), None, facts, EngineOptions(kv_tokens=128, max_sequences=2))
    engine.add_request(PROMPT, SamplingParams(max_tokens=20, **more), "r")
    return finish(engine)["r", 0]


def test_end_of_text_stop_tokens_min_tokens_and_ignore_eos():
    alone = generate_alone(PROMPT, 20)
    stop = alone[5]
    place = alone.index(stop)
    ended = _with_stop(stop)
    assert tokens_of(ended) == alone[: place + 1]
    assert (ended[-1].finish_reason, ended[-1].stop_reason) == ("stop", None)
    assert tokens_of(_with_stop(stop, ignore_eos=True)) == alone
    both = _with_stop(stop, ignore_eos=True, stop_token_ids=(alone[2],))
    assert both[-1].stop_reason == alone[2]
    late = tokens_of(_with_stop(stop, min_tokens=place + 2))
    assert stop not in late[: place + 1]
    assert len(late) > place + 1


def _text_engine() -> Engine:
    tokenizer = byte_level()
    facts = ModelFacts(tokenizer.vocab_size, 400, ())
    return Engine(
        FakeExecutor(vocab_size=tokenizer.vocab_size), tokenizer, facts, EngineOptions(kv_tokens=2048)
    )


def test_text_is_the_decoding_of_the_tokens():
    engine = _text_engine()
    engine.add_request("héllo", SamplingParams(max_tokens=100), "r")
    outputs = finish(engine)["r", 0]
    assert engine.tokenizer is not None
    assert "".join(output.text for output in outputs) == engine.tokenizer.decode(tokens_of(outputs))
    assert outputs[0].prompt_tokens == len(engine.tokenizer.encode("héllo"))


def test_stop_strings_cut_the_text_and_release_the_pages():
    engine = _text_engine()
    engine.add_request("hello", SamplingParams(max_tokens=200), "free")
    text = "".join(output.text for output in finish(engine)["free", 0])
    stop = text[20:23]
    engine.add_request("hello", SamplingParams(max_tokens=200, stop=(stop, "never there")), "r")
    outputs = finish(engine)["r", 0]
    assert "".join(output.text for output in outputs) == text[: text.index(stop)]
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", stop)
    assert engine.stats.pages_used == 0


def test_a_stop_token_gives_no_text():
    engine = _text_engine()
    engine.add_request("hello", SamplingParams(max_tokens=30), "free")
    tokens = tokens_of(finish(engine)["free", 0])
    stop = tokens[10]
    engine.add_request("hello", SamplingParams(max_tokens=30, stop_token_ids=(stop,)), "r")
    outputs = finish(engine)["r", 0]
    assert engine.tokenizer is not None
    assert tokens_of(outputs) == tokens[: tokens.index(stop) + 1]
    text = "".join(output.text for output in outputs)
    assert text == engine.tokenizer.decode(tokens[: tokens.index(stop)])


# Choices, log probabilities
# ----------------------------------------------------------------------------------


def test_choices_share_the_prompt_and_differ_by_their_random_numbers():
    executor = FakeExecutor()
    executor.keep_steps = True
    engine = make(executor)
    params = SamplingParams(n=3, temperature=2.0, seed=11, max_tokens=8, ignore_eos=True)
    engine.add_request(PROMPT, params, "r")
    outputs = finish(engine)
    answers = [tokens_of(outputs["r", index]) for index in range(3)]
    assert len({tuple(answer) for answer in answers}) == 3
    assert sum(len(step.token_ids) for step in executor.steps) == len(PROMPT) + 3 * 7
    again = make()
    again.add_request(PROMPT, params, "r")
    repeated = finish(again)
    assert [tokens_of(repeated["r", index]) for index in range(3)] == answers


def test_logprobs_are_those_of_the_model():
    engine = make()
    engine.add_request(PROMPT, SamplingParams(max_tokens=3, logprobs=2, ignore_eos=True), "r")
    context = list(PROMPT)
    for output in finish(engine)["r", 0]:
        logits = reference_logits(np.array(context), np.arange(len(context)), 97).astype(np.float64)
        expected = logits - np.log(np.exp(logits).sum())
        (found,) = output.logprobs
        assert found.token_id == output.token_ids[0] == int(np.argmax(logits))
        assert found.logprob == pytest.approx(expected.max(), abs=1e-5)
        assert [i for i, _ in found.top] == np.argsort(-logits, kind="stable")[:2].tolist()
        context += output.token_ids


# Cancelling and faults
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 3, 6])
def test_cancel_at_any_phase_frees_the_pages_and_leaves_the_others_alone(steps: int):
    engine = make(max_batch_tokens=8)
    engine.add_request(PROMPT, SamplingParams(max_tokens=20, ignore_eos=True), "stays")
    engine.add_request([7] * 30, SamplingParams(max_tokens=20, n=2, temperature=1.0), "goes")
    kept: list[int] = []
    for _ in range(steps):
        kept += [t for o in engine.step() if o.request_id == "stays" for t in o.token_ids]
    assert engine.cancel("goes")
    engine.check()
    held = {page for generation in engine.scheduler.running for page in generation.block_table}
    assert engine.stats.pages_used == len(held)
    assert not engine.cancel("goes")
    assert not engine.cancel("unknown")
    outputs = finish(engine)
    assert ("goes", 0) not in outputs
    assert kept + tokens_of(outputs["stays", 0]) == generate_alone(PROMPT, 20)


def test_broken_logits_end_their_request_and_no_other():
    executor = FakeExecutor()
    executor.nan_tokens = frozenset({66})
    engine = make(executor)
    engine.add_request([1, 66, 2], SamplingParams(max_tokens=5), "broken")
    good = SamplingParams(max_tokens=9, ignore_eos=True)
    engine.add_request(PROMPT, good, "good")
    outputs = finish(engine)
    (failed,) = outputs["broken", 0]
    assert failed.finish_reason == "error"
    assert failed.error is not None
    assert "no finite logit" in str(failed.error)
    expected = generate_alone(PROMPT, 9)
    assert 66 not in expected
    assert tokens_of(outputs["good", 0]) == expected


def test_an_executor_that_raises_leaves_a_clean_engine():
    executor = FakeExecutor()
    engine = make(executor)
    engine.add_request(PROMPT, SamplingParams(max_tokens=5), "a")
    engine.step()
    executor.fail_next = RuntimeError("kernel")
    with pytest.raises(RuntimeError, match="kernel"):
        engine.step()
    assert not engine.has_work
    engine.check()
    engine.add_request(PROMPT, SamplingParams(max_tokens=5, ignore_eos=True), "a")
    assert tokens_of(finish(engine)["a", 0]) == generate_alone(PROMPT, 5)


def test_a_fault_after_the_step_leaves_a_clean_engine(monkeypatch: pytest.MonkeyPatch):
    engine = make()
    engine.add_request(PROMPT, SamplingParams(max_tokens=5), "a")
    engine.add_request(PROMPT, SamplingParams(max_tokens=5), "b")
    with monkeypatch.context() as patch:
        patch.setattr("llmc.runtime.engine.sample", lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    assert not engine.has_work and not engine.request_ids()
    engine.check()
    engine.add_request(PROMPT, SamplingParams(max_tokens=5, ignore_eos=True), "a")
    assert tokens_of(finish(engine)["a", 0]) == generate_alone(PROMPT, 5)


# Scoring and statistics
# --------------------------------------------------------------------------------------


def test_scoring_gives_all_rows_whatever_the_chunk_and_makes_room_for_itself():
    text = list(range(40))
    expected = [reference_logits(np.array(text[: i + 1]), np.arange(i + 1), 97) for i in range(40)]
    engine = make(kv_tokens=64)
    engine.add_request(PROMPT, SamplingParams(max_tokens=30, ignore_eos=True), "r")
    before: list[int] = []
    for _ in range(10):
        before += [token for output in engine.step() for token in output.token_ids]
    for chunk in (None, 1, 7, 40):
        assert np.array_equal(np.concatenate(list(engine.score(text, chunk))), np.array(expected))
        engine.check()
    before += tokens_of(finish(engine)["r", 0])
    assert before == generate_alone(PROMPT, 30)
    with pytest.raises(ContextLengthError, match="65 tokens"):
        engine.score([1] * 65)


def test_waste_counts_slots_without_a_token():
    engine = make()
    engine.add_request([1] * 9, SamplingParams(max_tokens=3))
    engine.step()
    stats = engine.stats
    assert (stats.slots_allocated, stats.slots_filled) == (12, 9)
    assert stats.waste == pytest.approx(0.25)
    assert stats.pages_used + stats.pages_free + stats.pages_cached == stats.pages_total == 64
