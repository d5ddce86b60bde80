"""Values that are the same by how they were made: tables of positions with three coordinates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from llmc.frontend.trace import trace_module
from llmc.ir.errors import UnsupportedError
from llmc.ir.interpreter import run


class Tables(torch.nn.Module):
    """Cosines of `count` rows of positions, of which every third element comes from another row."""

    def __init__(self, positions: Any, taken: int = 1) -> None:
        super().__init__()
        self.positions, self.taken = positions, taken
        self.register_buffer("frequencies", torch.linspace(1, 0.1, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        angles = self.positions(x.shape[0])[..., None].float() * self.frequencies
        cosines = angles.cos() * 1.5
        table = cosines[0]
        table[..., 1:7:3] = cosines[self.taken, ..., 1:7:3]
        return table + x


def traced(model: Tables) -> Any:
    return trace_module(
        model, {"x": torch.zeros(5, 8)}, dynamic_shapes={"x": {0: torch.export.Dim("T", min=2)}}
    )


def products(count: int) -> torch.Tensor:
    """By a product of matrices, with the tokens behind the frequencies first."""
    whole = torch.arange(count)[None, None, :].float().expand(3, 1, -1)
    return (torch.ones(1, 1, 1).expand(3, 1, 1) @ whole).transpose(1, 2)[..., 0]


@pytest.mark.parametrize(
    "positions",
    [
        lambda n: torch.arange(n).expand(3, -1),
        lambda n: torch.arange(n)[None].expand(4, -1)[1:],
        lambda n: torch.arange(n).view(1, 1, -1).expand(3, 1, -1)[:, 0] + 2,
        products,
    ],
)
def test_what_stands_there_already_changes_nothing(positions: Any) -> None:
    model = Tables(positions)
    x = torch.randn(7, 8)
    graph = traced(model)
    assert torch.equal(run(graph, {"x": x})[0], model(x))


@pytest.mark.parametrize(
    "positions",
    [
        lambda n: torch.stack([torch.arange(n), torch.arange(n) + 1, torch.arange(n)]),
        lambda n: torch.arange(n).expand(3, -1) * torch.arange(3)[:, None],
        lambda n: torch.cat([torch.zeros(1, n), torch.arange(n).expand(2, -1)]),
    ],
)
def test_rows_that_differ_are_not_taken_for_each_other(positions: Any) -> None:
    with pytest.raises(UnsupportedError, match="on a part of a tensor that is read in parts"):
        traced(Tables(positions))


def test_rows_in_reverse_are_not_the_same() -> None:
    class Reversed(Tables):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            cosines = (self.positions(x.shape[0])[..., None].float() * self.frequencies).cos()
            table = cosines[0]
            table[..., 1:7:3] = cosines[1, ..., 2:8:3]
            return table + x

    with pytest.raises(UnsupportedError, match="on a part of a tensor that is read in parts"):
        traced(Reversed(lambda n: torch.arange(n).expand(3, -1)))
