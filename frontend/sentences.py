"""What a folder of sentence-transformers says of the use of its encoder, beside the encoder itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from ..ir.errors import InputError
from . import hf
from .text_part import first_class

_PARTS: Final = ("Transformer", "Pooling", "Dense", "Normalize")
_MAX_PROMPT: Final = 4096


def sentence_facts(folder: Path) -> dict[str, Any]:
    """`max_seq_length` (tokens that texts are cut to) and `prompts` (name → what is written before a text),
    each only where the folder gives it (`sentence_bert_config.json`, `config_sentence_transformers.json`).

    Raises InputError for a prompt that is none.
    """
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


def made_encoder(config: Any) -> None:
    """Change the configuration of a decoder that is used as an encoder, as files that say how its hidden
    states are pooled tell, to that of the model without its head.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    kind = type(config)
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING and kind in MODEL_MAPPING:
        config.architectures = [first_class(MODEL_MAPPING[kind]).__name__]


def dense_places(folder: Path) -> list[str]:
    """The subfolders of the layers that vectors go through behind the pooling (`modules.json`).

    Raises InputError where there is anything else behind it, or a layer elsewhere.
    """
    path = folder / "modules.json"
    if not path.is_file():
        return []
    parts = hf.read_json_list(path)
    kinds = [str(part.get("type", "")).rpartition(".")[2] for part in parts]
    others = [kind for kind in kinds if kind not in _PARTS]
    if others or [_PARTS.index(kind) for kind in kinds] != sorted(_PARTS.index(kind) for kind in kinds):
        raise InputError(
            f"{path} puts {', '.join(others or kinds)} one behind the other, which is not compiled",
            remedy="give an encoder whose vectors are pooled hidden states, or those through dense layers",
        )
    return [str(part.get("path", "")) for part, kind in zip(parts, kinds, strict=True) if kind == "Dense"]
