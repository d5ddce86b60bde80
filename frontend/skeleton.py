"""A transformers model without its weights: parameters on the meta device, buffers with their real values.

Tracing needs the modules, their shapes, and the small tensors that are computed rather than loaded (rotary
frequencies, scales). Building under `torch.device("meta")` would lose those values; building normally would
allocate and randomly fill every parameter. Here each parameter is replaced by a meta tensor in the moment it
is registered, and initialisation is switched off, so what is left in memory is the buffers.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

from ..ir.errors import InputError, LlmcError, UnsupportedError
from .text_part import built, first_class, headed

if TYPE_CHECKING:
    import torch

Task = Literal["causal_lm", "encoder", "classifier"]

_MOST_LAYERS = 4096  # the deepest published models have a few hundred

_PATCHING = threading.Lock()  # the patch below is on a class of torch, visible to every thread


def model_class(config: Any) -> tuple[type[torch.nn.Module], Task]:
    """The transformers class for a configuration, and what it does.

    A class named in `architectures` decides, where transformers knows it as a causal language model, as an
    encoder, or as an encoder with a head that classifies texts (a cross-encoder); without one the model type
    does. Raises InputError naming an architecture that is none of these.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        MODEL_FOR_TEXT_ENCODING_MAPPING,
        MODEL_MAPPING,
    )

    kind = type(config)
    named = list(getattr(config, "architectures", None) or [])
    causal_name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    causal_names = [causal_name] if isinstance(causal_name, str) else list(causal_name or [])
    label = f"{config.model_type} ({', '.join(named) or 'no architectures'})"
    if kind in MODEL_FOR_TEXT_ENCODING_MAPPING and kind in MODEL_MAPPING:
        encoder = first_class(MODEL_FOR_TEXT_ENCODING_MAPPING[kind])
        if encoder.__name__ in named and encoder is not first_class(MODEL_MAPPING[kind]):
            return encoder, "encoder"  # half of an encoder-decoder, saved alone
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"architecture {label} is an encoder-decoder", remedy="llmc compiles decoders and encoders"
        )
    causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING and (
        any(name in causal_names for name in named) or (not named and not is_encoder(config))
    )
    if causal:
        return _generator(MODEL_FOR_CAUSAL_LM_MAPPING[kind], config, label), "causal_lm"
    if kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        cls = first_class(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[kind])
        if cls.__name__ in named:
            return cls, "classifier"
    if (
        kind in MODEL_MAPPING
        and named
        and (whole := headed(first_class(MODEL_MAPPING[kind]), config)) is not None
    ):
        return whole, "causal_lm"
    if kind in MODEL_MAPPING and (is_encoder(config) or not named):
        return first_class(MODEL_MAPPING[kind]), "encoder"
    if kind in MODEL_MAPPING and (cls := first_class(MODEL_MAPPING[kind])).__name__ in named:
        if "input_ids" not in inspect.signature(cls.forward).parameters:
            raise UnsupportedError(
                f"architecture {label} takes no token ids", remedy="llmc compiles models of text"
            )
        return cls, "encoder"  # the hidden states of a model that was saved without a head
    pooled = _pooled(named, kind)
    if pooled is not None:
        return pooled, "encoder"
    raise InputError(
        f"unknown architecture {label}: transformers has no causal language model or encoder of that name",
        remedy="give a model whose architecture transformers implements",
    )


def _pooled(named: Sequence[str], kind: type[Any]) -> type[Any] | None:
    """The class of `architectures` whose first result is a text's vector, and that takes token ids; None
    where there is none. Encoders of questions and of passages are two classes of one configuration, of which
    transformers' tables have one.
    """
    import transformers

    for name in named:
        cls: Any = getattr(transformers, name, None)
        if getattr(cls, "config_class", None) is not kind:
            continue
        takes = inspect.signature(cls.forward)
        first = [
            fields(one)[0].name
            for one in get_args(get_type_hints(cls.forward).get("return")) or ()
            if is_dataclass(one)
        ]
        if "input_ids" in takes.parameters and first == ["pooler_output"]:
            return cls
    return None


def _generator(entry: Any, config: Any, label: str) -> type[torch.nn.Module]:
    """The causal language model of an entry of transformers' table. Raises UnsupportedError for one that is
    more, or that sees what it is to generate.
    """
    cls = first_class(entry)
    if cls.__name__.endswith("ForConditionalGeneration"):
        raise UnsupportedError(
            f"architecture {label} takes more than text", remedy="give its text model alone"
        )
    both_ways = getattr(config, "use_bidirectional_attention", None) is True
    if both_ways or getattr(config, "is_causal", True) is False:
        raise UnsupportedError(
            f"architecture {label} lets tokens attend to later ones", remedy="llmc compiles causal decoders"
        )
    return cls


def is_encoder(config: Any) -> bool:
    """An encoder is a model that transformers also offers for masked-token prediction and that is not set to
    decode.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)


def instantiate(config: Any, attn: str = "sdpa") -> torch.nn.Module:
    """The model of a configuration in float32, in eval mode, tied as its class ties, without a key/value
    cache.

    Args:
        attn: transformers' attention implementation, "sdpa" or "eager".
    """
    import torch
    from transformers.initialization import no_init_weights

    cls, task = model_class(config)
    _check_layers(config, cls.__name__)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    if attn == "sdpa" and not getattr(cls, "_supports_sdpa", True):
        attn = "eager"  # soft-capped scores have no place in torch's fused operator
    options: dict[str, Any] = {"attn_implementation": attn}
    if task == "encoder" and "add_pooling_layer" in inspect.signature(cls.__init__).parameters:
        options["add_pooling_layer"] = (
            False  # the step's output is hidden states; a pooler is often not even saved
        )
    try:
        with _meta_parameters(), no_init_weights(), torch.no_grad():
            model = cls._from_config(config, dtype=torch.float32, **options)  # pyright: ignore[reportAttributeAccessIssue]  # every transformers model has it
    except LlmcError:
        raise
    except Exception as error:  # whatever a model's constructor raises on a configuration that makes no sense
        raise InputError(
            f"{cls.__name__} cannot be built from its configuration: {type(error).__name__}: {error}",
            remedy="check config.json (or the GGUF metadata) of the model",
        ) from error
    model.tie_weights()
    return model.eval()


def instantiate_whole(config: Any) -> torch.nn.Module:
    """The model that takes more than text, whose text model has the configuration `config`."""
    import torch
    from transformers.initialization import no_init_weights

    with _meta_parameters(), no_init_weights(), torch.no_grad():
        return built(config.whole)


def _check_layers(config: Any, name: str) -> None:
    """Every layer is a module, and modules take memory even on the meta device."""
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and not 0 <= layers <= _MOST_LAYERS:
        raise InputError(
            f"{name} cannot be built from its configuration: it asks for {layers} layers; llmc builds up to "
            f"{_MOST_LAYERS}",
            remedy="check config.json (or the GGUF metadata) of the model",
        )


@contextmanager
def _meta_parameters() -> Generator[None]:
    """While this is open, every parameter becomes a meta tensor when a module registers it."""
    import torch

    with _PATCHING:
        original = torch.nn.Module.register_parameter

        def register(self: torch.nn.Module, name: str, param: torch.nn.Parameter | None) -> None:
            if param is not None and param.device.type != "meta":
                param = torch.nn.Parameter(param.detach().to("meta"), requires_grad=False)
            original(self, name, param)

        torch.nn.Module.register_parameter = register
        try:
            yield
        finally:
            torch.nn.Module.register_parameter = original
