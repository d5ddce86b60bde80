"""What a folder of sentence-transformers says of the use of its encoder, beside the encoder itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from ..ir.errors import InputError
from . import hf

_PARTS: Final = ("Transformer", "Pooling", "Normalize")
_MAX_PROMPT: Final = 4096


def sentence_facts(folder: Path) -> dict[str, Any]:
    """`max_seq_length` (tokens that texts are cut to) and `prompts` (name → what is written before a text),
    each only where the folder gives it (`sentence_bert_config.json`, `config_sentence_transformers.json`).

    Raises InputError for a folder whose vectors go through more than pooling (`modules.json`), and for a
    prompt that is none.
    """
    _check_parts(folder / "modules.json")
    facts: dict[str, Any] = {}
    length = _read(folder / "sentence_bert_config.json").get("max_seq_length")
    if isinstance(length, int) and not isinstance(length, bool) and length > 0:
        facts["max_seq_length"] = length
    path = folder / "config_sentence_transformers.json"
    prompts = _read(path).get("prompts") or {}
    if not isinstance(prompts, dict) or not all(_is_prompt(text) for text in prompts.values()):
        raise InputError(f"{path} has prompts that are no texts", remedy="correct the file")
    if any(prompts.values()):
        facts["prompts"] = {str(name): text for name, text in prompts.items() if text}
    return facts


def _read(path: Path) -> dict[str, Any]:
    return hf.read_json(path) if path.is_file() else {}


def _is_prompt(text: Any) -> bool:
    return text is None or (isinstance(text, str) and len(text) <= _MAX_PROMPT)


def _check_parts(path: Path) -> None:
    if not path.is_file():
        return
    kinds = [str(part.get("type", "")).rpartition(".")[2] for part in hf.read_json_list(path)]
    others = [kind for kind in kinds if kind not in _PARTS]
    if others:
        raise InputError(
            f"{path} puts {', '.join(others)} behind the pooling, which is not compiled",
            remedy="give an encoder whose vectors are its pooled hidden states",
        )
