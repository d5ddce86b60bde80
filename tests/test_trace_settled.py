"""Models that change their weights when they first run."""

from __future__ import annotations

import pytest
import torch
from llmc.frontend import export
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


class Counting(Halving):
    """Halves a weight each time, and counts."""

    def __init__(self) -> None:
        super().__init__(once=False)
        self.times = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.times += 1
        return super().forward(x)


class Late(Halving):
    """Halves a weight behind its use: the first result is another than all others."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + super().forward(x)


@pytest.mark.parametrize(
    "model", [Halving(once=False), Halving(once=True, part=True), Counting(), Late(once=True)]
)
def test_a_weight_that_is_changed_each_time_late_or_in_part_is_refused(model: nn.Module) -> None:
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


def test_stacks_are_noted_again_when_the_last_trace_ends() -> None:
    """Traces of other threads begin and end in any order; what the user set is the user's."""
    import torch.fx.config as settings

    first, second = export._without_stacks(), export._without_stacks()
    before = settings.do_not_emit_stack_traces
    first.__enter__()
    second.__enter__()
    assert settings.do_not_emit_stack_traces
    first.__exit__(None, None, None)
    assert settings.do_not_emit_stack_traces
    second.__exit__(None, None, None)
    assert settings.do_not_emit_stack_traces is before
