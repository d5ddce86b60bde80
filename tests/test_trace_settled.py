"""Models that change their weights when they first run, and tokens from further back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from llmc.frontend.trace import trace_module
from llmc.ir.errors import UnsupportedError
from llmc.ir.interpreter import run
from torch import nn

X = torch.linspace(-2, 3, 12).reshape(3, 4)


class Halving(nn.Module):
    """Divides a weight when it runs, once or each time."""

    def __init__(self, *, once: bool, part: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 5, bias=False)
        self.once, self.part, self.halved = once, part, False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.halved:
            weight = self.linear.weight[:2] if self.part else self.linear.weight
            with torch.no_grad():
                weight.div_(2)
            self.halved = self.once
        return self.linear(x)


def test_a_weight_that_is_changed_once_is_compiled_as_it_is_behind_that() -> None:
    model = Halving(once=True)
    before = model.linear.weight.detach().clone()
    (got,) = run(trace_module(model, (X,)), {"x": X})
    torch.testing.assert_close(got, X @ before.T / 2)
    assert torch.equal(model.linear.weight, before), "the module is as it was"
    assert not model.halved
    torch.testing.assert_close(model(X), got)


@pytest.mark.parametrize("model", [Halving(once=False), Halving(once=True, part=True)])
def test_a_weight_that_is_changed_each_time_or_in_part_is_refused(model: nn.Module) -> None:
    with pytest.raises(UnsupportedError, match=r"linear\.weight while it runs|a part of a tensor"):
        trace_module(model, (X,))


def test_a_weight_that_is_held_under_two_names_is_changed_under_both() -> None:
    class Tied(Halving):
        def __init__(self) -> None:
            super().__init__(once=True)
            self.other = nn.Linear(4, 5, bias=False)
            self.other.weight = self.linear.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + self.other(x)

    model = Tied()
    (got,) = run(trace_module(model, (X,)), {"x": X})
    torch.testing.assert_close(got, model(X))


EARLIER: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "padded and cut": lambda x: nn.functional.pad(x, (0, 0, 2, -2)),
    "zeros and all but the last": lambda x: torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1),
    "by a module": nn.ZeroPad2d((0, 0, 1, -1)),
}


@pytest.mark.parametrize("name", EARLIER)
@pytest.mark.parametrize("length", [1, 2, 7])
def test_tokens_from_further_back_are_a_recurrence(name: str, length: int) -> None:
    class Shifted(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return EARLIER[name](x)

    tokens = torch.export.Dim("T", min=3, max=63)
    graph = trace_module(Shifted(), (torch.zeros(1, 6, 4),), dynamic_shapes={"x": {1: tokens}})
    assert [op.opname for op in graph.ops].count("causal_conv1d") == 1
    x = torch.randn(1, length, 4, generator=torch.Generator().manual_seed(0))
    wanted = EARLIER[name](x) if length > 1 else torch.zeros(1, 1, 4)
    assert torch.equal(run(graph, {"x": x})[0], wanted)


@pytest.mark.parametrize("widths", [(1, 2), (-1, 1, 2, 0), (0, 3, -1, -1)])
def test_padding_joins_numbers_and_cuts(widths: tuple[int, ...]) -> None:
    class Padded(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.pad(x, widths, value=1.5) + nn.functional.pad(x, widths)

    (got,) = run(trace_module(Padded(), (X,)), {"x": X})
    assert torch.equal(got, Padded()(X))


def test_padding_by_what_stands_there_is_refused() -> None:
    class Mirrored(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.pad(x[None], (1, 1), mode="reflect")

    with pytest.raises(UnsupportedError, match=r"padding by reflect"):
        trace_module(Mirrored(), (X,))
