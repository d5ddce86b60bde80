"""Rotary embeddings that are scaled only for sequences that are longer than what a model was made for.

A scaling costs a model that was not trained with it some of its quality at every length (Peng et al. 2023,
arXiv:2309.00071, "Dynamic Scaling"). So a model may hold both tables of
cosines and sines, the published ones and the scaled ones, and the position of a token says which it takes:
p is p with the published frequencies, `offset` + p is p with the scaled ones. `offset` is the context that is
compiled for, so no position is both. Who makes the positions decides for a sequence at a time, since queries
meet keys of the same frequencies only (runtime/late_scaling.py).
"""

from __future__ import annotations

from typing import Any

import torch

from ..ir.errors import UnsupportedError
from .rope import rotary_modules


class RotaryByLength(torch.nn.Module):
    """Two rotary modules of transformers as one."""

    def __init__(self, published: Any, scaled: Any, offset: int) -> None:
        super().__init__()
        self.published, self.scaled, self.offset = published, scaled, offset

    def forward(self, x: Any, position_ids: Any, *args: Any, **kwargs: Any) -> Any:
        """As both modules: their tables, or what else they make of positions, element by element from one of
        them. Raises UnsupportedError where that is no tensor with a row for each position.
        """
        is_scaled = position_ids >= self.offset
        positions = torch.where(is_scaled, position_ids - self.offset, position_ids)
        found = [module(x, positions, *args, **kwargs) for module in (self.scaled, self.published)]
        rows = is_scaled[..., None]
        if isinstance(found[0], tuple):
            return tuple(self._choose(rows, *pair) for pair in zip(*found, strict=True))
        return self._choose(rows, *found)

    def _choose(self, rows: Any, scaled: Any, published: Any) -> Any:
        if not isinstance(scaled, torch.Tensor) or scaled.shape[:-1] != rows.shape[:-1]:
            raise UnsupportedError(
                f"--rope-scaling …,when=needed: {type(self.scaled).__name__} makes something else of "
                "positions than a row of each",
                remedy="leave when=needed away",
            )
        return torch.where(rows, scaled, published)


def install(model: torch.nn.Module, published: torch.nn.Module, offset: int) -> None:
    """Give `model`, whose rotary embeddings are scaled, those of `published` beside them: the same model as
    it was published, on the meta device but for its buffers.
    """
    modules = {id(module) for module, _, _ in rotary_modules(model)}
    places = [(name, module) for name, module in model.named_modules() if id(module) in modules]
    for name, module in places:
        parent, _, last = name.rpartition(".")
        setattr(
            model.get_submodule(parent), last, RotaryByLength(published.get_submodule(name), module, offset)
        )


__all__ = ["RotaryByLength", "install"]
