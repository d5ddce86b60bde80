"""The language model in a model that takes more than text: what is left without pictures and sounds.

Most models for conversation are published with a tower for pictures. Their text model is a model by itself,
of a class that transformers has too; its tensors stand in the same files under one more name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..ir.weights import LazyTensor

_PART = re.compile(r"^(model\.)?(?:language_model|text_model)\.")
_HEAD = "lm_head."


def text_part(config: Any) -> Any | None:
    """The configuration of the text model of one that takes more than text; None where it takes nothing else,
    or where transformers has no causal language model of its text.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    named = list(getattr(config, "architectures", None) or [])
    text = config.get_text_config()
    if text is config or getattr(config, "is_encoder_decoder", False):
        return None
    if named and not any(name.endswith("ForConditionalGeneration") for name in named):
        return None
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    entry: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(text)]
    name = (entry[0] if isinstance(entry, tuple) else entry).__name__
    if name.endswith("ForConditionalGeneration"):
        return None
    text.architectures = [name]
    text.tie_word_embeddings = config.tie_word_embeddings  # the whole model ties by its own
    return text


def text_tensors(stored: Mapping[str, LazyTensor]) -> Mapping[str, LazyTensor]:
    """Tensors of the text model by the names that they have in it: `language_model.model.norm.weight` and
    `model.language_model.norm.weight` are `model.norm.weight`. All of them where none is named as a part's.
    """
    found = {_PART.sub(r"\1", name): tensor for name, tensor in stored.items() if _PART.match(name)}
    heads = {name: tensor for name, tensor in stored.items() if name.startswith(_HEAD)}
    return heads | found if found else stored


__all__ = ["text_part", "text_tensors"]
