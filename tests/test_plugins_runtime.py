"""Samplers and formats of tool calls that plugins bring, while models answer."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llmc.ir.errors import CompileError, InputError
from llmc.plugins.entries import Registered
from llmc.runtime.chat import ChatModel
from llmc.runtime.chat_template import ChatTemplate
from llmc.runtime.custom_sampler import Sampler, SamplerContext, make_sampler, sampler_of_request
from llmc.runtime.grammar import GrammarCompiler
from llmc.runtime.sampling_params import SamplingParams
from llmc.runtime.tool_calls import FORMATS, Detected, Tool, collect, detect, find_format, recorded
from llmc.runtime.tool_calls.plugin import plugin_formats

from .plugin_packages import install, installed
from .test_runtime_engine import PROMPT, finish, make, tokens_of
from .test_runtime_llm import fake_llm
from .test_runtime_speculation import Oracle

SAMPLERS = '''
from dataclasses import dataclass
import numpy as np
from llmc.plugins import InputError, Sampler

@dataclass(frozen=True)
class Only(Sampler):
    """Tokens that leave a remainder."""
    name = "only"
    of: int = 2
    rest: int = 0
    loud: bool = False
    by: float = 1.0
    kind: str = "plain"

    def __post_init__(self):
        if self.of < 1:
            raise InputError(f"sampler only: of={self.of}", remedy="give a number from 1")

    def adjust(self, logits, context):
        assert context.tokens.dtype == np.int32 and len(context.tokens) >= context.prompt_length
        assert list(context.generated) == list(context.tokens[context.prompt_length:])
        found = logits.copy()
        found[np.arange(len(logits)) % self.of != self.rest] = -np.inf
        return found

@dataclass(frozen=True)
class Bad(Sampler):
    name = "bad"
    what: str = "raise"
    after: int = 0

    def adjust(self, logits, context):
        if len(context.generated) < self.after:
            return logits
        if self.what == "raise":
            raise LookupError("no luck")
        if self.what == "write":
            logits[:] = np.nan
            raise LookupError("no luck")
        return {
            "none": None, "short": logits[:3], "wide": logits.astype(np.float64),
            "nan": np.full_like(logits, np.nan), "nothing": np.full_like(logits, -np.inf),
            "infinite": np.full_like(logits, np.inf),
        }[self.what]
'''


@pytest.fixture
def samplers(tmp_path: Path) -> Generator[Callable[[str], Sampler]]:
    entries = {"llmc.samplers": {"only": "some_samplers:Only", "bad": "some_samplers:Bad"}}
    site = install(tmp_path / "s", "some-samplers", {"some_samplers.py": SAMPLERS}, entries, api="1.0")
    with installed(site):

        def get(text: str) -> Sampler:
            found = make_sampler(text)
            assert found is not None
            return found

        yield get


# Samplers --------------------------------------------------------------------------------------------------


def test_a_sampler_is_chosen_by_each_request(samplers: Callable[[str], Sampler]) -> None:
    engine = make()
    plain = SamplingParams(max_tokens=8, ignore_eos=True)
    third = SamplingParams(max_tokens=8, ignore_eos=True, sampler=samplers("only{of=3,rest=1}"))
    for name, params in (("plain", plain), ("third", third), ("again", third)):
        engine.add_request(PROMPT, params, name)
    outputs = finish(engine)
    assert all(token % 3 == 1 for token in tokens_of(outputs["third", 0]))
    assert tokens_of(outputs["third", 0]) == tokens_of(outputs["again", 0])
    alone = make()
    alone.add_request(PROMPT, plain, "plain")
    assert tokens_of(finish(alone)["plain", 0]) == tokens_of(outputs["plain", 0])


def test_drawing_with_a_seed_is_the_same_alone_and_in_company(samplers: Callable[[str], Sampler]) -> None:
    drawn = SamplingParams(
        max_tokens=12, temperature=1.5, seed=7, n=3, ignore_eos=True, sampler=samplers("only{of=2}")
    )
    engine = make()
    engine.add_request(PROMPT, drawn, "a")
    together = make()
    together.add_request([9, 9, 9], SamplingParams(max_tokens=9, n=2, temperature=2.0), "b")
    together.add_request(PROMPT, drawn, "a")
    one, other = finish(engine), finish(together)
    for choice in range(3):
        tokens = tokens_of(one["a", choice])
        assert tokens == tokens_of(other["a", choice]) and all(token % 2 == 0 for token in tokens)
    assert tokens_of(one["a", 0]) != tokens_of(one["a", 1])


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("raise", "sampler bad of package some-samplers raised LookupError: no luck at some_samplers.py:"),
        ("write", "sampler bad of package some-samplers raised LookupError: no luck"),
        ("none", r"gave NoneType\[\], not float32\[97\]"),
        ("short", r"gave float32\[3\], not float32\[97\]"),
        ("wide", r"gave float64\[97\], not float32\[97\]"),
        ("nan", "gave NaN among its logits"),
        ("nothing", "left no token to choose from"),
        ("infinite", "gave an infinite logit"),
    ],
)
def test_a_sampler_that_fails_ends_its_own_request(
    samplers: Callable[[str], Sampler], what: str, said: str
) -> None:
    engine = make()
    good = SamplingParams(max_tokens=8, ignore_eos=True)
    bad = SamplingParams(max_tokens=8, ignore_eos=True, sampler=samplers(f"bad{{what={what},after=2}}"))
    engine.add_request(PROMPT, bad, "bad")
    engine.add_request(PROMPT, good, "good")
    outputs = finish(engine)
    last = outputs["bad", 0][-1]
    assert last.finish_reason == "error" and len(tokens_of(outputs["bad", 0])) == 2
    with pytest.raises(CompileError, match=said):
        raise last.error  # type: ignore[misc]
    assert len(tokens_of(outputs["good", 0])) == 8 and engine.blocks.num_used == 0


def test_a_grammar_holds_whatever_a_sampler_does(samplers: Callable[[str], Sampler]) -> None:
    llm = fake_llm()
    grammar = llm.grammars.regex("[ab]{6}")
    answer = llm.generate("x", grammar=grammar, sampler=samplers("only{of=2,rest=0}"), max_tokens=20)
    assert len(answer.text) == 6 and set(answer.text) <= {"a", "b"}
    assert isinstance(llm.grammars, GrammarCompiler)


def test_log_probabilities_are_the_models_own(samplers: Callable[[str], Sampler]) -> None:
    """What the sampler rules out is still the most likely token, at the model's own log probability."""
    found: dict[str, list[Any]] = {}
    for name, sampler in (("plain", None), ("fifth", samplers("only{of=5}"))):
        engine = make()
        params = SamplingParams(max_tokens=3, ignore_eos=True, logprobs=1, sampler=sampler)
        engine.add_request(PROMPT, params, name)
        found[name] = [one for output in finish(engine)[name, 0] for one in output.logprobs]
    assert found["plain"][0].top[0][0] % 5, "of the prompt's next token the sampler leaves nothing"
    assert found["fifth"][0].top == found["plain"][0].top
    assert len(found["fifth"]) == 3
    assert all(one.token_id % 5 == 0 and one.logprob <= one.top[0][1] < 0 for one in found["fifth"])


def test_guessing_ahead_gives_the_same(samplers: Callable[[str], Sampler]) -> None:
    """A sampler sees each token before the next one: nothing is guessed for its request, but beside it."""
    sampled = SamplingParams(max_tokens=20, ignore_eos=True, sampler=samplers("only{of=40}"))
    plain = SamplingParams(max_tokens=20, ignore_eos=True)
    found: list[list[list[int]]] = []
    guessed: list[int] = []
    for requests in ({"a": sampled}, {"a": sampled, "b": plain}):
        for guess in (0, 4):
            engine = make(speculate=guess)
            engine.speculator.drafter = Oracle(right=3)
            for name, params in requests.items():
                engine.add_request(PROMPT, params, name)
            outputs = finish(engine)
            found.append([tokens_of(outputs[name, 0]) for name in requests])
            guessed.append(engine.counters.guesses_accepted)
    assert guessed[:3] == [0, 0, 0] and guessed[3] > 0
    assert found[0] == found[1] == found[2][:1] and found[2] == found[3]
    assert [len(one) for one in found[3]] == [20, 20]


def test_a_request_does_not_read_the_packages_files_again(
    samplers: Callable[[str], Sampler], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = samplers("only{of=3}")
    monkeypatch.setattr(Registered, "check_api", lambda self: 1 // 0)
    assert sampler_of_request({"name": "only", "of": 3}) == first


def test_options_come_as_text_and_as_json(samplers: Callable[[str], Sampler]) -> None:
    made = samplers("only{of=3, loud=yes,by=0.5,kind=odd}")
    assert str(made) == "only{of=3,rest=0,loud=True,by=0.5,kind=odd}"
    assert samplers(str(made)) == made
    given = {"name": "only", "of": 3, "loud": True, "by": 0.5, "kind": "odd"}
    assert sampler_of_request(given) == made
    assert sampler_of_request({"name": "only", "by": 2}) == samplers("only{by=2.0}")
    assert sampler_of_request({"name": "none"}) is None and make_sampler("none") is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "llmc_sampler has no name"),
        ({"name": 3}, "llmc_sampler has no name"),
        ({"name": "best"}, "no sampler is named 'best'; known: bad, only"),
        ({"name": "only", "at": 1}, "sampler only has no option 'at'; options: of, rest, loud, by, kind"),
        ({"name": "only", "of": "3"}, "sampler only: of='3' is no int"),
        ({"name": "only", "of": 1.5}, "sampler only: of='1.5' is no int"),
        ({"name": "only", "of": True}, "sampler only: of='True' is no int"),
        ({"name": "only", "loud": 1}, "sampler only: loud='1' is no bool"),
        ({"name": "only", "by": float("inf")}, "sampler only: by='inf' is no float"),
        ({"name": "only", "x" * 999: 1}, f"sampler only has no option '{'x' * 80}'; options: "),
        ({"name": "only", "kind": None}, "sampler only: kind='None' is no str"),
        (
            {"name": "only", "of": 0},
            "sampler only of package some-samplers: sampler only: of=0; give a number from 1",
        ),
        ({"name": "none", "of": 0}, "no sampler is named 'none'"),
    ],
)
def test_what_is_wrong_with_a_request_is_named(
    samplers: Callable[[str], Sampler], given: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        sampler_of_request(given)
    assert str(caught.value).startswith(message)


def test_a_model_may_prefer_a_sampler(samplers: Callable[[str], Sampler]) -> None:
    """What `llmc serve --sampler` does: it holds for requests that name none."""
    llm = fake_llm()
    llm.prefer(sampler="only{of=2}")
    assert llm.sampling().sampler == samplers("only{of=2}")
    assert llm.sampling(sampler="only{of=3}").sampler == samplers("only{of=3}")
    assert llm.sampling(sampler=None).sampler is None
    with pytest.raises(InputError, match=r"no sampler is named 'best'"):
        llm.prefer(sampler="best")
    assert llm.sampling().sampler == samplers("only{of=2}")


def test_the_server_takes_a_sampler_by_name(samplers: Callable[[str], Sampler]) -> None:
    from llmc.runtime.server.schema import FIELDS, CompletionRequest
    from llmc.runtime.server.service import ServedModel

    assert "llmc_sampler" in FIELDS
    body = CompletionRequest(prompt="x", llmc_sampler={"name": "only", "of": 4})
    assert ServedModel("m", fake_llm()).sampling(body, 5).sampler == samplers("only{of=4}")
    with pytest.raises(InputError, match=r"no sampler is named 'x'"):
        ServedModel("m", fake_llm()).sampling(CompletionRequest(prompt="x", llmc_sampler={"name": "x"}), 5)


def test_a_context_is_what_it_says() -> None:
    context = SamplerContext(np.arange(5, dtype=np.int32), 3)
    assert context.generated.tolist() == [3, 4] and context.choice == 0 and context.tokenizer is None


# Formats of tool calls -------------------------------------------------------------------------------------

SPECIALS = {"bos_token": "<s>", "eos_token": "</s>"}
WRITES = (
    "{% if tools %}{% for t in tools %}{{ t.function.name }}: {{ t.function.description }}\n{% endfor %}"
    "{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for call in m.tool_calls or [] %}"
    "->call {{ call.function.name }} {{ call.function.arguments | tojson }}\n{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ENTRIES = {"llmc.tool_formats": {"arrow": "arrows:Arrow"}}


def arrows() -> str:
    """The format of docs/plugins.md."""
    from .test_plugins_docs import BLOCK, ROOT

    text = (ROOT / "docs/plugins.md").read_text()
    return next(body for _, name, body in BLOCK.findall(text) if name == "my_plugin/format.py")


@pytest.fixture
def arrow(tmp_path: Path) -> Generator[Callable[..., None]]:
    from contextlib import ExitStack

    with ExitStack() as stack:

        def add(change: Callable[[str], str] = lambda text: text, entries: Any = None) -> None:
            files = {"arrows.py": change(arrows())}
            stack.enter_context(
                installed(install(tmp_path / "a", "arrows", files, entries or ENTRIES, api="1.0"))
            )

        yield add


def test_a_format_is_found_after_ours(arrow: Callable[..., None]) -> None:
    template = ChatTemplate(WRITES, SPECIALS)
    assert not detect(template).in_template
    arrow()
    assert detect(template) == Detected("arrow", True)
    hermes = '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    written = WRITES.replace(
        "->call {{ call.function.name }} {{ call.function.arguments | tojson }}\n",
        f"<tool_call>{hermes}</tool_call>",
    )
    assert detect(ChatTemplate(written, SPECIALS)).format == "hermes", "ours are tried first"


def test_a_recorded_format_is_found_again(
    arrow: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    entry = Detected("arrow", True).as_manifest()
    with caplog.at_level(logging.WARNING, "llmc.plugins"):
        assert recorded(entry) is None
    assert (
        "no installed package has the tool format 'arrow'; install the package that brings it" in caplog.text
    )
    with pytest.raises(InputError, match=r"no installed package has the tool format 'arrow'"):
        find_format("arrow")
    arrow()
    assert recorded(entry) == Detected("arrow", True)
    format = find_format("arrow")
    assert format.name == "arrow" and format.markers == ("->call ",)
    parser = format.parser([Tool("now")])
    _, calls = collect([*parser.push('->call now {"a"'), *parser.push(": 1}\n"), *parser.finish()])
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [("now", {"a": 1})]


def test_a_conversation_uses_it(arrow: Callable[..., None]) -> None:
    arrow()
    llm = fake_llm()
    llm.template = ChatTemplate(WRITES, SPECIALS)
    chat = ChatModel(llm)
    turn = chat.prepare(
        [{"role": "user", "content": "hi"}], SamplingParams(), tools=[Tool("now", "The time.")]
    )
    assert chat.detected.format == "arrow" and turn.params.grammar is not None
    assert turn.reader().parser is not None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            ("self.held, self.calls = ", "raise ValueError('no') ; "),
            "tool format arrow of package arrows raised Val",
        ),
        (
            ('name = "arrow"', 'name = "bow"'),
            "entry point arrow of package arrows is a tool format that calls itse",
        ),
        (
            ("def write(", "def written("),
            "entry point arrow of package arrows is no ToolFormat: it has no write",
        ),
        (("import json", "import jason"), "tool format arrow of package arrows cannot be imported"),
    ],
)
def test_a_format_that_goes_wrong_is_left_out_of_detection(
    arrow: Callable[..., None], caplog: pytest.LogCaptureFixture, change: tuple[str, str], said: str
) -> None:
    arrow(lambda text: text.replace(*change))
    with caplog.at_level(logging.WARNING, "llmc.plugins"):
        assert not detect(ChatTemplate(WRITES, SPECIALS)).in_template
    assert said in caplog.text


def test_one_that_fails_in_the_middle_of_an_answer_names_its_package(arrow: Callable[..., None]) -> None:
    arrow(
        lambda text: text.replace(
            '*lines, self.held = (self.held + text).split("\\n")', "raise KeyError(text)"
        )
    )
    parser = find_format("arrow").parser([Tool("now")])
    with pytest.raises(
        CompileError, match=r"tool format arrow of package arrows raised KeyError: 'x' at arrows.py"
    ):
        parser.push("x")


def test_a_plugin_cannot_take_the_name_of_a_format_of_ours(arrow: Callable[..., None]) -> None:
    arrow(lambda text: text.replace('"arrow"', '"hermes"'), {"llmc.tool_formats": {"hermes": "arrows:Arrow"}})
    assert find_format("hermes") is FORMATS["hermes"]
    assert list(plugin_formats(FORMATS)) == [] and list(plugin_formats(())) == ["hermes"]
