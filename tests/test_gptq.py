"""GPTQ's maths against a float64 reference that follows the paper step by step, and its promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llmc.passes.quantize.gptq import (
    DAMPING,
    Coded,
    Damped,
    better_rows,
    by_importance,
    corrected_target,
    damped,
    descend,
    gptq,
    loss,
    quantize_gptq,
    refine,
    refit_scales,
)
from llmc.passes.quantize.grid import Grid, encode, search_scales, storable

GRIDS = [Grid(4, 8, False), Grid(4, 16, True), Grid(3, 8, False), Grid(8, 24, True)]


def problem(seed: int, n: int = 5, k: int = 24, rank: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """w [n, k] and H [k, k] of correlated inputs of uneven size, float32."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((200, rank or k)) @ rng.standard_normal((rank or k, k))
    x *= np.exp(rng.standard_normal(k))
    w = rng.standard_normal((n, k)) * 0.1
    return torch.tensor(w, dtype=torch.float32), torch.tensor(x.T @ x / 200, dtype=torch.float32)


def nearest(w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, grid: Grid) -> Coded:
    k = w.shape[1]
    return Coded(encode(w, grid.spread(scale, k), grid.spread(zero, k), grid.top), scale, zero)


def undamped(h: torch.Tensor) -> Damped:
    order = by_importance(h).flip(0)
    return Damped(h, order, torch.linalg.cholesky(h[order][:, order]), 0)


def paper(w: np.ndarray, h: np.ndarray, scale: np.ndarray, zero: np.ndarray, top: int) -> np.ndarray:
    """Optimal brain quantization in a fixed order (section 3.2 and 3.3).

    Round a column, move the others that are open by −error / [H_F⁻¹]_qq · (H_F⁻¹)_q, F the open columns;
    the inverse is computed anew each time.
    """
    w = w.astype(np.float64).copy()
    order = np.argsort(-np.diag(h), kind="stable")
    codes = np.zeros_like(w)
    for i, q in enumerate(order):
        rest = order[i:]
        inverse = np.linalg.inv(h[np.ix_(rest, rest)])
        codes[:, q] = np.clip(np.rint(w[:, q] / scale[:, q] + zero[:, q]), 0, top)
        error = w[:, q] - (codes[:, q] - zero[:, q]) * scale[:, q]
        w[:, rest] -= np.outer(error / inverse[0, 0], inverse[0])
    return codes


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_codes_are_those_of_the_paper(grid: Grid, seed: int) -> None:
    w, h = problem(seed)
    h = damped(h).hessian
    scale, zero = search_scales(w, h.diagonal(), grid)
    wide = [grid.spread(part, w.shape[1]).double().numpy() for part in (scale, zero)]
    expected = paper(w.numpy(), h.double().numpy(), *wide, grid.top)
    found, lost = quantize_gptq(w.double(), undamped(h.double()), scale.double(), zero.double(), grid)
    np.testing.assert_array_equal(found.numpy(), expected)
    back = Coded(found, scale.double(), zero.double()).weight(grid)
    torch.testing.assert_close(lost, loss(w.double(), back, h.double()))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(GRIDS), st.integers(1, 30))
def test_the_loss_is_never_above_round_to_nearests(seed: int, grid: Grid, rank: int) -> None:
    w, h = problem(seed, rank=min(rank, 24))
    fixed = damped(h)
    full = fixed.hessian
    found = refine(w, *gptq(w, fixed, grid), full, grid)[0]
    plain = nearest(
        w, *search_scales(w, torch.ones(w.shape[1]), Grid(grid.bits, grid.group, grid.symmetric)), grid
    )
    searched = nearest(w, *search_scales(w, full.diagonal(), grid), grid)
    got = loss(w.double(), found.weight(grid).double(), full.double())
    best = loss(w.double(), searched.weight(grid).double(), full.double())
    assert bool((got <= best * (1 + 1e-4) + 1e-9).all())
    assert bool(torch.isfinite(plain.weight(grid)).all())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(GRIDS))
def test_searched_scales_lose_no_more_than_the_ranges(seed: int, grid: Grid) -> None:
    w, h = problem(seed)
    scale, zero = search_scales(w, h.diagonal(), grid)
    x = grid.pad(w)
    low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
    if grid.symmetric:
        plain_scale = torch.maximum(-low, high) / (grid.middle - 1)
        plain_zero = torch.full_like(low, grid.middle)
    else:
        plain_scale = (high - low) / grid.top
        plain_zero = (-low / plain_scale).round()
    plain_scale = plain_scale.half().float()

    def error(s: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return ((nearest(w, s, z, grid).weight(grid) - w) ** 2 * h.diagonal()).sum(1)

    assert bool((error(scale, zero) <= error(plain_scale, plain_zero) * (1 + 1e-4) + 1e-9).all())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_symmetric_grid_has_its_longer_side_where_the_largest_weight_is(bits: int) -> None:
    """Multiples of a step from −(2^(bits−1) − 1) to 2^(bits−1), and their negatives, are on the grid."""
    grid = Grid(bits, 1 << bits, True)
    whole = torch.arange(1 - grid.middle, grid.middle + 1).float()
    w = 0.25 * torch.stack([whole, -whole])
    scale, zero = search_scales(w, torch.ones(w.shape[1]), grid)
    assert scale.flatten().tolist() == [-0.25, 0.25]
    assert torch.equal(nearest(w, scale, zero, grid).weight(grid), w)


def test_storable_scales_keep_their_sign() -> None:
    given = torch.tensor([0.1, -0.1, 1e-9, -1e-9, 1e9, -1e9, 0.0])
    stored = storable(given)
    assert torch.equal(stored, stored.half().float()) and bool((stored != 0).all())
    assert stored.sign().tolist() == [1, -1, 1, -1, 1, -1, 1]
    torch.testing.assert_close(stored[:2], given[:2], rtol=1e-3, atol=0)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_refitting_solves_the_normal_equations(grid: Grid) -> None:
    """Against float64 least squares over the square root of H, before scales are rounded and bounded."""
    w, h = problem(3, n=4)
    h = damped(h).hessian
    scale, zero = search_scales(w, h.diagonal(), grid)
    found = Coded(quantize_gptq(w, undamped(h), scale, zero, grid)[0], scale, zero)
    k, groups = w.shape[1], scale.shape[1]
    root = np.linalg.cholesky(h.double().numpy())
    scales, gain = refit_scales(w, found, h, grid)
    before, after = (
        loss(w.double(), Coded(found.codes, s, zero).weight(grid).double(), h.double())
        for s in (scale, scales)
    )
    torch.testing.assert_close(gain.double(), before - after, rtol=1e-3, atol=1e-5 * float(before.max()))
    refit = scales.double().numpy()
    whole = (found.codes - grid.spread(zero, k)).double().numpy()
    for row in range(len(w)):
        columns = np.zeros((k, groups))
        for g in range(groups):
            part = slice(g * grid.group, (g + 1) * grid.group)
            columns[part, g] = whole[row, part]
        best = np.linalg.lstsq(root.T @ columns, root.T @ w[row].double().numpy(), rcond=None)[0]
        change = best / scale[row].numpy()
        kept = (change <= 0.5) | (change >= 2)
        np.testing.assert_allclose(refit[row][~kept], best[~kept], rtol=5e-3)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_sweep_changes_codes_only_for_less_loss(grid: Grid) -> None:
    w, h = problem(11, n=8)
    h = damped(h).hessian
    start = nearest(w, *search_scales(w, h.diagonal(), grid), grid)
    codes, gain = descend(w, start, h, grid)
    moved = Coded(codes, start.scale, start.zero)
    before, after = loss(w, start.weight(grid), h), loss(w, moved.weight(grid), h)
    assert bool((after <= before * (1 + 1e-5)).all())
    assert float(after.sum()) < 0.9 * float(before.sum())
    torch.testing.assert_close(gain, before - after, rtol=1e-3, atol=1e-5 * float(before.max()))
    refined, now = refine(w, start, before, h, grid)
    assert bool((now <= before).all())
    torch.testing.assert_close(loss(w, refined.weight(grid), h), now)


def test_the_corrected_target_undoes_a_linear_error() -> None:
    """Inputs that came out as A x instead of x are made up for by W A⁻¹ (share 1, hardly any damping)."""
    rng = np.random.default_rng(0)
    x = torch.tensor(rng.standard_normal((4000, 6)), dtype=torch.float64)
    mixed = x @ (torch.eye(6, dtype=torch.float64) + 0.1 * torch.tensor(rng.standard_normal((6, 6))))
    w = torch.tensor(rng.standard_normal((3, 6)))
    missing, hessian = w @ (x - mixed).T @ mixed / 4000, mixed.T @ mixed / 4000
    target = corrected_target(w, missing, undamped(hessian), share=1.0)
    left = ((mixed @ target.T - x @ w.T) ** 2).mean() / ((mixed @ w.T - x @ w.T) ** 2).mean()
    assert float(left) < 0.02


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_zero_constant_and_dead_parts(grid: Grid) -> None:
    w, h = problem(5)
    w[0] = 0
    w[1] = 0.25
    h[:, 7] = h[7, :] = 0
    fixed = damped(h)
    found = refine(w, *gptq(w, fixed, grid), fixed.hessian, grid)[0]
    back = found.weight(grid)
    assert bool(torch.isfinite(back).all())
    assert bool((back[0] == 0).all())
    assert bool(((found.codes >= 0) & (found.codes <= grid.top)).all())
    assert float((back[1] - 0.25).abs().max()) < 0.25 / 2


def test_damping_rises_until_a_rank_deficient_hessian_can_be_factored() -> None:
    h = torch.zeros(6, 6)
    h[0, 0] = 1.0
    h[0, 1] = h[1, 0] = 1.7  # not even semidefinite
    h[1, 1] = 1.0
    fixed = damped(h)
    assert fixed.damping > DAMPING
    product = fixed.factor @ fixed.factor.T
    torch.testing.assert_close(product, fixed.hessian[fixed.order][:, fixed.order])
    assert damped(torch.eye(6)).damping == DAMPING


@pytest.mark.parametrize("columns", [24, 700])
def test_better_rows_are_those_with_less_loss(columns: int) -> None:
    """Below and above what is looked at in one step."""
    w, h = problem(2, n=16, k=columns)
    fixed = undamped(damped(h).hessian.double())
    error = 0.01 * w.double()
    exact = loss(error, torch.zeros_like(error), fixed.hessian)
    given = exact * torch.linspace(0.5, 1.5, 16)
    rows, sums = better_rows(error, given, fixed)
    assert rows.tolist() == list(range(8, 16))
    torch.testing.assert_close(sums, exact[8:])
