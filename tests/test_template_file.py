"""What `llmc check` says of a chat template, from the published files alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from llmc.cli.main import main
from llmc.frontend.template_file import published_template

TEMPLATE = (
    "{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def folder_with(folder: Path, config: dict[str, Any], **files: str) -> Path:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_a_template_is_found_wherever_it_is_published(tmp_path: Path) -> None:
    assert published_template(tmp_path) is None and published_template(tmp_path / "absent") is None
    tokens = {"eos_token": {"content": "</s>"}, "bos_token": "<s>", "pad_token": None}
    found = published_template(folder_with(tmp_path, {**tokens, "chat_template": "one"}))
    assert found is not None and found.text == "one"
    assert found.special_tokens == {"eos_token": "</s>", "bos_token": "<s>"}
    several = [{"name": "rag", "template": "no"}, {"name": "default", "template": "two"}]
    found = published_template(folder_with(tmp_path, {"chat_template": several}))
    assert found is not None and found.text == "two"
    found = published_template(folder_with(tmp_path, {"chat_template": "one"}, chat_template__jinja="three"))
    assert found is not None and found.text == "three"
    older = tmp_path / "older"
    older.mkdir()
    found = published_template(folder_with(older, {}, chat_template__json='{"chat_template": "four"}'))
    assert found is not None and found.text == "four"
    found = published_template(folder_with(older, {"chat_template": "one"}))
    assert found is not None and found.text == "one", "as when it is compiled"


def test_check_says_how_tool_calls_are_written(
    tiny_folder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_bytes((tiny_folder("qwen2") / "config.json").read_bytes())
    folder_with(tmp_path, {"eos_token": "<|im_end|>", "chat_template": TEMPLATE})
    assert main(["check", str(tmp_path), "--target", "null", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tool_calls"]["format"] == "hermes"
    assert main(["check", str(tmp_path), "--target", "null"]) == 0
    assert "hermes, tools are shown by the template" in capsys.readouterr().out


def test_check_refuses_a_template_that_compile_would_refuse(
    tiny_folder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_bytes((tiny_folder("qwen2") / "config.json").read_bytes())
    folder_with(tmp_path, {"chat_template": "{{ messages.__class__ }}"})
    assert main(["check", str(tmp_path), "--target", "null"]) == 2
    assert "the chat template of" in capsys.readouterr().err
