"""GPTQ (Frantar et al. 2023, https://arxiv.org/abs/2210.17323), and what makes it lose less. Tensors in,
tensors out; nothing here knows a graph.

A linear layer with inputs x loses tr(E H Eᵀ), E = W − Ŵ, H = Σ x xᵀ. GPTQ rounds one input column after the
other and moves each column's error onto the columns that are still open. Beyond the paper:

- static groups: scales are chosen before (by error, `grid.search_scales`), so that columns can be taken in
  the order of falling diag(H) while groups stay in place;
- the target is corrected for what the quantized layers before did to x (`corrected_target`);
- given the codes, scales are refitted by least squares under H, and codes again by coordinate descent
  (`refine`), while that lowers the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .grid import Grid, encode, search_scales, storable

if TYPE_CHECKING:
    import torch

DAMPING = 0.03  # of the mean diagonal (0.01 in section 3.3 of the paper; tried in benchmarks/README.md)
BLOCK = 128  # columns whose errors are passed on to all others at once
PANEL = 16  # columns of a block whose errors are passed on to the block at once
SYSTEMS = 1 << 23  # elements of the systems that are solved at a time
GRADIENTS = 24  # steps towards the scales
TINY = 1e-30
PROPAGATION = 0.5  # how much of the earlier layers' error a layer makes up for


@dataclass
class Coded:
    """codes float32 [N, K] (whole numbers), scale and zero float32 [N, G]."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor

    def weight(self, grid: Grid) -> torch.Tensor:
        """float32 [N, K]"""
        k = self.codes.shape[1]
        return (self.codes - grid.spread(self.zero, k)) * grid.spread(self.scale, k)


@dataclass(frozen=True)
class Damped:
    """H + λI [K, K], its Cholesky factor, and the λ that it took, a share of the mean diagonal.

    order int64 [K] is the order of columns by rising importance, factor the lower L with
    LLᵀ = (H + λI)[order][:, order].
    """

    hessian: torch.Tensor
    order: torch.Tensor
    factor: torch.Tensor
    damping: float


def damped(hessian: torch.Tensor, damping: float = DAMPING) -> Damped:
    """H damped just enough.

    Inputs that never occur get a diagonal of the mean, so that their columns are rounded to nearest. A
    rank-deficient H is damped tenfold until it can be factored.
    """
    import torch

    order = by_importance(hessian).flip(0)
    mean = float(hessian.diagonal().mean())
    if not mean > 0:
        one = torch.eye(hessian.shape[0], dtype=hessian.dtype)
        return Damped(one, order, one, damping)
    h = hessian.clone()
    diagonal = h.diagonal()
    diagonal[diagonal <= 0] = mean
    diagonal.add_(damping * mean)
    factor, failed = torch.linalg.cholesky_ex(_permuted(h, order))
    while int(failed):
        diagonal.add_(9 * damping * mean)
        damping *= 10
        factor, failed = torch.linalg.cholesky_ex(_permuted(h, order))
    return Damped(h, order, factor, damping)


def by_importance(hessian: torch.Tensor) -> torch.Tensor:
    """The order of columns int64 [K]: falling diag(H)."""
    import torch

    return torch.argsort(hessian.diagonal(), descending=True, stable=True)


def _permuted(hessian: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """hessian[order][:, order] without a second matrix of that size."""
    import torch

    made = torch.empty_like(hessian)
    for rows, target in zip(order.split(BLOCK), made.split(BLOCK), strict=True):
        torch.index_select(hessian[rows], 1, order, out=target)
    return made


def corrected_target(
    w: torch.Tensor, missing: torch.Tensor, h: Damped, share: float = PROPAGATION
) -> torch.Tensor:
    """W + share · E[W (x_f − x_q) x_qᵀ] · (H + λI)⁻¹.

    With share 1 that is the weight which makes of the quantized prefix's x_q what W makes of the float
    model's x_f, by least squares.

    Args:
        missing: Σ W (x_f − x_q) x_qᵀ [N, K]; h: of Σ x_q x_qᵀ [K, K].
    """
    import torch

    change = torch.cholesky_solve(_rows(missing, h.order), h.factor)
    return w + share * change[torch.argsort(h.order)].T


def _rows(values: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Columns of values [N, _] by number as rows [len(order), N]: what is worked on at once lies together."""
    return values.T.contiguous()[order]


def quantize_gptq(
    w: torch.Tensor, h: Damped, scale: torch.Tensor, zero: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes float32 [N, K] for w [N, K] on given scales and zero points [N, G], and their `loss` [N].

    With A = L / diag(L) the loss is Σ_j L_jj² ((E A)_j)², and a column of E A knows its own error and those
    of the columns behind it. Taken from the last to the first, each column is rounded so that its term is as
    small as it can be. The codes are the paper's (proved in section 4 of Chee et al. 2023,
    https://arxiv.org/abs/2307.13304), for one factorization instead of two and an inverse.
    """
    import torch

    k = w.shape[1]
    groups = h.order // grid.group
    scales = _rows(scale, groups)
    inverse = scales.reciprocal()
    # With zero · scale added on both sides, a code is w / scale.
    given = _rows(w, h.order).addcmul_(_rows(zero, groups), scales)
    wanted = given.clone()  # given, and what makes up for the errors so far
    codes = torch.empty_like(given)
    pivots = h.factor.diagonal()
    unit = torch.div(h.factor, pivots, out=torch.empty(k, k, dtype=w.dtype))  # by rows, as it is read
    # Rows apart once: slicing a tensor for each costs as much as the arithmetic.
    givens, wants, inverses, sizes, coded = (t.unbind() for t in (given, wanted, inverse, scales, codes))
    lost = torch.zeros(len(w), dtype=w.dtype)
    for stop in range(k, 0, -BLOCK):
        start = max(0, stop - BLOCK)
        errors = torch.empty_like(given[start:stop])
        for last in range(stop, start, -PANEL):
            first = max(start, last - PANEL)
            for i in reversed(range(first, last)):
                q = torch.mul(wants[i], inverses[i], out=coded[i]).round_().clamp_(0, grid.top)
                error = torch.sub(givens[i], q.mul(sizes[i]), out=errors[i - start])
                if i > first:
                    wanted[first:i].addr_(unit[i, first:i], error)
            if first > start:
                done = slice(first - start, last - start)
                wanted[start:first].addmm_(unit[first:last, start:first].T, errors[done])
        if start:
            wanted[:start].addmm_(unit[start:stop, :start].T, errors)
        block = slice(start, stop)
        left = torch.addcmul(wanted[block], codes[block], scales[block], value=-1)
        lost += left.mul_(pivots[block, None]).square_().sum(0)
    return codes[torch.argsort(h.order)].T.contiguous(), lost


def better_rows(error: torch.Tensor, lost: torch.Tensor, h: Damped) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows int64 of error = W − Ŵ [N, K] whose `loss` is below lost [N], and theirs.

    A sum of squares, added up from the most important column on until it is above: that takes few columns
    where the error is no good.
    """
    import torch

    rows = torch.arange(len(error))
    sums = torch.zeros_like(lost)
    error = error[:, h.order]
    for stop in range(error.shape[1], 0, -4 * BLOCK):
        part = slice(max(0, stop - 4 * BLOCK), stop)
        sums += (error[:, part.start :] @ h.factor[part.start :, part]).square_().sum(1)
        open_ = sums < lost[rows]
        error, sums, rows = error[open_], sums[open_], rows[open_]
        if not len(rows):
            break
    return rows, sums


def loss(w: torch.Tensor, approximation: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """By row [N]: (w − ŵ) H (w − ŵ)ᵀ."""
    error = w - approximation
    return ((error @ hessian) * error).sum(1)


def gptq(w: torch.Tensor, h: Damped, grid: Grid) -> tuple[Coded, torch.Tensor]:
    """w float32 [N, K] on the grid, for inputs with H = Σ x xᵀ [K, K]; and the `loss` [N].

    Rows where round to nearest on the same scales loses less keep it: the loss is never above its.
    """
    k = w.shape[1]
    scale, zero = search_scales(w, h.hessian.diagonal(), grid)
    codes, lost = quantize_gptq(w, h, scale, zero, grid)
    nearest = encode(w, grid.spread(scale, k), grid.spread(zero, k), grid.top)
    rows, less = better_rows(w - Coded(nearest, scale, zero).weight(grid), lost, h)
    codes[rows], lost[rows] = nearest[rows], less
    return Coded(codes, scale, zero), lost


def refine(
    w: torch.Tensor, found: Coded, lost: torch.Tensor, hessian: torch.Tensor, grid: Grid
) -> tuple[Coded, torch.Tensor]:
    """Scales by least squares under H given the codes, then a sweep of coordinate descent over the codes; and
    the `loss` by row [N], `lost` before.

    Rows whose scales do not gain keep them.
    """
    import torch

    scale, gain = refit_scales(w, found, hessian, grid)
    better = gain > 0
    moved = Coded(found.codes, torch.where(better[:, None], scale, found.scale), found.zero)
    moved.codes, more = descend(w, moved, hessian, grid)
    return moved, lost - gain.clamp(min=0) - more


def refit_scales(
    w: torch.Tensor, found: Coded, hessian: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales [N, G] with least loss for fixed codes and zero points: a G × G system for every row; and how
    much less the `loss` [N] is with them.
    """
    import torch

    n, k = w.shape
    step = max(1, SYSTEMS // grid.groups(k) ** 2)
    scale, gain = torch.empty_like(found.scale), torch.empty(n, dtype=w.dtype)
    for a in range(0, n, step):
        part = Coded(*(t[a : a + step] for t in (found.codes, found.scale, found.zero)))
        scale[a : a + step], gain[a : a + step] = _refit_rows(w[a : a + step], part, hessian, grid)
    return scale, gain


def _refit_rows(
    w: torch.Tensor, found: Coded, hessian: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    n, k = w.shape
    groups = grid.groups(k)
    whole = found.codes - grid.spread(found.zero, k)
    right = grid.pad(whole * (w @ hessian)).sum(-1)
    system = torch.empty(n, groups, groups)
    for g in range(groups):
        first, last = g * grid.group, min((g + 1) * grid.group, k)
        products = (whole[:, first:last] @ hessian[first:last, first:]) * whole[:, first:]
        system[:, g, g:] = grid.pad(products).sum(-1)
        system[:, g:, g] = system[:, g, g:]
    right -= (system @ found.scale[..., None])[..., 0]
    diagonal = system.diagonal(dim1=1, dim2=2)
    ridge = 1e-4 * diagonal.mean(1, keepdim=True) + 1e-12
    diagonal.add_(ridge)
    scale = found.scale + _solve(system, right)
    ratio = scale / found.scale
    good = (ratio > 0.5) & (ratio < 2)  # a group that flips its sign is kept
    scale = storable(torch.where(good, scale, found.scale))
    diagonal.sub_(ridge)
    change = scale - found.scale
    return scale, 2 * (change * right).sum(1) - (change * (system @ change[..., None])[..., 0]).sum(1)


def _solve(system: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """About system⁻¹ right [N, G] for positive definite systems [N, G, G]: conjugate gradients with the
    diagonal as preconditioner (Golub & Van Loan, section 11.5). Each step loses less, so few are enough.

    Not LAPACK: MKL's batches of LU hang where a program has set torch's threads.
    """
    import torch

    inverse = system.diagonal(dim1=1, dim2=2).reciprocal()
    x = torch.zeros_like(right)
    rest = right
    ahead = inverse * rest
    step = ahead
    size = (rest * ahead).sum(1, keepdim=True)
    for _ in range(min(GRADIENTS, right.shape[1])):
        image = (system @ step[..., None])[..., 0]
        share = size / (step * image).sum(1, keepdim=True).clamp(min=TINY)
        x = x + share * step
        rest = rest - share * image
        ahead = inverse * rest
        before, size = size, (rest * ahead).sum(1, keepdim=True)
        step = ahead + size / before.clamp(min=TINY) * step
    return x


def descend(
    w: torch.Tensor, found: Coded, hessian: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sweep: each column's code is set to the best one given all others (CDQuant, cyclic). Codes [N, K],
    and how much less the `loss` [N] is with them.
    """
    import torch

    n, k = w.shape
    order = by_importance(hessian)
    h = _permuted(hessian, order)
    scales = _rows(found.scale, order // grid.group)
    codes = _rows(found.codes, order)
    error = (codes - _rows(found.zero, order // grid.group)).mul_(scales).sub_(_rows(w, order))  # ŵ − w
    steps = (scales * h.diagonal()[:, None]).reciprocal_()
    gain = torch.zeros(n, dtype=w.dtype)
    sizes, rates, coded = (t.unbind() for t in (scales, steps, codes))
    for start in range(0, k, BLOCK):
        stop = min(start + BLOCK, k)
        gradient = h[start:stop] @ error  # of the block's columns
        changes = torch.empty_like(gradient)
        for first in range(start, stop, PANEL):
            last = min(first + PANEL, stop)
            for i in range(first, last):
                at = i - start
                new = torch.addcmul(coded[i], gradient[at], rates[i], value=-1).round_().clamp_(0, grid.top)
                change = torch.sub(new, coded[i], out=changes[at]).mul_(sizes[i])
                coded[i].copy_(new)
                if i + 1 < last:
                    gradient[at + 1 : last - start].addr_(h[i + 1 : last, i], change)
            if last < stop:
                done = slice(first - start, last - start)
                gradient[last - start :].addmm_(h[last:stop, first:last], changes[done])
        error[start:stop] += changes
        # By a change d of one column the loss falls by −d (2 g + d h), g being its gradient just before.
        gain -= gradient.mul_(2).addcmul_(changes, h.diagonal()[start:stop, None]).mul_(changes).sum(0)
    return codes[torch.argsort(order)].T.contiguous(), gain
