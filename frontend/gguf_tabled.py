"""GGUF files of the architectures in `gguf_architectures.py`: their configurations and their tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np

from ..ir.errors import InputError, UnsupportedError
from ..ir.weights import ArrayTensor, LazyTensor
from .gguf import GGUFFile
from .gguf_architectures import ARCHITECTURES
from .gguf_experts import stacked_experts
from .gguf_fields import by_layer
from .gguf_layout import Architecture
from .weights import ReorderedTensor, transformed

_FOLDER: Final = "give the model as a Hugging Face folder"
_COMMON: Final = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
_BESIDE: Final = frozenset(
    {
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "rope.freq_base",
        "rope.dimension_count",
        "vocab_size",
        "pooling_type",
        "attention.causal",
        "tensor_data_layout",  # of q and k, which the row says
    }
)
_MOST_LAYERS: Final = 1024
"""That a file may name without tensors for them."""
_LATER: Final = "rope.scaling."  # gguf_model.py reads it, of every architecture


# What the package gguf has no names for: it has them for weights and biases.
_ODD_NAMES: Final = {
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "gate.e_score_correction_bias": "exp_probs_b.bias",
    "gate.moe_statics.e_score_correction_bias": "exp_probs_b.bias",
    "feed_forward.expert_bias": "exp_probs_b.bias",
    "mlp.expert_bias": "exp_probs_b.bias",
    "pre_ff_layernorm.weight": "ffn_norm",
    "A_log": "ssm_a",
    "D": "ssm_d",
    "dt_bias": "ssm_dt.bias",
}
_ODD: Final = re.compile(
    r".*\blayers\.(\d+)\.(?:\w+\.)?"
    rf"({'|'.join(map(re.escape, _ODD_NAMES))})"
)
_OF_A_LAYER: Final = re.compile(r".*\blayers\.(\d+)\.(.+)\.(weight|bias)")
_FUSED: Final = re.compile(r"(blk\.\d+\.attn_)qkv(\.weight|\.bias)")


def readable(file: GGUFFile) -> tuple[str, Architecture] | None:
    """transformers' `model_type` and the table's row of a file; None where transformers reads such files, or
    nobody.
    """
    keys = {k: v for k, v in _keys(file).items() if isinstance(v, int | float | str)}
    for kind, row in ARCHITECTURES.items():
        if row.name == file.architecture and row.fields is not None and row.when(keys, file.tensors):
            return row.kind or kind, row
    return None


def _keys(file: GGUFFile) -> dict[str, Any]:
    prefix = f"{file.architecture}."
    return {k.removeprefix(prefix): v for k, v in file.metadata.items() if k.startswith(prefix)}


def configuration(file: GGUFFile, arch: Architecture) -> dict[str, Any]:
    """The configuration's values that a file's metadata gives.

    Raises InputError for metadata that is missing or of another kind, UnsupportedError for a key-value that
    is not understood.
    """
    assert arch.fields is not None
    keys = _keys(file)
    known = {*_COMMON, *_BESIDE, *arch.reads, *arch.may, *arch.ignores, arch.norm_key}
    if keys.get("rope.freq_base_swa") == keys.get("rope.freq_base"):
        known = {*known, "rope.freq_base_swa"}
    odd = sorted(k for k in keys if k not in known and not k.startswith(_LATER))
    if odd:
        raise UnsupportedError(
            f"{file.path.name} sets {arch.name}.{odd[0]}, which is not understood", remedy=_FOLDER
        )
    free = arch.ignores | arch.lists
    numbers = [k for k, v in keys.items() if k not in free and not isinstance(v, int | float | str)]
    needed = [k for k in (*_COMMON, arch.norm_key, *arch.reads) if k not in arch.may]
    missing = [k for k in needed if k not in keys]
    if numbers or missing:
        what, which = ("lacks", missing) if missing else ("has an array of", numbers)
        raise InputError(f"{file.path.name} {what} {arch.name}.{which[0]}", remedy="download the file again")
    if int(keys["block_count"]) > max(len(file.tensors), _MOST_LAYERS):
        raise InputError(
            f"{file.path.name} says {arch.name}.block_count {keys['block_count']}, and has "
            f"{len(file.tensors)} tensors",
            remedy="download the file again",
        )
    heads = max(int(keys["attention.head_count"]), 1)
    head_dim = int(keys.get("attention.key_length", int(keys["embedding_length"]) // heads))
    if not arch.latent and keys.get("attention.value_length", head_dim) != head_dim:
        raise UnsupportedError(f"{file.path.name} has heads of two lengths", remedy=_FOLDER)
    turned = int(keys.get("rope.dimension_count", head_dim))
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    values: dict[str, Any] = {field: keys[key] for key, field in _COMMON.items() if key in keys}
    values[arch.norm_field] = keys[arch.norm_key]
    if arch.turns:
        values |= {
            "num_key_value_heads": keys.get("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "rope_theta": keys.get("rope.freq_base", 10000.0),
            "tie_word_embeddings": "output.weight" not in file.tensors,
            "attention_bias": any(f"blk.0.attn_{part}.bias" in file.tensors for part in ("q", "qkv")),
            "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        }
        if arch.latent:
            values.pop("head_dim")
        elif arch.partial:
            values["partial_rotary_factor"] = turned / head_dim
        elif turned != head_dim:
            raise UnsupportedError(
                f"{file.path.name} turns {turned} of {head_dim} dimensions of a head", remedy=_FOLDER
            )
    values["vocab_size"] = keys.get("vocab_size", len(tokens) if isinstance(tokens, list) else None)
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        default = arch.pad if name == "pad" else None
        values[f"{name}_token_id"] = file.metadata.get(f"tokenizer.ggml.{key}_token_id", default)
    return values | arch.fields(keys, file.tensors)


def named(arch: Architecture, layers: int) -> Callable[[str], str | None]:
    """A model's parameter → its name in GGUF, or None."""
    import gguf

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[arch.name], layers)

    def name_of(parameter: str) -> str | None:
        part = _OF_A_LAYER.fullmatch(parameter)
        if part is not None and part[2] in arch.parts:
            return f"blk.{part[1]}.{arch.parts[part[2]]}.{part[3]}"
        odd = _ODD.fullmatch(parameter)
        if odd is not None:
            return f"blk.{odd[1]}.{_ODD_NAMES[odd[2]]}"
        spellings = (
            parameter,
            parameter.replace(".router.weight", ".router.layer.weight"),
            parameter.replace("model.", "backbone.", 1),
        )
        for known in spellings:
            name = table.get_name(known, try_suffixes=(".weight", ".bias"))
            if name is not None:
                return name if name.endswith((".weight", ".bias")) else f"{name}.weight"
        return None

    return name_of


def weights(
    file: GGUFFile, arch: Architecture, model: Any, tensors: Mapping[str, LazyTensor]
) -> tuple[dict[str, LazyTensor], list[str]]:
    """Lazy tensors by the model's parameter names, and the names of tensors without a place."""
    config, name_of = model.config, named(arch, model.config.num_hidden_layers)
    shapes = {parameter: tuple(value.shape) for parameter, value in model.state_dict().items()}
    names = {name_of(parameter): parameter for parameter in shapes}
    tensors = {**tensors, **_numbers(file, arch)}
    tensors = _cut(tensors, {name: shapes[parameter][0] for name, parameter in names.items() if name})
    found, joined = stacked_experts(
        model, tensors, turned=arch.experts_turned, in_turns=arch.experts_in_turns
    )
    made, parts = arch.merge(config, shapes, tensors)
    found, joined = found | made, joined | parts
    unused: list[str] = []
    for name, tensor in tensors.items():
        parameter = names.get(name)
        if name in joined:
            continue
        if parameter is None:
            unused += [] if arch.unneeded(config, name) else [name]
            continue
        part = name.split(".")[-2]
        if arch.permuted and part in ("attn_q", "attn_k"):
            heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
            found[parameter] = transformed(tensor, lambda x, heads=heads: _unpaired(x, heads))
        elif arch.norm_offset and name.endswith("norm.weight") and part != "ssm_norm":
            found[parameter] = transformed(tensor, lambda x: x - np.float32(arch.norm_offset))
        elif (shape := shapes[parameter]) == (1, *tensor.shape):  # llama.cpp drops axes of length 1
            found[parameter] = transformed(tensor, lambda x, shape=shape: x.reshape(shape))
        else:
            found[parameter] = arch.mixer(config, parameter, tensor)
    return found, unused


def _numbers(file: GGUFFile, arch: Architecture) -> dict[str, LazyTensor]:
    """Key-values of a number a layer that are parameters.

    Raises InputError for those that are missing, or of another length.
    """
    layers, found = int(_keys(file)["block_count"]), dict[str, LazyTensor]()
    for key in arch.by_layer:
        if key not in file.metadata:
            raise InputError(f"{file.path.name} lacks {key}", remedy="download the file again")
        try:
            numbers = by_layer({"block_count": layers, key: file.metadata[key]}, key)
        except InputError as error:
            raise InputError(f"{file.path.name}: {error.message}", remedy=error.remedy) from None
        found[key] = ArrayTensor(np.array(numbers, np.float32), f"{file.path.name}: {key}")
    return found


def _cut(tensors: Mapping[str, LazyTensor], rows: Mapping[str, int]) -> dict[str, LazyTensor]:
    """The tensors, with queries, keys and values that a file has as one matrix (or bias) as three, where the
    model has places for three.

    Args:
        rows: of a tensor that the model has a place for.
    """
    cut = dict(tensors)
    for name, tensor in tensors.items():
        match = _FUSED.fullmatch(name)
        parts = [f"{match[1]}{part}{match[2]}" for part in "qkv"] if match is not None else []
        if not parts or name in rows or not all(part in rows for part in parts):
            continue
        ends = np.cumsum([rows[part] for part in parts])
        if tensor.shape[0] != ends[-1]:
            continue  # it has no place then, which is told later
        del cut[name]
        for part, order in zip(parts, np.split(np.arange(ends[-1]), ends[:-1]), strict=True):
            cut[part] = ReorderedTensor(tensor, order)
    return cut


def paired_rows(rows: int, heads: int) -> np.ndarray[Any, Any]:
    """Which row of transformers' q or k stands where in GGUF: of each head, row i of the first half, then row
    i of the second half.
    """
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)


def _unpaired(x: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    if len(x) % (2 * heads):
        return x  # of another shape than the model's, which is refused later
    return x[np.argsort(paired_rows(len(x), heads))]
