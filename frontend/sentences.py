"""What a folder of sentence-transformers says of the use of its encoder or reranker."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any, Final

from ..ir.errors import InputError
from . import hf
from .text_part import first_class

_PARTS: Final = ("Transformer", "Pooling", "Dense", "Normalize")
_MAX_PROMPT: Final = 4096
_MAX_LENGTH: Final = 1 << 24
_ROUTED: Final = ("padding", "truncation", "max_length", "return_tensors", "restore_suffix")
"""Of what a chat template is told in sentence-transformers, what it does not see."""
_TAKEN: Final = ("self", "messages", "tools", "documents")


def sentence_facts(folder: Path) -> dict[str, Any]:
    """`max_seq_length` (tokens that texts are cut to) and `prompts` (name → what is written before a text),
    each only where the folder gives it (`sentence_bert_config.json`, `config_sentence_transformers.json`).

    Raises InputError for a prompt that is none.
    """
    facts, prompts = _length(folder), _prompts(folder)
    return {**facts, "prompts": prompts} if prompts else facts


def _length(folder: Path) -> dict[str, Any]:
    """The longest text: of sentence-transformers' own files, else (since 5.4) of the tokenizer's."""
    own = _read(folder / "sentence_bert_config.json").get("max_seq_length")
    parts = (folder / "modules.json").is_file()
    other = _read(folder / "tokenizer_config.json").get("model_max_length") if parts else None
    given = [n for n in (own, other) if type(n) is int and 1 < n <= _MAX_LENGTH]
    return {"max_seq_length": given[0]} if given else {}


def _prompts(folder: Path) -> dict[str, str]:
    path = folder / "config_sentence_transformers.json"
    prompts = _read(path).get("prompts") or {}
    if not isinstance(prompts, dict) or not all(_is_prompt(text) for text in prompts.values()):
        raise InputError(f"{path} has prompts that are no texts", remedy="correct the file")
    return {str(name): text for name, text in prompts.items() if text}


def reranker_facts(folder: Path) -> dict[str, Any]:
    """`max_seq_length` as of `sentence_facts`; and `pairs` where a question and a passage are messages of the
    roles "query" and "document" for the chat template: `system` is the text of a system message before them,
    or null, `variables` what the template is told besides. Without that, a text before the question is the
    prompt "query" of `prompts`.
    """
    facts, given = _length(folder), _read(folder / "sentence_bert_config.json")
    config = given.get("modality_config")
    named = _read(folder / "config_sentence_transformers.json").get("default_prompt_name")
    system = _prompts(folder).get(named) if isinstance(named, str) else None
    if not isinstance(config, dict) or "message" not in config:
        return facts if system is None else {**facts, "prompts": {"query": system}}
    message = config["message"]
    form = message.get("format") if isinstance(message, dict) else None
    if form not in (None, "flat", "structured"):
        raise InputError(
            f"{folder / 'sentence_bert_config.json'} has messages in the form {str(form)[:80]!r}",
            remedy="known: flat, structured",
        )
    kwargs = given.get("processing_kwargs")
    told = kwargs.get("chat_template") if isinstance(kwargs, dict) else None
    variables = {n: v for n, v in told.items() if n not in _ROUTED} if isinstance(told, dict) else {}
    odd = [n for n, v in variables.items() if not n.isidentifier() or n in _TAKEN or not _is_plain(v)]
    if odd:
        raise InputError(
            f"{folder / 'sentence_bert_config.json'} tells the chat template {odd[0][:80]!r}",
            remedy="known: names with a text, a number, or true or false",
        )
    return {**facts, "pairs": {"system": system, "parts": form == "structured", "variables": variables}}


def scored_tokens(folder: Path) -> tuple[int, ...]:
    """The tokens whose logits are a text's scores, the one that means no before the one that means yes, where
    there is one: of a language model that sentence-transformers uses as a reranker (`LogitScore` in
    modules.json). Empty for any other folder.

    Raises InputError where the files do not say which tokens.
    """
    path = folder / "modules.json"
    parts = [] if not path.is_file() or isinstance(hf.read_json_any(path), dict) else hf.read_json_list(path)
    kinds = [str(part.get("type", "")).rpartition(".")[2] for part in parts]
    if "LogitScore" not in kinds:
        return ()
    if kinds != ["Transformer", "LogitScore"]:
        raise InputError(f"{path} has {', '.join(kinds)}", remedy="known: Transformer, LogitScore")
    config = hf.read_json(subfolder(folder, str(parts[1].get("path", ""))) / "config.json")
    ids = [config.get(key) for key in ("false_token_id", "true_token_id")]
    if ids[1] is None or not all(i is None or (type(i) is int and i >= 0) for i in ids):
        raise InputError(f"{path} names a LogitScore without ids of tokens", remedy="download it again")
    return tuple(i for i in ids if i is not None)


def subfolder(folder: Path, place: str) -> Path:
    """A folder that modules.json names. Raises InputError where it is none directly in that folder."""
    if PurePosixPath(place).name != place or place in ("", ".", "..") or "\\" in place or "\0" in place:
        raise InputError(
            f"modules.json of {folder} names {place!r}, which is no folder in it",
            remedy="do not use this checkpoint: such a list reaches for other files",
        )
    return folder / place


def _read(path: Path) -> dict[str, Any]:
    return hf.read_json(path) if path.is_file() else {}


def _is_plain(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= _MAX_PROMPT and not any("\ud800" <= c <= "\udfff" for c in value)
    return value is None or (isinstance(value, int | float) and abs(value) < 1 << 62)


def _is_prompt(text: Any) -> bool:
    return text is None or (isinstance(text, str) and len(text) <= _MAX_PROMPT)


def made_encoder(config: Any) -> None:
    """Change the configuration of a decoder that is used as an encoder, as files that say how its hidden
    states are pooled tell, to that of the model without its head. One that classifies stays as it is.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as CLASSIFIERS,
    )

    kind, named = type(config), list(getattr(config, "architectures", None) or [])
    classifies = kind in CLASSIFIERS and first_class(CLASSIFIERS[kind]).__name__ in named
    generates = kind in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(config, "whole", None) is not None
    if kind in MODEL_MAPPING and generates and not classifies:
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
    if "Dense" in kinds and kinds.count("Pooling") != 1:
        others = kinds
    if others or [_PARTS.index(kind) for kind in kinds] != sorted(_PARTS.index(kind) for kind in kinds):
        raise InputError(
            f"{path} puts {', '.join(others or kinds)} one behind the other, which is not compiled",
            remedy="give an encoder whose vectors are pooled hidden states, or those through dense layers",
        )
    return [str(part.get("path", "")) for part, kind in zip(parts, kinds, strict=True) if kind == "Dense"]
