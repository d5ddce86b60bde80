"""Tokens from further back, convolutions over tokens, and padding: as causal convolutions, which keep their
tokens from step to step.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from llmc.frontend.trace import trace_module
from llmc.ir.core import Graph
from llmc.ir.errors import UnsupportedError
from llmc.ir.interpreter import run
from torch import nn

from .graphs import opnames

X = torch.linspace(-2, 3, 12).reshape(3, 4)
LENGTHS = (1, 2, 3, 7)


def over_tokens(module: nn.Module) -> Graph:
    """Of any number of them, [1, T, 4]."""
    tokens = torch.export.Dim("T", min=3, max=63)
    return trace_module(module.eval(), (torch.zeros(1, 6, 4),), dynamic_shapes={"x": {1: tokens}})


def some(length: int) -> torch.Tensor:
    return torch.randn(1, length, 4, generator=torch.Generator().manual_seed(length))


class Convolved(nn.Module):
    """Columns of zeros before the tokens, and one convolution behind the other."""

    def __init__(self, lead: int, *layers: tuple[int, int, int, bool]) -> None:
        """Layers by outputs, width, groups, and whether there is a bias."""
        super().__init__()
        torch.manual_seed(0)
        self.lead, inputs = lead, 4
        self.layers = nn.ModuleList()
        for outputs, width, groups, bias in layers:
            self.layers.append(nn.Conv1d(inputs, outputs, width, groups=groups, bias=bias))
            inputs = outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.pad(x.transpose(1, 2), (self.lead, 0)) if self.lead else x.transpose(1, 2)
        for layer in self.layers:
            y = layer(y)
        return y.transpose(1, 2)


CONVOLVED = {
    "each channel's own": Convolved(2, (4, 3, 4, True)),
    "in groups": Convolved(2, (6, 3, 2, True)),
    "of all channels": Convolved(1, (5, 2, 1, False)),
    "of single tokens": Convolved(0, (6, 1, 2, True)),
    "two, with biases that stand before the first token": Convolved(3, (4, 2, 4, True), (6, 3, 2, True)),
    "three": Convolved(3, (4, 2, 4, False), (4, 2, 2, True), (4, 2, 1, False)),
    "of single tokens behind columns that are left": Convolved(1, (4, 1, 1, True), (4, 2, 4, False)),
}


@pytest.mark.parametrize("name", CONVOLVED)
def test_convolutions_see_the_tokens_before(name: str) -> None:
    """To 1e-6, the roundings of sums in another order."""
    module = CONVOLVED[name]
    graph = over_tokens(module)
    for length in LENGTHS:
        x = some(length)
        with torch.no_grad():
            torch.testing.assert_close(run(graph, {"x": x})[0], module(x), atol=1e-6, rtol=1e-6)


class Around(nn.Module):
    """A convolution with zeros on either side."""

    def __init__(self, around: int, outputs: int, width: int, groups: int, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv1d(4, outputs, width, padding=around, groups=groups, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


AROUND = {
    "each channel's own": Around(1, 4, 3, 4, True),
    "each channel's own, wide, without bias": Around(4, 4, 9, 4, False),
    "in groups": Around(1, 6, 3, 2, True),
    "of all channels": Around(2, 5, 5, 1, False),
    "of an even width, one more than tokens": Around(2, 4, 4, 4, True),
    "one fewer than tokens": Around(1, 4, 4, 1, True),
    "of single tokens, with zeros": Around(1, 4, 1, 1, True),
}


@pytest.mark.parametrize("name", AROUND)
def test_convolutions_see_tokens_on_both_sides(name: str) -> None:
    """To 1e-6, the roundings of sums in another order."""
    module = AROUND[name]
    graph = over_tokens(module)
    assert "causal_conv1d" not in opnames(graph)
    for length in LENGTHS[1:]:
        x = some(length)
        with torch.no_grad():
            torch.testing.assert_close(run(graph, {"x": x})[0], module(x), atol=1e-6, rtol=1e-6)


UNFOLDED: dict[str, tuple[dict[str, object], int]] = {
    "columns of tokens": ({"kernel_size": (3, 1), "padding": (1, 0)}, 4),
    "wide": ({"kernel_size": (9, 1), "padding": (4, 0)}, 4),
    "windows with gaps": ({"kernel_size": (2, 3), "dilation": (2, 1), "padding": (2, 1)}, 2),
    "single places": ({"kernel_size": 1}, 1),
}


@pytest.mark.parametrize("name", UNFOLDED)
def test_what_windows_see_is_unfolded(name: str) -> None:
    options, channels = UNFOLDED[name]

    class Unfolded(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            columns = x.view(1, -1, channels, 4 // channels).transpose(1, 2)
            return nn.functional.unfold(columns, **options)  # pyright: ignore[reportArgumentType]  (of any options)

    graph = over_tokens(Unfolded())
    for length in LENGTHS:
        x = some(length)
        assert torch.equal(run(graph, {"x": x})[0], Unfolded()(x))


def test_unfolding_with_steps_is_refused() -> None:
    class Unfolded(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.unfold(x[None], (1, 2), stride=2)

    with pytest.raises(UnsupportedError, match=r"unfolding with steps"):
        over_tokens(Unfolded())


class Stepping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 2, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(nn.functional.pad(x.transpose(1, 2), (1, 0)))


def test_other_convolutions_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="steps or gaps"):
        over_tokens(Stepping())


EARLIER: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "padded and cut": lambda x: nn.functional.pad(x, (0, 0, 2, -2)),
    "zeros and all but the last": lambda x: torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1),
    "by a module": nn.ZeroPad2d((0, 0, 1, -1)),
}


@pytest.mark.parametrize("name", EARLIER)
@pytest.mark.parametrize("length", LENGTHS)
def test_tokens_from_further_back_are_a_recurrence(name: str, length: int) -> None:
    class Shifted(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return EARLIER[name](x)

    graph = over_tokens(Shifted())
    assert [op.opname for op in graph.ops].count("causal_conv1d") == 1
    x = some(length)
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
