"""Checkpoint names → model parameters, by transformers' own conversion tables, without loading anything.

`from_pretrained` renames tensors (legacy gamma/beta, a missing or superfluous base-model prefix) and converts
some (experts merged, a fused QKV split). The same tables are applied here to names only; a tensor that needs
a conversion becomes a lazy one that runs it when read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import numpy as np

from ..ir.errors import CompileError, InputError
from ..ir.weights import LazyTensor, name_stored, read_chunks
from .text_part import text_name
from .weights import MergedTensor

if TYPE_CHECKING:
    import torch


def apply_conversions(
    model: Any, tensors: Mapping[str, LazyTensor], mapping: Sequence[Any]
) -> tuple[dict[str, LazyTensor], list[str]]:
    """Lazy tensors by the model's parameter names, and the names of tensors that the model does not take.

    Args:
        model: a transformers model on the meta device.
        tensors: the checkpoint's, by its names.
        mapping: transformers' renamings and converters, in order.
    """
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    state: dict[str, Any] = model.state_dict()
    prefix = model.base_model_prefix
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    weights: dict[str, LazyTensor] = {}
    merged: dict[str, tuple[Any, dict[str, dict[str, LazyTensor]]]] = {}
    unexpected: list[str] = []
    for name in sorted(tensors, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if renamed not in state and name in state:
            renamed, pattern = rename_source_key(
                name, [], [], base_model_prefix=prefix, meta_state_dict=state
            )
        if renamed not in state:
            unexpected.append(name)
        elif pattern is not None:
            _, groups = merged.setdefault(renamed, (by_pattern[pattern], {}))
            groups.setdefault(pattern, {})[name] = tensors[name]
        elif renamed in weights:
            raise InputError(
                f"{tensors[name].source} and {weights[renamed].source} both claim the parameter {renamed}",
                remedy="use a checkpoint saved by one tool",
            )
        else:
            weights[renamed] = tensors[name]
            if text_name(name) != renamed:
                name_stored(tensors[name], text_name(name))
    for first_target, (converter, groups) in merged.items():
        weights.update(_converted(model, state, first_target, converter, groups))
    return weights, unexpected


def _converted(
    model: Any,
    state: Mapping[str, Any],
    first_target: str,
    converter: Any,
    groups: Mapping[str, Mapping[str, LazyTensor]],
) -> dict[str, LazyTensor]:
    """The lazy tensors that one converter makes of its sources: one, or several where it splits."""
    from transformers.core_model_loading import MergeModulelist

    stacks = isinstance(converter.operations[0], MergeModulelist) and converter.operations[0].dim == 0
    stacks = stacks and all(getattr(op, "dim", 1) != 0 for op in converter.operations[1:])
    patterns = converter.target_patterns
    targets = [first_target.replace(patterns[0], pattern) for pattern in patterns]
    sources = {pattern: list(group.values()) for pattern, group in groups.items()}
    names = {pattern: [text_name(name) for name in group] for pattern, group in groups.items()}
    out: dict[str, LazyTensor] = {}
    for target in targets:
        if target not in state:
            continue

        def convert(
            parts: Mapping[str, Sequence[np.ndarray[Any, Any]]], target: str = target
        ) -> np.ndarray[Any, Any]:
            one = deepcopy(converter)  # a converter collects its tensors in itself
            for pattern, arrays in parts.items():
                one.collected_tensors[pattern] = [to_torch(array) for array in arrays]
            try:
                result = one.convert(first_target, model=model, config=model.config)
                value = result[target]
            except Exception as error:
                raise CompileError(f"transformers' conversion of {target} failed: {error}") from error
            return to_numpy_array(value[0] if isinstance(value, list) else value)

        shape = tuple(state[target].shape)
        moves = _moves_rows(converter, len(shape))
        out[target] = MergedTensor(
            target, shape, convert, sources, stacks, moves, _leaves_first(converter), names
        )
    return out


def _moves_rows(converter: Any, rank: int) -> bool:
    """Whether a converter only stacks, joins and cuts tensors, and not along the last axis of `rank`."""
    from transformers.core_model_loading import Chunk, Concatenate, MergeModulelist

    return all(
        isinstance(op, MergeModulelist | Concatenate | Chunk) and 0 <= op.dim < rank - 1
        for op in converter.operations
    )


def _leaves_first(converter: Any) -> bool:
    """Whether a converter only joins and cuts tensors, and not along the first axis."""
    from transformers.core_model_loading import Chunk, Concatenate

    return all(isinstance(op, Concatenate | Chunk) and op.dim > 0 for op in converter.operations)


def complete(model: Any, weights: dict[str, LazyTensor], origin: str) -> dict[str, LazyTensor]:
    """Fill tied names in, and check that nothing is missing and every shape fits.

    Raises InputError naming the parameters that the checkpoint lacks, or the first whose shape differs.
    """
    for target, source in dict(getattr(model, "all_tied_weights_keys", None) or {}).items():
        if target not in weights and source in weights:
            weights[target] = weights[source]
        elif source not in weights and target in weights:
            weights[source] = weights[target]
        elif source in weights and not _equal(weights[source], weights[target]):
            raise InputError(
                f"{origin}: the configuration ties {target} to {source}, but the two tensors differ",
                remedy='set "tie_word_embeddings": false in config.json if they are meant to differ',
            )
    ignored = [
        re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    ]
    missing = [
        name for name, _ in model.named_parameters()
        if name not in weights and not any(pattern.search(name) for pattern in ignored)
    ]  # fmt: skip
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise InputError(
            f"{origin} lacks {len(missing)} of the tensors of {type(model).__name__}: {shown}",
            remedy="the file is incomplete or its configuration belongs to another model",
        )
    for name, param in model.state_dict().items():
        if name in weights and tuple(param.shape) != tuple(weights[name].shape):
            raise InputError(
                f"{weights[name].source} has the shape {list(weights[name].shape)}, "
                f"{type(model).__name__} wants {list(param.shape)} for {name}",
                remedy="the configuration belongs to another model",
            )
    return weights


def _equal(one: LazyTensor, other: LazyTensor) -> bool:
    """Whether two tensors hold the same values; read in chunks, up to the first that differs."""
    if one is other or one.source == other.source:
        return True
    if one.shape != other.shape:
        return False
    return all(np.array_equal(a, b) for a, b in zip(read_chunks(one), read_chunks(other), strict=True))


def to_torch(array: np.ndarray[Any, Any]) -> torch.Tensor:
    """A torch tensor over a numpy array; bfloat16 by its bits, which numpy and torch do not exchange."""
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy_array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The numpy array of a torch tensor; bfloat16 as ml_dtypes' type."""
    import ml_dtypes
    import torch

    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
