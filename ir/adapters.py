"""Adapters: small changes of a model's weights, published apart from it. Only what they consist of; reading
them is the frontend's, merging them a pass's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from .weights import LazyTensor

MOST = 1e9
"""Of what scales a change: products of it stay finite in float32."""
_SHOWN = 6


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


@dataclass(frozen=True, eq=False)
class LowRank:
    """A weight's change: scaling · B A (LoRA, Hu et al. 2021, section 4.1).

    Attributes:
        a: [r, K]. b: [N, r]. bias: [N], added to the layer's bias after scaling, or None.
        scaling: alpha / r, or alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023).
        transposed: the weight is [K, N] (fan_in_fan_out, and embeddings: [V, D] changed by (B A)ᵀ).
        embedding: it changes a table of rows by id.
        magnitude: [N] of DoRA (Liu et al. 2024, section 4): rows of weight + change are scaled to these
            norms; None for LoRA.
    """

    a: LazyTensor
    b: LazyTensor
    scaling: float
    transposed: bool = False
    magnitude: LazyTensor | None = None
    bias: LazyTensor | None = None
    embedding: bool = False


@dataclass(frozen=True, eq=False)
class OfParameters:
    """Changes of a module that may be of its parameters (PEFT's `target_parameters`): of a matrix, or of E
    stacked ones, as of experts, where scaling · B_e A_e is what matrix e gains. Files say of which module;
    each of its parameters that the adapter targets has one, in the module's order. A module without any is
    changed itself.

    Attributes:
        factors: a [E · r, K], rows e · r … of matrix e, and b [N, r · E], column j · E + e being column j of
            matrix e; of each.
        rules: rank r and scaling, by the parameter's own name ("down_proj"); None for one that is not
            targeted.
        itself: the change of the module itself. Raises InputError where it is none.
    """

    factors: Sequence[tuple[LazyTensor, LazyTensor]]
    rules: Callable[[str], tuple[int, float] | None]
    itself: Callable[[], LowRank]


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Rows that take the place of a weight's [V, D] (PEFT's `trainable_token_indices`).

    Attributes:
        ids: which, each once.
        rows: [len(ids), D].
    """

    ids: tuple[int, ...]
    rows: LazyTensor


@dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter.

    Attributes:
        name: for people: its folder's name.
        changes: by the name of the module that is changed ("model.layers.0.self_attn.q_proj").
        replaced: whole tensors in the place of the model's, by parameter name.
        optional: those of `replaced` that PEFT saved unasked (embeddings beside their adapter): where the
            model has none of that name, because it is tied, nothing is lost.
        copies: those of `replaced` that are the base's own: PEFT saves an embedding beside its change.
        parameters: those that may be of parameters, by the name of the module that holds them.
        rows: of single tokens, by the name of the module. Where the model ties embeddings and output head,
            and there are none of the head, they are of both.
    """

    name: str
    changes: Mapping[str, LowRank]
    replaced: Mapping[str, LazyTensor]
    optional: frozenset[str] = frozenset()
    copies: frozenset[str] = frozenset()
    parameters: Mapping[str, OfParameters] = field(default_factory=dict[str, OfParameters])
    rows: Mapping[str, TokenRows] = field(default_factory=dict[str, TokenRows])

    def __str__(self) -> str:
        return self.name
