"""The web page of `llmc serve` in a real Chromium, beside a server that answers as each test says: what it
sends, what it shows of an answer, a tool call or an error, and what it keeps.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .chromium import Open, ask, chromium, expect, watched_pages, whole
from .fake_web_server import (
    MODEL,
    Cut,
    FakeServer,
    Gate,
    Raw,
    Refusal,
    Step,
    call,
    calls,
    delta,
    error,
    says,
    usage,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


@pytest.fixture
def open_page(browser: Any, server: FakeServer) -> Iterator[Open]:
    with watched_pages(browser, server.url) as open_page:
        yield open_page


# An answer as it comes ------------------------------------------------------------------------------------


def test_an_answer_shows_while_it_comes(open_page: Open, server: FakeServer) -> None:
    gate = Gate()
    server.answers = [says("Hello ", "**there**", gate, ", and the rest.", prompt=1234, cached=1024)]
    page = open_page()
    ask(page, "Hi")
    prose = page.locator(".prose")
    expect(prose).to_have_text("Hello there")
    expect(prose.locator("strong")).to_have_text("there")
    expect(page.locator(".status")).to_contain_text("answers")
    expect(page.locator("#stop")).to_be_visible()
    gate.opened.set()
    expect(prose).to_have_text("Hello there, and the rest.")
    whole(page)
    numbers = page.locator(".numbers").inner_text()
    assert re.search(r"to first token", numbers) and "3 tokens" in numbers
    assert "1,234 in the prompt, 1,024 of them cached" in numbers
    expect(page.locator("#context-words")).to_have_text("1,237 of 8,192 tokens")
    assert server.requests[0]["stream_options"] == {"include_usage": True}
    assert server.requests[0]["messages"] == [{"role": "user", "content": "Hi"}]


def test_rate_is_shown_where_there_is_enough_to_tell(open_page: Open, server: FakeServer) -> None:
    pieces: list[Step] = [step for _ in range(30) for step in ("word ", 0.004)]
    server.answers = [says(*pieces)]
    page = open_page()
    ask(page, "Count")
    whole(page)
    expect(page.locator(".numbers")).to_have_text(re.compile(r"^[\d.,]+ tokens/s"))
    expect(page.locator(".trace rect.some").first).to_be_attached()


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_a_stream_may_be_cut_anywhere(open_page: Open, server: FakeServer, size: int) -> None:
    text = ["Grüße, ", "世界 ", "👩‍🔬 and\n\n", "- one\n", "- two"]
    server.cut_every = size
    server.answers = [[Raw(b": keep-alive\r\n\r\n"), *says(*text)]]
    page = open_page()
    ask(page, "Greet")
    whole(page)
    expect(page.locator(".prose p")).to_have_text("Grüße, 世界 👩‍🔬 and")
    expect(page.locator(".prose li")).to_have_text(["one", "two"])


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_hangs_up_and_keeps_what_came(open_page: Open, server: FakeServer, how: str) -> None:
    server.answers = [says("The first half", Gate(), "never shown")]
    page = open_page()
    ask(page, "Go")
    expect(page.locator(".prose")).to_have_text("The first half")
    if how == "button":
        page.click("#stop")
    else:
        page.keyboard.press("Escape")
    assert server.hung_up.wait(10), "the server did not see the page hang up"
    expect(page.locator(".note")).to_have_text("You stopped this answer.")
    expect(page.locator(".prose")).to_have_text("The first half")
    expect(page.locator("#prompt")).to_be_focused()
    server.answers = [says("Fine.")]
    ask(page, "On")
    whole(page)
    assert [message["content"] for message in server.requests[1]["messages"]] == [
        "Go",
        "The first half",
        "On",
    ]


def test_stopped_before_the_first_token_is_no_history(open_page: Open, server: FakeServer) -> None:
    gate = Gate()
    server.answers = [[gate]]
    page = open_page()
    ask(page, "First")
    assert gate.reached.wait(10)
    page.keyboard.press("Escape")
    assert server.hung_up.wait(10)
    whole(page)
    server.answers = [says("Fine.")]
    ask(page, "Second")
    whole(page)
    assert server.requests[1]["messages"] == [{"role": "user", "content": "First\n\nSecond"}]


# Tools ----------------------------------------------------------------------------------------------------


def test_tool_calls_are_shown_and_their_results_sent(open_page: Open, server: FakeServer) -> None:
    gate = Gate()
    first = [
        call(0, "calculate", '{"expres'),
        gate,
        call(0, None, 'sion": "25 * 4 + 10", "n": 9007199254740993}'),
    ]
    server.answers = [calls(*first, call(1, "now", "{}")), says("It is 110.")]
    page = open_page()
    page.click("#tools-example")
    ask(page, "What is 25 * 4 + 10?")
    expect(page.locator(".call-args")).to_have_text('{"expres')
    expect(page.locator(".call-state")).to_have_text("arguments arrive")
    gate.opened.set()
    whole(page)
    laid = '{\n  "expression": "25 * 4 + 10",\n  "n": 9007199254740993\n}'  # as it was written: 2^53 + 1
    assert page.locator(".call-args").first.inner_text() == laid
    assert server.requests[0]["tools"][0]["function"]["name"] == "calculate"
    assert server.requests[0]["tool_choice"] == "auto"
    ask(page, "and now?")  # the model waits for the results first
    expect(page.locator("#refusal")).to_contain_text("waits for the result")
    expect(page.locator(".calls textarea").first).to_be_focused()
    assert len(server.requests) == 1 and page.input_value("#prompt") == "and now?"
    page.keyboard.type("110")
    page.locator(".calls textarea").nth(1).fill("noon")
    page.keyboard.press("Control+Enter")
    expect(page.locator(".prose").last).to_have_text("It is 110.")
    expect(page.locator("#prompt")).to_be_focused()
    asked, answer, *results = server.requests[1]["messages"]
    assert asked["content"] == "What is 25 * 4 + 10?"
    assert [one["function"]["name"] for one in answer["tool_calls"]] == ["calculate", "now"]
    assert json.loads(answer["tool_calls"][0]["function"]["arguments"])["n"] == 9007199254740993
    assert results == [
        {"role": "tool", "tool_call_id": "call_0", "content": "110"},
        {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
    ]


def test_a_call_that_was_cut_is_not_sent_back(open_page: Open, server: FakeServer) -> None:
    gate = Gate()
    server.answers = [[delta(content="Wait."), call(0, "f", '{"a": 1'), gate, Cut()], says("Fine.")]
    page = open_page()
    ask(page, "Go")
    expect(page.locator(".call-args")).to_have_text('{"a": 1')
    gate.opened.set()
    expect(page.locator(".call-state")).to_have_text("incomplete")
    expect(page.locator(".error")).to_contain_text("before the answer was complete")
    expect(page.locator(".calls textarea")).to_have_count(0)
    ask(page, "Again")
    whole(page)
    assert [message["content"] for message in server.requests[1]["messages"]] == ["Go", "Wait.", "Again"]


# Errors ---------------------------------------------------------------------------------------------------


def test_an_error_shows_the_servers_words_and_the_setting(open_page: Open, server: FakeServer) -> None:
    refusal = error("temperature: 1.9 is above 1.5", param="temperature", code="invalid_value")
    server.answers = [Refusal(400, refusal), says("Fine.")]
    page = open_page()
    page.fill("#temperature", "1.9")
    ask(page, "Go")
    card = page.locator(".error")
    expect(card.locator("[role=alert]")).to_contain_text("temperature: 1.9 is above 1.5")
    expect(card.locator(".details")).to_have_text("400, invalid_request_error, invalid_value, temperature")
    card.get_by_role("button", name="Show the setting").click()
    expect(page.locator("#temperature")).to_be_focused()
    expect(page.locator("#temperature-error")).to_have_text("temperature: 1.9 is above 1.5")
    page.fill("#temperature", "0.5")
    expect(page.locator("#temperature-error")).to_be_hidden()
    card.get_by_role("button", name="Try again").click()
    whole(page)
    expect(card).to_have_count(0)
    assert [body["temperature"] for body in server.requests] == [1.9, 0.5]


def test_a_busy_server_is_asked_again_after_its_time(open_page: Open, server: FakeServer) -> None:
    full = Refusal(429, error("64 requests wait already", type="rate_limit_error"), {"Retry-After": "2"})
    server.answers = [full, says("Now.")]
    page = open_page()
    ask(page, "Go")
    again = page.locator(".error button")
    expect(again).to_have_text(re.compile(r"Try again in [12] s"))
    expect(again).to_be_disabled()
    expect(again).to_be_enabled()
    again.click()
    expect(page.locator(".prose")).to_have_text("Now.")
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Refusal(500, "<html>Traceback</html>"), "status 500 and gave no reason"),
        (Refusal(404, {"error": None}), "status 404"),
        ([says("Half")[1], Raw(b'data: {"error": {"message": "the worker died"}}\n\n')], "the worker died"),
        ([Raw(b"data: nonsense\n\n")], "not a JSON object"),
        ([says("Half")[1], Cut()], "before the answer was complete"),
        ([says("Half")[1]], "before the answer was complete"),
    ],
)
def test_what_goes_wrong_is_said(open_page: Open, server: FakeServer, answer: Any, words: str) -> None:
    server.answers = [answer, says("Whole.")]
    page = open_page()
    ask(page, "Go")
    expect(page.locator(".error")).to_contain_text(words)
    whole(page)
    page.click(".error button")
    expect(page.locator(".prose")).to_have_text("Whole.")  # in place of the half
    assert server.requests[1]["messages"] == [{"role": "user", "content": "Go"}]


def test_a_server_that_is_gone_is_said(open_page: Open, server: FakeServer) -> None:
    page = open_page()
    page.route("**/v1/chat/completions", lambda route: route.abort())
    ask(page, "Go")
    expect(page.locator(".error")).to_contain_text("The server did not answer")


def test_a_key_is_asked_for_and_kept_only_when_told(open_page: Open, server: FakeServer) -> None:
    models = server.models
    server.models = Refusal(401, error("Incorrect API key", code="invalid_api_key"))
    page = open_page(ready=".error")
    expect(page.locator(".error")).to_contain_text("Incorrect API key")
    page.get_by_role("button", name="Enter a key").click()
    expect(page.locator("#key")).to_be_focused()
    server.models = models
    page.keyboard.type("sk-secret")
    page.keyboard.press("Tab")
    expect(page.locator("#empty h2")).to_have_text(MODEL["id"])
    server.answers = [says("In.")]
    ask(page, "Go")
    whole(page)
    assert server.keys[-2:] == ["Bearer sk-secret"] * 2
    stored = "JSON.stringify([localStorage, sessionStorage])"
    assert "sk-secret" not in page.evaluate(stored)
    page.check("#keep-key")
    page.check("#remember")
    assert "sk-secret" in page.evaluate("JSON.stringify(sessionStorage)")
    assert "sk-secret" not in page.evaluate("JSON.stringify(localStorage)")
    page.uncheck("#keep-key")
    assert "sk-secret" not in page.evaluate(stored)


# Settings and what is kept --------------------------------------------------------------------------------


def test_settings_are_what_is_sent(open_page: Open, server: FakeServer) -> None:
    server.answers = [says("Fine.")]
    page = open_page()
    expect(page.locator("#model option")).to_have_text([MODEL["id"], "smollm2-135m"])  # no encoders
    ask(page, "Plain")
    whole(page)
    page.select_option("#model", "smollm2-135m")
    page.fill("#system", "Be brief.")
    for name, value in {"temperature": "0", "top_p": "0.9", "max_tokens": "64", "seed": "7"}.items():
        page.fill(f"#{name}", value)
    ask(page, "Set")
    whole(page)
    plain, found = server.requests
    assert set(plain) == {"model", "messages", "stream", "stream_options"}  # empty: the server's defaults
    assert found["model"] == "smollm2-135m"
    assert found["messages"][0] == {"role": "system", "content": "Be brief."}
    values = {name: found[name] for name in ("temperature", "top_p", "max_tokens", "seed")}
    assert values == {"temperature": 0, "top_p": 0.9, "max_tokens": 64, "seed": 7}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", "0"),
        ("max_tokens", "1.5"),
        ("top_p", "2"),
        ("temperature", "-1"),
        ("tools", "{"),
        ("tools", "{}"),
    ],
)
def test_a_wrong_setting_is_not_sent(open_page: Open, server: FakeServer, name: str, value: str) -> None:
    page = open_page()
    page.fill(f"#{name}", value)
    ask(page, "Go")
    expect(page.locator(f"#{name}-error")).to_be_visible()
    expect(page.locator(f"#{name}")).to_be_focused()
    assert not server.requests and page.input_value("#prompt") == "Go"


def test_facts_of_the_artifact_are_shown(open_page: Open) -> None:
    page = open_page()
    shown = dict(zip(*(page.locator(f"#empty {tag}").all_inner_texts() for tag in ("dt", "dd")), strict=True))
    assert {name: value.replace("\xa0", " ") for name, value in shown.items()} == {
        "Quantization": "best-int4-g32",
        "Bits a weight": "4.625",
        "Weights": "312 MB",
        "Context": "8,192 tokens",
        "Compiled for": "tvm-cpu, avx512",
        "Perplexity": "+3.81 %",
        "KL to source": "0.0482",
        "Same top token": "91.2 %",
    }
    page.select_option("#model", "smollm2-135m")
    expect(page.locator("#empty dt")).to_have_count(0)
    expect(page.locator("#about")).to_have_text("The server says nothing about it.")


def test_edit_regenerate_and_new(open_page: Open, server: FakeServer) -> None:
    server.answers = [says("One."), says("Two."), says("Three."), says("Four.")]
    page = open_page()
    page.click(".example >> nth=0")
    whole(page)
    ask(page, "Second question")
    whole(page)
    expect(page.get_by_role("button", name="Edit")).to_have_count(1)  # the last message's alone
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".prose")).to_have_text(["One.", "Three."])
    page.get_by_role("button", name="Edit").click()
    page.keyboard.press("Escape")
    expect(page.locator(".said").last).to_have_text("Second question")
    page.get_by_role("button", name="Edit").click()
    page.fill(".edit", "Third question")
    page.get_by_role("button", name="Send again").click()
    expect(page.locator(".prose")).to_have_text(["One.", "Four."])
    assert [message["content"] for message in server.requests[3]["messages"]][1:] == [
        "One.",
        "Third question",
    ]
    page.click("#new")
    expect(page.locator(".message")).to_have_count(0)
    expect(page.locator("#empty h2")).to_be_visible()


def test_copy_and_export(open_page: Open, server: FakeServer) -> None:
    text = "Use **this**:\n\n```py\nprint('x')\n```"
    server.answers = [says(text)]
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    page.fill("#key", "sk-secret")
    ask(page, "How?")
    whole(page)
    page.locator(".foot").get_by_role("button", name="Copy").click()
    expect(page.locator(".foot .words").first).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == text  # as it was written
    page.locator(".code button").click()
    expect(page.locator(".code button")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "print('x')"
    with page.expect_download() as download:
        page.click("#export")
    written = Path(download.value.path()).read_text()
    assert download.value.suggested_filename.endswith(".json") and "sk-secret" not in written
    record = json.loads(written)
    assert record["request"]["messages"] == [
        {"role": "user", "content": "How?"},
        {"role": "assistant", "content": text},
    ]
    assert record["answers"][0]["usage"] == usage(12, 1)["usage"]


def test_it_remembers_only_when_told(open_page: Open, server: FakeServer) -> None:
    server.answers = [says("Kept *answer*.")]
    page = open_page()
    page.fill("#seed", "3")
    ask(page, "Kept question")
    whole(page)
    assert page.evaluate("localStorage.length") == 0
    page.check("#remember")
    again = open_page(context=page.context, ready=".prose em")
    expect(again.locator(".said")).to_have_text("Kept question")
    assert again.input_value("#seed") == "3" and again.is_checked("#remember")
    ask(again, "More")
    whole(again)
    assert [message["role"] for message in server.requests[1]["messages"]] == ["user", "assistant", "user"]
    again.uncheck("#remember")
    assert again.evaluate("localStorage.length") == 0


STRANGE = {
    "version": 1,
    "messages": [1, {"role": {}}, {"role": "assistant", "calls": [None, {"name": 3}], "content": {}}],
    "settings": {"seed": [], "tool_choice": "x"},
}


@pytest.mark.parametrize("kept", ["", "{", '{"version": 1}', json.dumps(STRANGE)])
def test_what_was_kept_may_be_anything(open_page: Open, server: FakeServer, kept: str) -> None:
    first = open_page()
    first.evaluate("(text) => localStorage.setItem('llmc.page', text)", kept)
    page = open_page(context=first.context, ready="#model:enabled")
    server.answers = [says("Fine.")]
    ask(page, "Go")
    expect(page.locator(".prose").last).to_have_text("Fine.")


def test_the_reader_may_scroll_away_from_the_end(open_page: Open, server: FakeServer) -> None:
    gate = Gate()
    lines = "".join(f"line {at}\n\n" for at in range(80))
    server.answers = [says(lines, gate, lines)]
    page = open_page()
    ask(page, "Go")
    expect(page.locator(".prose p")).to_have_count(80)
    expect(page.locator(".prose p").last).to_be_in_viewport()
    page.hover("#scroll")
    page.mouse.wheel(0, -2000)
    expect(page.locator("#latest")).to_be_visible()
    at = page.evaluate("document.querySelector('#scroll').scrollTop")
    gate.opened.set()
    whole(page)
    assert page.evaluate("document.querySelector('#scroll').scrollTop") == at
    page.click("#latest")
    expect(page.locator(".numbers")).to_be_in_viewport()
