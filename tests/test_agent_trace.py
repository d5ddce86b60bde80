"""Records of agent runs, their replay, and the command `llmc agent`."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from llmc.cli import agent as agent_command
from llmc.ir.errors import InputError, LlmcError
from llmc.runtime.tool_calls import Tool, ToolCall
from llmc.runtime.tools.agent import Agent, ChatAnswer, Limits
from llmc.runtime.tools.function import tool
from llmc.runtime.tools.registry import ToolBox
from llmc.runtime.tools.trace import TraceFile, read_trace, replay

from . import command_line
from .command_line import Capture
from .server_harness import fake_llm
from .test_agent import CALCULATE, QUESTION, Clock, Script, answer, builtin, call, counting

WRONG = "give a file that --trace wrote"


def record(path: Path, chat: Script, box: ToolBox | None = None, **options: Any) -> LlmcError | None:
    with TraceFile(path) as trace:
        try:
            Agent(chat, box or builtin(), trace=trace, about={"artifact": "x"}, **options).run(QUESTION)
        except LlmcError as error:
            return error
    return None


def events_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_everything_is_in_the_trace(tmp_path: Path) -> None:
    record(tmp_path / "t", Script(CALCULATE, answer("It is 110.")))
    events = events_of(tmp_path / "t")
    assert [event["event"] for event in events] == ["start", "answer", "call", "result", "answer", "end"]
    start, first, made, result, _, end = events
    assert start["schema"] == 1 and start["about"] == {"artifact": "x"}
    assert start["limits"] == {"steps": 8, "seconds": 300.0, "tokens": 8192}
    assert start["tools"][0]["function"]["name"] == "calculate" and start["time"].endswith("+00:00")
    assert (first["prompt_tokens"], first["generated_tokens"], first["finish_reason"]) == (
        20,
        5,
        "tool_calls",
    )
    assert first["message"]["tool_calls"][0]["function"]["arguments"] == made["arguments"]
    assert (made["name"], result["id"], result["kind"], result["text"]) == ("calculate", "c1", "ok", "110")
    assert (end["reason"], end["text"], end["steps"], end["calls"]) == ("stop", "It is 110.", 2, 1)
    assert all(isinstance(event["t"], float) for event in events)
    messages = [*start["messages"], *(event["message"] for event in events if "message" in event)]
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"]


def test_events_are_written_as_they_happen(tmp_path: Path) -> None:
    seen: list[int] = []

    def count() -> ChatAnswer:
        seen.append(len(events_of(tmp_path / "t")))
        return answer("x") if len(seen) > 1 else CALCULATE

    record(tmp_path / "t", Script(count))
    assert seen == [1, 4]


def test_a_replay_is_the_same(tmp_path: Path) -> None:
    record(tmp_path / "t", Script(CALCULATE, answer("It is 110.")))
    for box in (None, builtin()):
        found = replay(tmp_path / "t", toolbox=box)
        assert found.same and found.complete and found.differences == []
        assert (found.runs, found.steps, found.calls, found.texts) == (1, 2, 1, ["It is 110."])


def ends() -> list[Any]:
    """(model, options) of runs that end in each of the errors."""
    clock = Clock()
    counted = counting()

    def slow() -> ChatAnswer:
        clock.now += 20
        return counted()

    same = answer("", call("c", "calculate", expression="1"))
    return [
        pytest.param(Script(same), {}, id="repeated"),
        pytest.param(Script(counting()), {"limits": Limits(steps=3)}, id="steps"),
        pytest.param(Script(counting()), {"limits": Limits(tokens=250)}, id="tokens"),
        pytest.param(Script(slow), {"limits": Limits(seconds=50), "clock": clock}, id="time"),
    ]


@pytest.mark.parametrize(("chat", "options"), ends())
def test_a_run_that_ends_in_an_error_replays_to_the_same_error(
    chat: Script, options: dict[str, Any], tmp_path: Path
) -> None:
    error = record(tmp_path / "t", chat, **options)
    assert error is not None
    last = events_of(tmp_path / "t")[-2:]
    assert [event["event"] for event in last] == ["error", "end"]
    assert last[0]["type"] == last[1]["reason"] == type(error).__name__ and last[0]["message"] == str(error)
    found = replay(tmp_path / "t")
    assert found.complete and found.same, found.differences


def test_refusals_replay_without_a_question(tmp_path: Path) -> None:
    @tool(effects=True)
    def send() -> str:
        """Send."""
        return "sent"

    script = (answer("", call("1", "send")), answer("ok"))
    record(tmp_path / "t", Script(*script), ToolBox([send]), confirm=lambda *_: False)
    assert replay(tmp_path / "t").same
    live = replay(tmp_path / "t", toolbox=ToolBox([send]), confirm=lambda *_: True)
    assert live.differences == [
        'step 1, send({}): kind was "refused", is "ok"',
        'step 1, send({}): text was "the user did not allow this call", is "sent"',
    ]


def test_differences_are_named(tmp_path: Path) -> None:
    def now() -> int:
        """Tell the time."""
        return 1

    def other() -> int:
        """Tell the time, differently."""
        return 2

    record(tmp_path / "t", Script(answer("", call("1", "now")), answer("It is 1.")), ToolBox([now]))
    found = replay(tmp_path / "t", toolbox=ToolBox([tool(name="now")(other)]))
    assert not found.same and len(found.differences) == 2
    assert found.differences[0].startswith(
        'start: tools was [{"type": "function", "function": {"name": "now"'
    )
    assert found.differences[1] == 'step 1, now({}): text was "1", is "2"'
    gone = replay(tmp_path / "t", toolbox=builtin())
    assert 'step 1, now({}): kind was "ok", is "unknown_tool"' in gone.differences

    lines = (tmp_path / "t").read_text().splitlines()
    edited = [line.replace('"steps": 8', '"steps": 1') for line in lines]
    (tmp_path / "fewer").write_text("\n".join(edited) + "\n")
    assert replay(tmp_path / "fewer").differences == ["step 1: recorded was the event call, now it is error"]
    (tmp_path / "text").write_text("\n".join([*lines[:-1], lines[-1].replace("It is 1.", "It is 2.")]) + "\n")
    assert replay(tmp_path / "text").differences == ['end: text was "It is 2.", is "It is 1."']


def test_a_record_that_was_cut_off(tmp_path: Path) -> None:
    record(tmp_path / "t", Script(CALCULATE, answer("It is 110.")))
    whole = (tmp_path / "t").read_bytes()
    for size in range(whole.index(b"\n") + 1, len(whole) - 1, 37):
        (tmp_path / "cut").write_bytes(whole[:size])
        found = replay(tmp_path / "cut")
        assert found.same and not found.complete, found.differences
        (events,) = read_trace(tmp_path / "cut")
        assert found.steps == sum(event["event"] == "answer" for event in events)
        assert len(events) - whole[:size].count(b"\n") in (0, 1)


def test_a_model_that_fails_is_no_difference(tmp_path: Path) -> None:
    error = record(tmp_path / "t", Script(CALCULATE, InputError("the prompt is too long")))
    assert isinstance(error, InputError)
    assert events_of(tmp_path / "t")[-2]["message"] == "the prompt is too long"
    found = replay(tmp_path / "t")
    assert found.same and not found.complete


def test_any_text_survives(tmp_path: Path) -> None:
    odd = 'line\nfeed \u2028 "quoted" \\ é \U0001f600 \ud800 \x00'
    box = ToolBox([tool(name="f")(lambda: "x")])
    record(tmp_path / "t", Script(answer(odd, ToolCall("1", "f", odd)), answer(odd)), box)
    (events,) = read_trace(tmp_path / "t")
    assert events[-1]["text"] == odd and events[2]["arguments"] == odd
    assert replay(tmp_path / "t").same


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", f"holds no run; {WRONG}"),
        ("x\n", f"line 1: no JSON; {WRONG}"),
        ("[]\n", f"line 1: no event of a trace; {WRONG}"),
        (
            '{"event": "end", "t": 1, "reason": "", "text": "", "steps": 1}\n',
            "line 1: begins without a start",
        ),
        ('{"event": "start", "t": 0, "schema": 2}\n', "line 1: schema 2 is newer than 1; upgrade llmc"),
        (
            '{"event": "start", "t": 0, "schema": 1}\n',
            "line 1: limits of the event start is missing or wrong",
        ),
        (
            '{"event": "start", "t": 0, "schema": 1, "limits": {"steps": 0}, "tools": [], "messages": []}\n',
            "run 1: limit of steps is 0",
        ),
        (
            '{"event": "start", "t": 0, "schema": 1, "limits": {"x": 1}, "tools": [], "messages": []}\n',
            "run 1: .* unexpected keyword argument 'x'",
        ),
        (
            '{"event": "start", "t": 0, "schema": 1, "limits": {}, "tools": [1], "messages": []}\n',
            r"run 1: tools\[0\] is no object",
        ),
        ("[" * 100_000 + "\n", "line 1: no JSON"),
    ],
)
def test_what_is_no_trace_is_named(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "t").write_text(text)
    with pytest.raises(InputError, match=sentence):
        replay(tmp_path / "t")


# The command -----------------------------------------------------------------------------------------------


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Script]:
    """A function that puts a scripted model in the place of the artifact's."""

    def put(*answers: Any) -> Script:
        script = Script(*answers)
        monkeypatch.setattr(agent_command, "_chat", lambda *_: script)
        return script

    return put


def typed(monkeypatch: pytest.MonkeyPatch, text: str, *, terminal: bool = False) -> None:
    stream = io.StringIO(text)
    stream.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", stream)


def run(capsys: Capture, *words: str) -> tuple[int, str, str]:
    return command_line.run(capsys, "agent", *words)


def test_the_answer_on_stdout_and_the_calls_on_stderr(scripted: Any, capsys: Capture, tmp_path: Path) -> None:
    chat = scripted(CALCULATE, answer("It is 110."))
    words = ("x.llmc", "What is 25 * 4 + 10?", "--system", "Be brief.", "--trace", tmp_path / "t")
    code, out, err = run(capsys, *words)
    assert (code, out) == (0, "It is 110.\n")
    assert '→ calculate({"expression": "25 * 4 + 10"})\n← 110\n' in err
    assert "[2 steps, prompts 40 tokens, answers 10 tokens, " in err
    assert chat.seen[0] == [{"role": "system", "content": "Be brief."}, *QUESTION]
    assert run(capsys, "--replay", tmp_path / "t")[:2] == (0, "as recorded: 1 run(s), 2 step(s), 1 call(s)\n")
    assert run(capsys, "--replay", tmp_path / "t", "--live-tools", "--json")[0] == 0
    code, out, _ = run(capsys, "--replay", tmp_path / "t", "--live-tools", "--no-builtin")
    assert code == 1 and 'kind was "ok", is "unknown_tool"' in out


def test_json(scripted: Any, capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "t.py").write_text('def shout(text: str) -> str:\n  print("noise")\n  return text.upper()\n')
    scripted(answer("", call("1", "shout", text="hi")), answer("HI"))
    code, out, err = run(capsys, "x.llmc", "shout", "--tools", tmp_path / "t.py", "--no-builtin", "--json")
    result = json.loads(out)
    assert code == 0 and "noise" in err
    (made,) = result.pop("calls")
    assert made.pop("seconds") >= 0 and result.pop("seconds") >= 0
    assert made == {"step": 1, "name": "shout", "arguments": '{"text": "hi"}', "kind": "ok", "result": "HI"}
    assert result == {
        "text": "HI", "reason": "stop", "steps": 2, "prompt_tokens": 40, "generated_tokens": 10,
    }  # fmt: skip


def test_a_model_of_its_own(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_llm(context=1000) as llm:
        own = llm.generate([{"role": "user", "content": "Hello"}], max_tokens=8, temperature=0)
        monkeypatch.setattr("llmc.load", lambda *_, **__: contextlib.nullcontext(llm))
        words = ("x.llmc", "Hello", "--max-tokens", "8", "--temperature", "0")
        code, out, err = run(capsys, *words, "--no-builtin")
        assert (code, out) == (0, own.text + "\n") and "the answer was cut off; --max-tokens allows" in err
        code, out, _ = run(capsys, *words, "--json")
        assert code == 0 and 0 < json.loads(out)["generated_tokens"] <= 8
        llm.template = None
        code, _, err = run(capsys, *words)
        assert code == 2 and "x.llmc has no chat template; use llmc run" in err


def test_a_servers_tool_whose_schema_cannot_be_kept_to_is_left_out(capsys: Capture) -> None:
    pytest.importorskip("mcp")
    from llmc.runtime.tools.mcp import McpTool

    def check(schema: Any) -> None:
        if "bad" in schema["properties"]:
            raise InputError("no such keyword")

    schemas = {name: {"type": "object", "properties": {name: {}}} for name in ("good", "bad")}
    server: Any = None
    box = ToolBox(
        McpTool(Tool(name, "", schema), True, "mcp:x", server, name) for name, schema in schemas.items()
    )
    model: Any = SimpleNamespace(llm=SimpleNamespace(grammars=SimpleNamespace(json_schema=check)))
    agent_command._leave_out(box, model)
    assert [one.spec.name for one in box] == ["good"]
    assert capsys.readouterr().err == "left out: bad of mcp:x: no such keyword\n"


def test_errors_end_it_with_a_line(scripted: Any, capsys: Capture) -> None:
    scripted(counting())
    code, out, err = run(capsys, "x.llmc", "q", "--max-steps", "2", "--json")
    assert code == 1 and json.loads(out)["error"].startswith("no answer after 2 steps, the last of which")
    assert run(capsys, "x.llmc", "q", "--max-total-tokens", "50")[0] == 1
    assert run(capsys, "x.llmc", "q", "--max-steps", "0")[0] == 2
    code, _, err = run(capsys, "x.llmc", "q", "--tools", "nowhere.py")
    assert code == 2 and "nowhere.py: no such file" in err
    code, _, err = run(capsys)
    assert code == 2 and "no artifact was given" in err
    code, _, err = run(capsys, "x.llmc", "q", "--trace", "/nowhere/t")
    assert code == 2 and "no such file or directory" in err


EFFECTS = """
from llmc.runtime.tools.function import tool
@tool(effects=True)
def erase(what: str) -> str:
    return "erased"
"""


@pytest.mark.parametrize(
    ("reply", "terminal", "words", "kind"),
    [
        ("y\n", True, [], "ok"),
        ("YES\n", True, [], "ok"),
        ("\n", True, [], "refused"),
        ("", True, [], "refused"),
        ("y\n", False, [], "refused"),
        ("", False, ["--yes"], "ok"),
    ],
)
def test_effects_are_asked_about(
    reply: str, terminal: bool, words: list[str], kind: str, scripted: Any, capsys: Capture,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    (tmp_path / "t.py").write_text(EFFECTS)
    scripted(answer("", call("1", "erase", what="all\x1b[2K\u202e")), answer("done"))
    typed(monkeypatch, reply, terminal=terminal)
    code, out, err = run(capsys, "x.llmc", "go", "--tools", tmp_path / "t.py", "--json", *words)
    assert code == 0 and json.loads(out)["calls"][0]["kind"] == kind
    assert ("? erase (of " in err) == (terminal and not words)
    assert ("nobody can be asked; --yes allows it" in err) == (not terminal and not words)
    if terminal:
        assert r'Call it with {"what": "all\u001b[2K\u202e"}? [y/N] ' in err
    assert "\x1b" not in err and "\u202e" not in err, "what a stranger wrote does not move the cursor"


def test_a_conversation(
    scripted: Any, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    typed(monkeypatch, "hello\n/what\nfail\nagain\n/clear\nanew\n/exit\nunread\n")
    chat = scripted(answer("one"), InputError("too long"), answer("two"), answer("three"))
    code, out, err = run(capsys, "x.llmc", "--system", "S", "--trace", tmp_path / "t")
    assert (code, out) == (0, "one\ntwo\nthree\n")
    assert "error: too long" in err and "/clear begins anew" in err
    assert [[m["content"] for m in seen] for seen in chat.seen] == [
        ["S", "hello"],
        ["S", "hello", "one", "fail"],
        ["S", "hello", "one", "again"],
        ["S", "anew"],
    ]
    again = replay(tmp_path / "t")
    assert again.same and again.texts == ["one", "", "two", "three"] and not again.complete
    typed(monkeypatch, "hello\nfail\n")
    scripted(answer("one"), InputError("too long"))
    code, out, _ = run(capsys, "x.llmc", "--json")
    result = json.loads(out)
    assert [m["content"] for m in result["messages"]] == ["hello", "one"]
    assert result["answers"][0]["text"] == "one" and result["answers"][1] == {"error": "too long"}


def test_an_interrupted_answer_is_no_part_of_the_conversation(
    scripted: Any, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt() -> ChatAnswer:
        raise KeyboardInterrupt

    typed(monkeypatch, "hello\nagain\n")
    chat = scripted(interrupt, answer("two"))
    code, out, err = run(capsys, "x.llmc")
    assert (code, out) == (0, "two\n") and "interrupted" in err
    assert chat.seen[1] == [{"role": "user", "content": "again"}]
