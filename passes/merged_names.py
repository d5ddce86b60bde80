"""Names of merged weights: the first part's, then what the others are called beside it.

    model.layers.0.self_attn.q_proj.weight+k_proj+v_proj         siblings
    model.layers.0.self_attn.q_proj.weight+k_proj+-mlp-fc1       -mlp-fc1: model.layers.0.mlp.fc1

Each leading "-" goes up by one module, the others stand for dots: what is quantized later adds ".q" and the
like to the end, and weights that are stored on several grids are cut into pieces, "….part0" and so on.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_PIECE = re.compile(r"\.part\d+$")


def without_piece(name: str) -> str:
    """The name of the weight that one of this name is a piece of (`split_by_grid`), or its own."""
    return _PIECE.sub("", name)


def merged_name(names: Sequence[str]) -> str:
    """The name of the weight that is made of those: names of parameters, or of weights that were merged."""
    first, *others = (one for name in names for one in merged_names(name))
    return "+".join([first, *(_beside(first, other) for other in others)])


def merged_names(name: str) -> list[str]:
    """Full names of the parameters that a merged weight's name lists; the name itself where nothing is
    merged.
    """
    first, *others = name.split("+")
    module, dot, kind = first.rpartition(".")
    if not others or not dot:
        return [name]
    above = module.rpartition(".")[0]
    return [first, *(f"{_module_beside(above, other.split('.')[0].rstrip('_'))}.{kind}" for other in others)]


def _module_beside(above: str, other: str) -> str:
    """The full name of a module that a merged weight's name lists, whose first part is in module `above`."""
    up = len(other) - len(other.lstrip("-"))
    path = [*above.split("."), other] if not up else [*above.split(".")[:-up], *other[up:].split("-")]
    return ".".join(part for part in path if part)


def _beside(first: str, other: str) -> str:
    if other.count(".") < 2:
        return other
    above, module, _ = other.rsplit(".", 2)
    mine = first.split(".")[:-2]
    if mine == above.split("."):
        return module
    theirs = [*above.split("."), module]
    if not mine:
        return module
    same = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), len(mine))
    same = min(same, len(mine) - 1)
    return "-" * (len(mine) - same) + "-".join(theirs[same:])
