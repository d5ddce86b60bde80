"""The language model in a model that takes more than text: what is left without pictures and sounds.

Most models for conversation are published with a tower for pictures. Their text model is a model by itself,
of a class that transformers has too; its tensors stand in the same files under one more name.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

from ..ir.errors import UnsupportedError
from ..ir.weights import LazyTensor

_PART = re.compile(r"^(model\.)?(?:language_model|text_model)\.")
_HEAD = "lm_head."
_WHOLE = "ForConditionalGeneration"
_WITH_HEAD = "WithHead"


def text_part(config: Any) -> Any | None:
    """The configuration of the text model of one that is published for more than text; None where it is not,
    or where transformers has no model of its text alone.
    """
    named = list(getattr(config, "architectures", None) or [])
    if getattr(config, "is_encoder_decoder", False) or not any(name.endswith(_WHOLE) for name in named):
        return None
    try:
        text = config.get_text_config()
        name = None if text is config else _class_name(text)
    except ValueError:  # it has several texts, or a class that is not there
        return None
    if name is None:
        return None
    text = copy.deepcopy(text)
    text.architectures, text.whole = [name], config
    # The whole model ties by its own configuration, and not where that does not say.
    text.tie_word_embeddings = getattr(config, "tie_word_embeddings", False)
    return text


def _class_name(text: Any) -> str | None:
    """The causal language model of a text model's configuration, with a head of ours where it has none."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    if type(text) in MODEL_FOR_CAUSAL_LM_MAPPING:
        name = first_class(MODEL_FOR_CAUSAL_LM_MAPPING[type(text)]).__name__
        return None if name.endswith(_WHOLE) else name
    known = type(text) in MODEL_MAPPING
    return first_class(MODEL_MAPPING[type(text)]).__name__ + _WITH_HEAD if known else None


def headed(base: type[Any], config: Any) -> type[Any] | None:
    """The causal language model of a text model that transformers has without its head; None for
    configurations that are not from `text_part`.
    """
    name, whole = base.__name__ + _WITH_HEAD, getattr(config, "whole", None)
    if whole is None or name not in config.architectures:
        return None
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutputWithPast

    # What the family's models have in common, which knows how they attend.
    common = next(one for one in base.__mro__[1:] if issubclass(one, PreTrainedModel))

    class WithHead(common):
        """The text model, and what the whole one makes of its hidden states."""

        config_class = base.config_class
        base_model_prefix = "model"

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = base(config)
            head = _Head(whole)
            self.lm_head = head.linear
            self._head = (head,)  # no module of this one
            self.post_init()

        def forward(self, input_ids: Any, **options: Any) -> Any:
            """Logits of every token."""
            hidden = self.model(input_ids=input_ids, **options).last_hidden_state
            return CausalLMOutputWithPast(logits=self._head[0](input_ids, hidden))

    made: Any = WithHead
    made.__name__ = made.__qualname__ = name
    made._tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    return made


def built(config: Any) -> Any:
    """A model that takes more than text, of its configuration, in float32."""
    import torch
    import transformers

    cls: Any = getattr(transformers, config.architectures[0], None)
    if getattr(cls, "config_class", None) is not type(config):
        raise UnsupportedError(
            f"transformers has no {config.architectures[0]}, in which the text model stands",
            remedy="give its text model alone",
        )
    return cls._from_config(copy.deepcopy(config), dtype=torch.float32, attn_implementation="eager")


class _Head:
    """What a model that takes more than text makes of hidden states: logits, which it may scale and cap.

    It is the model's own forward, in which what comes before the head is told the hidden states.
    """

    def __init__(self, config: Any) -> None:
        import torch

        class Told(torch.nn.Module):
            hidden: Any = None

            def forward(self, *_: Any, **__: Any) -> _Outputs:
                return _Outputs((self.hidden,))

        self._whole = built(config)
        self.linear = self._whole.lm_head
        self._told = Told()
        for name, _ in list(self._whole.named_children()):
            if f"{name}." != _HEAD:
                setattr(self._whole, name, self._told)
        self._whole.eval()

    def __call__(self, input_ids: Any, hidden: Any) -> Any:
        self._told.hidden = hidden
        try:
            return self._whole(input_ids=input_ids).logits
        finally:
            self._told.hidden = None


class _Outputs(tuple[Any, ...]):
    """Hidden states as a model returns them, and nothing else."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        return self[0] if name == "last_hidden_state" else None


def first_class(entry: Any) -> type[Any]:
    """Of a value in transformers' mappings: a class, or a tuple of alternatives with the usual one first."""
    return entry[0] if isinstance(entry, tuple) else entry


def text_name(name: str) -> str:
    """The name that a tensor or module of the whole model has in its text model."""
    return _PART.sub(r"\1", name)


def text_tensors(stored: Mapping[str, LazyTensor]) -> Mapping[str, LazyTensor]:
    """Tensors of the text model by the names that they have in it: `language_model.model.norm.weight` and
    `model.language_model.norm.weight` are `model.norm.weight`. All of them where none is named as a part's.
    """
    found = {text_name(name): tensor for name, tensor in stored.items() if _PART.match(name)}
    heads = {name: tensor for name, tensor in stored.items() if name.startswith(_HEAD)}
    return heads | found if found else stored


__all__ = ["built", "headed", "text_name", "text_part", "text_tensors"]
