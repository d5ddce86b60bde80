"""Checkpoints of AutoRound, which packs as other formats do and says as which (`packing_format`).

    auto_round:auto_gptq                  GPTQ's, zero points less one
    auto_round, auto_round:gptqmodel      GPTQ's, zero points as they are
    auto_round:auto_awq                   AWQ's ("gemm")

`extra_config` has bits and group of single modules, by name. https://github.com/intel/auto-round
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from ...ir.errors import UnsupportedError
from ...ir.weights import LazyTensor
from .awq import open_awq
from .checks import Config
from .gptq import open_gptq

_Open = Callable[[Mapping[str, LazyTensor], Config], dict[str, LazyTensor]]
_PACKINGS: Final[dict[str, tuple[_Open, str]]] = {
    "auto_round:auto_gptq": (open_gptq, "gptq"),
    "auto_round:gptq": (open_gptq, "gptq"),
    "auto_round:gptqmodel": (open_gptq, "gptq_v2"),
    "auto_round": (open_gptq, "gptq_v2"),
    "auto_round:auto_awq": (open_awq, "gemm"),
    "auto_round:awq": (open_awq, "gemm"),
}
_OF_MODULES: Final = ("bits", "group_size", "sym")


def open_autoround(tensors: Mapping[str, LazyTensor], config: Config) -> dict[str, LazyTensor]:
    """The tensors with every quantized module's parts replaced by its `weight`.

    Raises InputError where configuration and tensors disagree, UnsupportedError for another packing.
    """
    packing = config.get("packing_format", "auto_round:auto_gptq")
    if not isinstance(packing, str) or packing not in _PACKINGS:
        raise UnsupportedError(
            f"the AutoRound checkpoint is packed as {str(packing)[:40]!r}",
            remedy=f"give one of {', '.join(_PACKINGS)}",
        )
    importer, layout = _PACKINGS[packing]
    whole = {**config, "checkpoint_format": layout}
    special = config.get("extra_config")
    special = special if isinstance(special, Mapping) else {}
    apart: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in tensors.items():
        module = name.rpartition(".")[0]
        apart.setdefault(module if module in special else "", {})[name] = tensor
    found: dict[str, LazyTensor] = {}
    for module, own in apart.items():
        found |= importer(own, _with(whole, special.get(module)))
    return found


def _with(config: Config, settings: Any) -> Config:
    """The configuration with what is said of one module."""
    if not isinstance(settings, Mapping):
        return config
    return {**config, **{name: settings[name] for name in _OF_MODULES if settings.get(name) is not None}}
