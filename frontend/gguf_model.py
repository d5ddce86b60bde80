"""A GGUF file as a transformers model: configuration, parameter names, tensor conversions.

All three come from transformers' own GGUF support; this file feeds it a header that `gguf.py` has checked and
applies its conversions to lazy tensors, one at a time. What transformers would silently leave out (rope
frequency factors, scaling, soft-caps, tensors without a place) is applied here or refused, because the file
would run wrong without it.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import numpy as np

from ..ir.errors import InputError, LlmcError, UnsupportedError
from ..ir.weights import LazyTensor
from . import gguf_tabled
from .conversions import apply_conversions, to_numpy_array
from .gguf import GGUFFile
from .gguf_factors import beside_blocks
from .weights import MergedTensor, open_gguf_tensors, transformed

_ROPE_FREQS: Final = "rope_freqs.weight"
_ROPE_LONG: Final = "rope_factors_long.weight"
_ROPE_SHORT: Final = "rope_factors_short.weight"
_HEAD: Final = "output.weight"
DENSE: Final = ("dense_2.weight", "dense_3.weight")
"""Layers behind the pooling of a file that is used as an encoder, in their order."""
# `pooling_type` as llama.cpp numbers it.
_POOLINGS: Final = {1: "mean", 2: "cls", 3: "last"}
_PATCHING = threading.Lock()  # the reader class below is swapped in a module that every thread sees

# Texts that end a turn or a document, where a file marks them as control tokens: llama.cpp's list
# (llama-vocab.cpp, "special_eog_ids"), since a GGUF names one end token and chat models use several.
_END_TEXTS: Final = frozenset(
    {"<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>",
     "<|eom_id|>", "<EOT>", "<|END_OF_TURN_TOKEN|>", "<end_of_utterance>", "<turn|>",
     "<|tool_response>"}
)  # fmt: skip


class _Field(NamedTuple):
    """What transformers reads of a metadata field of gguf's reader."""

    parts: list[np.ndarray[Any, Any]]
    data: list[int]
    types: list[int]


class _Named(NamedTuple):
    name: str


class _CheckedReader:
    """Stands in for `gguf.GGUFReader` over a header that was checked already.

    gguf's reader trusts the file and makes a numpy array of every token (hundreds of megabytes for a large
    vocabulary). Arrays of strings are shown by their length only: no configuration depends on their contents.
    """

    def __init__(self, file: GGUFFile) -> None:
        self.tensors = [_Named(name) for name in file.tensors]
        self.fields = {key: _field(value) for key, value in file.metadata.items()}
        tokens = file.metadata.get("tokenizer.ggml.tokens")
        if isinstance(tokens, list):
            self.fields.setdefault(f"{file.architecture}.vocab_size", _field(len(tokens)))


def _field(value: Any) -> _Field:
    if isinstance(value, str):
        return _Field([np.frombuffer(value.encode(), np.uint8)], [0], [8])
    if isinstance(value, bool):
        return _Field([np.array([value])], [0], [7])
    if isinstance(value, int):
        return _Field([np.array([value])], [0], [11])
    if isinstance(value, float):
        return _Field([np.array([value])], [0], [12])
    if isinstance(value, list):  # strings: the count is what matters
        return _Field([np.frombuffer(b"?", np.uint8)], [0] * len(value), [9, 8])
    if len(value) > 4096:  # scores and token types of the vocabulary
        return _Field([np.array([0])], [0], [9, 11])
    kind = {"f": 12, "b": 7}.get(value.dtype.kind, 11)
    return _Field([np.array([one]) for one in value], list(range(len(value))), [9, kind])


@contextmanager
def _reader_of(file: GGUFFile) -> Generator[None]:
    import gguf

    with _PATCHING:
        original = gguf.GGUFReader
        gguf.GGUFReader = lambda *args, **kwargs: _CheckedReader(file)  # pyright: ignore[reportAttributeAccessIssue]
        try:
            yield
        finally:
            gguf.GGUFReader = original


def read_config(file: GGUFFile) -> Any:
    """The transformers configuration that the metadata describes.

    Raises InputError for an architecture that transformers cannot take from GGUF, or metadata that it
    refuses.
    """
    from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS, get_gguf_config
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    arch = file.architecture
    tabled = gguf_tabled.readable(file)
    logger = logging.getLogger("transformers")  # its advice is for those who train
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        if tabled is not None:
            kind, row = tabled
            values = {"model_type": kind, **gguf_tabled.configuration(file, row)}
        elif arch in GGUF_CONFIG_ARCHS:
            values = get_gguf_config(_counted(file.metadata), tuple(file.tensors))
        else:
            with _reader_of(file):
                values = load_gguf_checkpoint(str(file.path), return_tensors=False)["config"]
        model_type = values["model_type"]
        if model_type not in CONFIG_MAPPING:
            raise ValueError(f"model type {model_type} is not in transformers")
        tokens = file.metadata.get("tokenizer.ggml.tokens")
        if "vocab_size" not in values and isinstance(tokens, list):
            values["vocab_size"] = len(tokens)
        config = CONFIG_MAPPING[model_type].from_dict(values)
    except LlmcError:
        raise
    except Exception as error:  # transformers indexes into metadata that a file may lack or mistype
        reason = f"{type(error).__name__}: {error}"
        raise InputError(
            f"architecture {arch!r} of {file.path.name} cannot be taken from GGUF ({reason})",
            remedy="give the model as a Hugging Face folder",
        ) from error
    finally:
        logger.setLevel(level)
    _apply_softcaps(file, config)
    _apply_rope_scaling(file, config)
    refusal = None if tabled is None else tabled[1].check(config)
    if refusal is not None:
        raise UnsupportedError(
            f"{file.path.name} has {refusal}", remedy="give the model as a Hugging Face folder"
        )
    both_ways = getattr(config, "use_bidirectional_attention", None) is True
    if file.metadata.get(f"{arch}.attention.causal") is False and not both_ways:
        config.is_causal = False
    return config


def pooling(file: GGUFFile) -> str | None:
    """How a file that is used as an encoder pools its hidden states (`pooling_type`); None for others."""
    asked = file.metadata.get(f"{file.architecture}.pooling_type")
    return _POOLINGS.get(asked) if type(asked) is int else None


def _counted(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata as transformers' newer reader gives it: string arrays as their length, number arrays as
    lists.
    """
    return {
        key: len(value)
        if isinstance(value, list)
        else value.tolist()
        if isinstance(value, np.ndarray)
        else value
        for key, value in metadata.items()
    }


def _apply_softcaps(file: GGUFFile, config: Any) -> None:
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        value = file.metadata.get(f"{file.architecture}.{name}")
        if value:
            if not hasattr(config, name):
                raise UnsupportedError(
                    f"{file.path.name} sets {name}, which {config.model_type} in transformers lacks",
                    remedy="give the model as a Hugging Face folder",
                )
            setattr(config, name, float(value))


def _apply_rope_scaling(file: GGUFFile, config: Any) -> None:
    """Carry `rope.scaling.*` over, which transformers' mapping ignores for most architectures."""
    prefix = f"{file.architecture}.rope.scaling."
    kind = file.metadata.get(prefix + "type", "linear")
    factor = file.metadata.get(prefix + "factor", 0.0)
    parameters = getattr(config, "rope_parameters", None)
    if _ROPE_LONG in file.tensors or _ROPE_SHORT in file.tensors:
        _apply_longrope(file, config, prefix)
        return
    if kind == "none" or not factor or not isinstance(parameters, dict):
        return
    if kind not in ("linear", "yarn"):
        raise UnsupportedError(
            f"{file.path.name} uses the rope scaling {kind!r}", remedy="give the Hugging Face folder"
        )
    target = parameters.get("full_attention", parameters)
    if target.get("rope_type", "default") != "default":
        return  # transformers has read it
    target.update(rope_type=kind, factor=float(factor))
    original = file.metadata.get(prefix + "original_context_length")
    if kind == "yarn" and original:
        target["original_max_position_embeddings"] = int(original)
    if kind == "yarn":
        _apply_yarn_options(file, target, prefix)


def _apply_yarn_options(file: GGUFFile, target: dict[str, Any], prefix: str) -> None:
    """What a file may say of its yarn scaling besides the factor."""
    for key in ("beta_fast", "beta_slow"):
        value = file.metadata.get(f"{prefix}yarn_{key}")
        if value:
            target[key] = float(value)
    attention = file.metadata.get(prefix + "attn_factor", 1.0)  # on top of the paper's temperature
    if attention != 1.0:
        target["attention_factor"] = float(attention) * (0.1 * math.log(target["factor"]) + 1.0)
    temperature = file.metadata.get(f"{prefix}yarn_log_multiplier", 0.0)
    latent = f"{file.architecture}.attention.kv_lora_rank" in file.metadata
    if temperature and latent:  # there it is a tenth of the published number
        target["mscale"] = target["mscale_all_dim"] = 10.0 * float(temperature)
    zero = () if latent else (("yarn_log_multiplier", 0.0),)
    for key, plain in (("yarn_ext_factor", 1.0), ("yarn_attn_factor", 1.0), *zero):
        value = file.metadata.get(prefix + key, plain)
        if value not in (plain, -1.0):
            raise UnsupportedError(
                f"{file.path.name} has {key} {value:g} in its yarn scaling",
                remedy="give the model as a Hugging Face folder",
            )


def _apply_longrope(file: GGUFFile, config: Any, prefix: str) -> None:
    """LongRoPE: two tensors with a factor a frequency, for contexts up to the original one and beyond."""
    parameters = getattr(config, "rope_parameters", None)
    # Without it llama.cpp takes the context's, so that the long factors are never taken.
    context = file.metadata.get(f"{file.architecture}.context_length")
    original = file.metadata.get(prefix + "original_context_length", context)
    if not isinstance(parameters, dict) or not original:
        raise UnsupportedError(
            f"{file.path.name} has {_ROPE_LONG}, but {config.model_type} no place for it, or the file says "
            "no context_length",
            remedy="give the model as a Hugging Face folder",
        )
    tensors = open_gguf_tensors(file)
    missing = next((name for name in (_ROPE_LONG, _ROPE_SHORT) if name not in tensors), None)
    if missing is not None:
        raise InputError(
            f"{file.path.name} has one of the two tensors of LongRoPE, but no {missing}",
            remedy="the file is damaged: download or convert it again",
        )
    target = parameters.get("full_attention", parameters)
    target.update(
        rope_type="longrope",
        short_factor=tensors[_ROPE_SHORT].read().tolist(),
        long_factor=tensors[_ROPE_LONG].read().tolist(),
        original_max_position_embeddings=int(original),
    )
    factor = file.metadata.get(prefix + "attn_factor")
    if factor:
        target["attention_factor"] = float(factor)
    if hasattr(config, "original_max_position_embeddings"):  # transformers takes this one where it is there
        config.original_max_position_embeddings = int(original)


def refuse_rope_factors(file: GGUFFile, asked: str) -> None:
    """Raises InputError where a file that is to be scaled carries factors of its frequencies already."""
    for name in (_ROPE_FREQS, _ROPE_LONG):
        if name in file.tensors:
            raise InputError(
                f"--rope-scaling {asked} contradicts {file.path.name}, which is scaled already by {name}",
                remedy="leave --rope-scaling away",
            )


def apply_rope_factors(model: Any, tensors: Mapping[str, LazyTensor]) -> None:
    """Divide the rotary frequencies by the factors that a file carries as a tensor.

    llama.cpp stores the scaling as one factor a frequency, `rope_freqs.weight` [head_dim / 2]; transformers
    drops it.
    """
    if _ROPE_FREQS not in tensors:
        return
    import torch

    factors = torch.from_numpy(tensors[_ROPE_FREQS].read())
    buffers = [b for b in model.named_buffers() if b[0].endswith("inv_freq") and b[1].shape == factors.shape]
    # Where layers with a window have frequencies of their own, the factors are the others'.
    full = [buffer for name, buffer in buffers if "full_attention" in name]
    for buffer in full or [buffer for _, buffer in buffers]:
        buffer.div_(factors)
    if not buffers:
        raise UnsupportedError(
            f"{tensors[_ROPE_FREQS].source} scales rotary frequencies, which {type(model).__name__} lacks",
            remedy="give the model as a Hugging Face folder",
        )


def map_weights(file: GGUFFile, model: Any, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Lazy tensors by the model's parameter names.

    Raises UnsupportedError for a tensor that has no place in the model: leaving it out would change the
        results.
    """
    from transformers.integrations.gguf.utils import get_gguf_conversion_mapping, is_gguf_arch_supported

    tabled = gguf_tabled.readable(file)
    if tabled is not None:
        weights, unused = gguf_tabled.weights(file, tabled[1], model, tensors)
    elif is_gguf_arch_supported(file.architecture):
        mapping = get_gguf_conversion_mapping(file.architecture, model.config)
        weights, unused = apply_conversions(model, tensors, mapping)
    else:
        weights, unused = _processed(file, model, tensors)
    known = {_ROPE_FREQS, _ROPE_LONG, _ROPE_SHORT, *([_HEAD, *DENSE] if pooling(file) else [])}
    unused = beside_blocks([name for name in unused if name not in known], tensors)
    if unused:
        raise UnsupportedError(
            f"{file.path.name}: tensor {unused[0]} has no place in {type(model).__name__}",
            remedy="give the model as a Hugging Face folder",
        )
    return weights


class _Names:
    """What the name map asks of a model, without the recursion into every submodule (some seconds).

    The recursion serves checkpoints saved from the base model inside, so one level of it is kept.
    """

    def __init__(self, model: Any, children: bool = True) -> None:
        self.config = model.config
        self.state_dict = model.state_dict
        base = getattr(model, model.base_model_prefix, None) if children else None
        self._children = [(model.base_model_prefix, _Names(base, children=False))] if base is not None else []

    def named_children(self) -> list[tuple[str, _Names]]:
        return self._children


def _processed(
    file: GGUFFile, model: Any, tensors: Mapping[str, LazyTensor]
) -> tuple[dict[str, LazyTensor], list[str]]:
    """Names and conversions by transformers' tensor processors, each applied to one lazy tensor."""
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    processor = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)(config=model.config.to_dict())
    names: dict[str, str] = get_gguf_hf_weights_map(_Names(model), processor)
    parts: dict[str, list[str]] = {}
    unused: list[str] = []
    for name in tensors:
        target = names.get(name) or names.get(name.removesuffix(".weight"))
        if target is None and name == _HEAD and "lm_head.weight" in model.state_dict():
            target = "lm_head.weight"
        if target is None:
            unused.append(name)
        else:
            parts.setdefault(target, []).append(name)
    state = model.state_dict()
    weights: dict[str, LazyTensor] = {}
    for target, sources in parts.items():

        def run(name: str, array: np.ndarray[Any, Any], target: str = target) -> np.ndarray[Any, Any]:
            return _run_processor(processor, names, name, array, target)

        if len(sources) == 1:
            name = sources[0]
            weights[target] = transformed(tensors[name], lambda array, name=name, run=run: run(name, array))
            continue

        def merge(
            arrays: Mapping[str, Sequence[np.ndarray[Any, Any]]], target: str = target
        ) -> np.ndarray[Any, Any]:
            collected: dict[str, Any] = {}
            for name, (array,) in arrays.items():
                _run_processor(processor, names, name, array, target, collected)
            return to_numpy_array(collected[target])

        weights[target] = MergedTensor(
            target,
            tuple(state[target].shape),
            merge,
            {name: [tensors[name]] for name in sources},
            stacks_rows=False,
        )
    return weights, unused


def _run_processor(
    processor: Any,
    names: dict[str, str],
    name: str,
    array: np.ndarray[Any, Any],
    target: str,
    collected: dict[str, Any] | None = None,
) -> np.ndarray[Any, Any]:
    """One call of a transformers processor: it returns the array, or files it under the target's name."""
    filed: dict[str, Any] = {} if collected is None else collected
    result = processor.process(
        weights=array, name=name, tensor_key_mapping=names, parsed_parameters={"tensors": filed}
    )
    if result.name is not None:
        return result.weights
    return to_numpy_array(filed[target])


def generation_facts(file: GGUFFile) -> tuple[list[int], int | None, dict[str, float]]:
    """End-of-generation ids (the first is the file's `eos_token_id`), the begin id, sampling defaults (none
    in GGUF).
    """
    meta = file.metadata
    ids = [meta[key] for key in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id") if key in meta]
    tokens, types = meta.get("tokenizer.ggml.tokens"), meta.get("tokenizer.ggml.token_type")
    if isinstance(tokens, list) and isinstance(types, np.ndarray) and len(types) == len(tokens):
        ids += [int(i) for i in np.flatnonzero((types == 3) | (types == 4)) if tokens[i] in _END_TEXTS]
    bos = meta.get("tokenizer.ggml.bos_token_id")
    return list(dict.fromkeys(int(one) for one in ids)), None if bos is None else int(bos), {}


__all__ = [
    "apply_rope_factors",
    "generation_facts",
    "map_weights",
    "open_gguf_tensors",
    "read_config",
    "refuse_rope_factors",
]
