"""Which format a chat template is found to write, and that this is recorded when a model is compiled.

The templates here are short ones in the styles of published families; those of real models are tested where
the models are at hand.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from llmc.runtime.chat_template import ChatTemplate, render_once
from llmc.runtime.tool_calls import FORMATS, Detected, Tool, ToolCall, collect, detect, detect_once

from .models import real_model, save_tiny

SPECIALS = {"bos_token": "<s>", "eos_token": "</s>"}

HERMES = """\
{%- if tools %}{{ '<|im_start|>system\\nTools:\\n' }}
  {%- for tool in tools %}{{ tool | tojson ~ '\\n' }}{% endfor %}{{ '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
  {{- '<|im_start|>' + message.role }}
  {%- if message.content %}{{ '\\n' + message.content }}{% endif %}
  {%- for call in message.tool_calls or [] %}
    {{- '\\n<tool_call>\\n' }}CALL{{ '\\n</tool_call>' }}
  {%- endfor %}
  {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}PROMPT{% endif %}"""
HERMES_CALL = "{{ '{\"name\": \"' ~ call.function.name ~ '\", \"arguments\": ' ~ ARGUMENTS ~ '}' }}"

LLAMA3 = """\
{{- bos_token }}
{%- if tools %}
  {{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
  {%- for tool in tools %}{{ tool | tojson(indent=4) ~ '\\n\\n' }}{% endfor %}{{ '<|eot_id|>' }}
{%- endif %}
{%- for message in messages %}
  {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
  {%- if 'tool_calls' in message %}
    {%- if message.tool_calls | length != 1 %}{{ raise_exception('one tool call at a time') }}{% endif %}
    {%- set call = message.tool_calls[0].function %}
    {{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}' }}
  {%- else %}{{ message.content | trim }}{% endif %}
  {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

MISTRAL = """\
{{- bos_token }}
{%- for message in messages %}
  {%- if message.role == 'user' %}
    {%- if tools and loop.first %}{{ '[AVAILABLE_TOOLS]' ~ tools | tojson ~ '[/AVAILABLE_TOOLS]' }}{% endif %}
    {{- '[INST]' + message.content + '[/INST]' }}
  {%- elif message.tool_calls %}CALLS{{ eos_token }}
  {%- else %}{{ message.content + eos_token }}{% endif %}
{%- endfor %}"""
MISTRAL_LIST = """
    {{- '[TOOL_CALLS][' }}
    {%- for call in message.tool_calls %}
      {%- if call.id | length != 9 %}{{ raise_exception('ids have 9 letters and digits') }}{% endif %}
      {{- (call.function | tojson)[:-1] ~ ', "id": "' ~ call.id ~ '"}' ~ (']' if loop.last else ', ') }}
    {%- endfor %}"""
MISTRAL_ARGS = """
    {%- for call in message.tool_calls %}
      {%- set given = call.function.arguments %}
      {{- '[TOOL_CALLS]' ~ call.function.name ~ '[ARGS]' ~ (given if given is string else given | tojson) }}
    {%- endfor %}"""

GEMMA = """\
{%- macro write(value) %}
  {%- if value is string %}{{ QUOTE ~ value ~ QUOTE }}
  {%- elif value is boolean %}{{ 'true' if value else 'false' }}
  {%- elif value is mapping %}{{ '{' }}
    {%- for key, inner in value | dictsort %}
      {{- key ~ ':' ~ write(inner) ~ ('' if loop.last else ',') }}
    {%- endfor %}{{ '}' }}
  {%- elif value is sequence %}{{ '[' }}
    {%- for inner in value %}{{ write(inner) ~ ('' if loop.last else ',') }}{% endfor %}{{ ']' }}
  {%- else %}{{ value }}{% endif %}
{%- endmacro %}
{{- bos_token }}
{%- for tool in tools or [] %}{{ tool.function.name ~ write(tool.function) }}{% endfor %}
{%- for message in messages %}
  {{- '<start_of_turn>' ~ ('model' if message.role == 'assistant' else 'user') ~ '\\n' ~ message.content }}
  {%- for call in message.tool_calls or [] %}
    {{- OPEN ~ 'call:' ~ call.function.name ~ write(call.function.arguments) ~ CLOSE }}
  {%- endfor %}
  {{- '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

PLAIN = """\
{%- for message in messages %}{{ message.role ~ ': ' ~ (message.content or '') ~ '\\n' }}{% endfor %}
{%- if add_generation_prompt %}assistant: {% endif %}"""
LIST = """\
{%- if tools %}{{ tools | tojson ~ '\\n' }}{% endif %}
{%- for message in messages %}{{ message.role ~ ': ' }}
  {%- if message.tool_calls %}{{ '[' }}
    {%- for call in message.tool_calls %}
      {{- call.function | tojson ~ (']' if loop.last else ', ') }}
    {%- endfor %}
  {%- else %}{{ message.content }}{% endif %}{{ '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"""


def hermes(arguments: str, prompt: str = "") -> str:
    return HERMES.replace("CALL", HERMES_CALL.replace("ARGUMENTS", arguments)).replace("PROMPT", prompt)


def gemma(opening: str, closing: str, quote: str) -> str:
    return GEMMA.replace("OPEN", repr(opening)).replace("CLOSE", repr(closing)).replace("QUOTE", repr(quote))


def mistral(calls: str) -> str:
    return MISTRAL.replace("CALLS{{", calls + "{{")


TOJSON = "call.function.arguments | tojson"
NONE = Detected("json", in_template=False)
STYLES = {
    "hermes": (hermes(TOJSON), Detected("hermes", True)),
    "hermes, arguments as text": (hermes("call.function.arguments"), Detected("hermes", True, "text")),
    "hermes, thinking": (hermes(TOJSON, "{{ '<think></think>' }}"), Detected("hermes", True)),
    "llama3": (LLAMA3, Detected("llama3", True, parallel=False)),
    "mistral, a list": (mistral(MISTRAL_LIST), Detected("mistral", True, short_ids=True)),
    "mistral, one by one": (mistral(MISTRAL_ARGS), Detected("mistral", True)),
    "gemma": (gemma("<start_function_call>", "<end_function_call>", "<escape>"), Detected("gemma", True)),
    "gemma 4": (gemma("<|tool_call>", "<tool_call|>", '<|"|>'), Detected("gemma", True)),
    "a list": (LIST, Detected("json", True)),
    "no tools": (PLAIN, NONE),
    "tools, but no calls": ("{{ tools | tojson }}" + PLAIN, NONE),
    "calls, but no tools": (hermes(TOJSON).replace("if tools", "if nothing"), NONE),
    "another style": (hermes(TOJSON).replace("tool_call>", "call>"), NONE),
    "a refusal": ("{{ raise_exception('no') }}", NONE),
    "a hog": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", NONE),
}


@pytest.mark.parametrize("style", STYLES)
def test_the_format_is_the_one_that_the_template_writes(style: str) -> None:
    source, expected = STYLES[style]
    assert detect(ChatTemplate(source, SPECIALS)) == expected


@pytest.mark.parametrize("style", ["a hog", "another style", "hermes"])
def test_nothing_is_rendered_twice(style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A template that is slow costs its limit each time."""
    template = ChatTemplate(STYLES[style][0], SPECIALS)
    asked: list[str] = []
    render = template.render

    def noted(messages: Any, **how: Any) -> str:
        asked.append(json.dumps([messages, how]))
        return render(messages, **how)

    monkeypatch.setattr(template, "render", noted)
    assert detect(template) == STYLES[style][1]
    assert len(asked) == len(set(asked)) == {"a hog": 1, "another style": 5, "hermes": 3}[style]


CALL = {"city": "Graz", "days": [1, 2], "exact": True}
WEATHER = Tool("weather", "Weather of a city", {"type": "object", "properties": {"city": {"type": "string"}}})


@pytest.mark.parametrize("style", [name for name, (_, detected) in STYLES.items() if detected.in_template])
def test_history_written_as_detected_is_read_back(style: str) -> None:
    """What the server does with a conversation in which there was a call."""
    source, detected = STYLES[style]
    given: Any = json.dumps(CALL) if detected.arguments == "text" else CALL
    call = {
        "id": detected.template_id("call_0123456789abcdef01234567"),
        "type": "function",
        "function": {"name": "weather", "arguments": given},
    }
    asked = {"role": "user", "content": "Weather?"}
    template = ChatTemplate(source, SPECIALS)
    tools = [WEATHER.as_openai()]
    prompt = template.render([asked], tools=tools)
    text = template.render(
        [asked, {"role": "assistant", "content": "", "tool_calls": [call]}],
        tools=tools,
        add_generation_prompt=False,
    )
    prompt = prompt.removesuffix("<think></think>")
    parser = FORMATS[detected.format].parser([WEATHER])
    _, (found,) = collect([*parser.push(text.removeprefix(prompt)), *parser.finish()])
    assert (found.name, json.loads(found.arguments)) == ("weather", CALL)
    # And what the format writes is what the template does.
    if style not in ("mistral, a list", "gemma 4", "a list"):
        assert FORMATS[detected.format].write([ToolCall("", "weather", json.dumps(CALL))]) in text


def test_short_ids() -> None:
    short = Detected("mistral", True, short_ids=True)
    ids = {short.template_id(f"call_{number}") for number in range(1000)}
    assert len(ids) == 1000
    assert all(len(one) == 9 and one.isalnum() and one.isascii() for one in ids)
    assert short.template_id("call_1") == short.template_id("call_1")
    assert Detected("hermes", True).template_id("call_1") == "call_1"


def test_the_manifest_says_what_was_detected() -> None:
    for source, detected in STYLES.values():
        if "99999" in source:
            continue  # tried once already, and slow
        entry = json.loads(json.dumps(detect_once(source, SPECIALS)))
        assert Detected.from_manifest(entry, FORMATS) == detected
    for entry in (None, {}, {"format": "of the future", "in_template": True}, [], "hermes"):
        assert Detected.from_manifest(entry, FORMATS) is None
    old = {"format": "hermes", "in_template": True, "arguments": "object"}
    assert Detected.from_manifest(old, FORMATS) == Detected("hermes", True)


def test_compiling_records_it(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from llmc.codegen.driver import compile_model

    folder = tmp_path / "model"
    folder.mkdir()
    save_tiny("llama", folder)
    (folder / "chat_template.jinja").write_text(STYLES["hermes"][0])
    made = compile_model(
        folder, tmp_path / "a.llmc", targets=["null"], render=render_once, detect=detect_once
    )
    tokenizer = made.artifact.manifest["tokenizer"]
    assert Detected.from_manifest(tokenizer["tool_calls"], FORMATS) == Detected("hermes", True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("qwen2.5-coder", Detected("hermes", True)),
        ("smollm2", Detected("json", False)),
        ("gemma3", None),  # the base model, published without a template
    ],
)
def test_published_models(model: str, expected: Detected | None, tmp_path: Path) -> None:
    from llmc.frontend.source import open_source
    from llmc.frontend.tokenizer import export_tokenizer

    facts = export_tokenizer(open_source(real_model(model)), tmp_path, render_once, detect_once)
    assert facts is not None
    assert Detected.from_manifest(facts.tool_calls, FORMATS) == expected
    assert (facts.chat_template is None) == (expected is None)
