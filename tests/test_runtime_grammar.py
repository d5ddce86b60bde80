"""Grammars in the engine: answers that match, forced tokens, choices, preemption, faults that stay with their
request.
"""

from __future__ import annotations

import json
import re
import threading
from array import array
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llmc.ir.errors import InputError
from llmc.runtime.engine import Engine, EngineOptions, ModelFacts
from llmc.runtime.executor import StepInputs
from llmc.runtime.generation import StepOutput
from llmc.runtime.grammar import Grammar, GrammarCompiler, GrammarError, MaskWorker, Matcher
from llmc.runtime.sampler import SamplerRow, sample
from llmc.runtime.sampling_params import SamplingParams
from llmc.runtime.tokenizer import Tokenizer

from .fake_executor import FakeExecutor
from .models import EOS, TURN, tiny_tokenizer

VOCAB = 400  # more than the tokenizer's 384 ids, as models pad
FACTS = ModelFacts(vocab_size=VOCAB, context_length=256, eos_token_ids=(2,))
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "location": {"type": "string", "maxLength": 8},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "days": {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 31}, "maxItems": 3},
    },
    "required": ["location", "unit"],
    "additionalProperties": False,
}
FORCED = r"(yes|no), said the captain of the boat on the wide and slow river\."


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer(tiny_tokenizer())


@cache
def compiler() -> GrammarCompiler:
    return GrammarCompiler(tokenizer(), VOCAB, FACTS.eos_token_ids)


def make(executor: FakeExecutor | None = None, **options: object) -> Engine:
    sizes = {"kv_tokens": 1024, "max_sequences": 8, "max_batch_tokens": 32, **options}
    return Engine(executor or FakeExecutor(vocab_size=VOCAB), tokenizer(), FACTS, EngineOptions(**sizes))


def finish(engine: Engine) -> dict[tuple[str, int], list[StepOutput]]:
    outputs: dict[tuple[str, int], list[StepOutput]] = {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault((output.request_id, output.index), []).append(output)
        engine.check()
    assert engine.blocks.num_used == 0
    return outputs


def alone(prompt: str, params: SamplingParams, **options: object) -> list[StepOutput]:
    engine = make(**options)
    engine.add_request(prompt, params, "a")
    return finish(engine)["a", 0]


def text_of(outputs: list[StepOutput]) -> str:
    return "".join(output.text for output in outputs)


def tokens_of(outputs: list[StepOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def is_valid(text: str, schema: dict[str, Any] = SCHEMA) -> bool:
    import jsonschema

    return bool(jsonschema.Draft202012Validator(schema).is_valid(json.loads(text)))


# What comes out
# ----------------------------------------------------------------------------------------------------------


def test_an_answer_matches_its_schema_and_ends_by_itself():
    outputs = alone("weather", SamplingParams(grammar=compiler().json_schema(SCHEMA), max_tokens=200))
    assert outputs[-1].finish_reason == "stop"
    assert outputs[-1].stop_reason is None
    assert is_valid(text_of(outputs))
    assert outputs[-1].generated_tokens == len(tokens_of(outputs))
    assert tokens_of(outputs)[-1] not in FACTS.eos_token_ids, "no step is spent on an end that is certain"


@given(st.integers(0, 2**32), st.floats(0.3, 3))
@settings(max_examples=40, deadline=None)
def test_whatever_the_logits_an_answer_is_valid_or_cut_off(seed: int, temperature: float):
    params = SamplingParams(
        grammar=compiler().json_schema(SCHEMA), max_tokens=150, temperature=temperature, seed=seed
    )
    outputs = alone("weather", params)
    if outputs[-1].finish_reason == "stop":
        assert is_valid(text_of(outputs))
    else:
        assert outputs[-1].finish_reason == "length"


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (lambda: compiler().regex(r"[a-c]{3}-\d{2}"), r"[a-c]{3}-[0-9]{2}"),
        (lambda: compiler().regex("^(left|right)$"), "left|right"),
        (lambda: compiler().lark('start: "<<" %json {"type": "integer", "maximum": 9} ">>"'), r"<<-?\d+>>"),
        (lambda: compiler().lark(f"start: {TURN} /[ab]+/ {TURN}"), "[ab]+"),
    ],
)
def test_regular_expressions_and_lark(grammar: Any, pattern: str):
    params = SamplingParams(grammar=grammar(), max_tokens=60, temperature=1.0, seed=5)
    outputs = alone("go", params)
    assert outputs[-1].finish_reason == "stop"
    assert re.fullmatch(pattern, text_of(outputs))


def test_special_tokens_are_shown_where_asked_for():
    grammar = compiler().lark(f'start: {TURN} "boat"')
    assert text_of(alone("go", SamplingParams(grammar=grammar))) == "boat"
    shown = alone("go", SamplingParams(grammar=grammar, skip_special_tokens=False))
    assert text_of(shown) == f"{TURN}boat"
    assert EOS not in text_of(shown)


def test_json_objects():
    grammar = compiler().json_object()
    params = SamplingParams(grammar=grammar, max_tokens=250, temperature=1.0, seed=2)
    outputs = alone("go", params)
    assert text_of(outputs).startswith("{")
    assert outputs[-1].finish_reason == "length" or isinstance(json.loads(text_of(outputs)), dict)


# Forced tokens
# ----------------------------------------------------------------------------------------------------------


def test_forced_tokens_take_no_step_and_the_next_step_computes_them_together():
    executor = FakeExecutor(vocab_size=VOCAB)
    executor.keep_steps = True
    engine = make(executor)
    engine.add_request("go", SamplingParams(grammar=compiler().regex(FORCED)), "a")
    outputs = finish(engine)["a", 0]
    assert text_of(outputs) in {f"{word}{FORCED[8:-2]}." for word in ("yes", "no")}
    assert max(len(output.token_ids) for output in outputs) > 8
    assert len(outputs) < len(tokens_of(outputs)) / 2
    computed = sum(len(step.token_ids) for step in executor.steps)
    assert computed <= len(tokenizer().encode("go")) + len(tokens_of(outputs))
    assert engine.stats.tokens_generated == len(tokens_of(outputs))


def test_log_probabilities_are_the_models_own_and_change_no_token():
    grammar = compiler().json_schema(SCHEMA)
    plain = alone("weather", SamplingParams(grammar=grammar, max_tokens=200))
    scored = alone("weather", SamplingParams(grammar=grammar, max_tokens=200, logprobs=2))
    assert tokens_of(scored) == tokens_of(plain)
    assert all(len(output.token_ids) == len(output.logprobs) == 1 for output in scored)
    ids = [*tokenizer().encode("weather"), *tokens_of(scored)]
    rows = np.concatenate([part.copy() for part in make().score(ids)])[-len(scored) - 1 : -1]
    for output, row in zip(scored, rows, strict=True):
        expected = row[output.token_ids[0]] - np.log(np.sum(np.exp(row.astype(np.float64))))
        assert output.logprobs[0].logprob == pytest.approx(float(expected), abs=1e-5)
        assert output.logprobs[0].top[0][0] == int(np.argmax(row)), "the grammar must not show in them"


@pytest.mark.parametrize("most", [1, 2, 3, 5, 9])
def test_max_tokens_cuts_forced_tokens(most: int):
    grammar = compiler().regex(FORCED)
    whole = alone("go", SamplingParams(grammar=grammar))
    cut = alone("go", SamplingParams(grammar=grammar, max_tokens=most))
    assert tokens_of(cut) == tokens_of(whole)[:most]
    assert cut[-1].finish_reason == "length"
    assert cut[-1].generated_tokens == most
    assert text_of(whole).startswith(text_of(cut))


def test_stop_strings_and_stop_tokens_end_forced_tokens():
    grammar = compiler().regex(FORCED)
    whole = alone("go", SamplingParams(grammar=grammar))
    outputs = alone("go", SamplingParams(grammar=grammar, stop=("captain",)))
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", "captain")
    assert text_of(outputs) == text_of(whole).partition("captain")[0]
    stop = tokens_of(whole)[6]
    outputs = alone("go", SamplingParams(grammar=grammar, stop_token_ids=(stop,)))
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", stop)
    assert tokens_of(outputs) == tokens_of(whole)[: tokens_of(whole).index(stop) + 1]


def test_a_grammar_decides_where_the_answer_ends():
    grammar = compiler().regex("boat")
    for params in (
        SamplingParams(grammar=grammar, min_tokens=50),
        SamplingParams(grammar=grammar, ignore_eos=True),
    ):
        outputs = alone("go", params)
        assert (text_of(outputs), outputs[-1].finish_reason) == ("boat", "stop")
    longer = compiler().regex("[a-z]*")
    outputs = alone("go", SamplingParams(grammar=longer, min_tokens=12, max_tokens=40))
    assert len(tokens_of(outputs)) >= 12, "min_tokens counts where the grammar leaves a choice"


def test_a_bias_moves_tokens_only_within_the_grammar():
    inside, outside = tokenizer().encode("b", add_special_tokens=False), tokenizer().encode("z")
    bias = {inside[0]: 100.0, outside[-1]: 100.0}
    outputs = alone("go", SamplingParams(grammar=compiler().regex("[abc]{4}"), logit_bias=bias))
    assert text_of(outputs) == "bbbb"


# The request alone decides
# ----------------------------------------------------------------------------------------------------------


@st.composite
def requests(draw: st.DrawFn) -> list[tuple[str, SamplingParams]]:
    found: list[tuple[str, SamplingParams]] = []
    for index in range(draw(st.integers(1, 6))):
        grammar: Grammar | None = draw(
            st.sampled_from(
                [None, compiler().json_schema(SCHEMA), compiler().regex(FORCED), compiler().regex("[a-z ]+")]
            )
        )
        temperature, many = draw(st.sampled_from([0.0, 1.0])), draw(st.integers(1, 3))
        params = SamplingParams(
            grammar=grammar, temperature=temperature, seed=index, n=many, max_tokens=draw(st.integers(1, 60))
        )
        found.append((draw(st.sampled_from(["go", "The river was wide", "go " * 30])), params))
    return found


@given(requests(), st.integers(0, 3), st.sampled_from([160, 1024]))
@settings(max_examples=40, deadline=None)
def test_tokens_are_the_same_alone_and_beside_others_and_after_preemption(
    wanted: list[tuple[str, SamplingParams]], cancelled: int, kv_tokens: int
):
    engine = make(kv_tokens=kv_tokens, max_batch_tokens=9)
    for index, (prompt, params) in enumerate(wanted):
        engine.add_request(prompt, params, str(index))
    outputs: dict[tuple[str, int], list[StepOutput]] = {}
    steps = 0
    while engine.has_work:
        if steps == 12 and cancelled < len(wanted):
            engine.cancel(str(cancelled))
        for output in engine.step():
            outputs.setdefault((output.request_id, output.index), []).append(output)
        engine.check()
        steps += 1
    for index, (prompt, params) in enumerate(wanted):
        single = make()
        single.add_request(prompt, params, str(index))
        for place, expected in finish(single).items():
            got = tokens_of(outputs.get(place, []))
            if index == cancelled:
                assert tokens_of(expected)[: len(got)] == got
            else:
                assert got == tokens_of(expected)


def test_choices_part_from_the_same_state():
    engine = make()
    params = SamplingParams(grammar=compiler().json_schema(SCHEMA), n=4, temperature=1.5, seed=3)
    engine.add_request("weather", params, "a")
    found = finish(engine)
    texts = [text_of(found["a", index]) for index in range(4)]
    assert len(set(texts)) > 1
    for index, text in enumerate(texts):
        assert found["a", index][-1].finish_reason == "length" or is_valid(text)


def test_prompts_advance_beside_answers_that_jump():
    engine = make(max_batch_tokens=8, max_sequences=4)
    for index in range(3):
        engine.add_request("go", SamplingParams(grammar=compiler().regex(FORCED)), f"jump{index}")
    engine.add_request("go " * 40, SamplingParams(max_tokens=2), "long")
    outputs = finish(engine)
    assert len(tokens_of(outputs["long", 0])) == 2
    assert all(outputs[f"jump{index}", 0][-1].finish_reason == "stop" for index in range(3))


# Faults
# ----------------------------------------------------------------------------------------------------------


def test_a_grammar_that_fails_ends_its_own_request_only():
    grammar = compiler().regex("(a?){1000}a{1000}")  # its states become too many when it is followed
    engine = make()
    engine.add_request("go", SamplingParams(grammar=grammar, max_tokens=50), "bad")
    engine.add_request("go", SamplingParams(grammar=compiler().regex(FORCED)), "good")
    outputs = finish(engine)
    assert outputs["bad", 0][-1].finish_reason == "error"
    assert "the grammar failed" in str(outputs["bad", 0][-1].error)
    assert tokens_of(outputs["good", 0]) == tokens_of(
        alone("go", SamplingParams(grammar=compiler().regex(FORCED)))
    )


def test_broken_logits_are_found_under_a_mask():
    executor = FakeExecutor(vocab_size=VOCAB)
    executor.nan_tokens = frozenset(tokenizer().encode("go"))
    engine = make(executor)
    engine.add_request("go", SamplingParams(grammar=compiler().regex("[ab]+")), "a")
    outputs = finish(engine)["a", 0]
    assert outputs[-1].finish_reason == "error"
    assert "no finite logit" in str(outputs[-1].error)


def test_a_step_that_fails_leaves_no_mask_behind():
    executor = FakeExecutor(vocab_size=VOCAB)
    engine = make(executor)
    grammar = compiler().json_schema(SCHEMA)
    engine.add_request("go", SamplingParams(grammar=grammar), "a")
    executor.fail_next = RuntimeError("no memory")
    with pytest.raises(RuntimeError, match="no memory"):
        engine.step()
    assert not engine.has_work
    engine.add_request("go", SamplingParams(grammar=grammar, max_tokens=200), "a")
    assert is_valid(text_of(finish(engine)["a", 0]))


def test_a_grammar_of_another_model_is_refused():
    other = GrammarCompiler(tokenizer(), 384, (2,)).regex("a")
    with pytest.raises(InputError, match="grammar is made for 384 ids"):
        make().add_request("go", SamplingParams(grammar=other))


def test_masks_are_made_while_the_model_computes():
    began = threading.Event()

    class Waiting(FakeExecutor):
        def step(self, inputs: StepInputs) -> np.ndarray:
            assert began.wait(60), "the mask waits for the step"
            return super().step(inputs)

    class Telling(MaskWorker):
        def _fill(self, matchers: Sequence[Matcher]) -> np.ndarray:
            began.set()
            return super()._fill(matchers)

    engine = make(Waiting(vocab_size=VOCAB))
    engine._masks = Telling(VOCAB)
    engine.add_request("go", SamplingParams(grammar=compiler().regex("[ab]{2}")), "a")
    assert finish(engine)["a", 0][-1].finish_reason == "stop"


# Parts
# ----------------------------------------------------------------------------------------------------------


def test_masks_are_bits_of_tokens():
    grammar = compiler().regex("b")
    matcher = grammar.start()
    worker = MaskWorker(VOCAB)
    masks = worker.begin([matcher, grammar.start()]).result()
    assert masks.shape == (2, 13)
    allowed = np.flatnonzero(np.unpackbits(masks.view(np.uint8)[0], bitorder="little"))
    assert allowed.tolist() == tokenizer().encode("b", add_special_tokens=False)
    matcher.accept(int(allowed[0]))
    assert matcher.is_finished
    assert not grammar.start().is_finished


@given(st.lists(st.integers(0, 99), max_size=99, unique=True), st.integers(0, 2**32))
@settings(deadline=None)
def test_a_mask_leaves_the_best_of_what_it_allows(allowed: list[int], seed: int):
    logits = np.random.default_rng(seed).normal(size=(2, 100)).astype(np.float32)
    bits = np.zeros(128, np.uint8)
    bits[allowed] = 1
    mask = np.packbits(bits, bitorder="little").view(np.int32)
    row = SamplerRow(SamplingParams(), array("i"), seed=0, choice=0, stops=[])
    tokens, _ = sample(logits.copy(), [row, row], [0, 0], [mask, None])
    assert tokens[0] == (max(allowed, key=lambda token: logits[0, token]) if allowed else -1)
    assert tokens[1] == int(np.argmax(logits[1]))


def test_the_same_source_is_compiled_once_and_old_ones_are_forgotten():
    own = GrammarCompiler(tokenizer(), VOCAB, (2,))
    first = own.json_schema(SCHEMA)
    assert own.json_schema(json.loads(json.dumps(SCHEMA))) is first
    for index in range(64):
        own.regex(f"a{index}")
    assert own.json_schema(SCHEMA) is not first


def test_compiling_from_several_threads_gives_the_same_grammars():
    own = GrammarCompiler(tokenizer(), VOCAB, (2,))
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for index in range(10):
                own.regex(f"x{index % 3}").start().forced()
                own.json_schema(SCHEMA).start()
        except BaseException as error:  # noqa: BLE001  (reported below)
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ('start: "a', "the grammar cannot be used"),
        ("start: %json 5 6", "the schema is no JSON object"),
        ("start: %json oops", "%json in line 1 of the grammar is not followed by JSON"),
        ('start: %json {"not": {}}', "'not' of the schema at / is not supported"),
        ("start: x\nx: x", "the grammar cannot be used"),
        ('start: <|nobody|> "a"', "unknown special token"),
        ("\ud800", "not valid Unicode"),
        ("x" * 300_000, "has 300000 bytes"),
        ("start: /(a{1000}){1000}/", "too much memory or time"),
    ],
)
def test_wrong_grammars_are_refused(source: str, message: str):
    with pytest.raises(GrammarError, match=re.escape(message)):
        compiler().lark(source)


def test_json_is_only_looked_for_where_it_is_meant():
    source = '# %json here\nstart: "%json {" NAME // %json there\nNAME: /%json|a/\n'
    grammar = compiler().lark(source)
    outputs = alone("go", SamplingParams(grammar=grammar))
    assert text_of(outputs) in {"%json {%json", "%json {a"}
