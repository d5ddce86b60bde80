"""Tensors that GGUF's named layouts have otherwise than transformers: in parts, in another order, or as the
value that the model would compute. `gguf_architectures.py` names for each layout which of these it takes:

    merge(configuration, shapes by parameter, tensors) → tensors by parameter, names of those behind them
    mixer(configuration, parameter, tensor)            → the tensor as transformers has it

What codes a tensor has stays with it wherever rows are only moved.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from ..ir.errors import InputError
from ..ir.weights import ArrayTensor, LazyTensor
from .weights import MergedTensor, ReorderedColumns, ReorderedTensor, TransformedTensor, transformed

Array = np.ndarray[Any, Any]
Shapes = Mapping[str, tuple[int, ...]]
Merged = tuple[dict[str, LazyTensor], set[str]]
_MIXER: Final = re.compile(r".*\.layers\.\d+\.\w+\.(.+)")
_OF_ACTIVATION: Final = re.compile(r".*\.layers\.(\d+)\..*\bact_fn\.(\w+)")
_FLAT: Final = ("conv1d.weight", "conv.weight", "D", "norm.weight")
"""Parameters of mixers whose axes differ alone: llama.cpp drops an axis of length 1, or has a group a row."""


def _layer(parameter: str) -> str:
    """`blk.N` of a parameter of layer N."""
    return f"blk.{parameter.split('.layers.')[1].split('.')[0]}"


def _all_of(
    found: Merged, parameter: str, shape: tuple[int, ...], names: Sequence[str], tensors: Any, convert: Any
) -> None:
    """Add what is made of tensors by moving rows, where all of them are there."""
    if not all(name in tensors for name in names):
        return
    sources = {name: [tensors[name]] for name in names}

    def made(parts: Mapping[str, Sequence[Array]]) -> Array:
        return convert(*(parts[name][0] for name in names))

    found[0][parameter] = MergedTensor(parameter, shape, made, sources, stacks_rows=False, moves_rows=True)
    found[1].update(names)


def latent_parts(config: Any, shapes: Shapes, tensors: Mapping[str, LazyTensor]) -> Merged:
    """The matrices that make keys and values of a latent, of files that have them as attn_k_b [heads, latent,
    key] and attn_v_b [heads, value, latent]: the rows of a head's keys, then those of its values.
    """

    def rows(parts: Mapping[str, Sequence[Array]]) -> Array:
        (k,), (v,) = parts["k"], parts["v"]
        both = np.concatenate([k.swapaxes(1, 2), v], axis=1)
        return both.reshape(-1, both.shape[2])

    found, used = dict[str, LazyTensor](), set[str]()
    for parameter, shape in shapes.items():
        if not parameter.endswith(".self_attn.kv_b_proj.weight"):
            continue
        names = [f"{_layer(parameter)}.attn_{part}_b.weight" for part in "kv"]
        if all(name in tensors for name in names):
            sources = {part: [tensors[name]] for part, name in zip("kv", names, strict=True)}
            found[parameter] = MergedTensor(parameter, shape, rows, sources, stacks_rows=False)
            used |= set(names)
    return found, used


def shared_parts(config: Any, shapes: Shapes, tensors: Mapping[str, LazyTensor]) -> Merged:
    """Gate and up of one matrix, shared_mlp.input_linear [2 I, H], and down: of the expert that all tokens
    take, or of a layer without experts.
    """
    found: Merged = {}, set()
    for parameter, shape in shapes.items():
        if parameter.endswith(".shared_mlp.input_linear.weight"):
            for kind in ("_shexp", ""):
                names = [f"{_layer(parameter)}.ffn_{part}{kind}.weight" for part in ("gate", "up")]
                _all_of(found, parameter, shape, names, tensors, lambda *parts: np.concatenate(parts))
        down = f"{_layer(parameter)}.ffn_down.weight" if ".layers." in parameter else ""
        if parameter.endswith(".shared_mlp.output_linear.weight") and down in tensors:
            found[0][parameter] = tensors[down]
            found[1].add(down)
    return found


def projected_parts(config: Any, shapes: Shapes, tensors: Mapping[str, LazyTensor]) -> Merged:
    """The matrices that make further inputs of one, and one of several, which GGUF has stacked."""
    found: Merged = {}, set()
    for parameter in shapes:
        match = re.fullmatch(r"model\.altup_(projections|unembed_projections)\.(\d+)\.weight", parameter)
        stack = "altup_proj" if match and match[1] == "projections" else "altup_unembd_proj"
        if match and f"{stack}.weight" in tensors:
            one = int(match[2])
            tensor = tensors[f"{stack}.weight"]
            found[0][parameter] = transformed(tensor, lambda x, one=one: x[one])
            found[1].add(f"{stack}.weight")
    return found


def delta_parts(config: Any, shapes: Shapes, tensors: Mapping[str, LazyTensor]) -> Merged:
    """Queries, keys, values and gates of a delta rule in one matrix, by key heads: GGUF has attn_qkv, whose
    queries come before all keys and these before all values, and attn_gate.
    """
    keys, per = config.linear_num_key_heads, config.linear_num_value_heads // config.linear_num_key_heads
    key, value = config.linear_key_head_dim, per * config.linear_value_head_dim

    def by_heads(qkv: Array, z: Array) -> Array:
        q, k, v = np.split(qkv, [keys * key, 2 * keys * key])
        parts = [part.reshape(keys, -1, part.shape[1]) for part in (q, k, v, z)]
        return np.concatenate(parts, axis=1).reshape(-1, z.shape[1])

    found: Merged = {}, set()
    for parameter, shape in shapes.items():
        if parameter.endswith(".linear_attn.in_proj_qkvz.weight") and shape[0] == 2 * keys * (key + value):
            names = [f"{_layer(parameter)}.{name}.weight" for name in ("attn_qkv", "attn_gate")]
            if all(name in tensors for name in names):
                rows = [tensors[name].shape[0] for name in names]
                if rows == [keys * (2 * key + value), keys * value]:
                    _all_of(found, parameter, shape, names, tensors, by_heads)
    return found


def numbers_of_layers(config: Any, shapes: Shapes, tensors: Mapping[str, LazyTensor]) -> Merged:
    """Parameters of one number, `….act_fn.alpha_p` of a layer, out of a key-value `xielu.alpha_p` of all."""
    found: Merged = {}, set()
    for parameter, shape in shapes.items():
        match = _OF_ACTIVATION.fullmatch(parameter)
        name = "" if match is None else f"xielu.{match[2]}"
        if match is not None and name in tensors:
            number = tensors[name].read()[int(match[1])].reshape(shape)
            found[0][parameter] = ArrayTensor(number, tensors[name].source)
            found[1].add(name)
    return found


def joined_by_head(config: Any, parameter: str, tensor: LazyTensor) -> LazyTensor:
    """Queries, keys and values in one matrix or bias, those of one head behind each other; GGUF has all
    queries first.
    """
    heads = config.num_attention_heads
    if "query_key_value" not in parameter or tensor.shape[0] % (3 * heads):
        return tensor
    order = np.arange(tensor.shape[0]).reshape(3, heads, -1).swapaxes(0, 1).reshape(-1)
    return ReorderedTensor(tensor, order)


def mixed(config: Any, parameter: str, tensor: LazyTensor) -> LazyTensor:
    """A parameter of a layer that mixes tokens by a recurrence or a convolution. GGUF has -exp(A_log)."""
    match = _MIXER.fullmatch(parameter)
    if match is None:
        return tensor
    if match[1] == "A_log":
        return TransformedTensor(tensor, lambda a: _logarithms(a, tensor.source), by_row=False)
    if match[1] in _FLAT and len(tensor.shape) == 2:
        axes = (tensor.shape[0], 1, tensor.shape[1]) if match[1].startswith("conv") else (-1,)
        return transformed(tensor, lambda x: x.reshape(axes))
    return tensor


def _logarithms(a: Array, source: str) -> Array:
    if not (a < 0).all():
        raise InputError(f"{source} has values that are not below zero", remedy="download the file again")
    logarithms = np.log(-a)
    return logarithms.reshape(-1) if logarithms.shape[-1:] == (1,) else logarithms


def in_turns(config: Any, parameter: str, tensor: LazyTensor) -> LazyTensor:
    """`mixed`, of files that have the value heads of a delta rule in turns: the first of each key head, then
    the second of each.
    """
    match = _MIXER.fullmatch(parameter)
    part = match[1] if match is not None else ""
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    width = config.linear_value_head_dim
    before = 2 * keys * config.linear_key_head_dim
    whole = {
        "in_proj_qkv.weight": (before, width),
        "conv1d.weight": (before, width),
        "in_proj_z.weight": (0, width),
        "out_proj.weight": (0, width),
        **dict.fromkeys(("in_proj_a.weight", "in_proj_b.weight", "A_log", "dt_bias"), (0, 1)),
    }
    if part in whole and values != keys > 0:
        first, width = whole[part]
        axis = 1 if part == "out_proj.weight" else 0
        if tensor.shape[axis : axis + 1] == (first + values * width,):  # of another shape it is refused later
            order = _grouped(keys, values // keys, width, first)
            tensor = ReorderedColumns(tensor, order) if axis else transformed(tensor, lambda x: x[order])
    return mixed(config, parameter, tensor)


def _grouped(keys: int, per: int, width: int, first: int) -> Array:
    """Where each row of heads in groups stands among heads in turns, behind `first` others."""
    turns = np.arange(keys * per * width).reshape(keys, per, width).swapaxes(0, 1).reshape(-1)
    return np.concatenate([np.arange(first), first + np.argsort(turns)])


__all__ = [
    "delta_parts",
    "in_turns",
    "joined_by_head",
    "latent_parts",
    "mixed",
    "numbers_of_layers",
    "projected_parts",
    "shared_parts",
]
