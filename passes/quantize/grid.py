"""Grids of codes, and scales and zero points chosen by error. Tensors in, tensors out.

A grid's row and group stand for scale · (code − zero), code and zero in 0 … 2^bits − 1 (a symmetric grid's
zero is 2^(bits−1)). Round to nearest takes the scale from the largest weight; here it is the one of several
that loses least, each weight's squared error counted by how much its input carries (diag of the Hessian), as
llm-compressor's and GGML's searches do in kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

SHRINK = tuple(0.72 + 0.03 * i for i in range(13))
"""Factors of the range that are tried: 0.72 … 1.08."""
SMALLEST = float(np.finfo(np.float16).smallest_normal)
ELEMENTS = 1 << 18  # weights searched at a time: what is computed of them stays in the cache


@dataclass(frozen=True)
class Grid:
    """Bits of a code, weights that share a scale along K, and whether the zero point is fixed."""

    bits: int
    group: int
    symmetric: bool

    @property
    def top(self) -> int:
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        return 1 << (self.bits - 1)

    def groups(self, k: int) -> int:
        return -(-k // self.group)

    def pad(self, w: torch.Tensor) -> torch.Tensor:
        """[N, K] → [N, G, group], the last group filled with zeros."""
        import torch

        n, k = w.shape
        full = self.groups(k) * self.group
        return torch.nn.functional.pad(w, (0, full - k)).reshape(n, -1, self.group)

    def spread(self, per_group: torch.Tensor, k: int) -> torch.Tensor:
        """[N, G] → [N, K]."""
        return per_group.repeat_interleave(self.group, 1)[:, :k]


def storable(scale: torch.Tensor) -> torch.Tensor:
    """Scales as the float16 numbers that will be stored, in float32, never 0 and never infinite; their sign
    stays.
    """
    import torch

    largest = float(np.finfo(np.float16).max)
    return torch.where(scale < 0, -1.0, 1.0) * scale.abs().clamp(SMALLEST, largest).half().float()


def encode(w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, top: int) -> torch.Tensor:
    """Nearest codes as floats; all shapes broadcast."""
    return (w / scale).add_(zero).round_().clamp_(0, top)


def turned(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """The negative of each group's weight of largest size, of weights in low ≤ 0 … high ≥ 0: what a symmetric
    grid's scale is a share of. The grid reaches one step further down than up; a negative scale turns it
    round, so that the largest weight lies on the longer side.
    """
    import torch

    return torch.where(high > -low, -high, -low)


def search_scales(w: torch.Tensor, weight: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point float32 [N, G] of w float32 [N, K], least Σ_k weight[k] · (w − ŵ)².

    Args:
        weight: importance of each input float32 [K], such as the Hessian's diagonal.
    Round to nearest's own scale, or on a symmetric grid its negative where that reaches further, is among the
    candidates, so that the error is never above its.
    """
    import torch

    step = max(1, ELEMENTS // w.shape[1])
    parts = [_search_rows(w[i : i + step], weight, grid) for i in range(0, w.shape[0], step)]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def _search_rows(w: torch.Tensor, weight: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    x = grid.pad(w)
    importance = grid.pad(weight[None])
    low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
    best = torch.full(low.shape, float("inf"))
    best_scale, best_zero = torch.ones_like(low), torch.full_like(low, float(grid.middle))
    for scale, zero in _candidates(low, high, grid):
        step, point = scale[..., None], zero[..., None]
        error = encode(x, step, point, grid.top).sub_(point).mul_(step).sub_(x).square_()
        error = error.mul_(importance).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _candidates(low: torch.Tensor, high: torch.Tensor, grid: Grid) -> list[tuple[torch.Tensor, torch.Tensor]]:
    import torch

    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for factor in (1.0, *SHRINK):
        if grid.symmetric:
            middle = torch.full_like(low, float(grid.middle))
            largest = turned(low, high)
            found += [(storable(factor * largest / d), middle) for d in (grid.middle - 1, grid.middle)]
            continue
        scale = storable(factor * (high - low) / grid.top)
        point = -factor * low / scale
        found += [(scale, z.clamp(0, grid.top)) for z in (point.floor(), point.ceil())]
    return found
