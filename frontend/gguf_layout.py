"""How one of GGUF's named layouts is read and written: a row of the tables in `gguf_architectures.py` and
`gguf_hybrids.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from ..ir.weights import LazyTensor
from . import gguf_parts
from .gguf_fields import Keys, Tensors

LAYER_NORM: Final = "attention.layer_norm_epsilon"
"""`norm_key` of norms that take the mean off."""


@dataclass(frozen=True)
class Architecture:
    """How a family of transformers is called and stored in GGUF.

    Attributes:
        name: `general.architecture`, also the name of its tensor table in the package gguf.
        kind: transformers' `model_type`, where it is not the row's key.
        turns: positions are rotary.
        permuted: q and k rows are stored with rotary pairs side by side.
        norm_offset: norms are stored with this added.
        partial: rotary embeddings may turn a part of a head only.
        experts_turned: transformers has an expert's matrices transposed.
        experts_in_turns: and its gate and up in turns.
        latent: keys and values are made of a latent; `fields` says how long heads are.
        norm_key, norm_field: what is added to a norm's variance, in GGUF and in the configuration.
        check: what of a configuration cannot be said in GGUF, as a sentence, or None.
        extra: further key-values without their prefix.
        written: whether target gguf writes it.
        reads: further key-values that `fields` understands, all of which a file has.
        may: those that it understands where they are there.
        ignores: those that say no more than the tensors or other key-values do, or nothing about text.
        lists: those that may have a value a layer.
        by_layer: key-values of a number a layer, without a prefix, that are parameters of the model: `merge`
            is given them as tensors of those names.
        pad: the token for padding of a file that names none, where a configuration must have one.
        parts: of a layer, those that the package gguf knows by other names than transformers' → their
            tensors.
        unneeded: whether a model of this configuration has no place for a tensor that files have.
        merge: what is made of several tensors, and which (gguf_parts.py).
        mixer: how a tensor differs from transformers' (gguf_parts.py).
        when: of the key-values without their prefix and the tensors, whether a file of that name is of this
            row.
        fields: of a file's key-values without their prefix, and the names of its tensors, what the
            configuration has beyond what all have; None where transformers reads the file itself.
    """

    name: str
    kind: str = ""
    turns: bool = True
    permuted: bool = False
    norm_offset: float = 0.0
    partial: bool = False
    experts_turned: bool = False
    experts_in_turns: bool = False
    latent: bool = False
    norm_key: str = "attention.layer_norm_rms_epsilon"
    norm_field: str = "rms_norm_eps"
    check: Callable[[Any], str | None] = lambda config: None
    extra: Callable[[Any], dict[str, Any]] = lambda config: {}
    written: bool = True
    reads: frozenset[str] = frozenset()
    may: frozenset[str] = frozenset()
    ignores: frozenset[str] = frozenset()
    lists: frozenset[str] = frozenset()
    by_layer: tuple[str, ...] = ()
    pad: int | None = None
    parts: Mapping[str, str] = field(default_factory=dict[str, str])
    unneeded: Callable[[Any, str], bool] = lambda config, name: False
    merge: Callable[[Any, gguf_parts.Shapes, Mapping[str, LazyTensor]], gguf_parts.Merged] = lambda *_: (
        {},
        set(),
    )
    mixer: Callable[[Any, str, LazyTensor], LazyTensor] = lambda config, parameter, tensor: tensor
    when: Callable[[Keys, Tensors], bool] = lambda keys, tensors: True
    fields: Callable[[Keys, Tensors], dict[str, Any]] | None = None
