"""Small random arguments for functions that may be recurrences, by the names of their parameters
(`recurrence.py` compares what such a function gives with what is to stand for it).
"""

from __future__ import annotations

from typing import Any


def _normal(*shape: int) -> Any:
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + len(shape)))


def conv_trial(activation: str | None) -> dict[str, Any]:
    return {
        "hidden_states": _normal(1, 3, 7),
        "weight": _normal(3, 4),
        "bias": _normal(3),
        "activation": activation,
    }


def selective_trial(softplus: bool) -> dict[str, Any]:
    return {
        "hidden_states": _normal(1, 6, 7),
        "dt": _normal(1, 6, 7).abs(),
        "A": -_normal(6, 4).exp(),
        "B": _normal(1, 4, 7),
        "C": _normal(1, 4, 7),
        "D": _normal(6),
        "z": _normal(1, 6, 7),
        "delta_bias": _normal(6),
        "delta_softplus": softplus,
    }


def ssd_trial(softplus: bool) -> dict[str, Any]:
    return {
        "hidden_states": _normal(1, 7, 4, 5),
        "dt": _normal(1, 7, 4),
        "A": -_normal(4).exp(),
        "B": _normal(1, 7, 2, 3),
        "C": _normal(1, 7, 2, 3),
        "chunk_size": 4,
        "D": _normal(4),
        "dt_bias": _normal(4),
        "dt_softplus": softplus,
        "dt_limit": (0.1, 0.9),
    }


def delta_trial(units: bool, wide: bool) -> dict[str, Any]:
    decay = -_normal(1, 7, 4, 5).abs()
    return {
        "query": _normal(1, 7, 4, 5),
        "key": _normal(1, 7, 4, 5) * 0.3,
        "value": _normal(1, 7, 4, 3),
        "g": decay if wide else decay[..., 0],
        "beta": _normal(1, 7, 4).sigmoid(),
        "chunk_size": 4,
        "use_qk_l2norm_in_kernel": units,
    }


def linear_trial() -> dict[str, Any]:
    import torch

    return {
        "self": None,
        "hidden_states": _normal(1, 7, 3),
        "recurrent_gate": _normal(1, 7, 3).sigmoid(),
        "reset": torch.arange(7)[None, :, None] == 0,
        "recurrent_states": None,
    }
