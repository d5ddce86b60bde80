"""Tensors that a model makes and fills part by part, and choices: as values of the graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from llmc.frontend.trace import trace_module
from llmc.ir.core import Graph
from llmc.ir.errors import UnsupportedError
from llmc.ir.interpreter import run

X = torch.arange(12, dtype=torch.float32).reshape(3, 4) - 5.25  # no two of equal size


class _Module(torch.nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def traced(function: Any) -> Graph:
    return trace_module(_Module(function), (X,))


def _joined(x: torch.Tensor) -> torch.Tensor:
    out = x.new_empty(3, 9)
    out[..., :4].copy_(x)
    out[..., 4:8].copy_(x * 2)
    out[..., 8:].copy_(x[:, :1])
    return out


def _middle(x: torch.Tensor) -> torch.Tensor:
    out = x + 1
    before = out * 2
    out[:, 1:3] = x[:, :2]
    return before + out


def _added(x: torch.Tensor) -> torch.Tensor:
    out = x * 2
    out[1:] += x[:2]
    out[:, 1:3].mul_(3)
    out[:1].zero_()
    out[:, 3:] = 7.5
    return out


def _through_another_order(x: torch.Tensor) -> torch.Tensor:
    out = (x + 1).t()
    out += 2
    return out * x.t()


def _chosen(x: torch.Tensor) -> torch.Tensor:
    values, places = torch.topk(x.abs(), 2, dim=-1, sorted=False)
    mask = torch.zeros_like(x).scatter_(1, places, 1)
    hot = torch.nn.functional.one_hot(places, 4).sum(1)
    return x.masked_fill(~mask.bool(), 0.0) + values.sum(-1, keepdim=True) + hot


@pytest.mark.parametrize("function", [_joined, _middle, _added, _through_another_order, _chosen])
def test_it_is_what_torch_computes(function: Any) -> None:
    (got,) = run(traced(function), {"x": X})
    assert torch.equal(got, function(X))


def test_parts_that_are_written_whole_leave_no_trace_of_the_memory() -> None:
    graph = traced(_joined)
    graph.drop_dead()
    made = [op for op in graph if op.opname in ("full", "slice") and op.result.type.rank > 1]
    assert [op.opname for op in made] == ["slice"]  # the one that the model itself takes


def _seen_before(x: torch.Tensor) -> torch.Tensor:
    out = x + 1
    half = out[:, :2]
    out[:, :1].copy_(x[:, :1])
    return half * 2


def _through_a_view(x: torch.Tensor) -> torch.Tensor:
    out = x + 1
    out.t()[:2].copy_(x.t()[:2])
    return out


def _with_gaps(x: torch.Tensor) -> torch.Tensor:
    out = x + 1
    out[:, ::2].copy_(x[:, ::2])
    return out


def _read_under_an_old_name(x: torch.Tensor) -> torch.Tensor:
    out = x + 1
    first = out[:1]
    out[:2] += 3
    return first + out


def _added_to_what_is_seen(x: torch.Tensor) -> torch.Tensor:
    out = x + 1
    out.t().add_(2)
    return out


@pytest.mark.parametrize("function", [_added_to_what_is_seen, _read_under_an_old_name])
def test_what_is_changed_and_read_under_another_name_is_refused(function: Any) -> None:
    with pytest.raises(UnsupportedError, match=r"on a part of (another )?tensor|on a part of a tensor"):
        traced(function)


def test_an_input_that_is_changed_through_a_view_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="changes x while it runs"):
        traced(lambda x: x.t().add_(1))


@pytest.mark.parametrize("function", [_seen_before, _through_a_view, _with_gaps])
def test_what_shares_memory_otherwise_is_refused(function: Any) -> None:
    with pytest.raises(UnsupportedError, match=r"aten\.copy_\.default on a part"):
        traced(function)
