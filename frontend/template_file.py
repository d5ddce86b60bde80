"""The chat template as it is published, read without the tokenizer: for `llmc check`, which takes seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from .gguf_split import read_gguf_model
from .hf import downloaded, is_repo_id, read_json

_NAMES: Final = ("bos_token", "eos_token", "pad_token", "unk_token")
_MOST_BYTES: Final = 1 << 20


@dataclass(frozen=True)
class PublishedTemplate:
    """A template's source, and the special tokens that it may write, by name."""

    text: str
    special_tokens: Mapping[str, str]


def published_template(model: Path) -> PublishedTemplate | None:
    """The chat template of a GGUF file, a Hugging Face folder, or a hub id whose files were fetched; None
    where there is none.

    Raises InputError naming a file that is damaged.
    """
    if model.is_file():
        return _of_gguf(read_gguf_model(model).metadata)
    folder = model if model.is_dir() else downloaded(str(model)) if is_repo_id(str(model)) else None
    return None if folder is None else _of_folder(folder)


def _of_folder(folder: Path) -> PublishedTemplate | None:
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default") or next(iter(named.values()), None)
    # As transformers and `tokenizer.export_tokenizer` choose among several.
    jinja, older = (folder / name for name in ("chat_template.jinja", "chat_template.json"))
    if jinja.is_file() and jinja.stat().st_size <= _MOST_BYTES:
        template = jinja.read_text(encoding="utf-8", errors="replace")
    elif template is None and older.is_file() and older.stat().st_size <= _MOST_BYTES:
        template = read_json(older).get("chat_template")
    return _made(template, {name: _token_text(config.get(name)) for name in _NAMES})


def _of_gguf(metadata: Mapping[str, Any]) -> PublishedTemplate | None:
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    keys = {"pad_token": "padding_token_id", "unk_token": "unknown_token_id"}
    found: dict[str, Any] = {}
    for name in _NAMES:
        number = metadata.get(f"tokenizer.ggml.{keys.get(name, name + '_id')}")
        found[name] = tokens[number] if isinstance(number, int) and 0 <= number < len(tokens) else None
    return _made(metadata.get("tokenizer.chat_template"), found)


def _made(template: Any, tokens: Mapping[str, Any]) -> PublishedTemplate | None:
    if not isinstance(template, str) or not template.strip():
        return None
    return PublishedTemplate(template, {k: v for k, v in tokens.items() if isinstance(v, str)})


def _token_text(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token
