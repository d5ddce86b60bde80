"""References of ops that take faster ways through torch: the same as the plain definition in float64."""

from __future__ import annotations

import math

import pytest
import torch
from llmc.ir.ops.attention import attend
from llmc.ir.ops.nn import linear


@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 3, 5), (0, 5), (2, 640)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_is_the_product(shape: tuple[int, ...], bias: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    x, w = torch.randn(shape, generator=rng), torch.randn(7, shape[-1], generator=rng)
    b = torch.randn(7, generator=rng) if bias else None
    expected = x.double() @ w.double().T + (0 if b is None else b.double())
    torch.testing.assert_close(linear(x, w, b).double(), expected, rtol=1e-5, atol=1e-5)
    back = w.T.contiguous().T  # columns lie together
    torch.testing.assert_close(linear(x, back, b).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(linear(x.double(), w, b), expected, rtol=1e-12, atol=1e-12)


def test_linear_has_gradients() -> None:
    x, w = torch.randn(3, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    linear(x, w).sum().backward()
    assert x.grad is not None and w.grad is not None
    torch.testing.assert_close(x.grad, w.detach().sum(0).expand(3, 5))
    torch.testing.assert_close(w.grad, x.detach().sum(0).expand(7, 5))


@pytest.mark.parametrize("window", [None, 4, 100])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("later", [0, 3])
def test_attention_is_softmax_over_what_is_seen(window: int | None, causal: bool, later: int) -> None:
    """Queries that begin `later` than the keys, as after a prefix."""
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(t, h, 8, generator=rng) for t, h in ((9, 4), (9 + later, 2), (9 + later, 2)))
    at, keys = torch.arange(9) + later, torch.arange(9 + later)
    found = attend(q, k, v, None, (at, keys), scale=0.3, causal=causal, window=window, softcap=None)
    for i in range(9):
        for h in range(4):
            scores = 0.3 * k[:, h // 2].double() @ q[i, h].double()
            distance = at[i] - keys
            hidden = (distance < 0 if causal else torch.zeros(9 + later, dtype=torch.bool)) | (
                distance.abs() >= (window or math.inf)
            )
            p = scores.masked_fill(hidden, -math.inf).softmax(0)
            torch.testing.assert_close(found[i, h].double(), p @ v[:, h // 2].double(), rtol=1e-5, atol=1e-5)
