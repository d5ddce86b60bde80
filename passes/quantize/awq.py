"""Activation-aware weight quantization (Lin et al. 2024, https://arxiv.org/abs/2306.00978): scales of input
channels before rounding. Tensors in, tensors out; nothing here knows a graph.

A linear layer y = W x is the same as (W · diag(s)) (x / s). Rounding W · diag(s) leaves the error Δ / s in
the columns of W, so a channel that carries much (mean |x| large) loses less with s > 1, at the expense of
the others in its group (section 3.2). s = mean|x|^α with α searched over a grid (eq. 5); the authors' later
form s = mean|x|^α / mean|w|^(1-α), the weights in units of their group's largest, is searched as well.

The error is that of the layers' outputs over all calibration tokens at once: tr(E H Eᵀ) with E = W − Ŵ and
H = Σ x xᵀ, each row counted by how much the block's output depends on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .grid import Grid, encode, search_scales, storable, turned

if TYPE_CHECKING:
    import torch

STEPS = 20  # of α, as in the paper
WORK = 1 << 28  # rows · K² that the search spends on a layer and scale; the choice is confirmed on all rows
FEW = 128  # rows that it looks at, at least
FLOOR = 1e-4  # of means, in units of their mean: a channel that never occurs is no reason to divide by zero

Constraint = Callable[["torch.Tensor"], "torch.Tensor"]


@dataclass(frozen=True)
class Layer:
    """One of the linear layers that read x: w float32 [N, K], and how much each row matters, float32 [N]."""

    w: torch.Tensor
    importance: torch.Tensor


@dataclass(frozen=True)
class Choice:
    """Scales float32 [K] that x is divided by; the error with them, and without (round to nearest)."""

    scale: torch.Tensor
    alpha: float
    error: float
    error_nearest: float


def nearest(w: torch.Tensor, grid: Grid) -> torch.Tensor:
    """w float32 [N, K] rounded to nearest as `rtn.quantize_rtn` does, back as float32."""
    import torch

    x = grid.pad(w)
    low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
    if grid.symmetric:
        largest = turned(low, high)
        scale = storable(largest.abs() / (grid.middle - 1) if grid.bits >= 8 else largest / grid.middle)
        zero = torch.full_like(scale, float(grid.middle))
    else:
        scale = storable((high - low) / grid.top)
        zero = (-low / scale).round().clamp(0, grid.top)
    codes = encode(x, scale[..., None], zero[..., None], grid.top)
    return ((codes - zero[..., None]) * scale[..., None]).reshape(w.shape[0], -1)[:, : w.shape[1]]


def output_error(error: torch.Tensor, hessian: torch.Tensor, importance: torch.Tensor) -> float:
    """Σ_n importance[n] · e_n H e_nᵀ for the errors e of rows [N, K], H [K, K]."""
    return float((((error @ hessian) * error).sum(1).double() * importance.double()).sum())


def scaled_error(layers: Sequence[Layer], hessian: torch.Tensor, scale: torch.Tensor, grid: Grid) -> float:
    """The output error of layers whose columns are scaled, rounded to nearest, and scaled back."""
    return sum(
        output_error(nearest(one.w * scale, grid) / scale - one.w, hessian, one.importance) for one in layers
    )


def relative_magnitude(layers: Sequence[Layer], grid: Grid) -> torch.Tensor:
    """By column [K]: the mean over rows of |w| in units of its group's largest."""
    import torch

    total = torch.zeros(layers[0].w.shape[1])
    for one in layers:
        x = grid.pad(one.w).abs()
        relative = x / x.amax(-1, keepdim=True).clamp(min=1e-12)
        total += relative.reshape(one.w.shape[0], -1)[:, : one.w.shape[1]].sum(0)
    return total / sum(one.w.shape[0] for one in layers)


def candidates(
    mean_abs: torch.Tensor, magnitude: torch.Tensor, steps: int = STEPS
) -> Iterator[tuple[float, torch.Tensor]]:
    """(α, s [K]) for all that is tried; s is balanced, so that its largest and least are inverse."""
    x = mean_abs / mean_abs.mean().clamp(min=1e-30)
    x = x.clamp(min=FLOOR)
    w = magnitude.clamp(min=FLOOR)
    for i in range(steps + 1):
        alpha = i / steps
        for s in (x**alpha, x**alpha / w ** (1 - alpha)):
            yield alpha, balanced(s)


def balanced(scale: torch.Tensor) -> torch.Tensor:
    """Scales whose largest times whose least is 1, so that neither side's numbers run away."""
    return scale / (scale.max() * scale.min()).sqrt()


def search_scale(
    layers: Sequence[Layer],
    hessian: torch.Tensor,
    mean_abs: torch.Tensor,
    grid: Grid,
    constrain: Constraint = lambda scale: scale,
) -> Choice:
    """The scales of x with the least output error of the layers that read it.

    Args:
        hessian: Σ x xᵀ float32 [K, K]; mean_abs: mean |x| float32 [K].
        constrain: the nearest scales [K] that the ops before can take in (`absorb.Absorption.tied`).
    The error is never above that of no scales at all.
    """
    import torch

    few = [_some_rows(one) for one in layers]
    unscaled = torch.ones_like(mean_abs)
    best = (scaled_error(few, hessian, unscaled, grid), 0.0, unscaled)
    for alpha, wanted in candidates(mean_abs, relative_magnitude(layers, grid)):
        scale = constrain(wanted)
        error = scaled_error(few, hessian, scale, grid)
        if error < best[0]:
            best = (error, alpha, scale)
    before = scaled_error(layers, hessian, unscaled, grid)
    after = scaled_error(layers, hessian, best[2], grid)
    if after < before:
        return Choice(best[2], best[1], after, before)
    return Choice(unscaled, 0.0, before, before)


def _some_rows(layer: Layer) -> Layer:
    n, k = layer.w.shape
    step = -(-n // max(FEW, WORK // (k * k)))
    return Layer(layer.w[::step].contiguous(), layer.importance[::step])


@dataclass
class Rounded:
    """The grid of one weight: scale and zero float32 [N, G], as they will be stored."""

    scale: torch.Tensor
    zero: torch.Tensor

    def codes(self, w: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Nearest codes float32 [N, K]."""
        k = w.shape[1]
        return encode(w, grid.spread(self.scale, k), grid.spread(self.zero, k), grid.top)

    def weight(self, w: torch.Tensor, grid: Grid) -> torch.Tensor:
        """float32 [N, K]: what stands for w."""
        k = w.shape[1]
        return (self.codes(w, grid) - grid.spread(self.zero, k)) * grid.spread(self.scale, k)

    def rows_scaled(self, factors: torch.Tensor) -> Rounded:
        """The grid of rows that are multiplied by factors [N]: the same codes."""
        return Rounded(storable(self.scale * factors[:, None]), self.zero)


def clip(w: torch.Tensor, hessian: torch.Tensor, grid: Grid) -> Rounded:
    """The clip search: each row and group's range shrunk so that the error weighted by E[x²] is least.

    Args:
        w: float32 [N, K], columns scaled already; hessian: Σ x xᵀ of the inputs divided by the scales.
    """
    return Rounded(*search_scales(w, hessian.diagonal().clamp(min=0), grid))
