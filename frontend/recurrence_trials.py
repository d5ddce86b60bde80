"""Small random arguments for functions that may be recurrences, by the names of their parameters, in each
variant that is asked for (`recurrence.py` compares what such a function gives with what is to stand for it).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

Arguments = dict[str, Any]
_ACTIVATIONS = (None, "silu", "gelu", "relu", "sigmoid", "swish", "gelu_pytorch_tanh", "gelu_new")


def _normal(*shape: int) -> Any:
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + len(shape)))


def _with(arguments: Arguments, chosen: Sequence[Any], optional: Mapping[str, Any]) -> Arguments:
    """Arguments, and those of the optional ones that were chosen."""
    named = zip(optional.items(), chosen, strict=True)
    return arguments | {name: x for (name, x), is_given in named if is_given}


def _present(given: Mapping[str, Any], *names: str) -> list[str]:
    return [name for name in names if given.get(name) is not None]


def _flags(count: int) -> list[tuple[bool, ...]]:
    return list(itertools.product((False, True), repeat=count))


def conv_trials() -> list[Arguments]:
    plain = {"hidden_states": _normal(1, 3, 7), "weight": _normal(3, 4)}
    return [
        _with({**plain, "activation": name}, [biased], {"bias": _normal(3)})
        for name, biased in itertools.product(_ACTIVATIONS, (False, True))
    ]


def conv_variant(given: Mapping[str, Any]) -> str:
    return ", ".join([str(given.get("activation")), *_present(given, "bias")])


def selective_trials() -> list[Arguments]:
    plain = {
        "hidden_states": _normal(1, 6, 7),
        "dt": _normal(1, 6, 7).abs(),
        "A": -_normal(6, 4).exp(),
        "B": _normal(1, 4, 7),
        "C": _normal(1, 4, 7),
    }
    optional = {"D": _normal(6), "z": _normal(1, 6, 7), "delta_bias": _normal(6), "delta_softplus": True}
    return [_with(plain, chosen, optional) for chosen in _flags(4)]


def selective_variant(given: Mapping[str, Any]) -> str:
    softplus = ["softplus"] if given.get("delta_softplus") else []
    return ", ".join([*softplus, *_present(given, "D", "z", "delta_bias")])


def ssd_trials() -> list[Arguments]:
    plain = {
        "hidden_states": _normal(1, 7, 4, 5),
        "dt": _normal(1, 7, 4),
        "A": -_normal(4).exp(),
        "B": _normal(1, 7, 2, 3),
        "C": _normal(1, 7, 2, 3),
        "chunk_size": 4,
    }
    optional = {"dt_bias": _normal(4), "dt_softplus": True, "dt_limit": (0.1, 0.9)}
    residual: list[Arguments] = [{}, {"D": _normal(4)}, {"D": _normal(4, 5)}]
    return [_with(plain | one, chosen, optional) for one in residual for chosen in _flags(3)]


def ssd_variant(given: Mapping[str, Any]) -> str:
    found = ["softplus"] if given.get("dt_softplus") else []
    residual = given.get("D")
    if residual is not None:
        found.append("D" if residual.dim() == 1 else f"D of {residual.dim()} axes")
    found += _present(given, "dt_bias")
    limited = tuple(given.get("dt_limit", (0.0, math.inf))) != (0.0, math.inf)
    return ", ".join([*found, *(["dt_limit"] if limited else [])])


def delta_trials() -> list[Arguments]:
    found: list[Arguments] = []
    for units, wide, fewer in _flags(3):
        heads = 2 if fewer else 4
        decay = -_normal(1, 7, 4, 5).abs()
        found.append(
            {
                "query": _normal(1, 7, heads, 5),
                "key": _normal(1, 7, heads, 5) * 0.3,
                "value": _normal(1, 7, 4, 3),
                "g": decay if wide else decay[..., 0],
                "beta": _normal(1, 7, 4).sigmoid(),
                "chunk_size": 4,
                "use_qk_l2norm_in_kernel": units,
            }
        )
    return found


def delta_variant(given: Mapping[str, Any]) -> str:
    found = [f"decays by {'element' if given['g'].dim() == given['value'].dim() else 'head'}"]
    if given.get("use_qk_l2norm_in_kernel"):
        found.append("vectors of length one")
    if given["key"].shape[-2] != given["value"].shape[-2]:
        found.append("fewer heads of keys")
    return ", ".join(found)


def linear_trials() -> list[Arguments]:
    import torch

    return [
        {
            "self": None,
            "hidden_states": _normal(1, 7, 3),
            "recurrent_gate": _normal(1, 7, 3).sigmoid(),
            "reset": torch.arange(7)[None, :, None] == 0,
            "recurrent_states": None,
        }
    ]


def wkv_trials() -> list[Arguments]:
    return [
        {
            "time_decay": _normal(3),
            "time_first": _normal(3) * 2,
            "key": _normal(1, 7, 3) * 3,
            "value": _normal(1, 7, 3),
        }
    ]
