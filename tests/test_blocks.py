"""Modules that go over a sequence in blocks of tokens: which give the same wherever blocks end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from llmc.frontend.blocks import Table, blocks_of, installed, tables_of
from llmc.frontend.source import open_source
from llmc.frontend.trace import trace_source
from llmc.ir.weights import ArrayTensor, LongerTensor, ShapeOnlyTensor
from torch import nn

from .families import TOLERANCE, compared, reference, rows_of, save_family
from .family_configs import token_ids
from .graphs import lowered

HEADS, WIDTH, BLOCK = 2, 6, 8


class Decayed(nn.Module):
    """Linear attention with decays over blocks of tokens."""

    heads = HEADS

    def __init__(self, keeps: float = 1.0, rate: float = 0.2) -> None:
        super().__init__()
        self.block_size, self.keeps, self.layer_idx = BLOCK, keeps, int(rate * 10)
        self.qkv = nn.Linear(10, 3 * self.heads * WIDTH, bias=False)
        self.scale: Any = 1.0
        self.out = nn.Linear(self.heads * WIDTH, 10, bias=False)
        steps = torch.arange(BLOCK)
        distance = steps[:, None] - steps[None]
        self.rate = rate
        self.table = nn.Buffer(torch.where(distance >= 0, torch.exp(-rate * distance), 0.0)[None])
        self.rows = nn.Buffer(torch.exp(-rate * (steps + 1))[:, None])

    def forward(self, hidden_states: torch.Tensor, mask: Any, cache: Any = None) -> Any:
        length = hidden_states.shape[1]
        parts = self.qkv(hidden_states).view(1, length, self.heads, -1).transpose(1, 2).chunk(3, -1)
        state, rows = torch.zeros(1, self.heads, WIDTH, WIDTH), list[torch.Tensor]()
        for i in range((length + self.block_size - 1) // self.block_size):
            q, k, v = (x[:, :, i * self.block_size : (i + 1) * self.block_size] for x in parts)
            n = q.shape[2]
            within = (q @ k.transpose(-1, -2) * self.table[..., :n, :n] * self.scale) @ v / self.scale
            rows.append(within + (q * self.rows[..., :n, :]) @ state)
            fading = torch.exp(-self.rate * (n - 1 - torch.arange(n)))[:, None]
            state = self.keeps * state * float(torch.exp(torch.tensor(-self.rate * n)))
            state = state + (k * fading).transpose(-1, -2) @ v
        joined = torch.cat(rows, 2).transpose(1, 2).reshape(1, length, -1)
        return self.out(joined), state


class AsManyHeads(Decayed):
    """Tables have an axis of heads, of which there are as many as tokens in a block; so has a scale."""

    heads = BLOCK

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Buffer(self.table[:, None].repeat(1, BLOCK, 1, 1))
        self.rows = nn.Buffer(self.rows.repeat(BLOCK, 1, 1))
        del self.scale
        self.scale = nn.Buffer(torch.linspace(1, 2, BLOCK)[:, None, None])


class Apart(Decayed):
    """Attention that stays within a block."""

    def __init__(self) -> None:
        super().__init__(keeps=0.0)


class Biased(Decayed):
    """Keys of tokens that are zero are none: the trial says nothing of it."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.ones(10))

    def forward(self, hidden_states: torch.Tensor, mask: Any, cache: Any = None) -> Any:
        return super().forward(hidden_states + self.shift, mask)


class Untabled(Decayed):
    def __init__(self) -> None:
        super().__init__()
        del self.table, self.rows


def stored(model: nn.Module) -> dict[str, Any]:
    return {name: ArrayTensor(b.numpy().copy()) for name, b in model.named_buffers()}


def test_blocks_that_end_anywhere_are_found() -> None:
    model = nn.ModuleList([Decayed(), Decayed(rate=0.1), Apart(), Biased(), Untabled(), nn.Linear(2, 2)])
    found = blocks_of(model)
    assert [(one.path, one.name, one.size, one.tables) for one in found] == [
        (path, "block_size", BLOCK, (Table("table", (1, 2)), Table("rows", (0,)))) for path in ("0", "1")
    ]


def test_axes_that_are_as_long_as_a_block_by_chance_stay_so() -> None:
    model = nn.ModuleList([AsManyHeads()])
    (found,) = blocks_of(model)
    assert found.tables == (Table("table", (2, 3)), Table("rows", (1,)))
    kept, longer = tables_of([found], stored(model), 1000)
    assert {name: data.shape for name, data in longer.items()} == {
        "0.table": (1, BLOCK, 1000, 1000),
        "0.rows": (BLOCK, 1000, 1),
    }
    with installed(kept, 1000):
        assert model[0].scale.shape == (BLOCK, 1, 1) and model[0].rows.shape == (BLOCK, 1000, 1)


def test_a_family_with_as_many_heads_as_tokens_in_a_block(tmp_path: Path) -> None:
    """Beside transformers in float32, in two chunks."""
    model, task = save_family("minimax", tmp_path, changed={"num_attention_heads": 16, "head_dim": 8})
    assert model.config.block_size == 16
    texts = token_ids(40), token_ids(21, seed=3)
    paged, _ = lowered(trace_source(open_source(tmp_path)), "paged")
    worst, _ = compared(rows_of(paged, task, *texts), [reference(model, ids, task) for ids in texts])
    assert worst <= TOLERANCE


def test_parameters_without_values_are_no_hindrance() -> None:
    module = Decayed()
    for layer in (module.qkv, module.out):
        layer.weight = nn.Parameter(layer.weight.to("meta"))
    assert [one.path for one in blocks_of(nn.ModuleList([module]))] == ["0"]


def test_modules_have_longer_blocks_for_a_while() -> None:
    model = nn.ModuleList([Decayed()])
    table = model[0].table
    kept, longer = tables_of(blocks_of(model), stored(model), 1000)
    assert {name: data.shape for name, data in longer.items()} == {
        "0.table": (1, 1000, 1000),
        "0.rows": (1000, 1),
    }
    assert all(isinstance(data, LongerTensor) for data in longer.values())
    with installed(kept, 1000):
        assert model[0].block_size == 1000 and model[0].table.shape == (1, 1000, 1000)
        assert model[0].table.is_meta
    assert model[0].block_size == BLOCK and model[0].table is table


@pytest.mark.parametrize("kind", ["rounded", "shape only", "other", "missing", "another shape"])
def test_what_a_checkpoint_has_instead_of_a_table(kind: str) -> None:
    """Rounded ones are the module's, other ones are no longer what was proven."""
    model = nn.ModuleList([Decayed()])
    weights = stored(model)
    table = model[0].table.float()
    if kind == "rounded":
        weights["0.table"] = ArrayTensor(table.bfloat16().float().numpy())
    elif kind == "shape only":
        weights["0.table"] = ShapeOnlyTensor(tuple(table.shape), "float32")
    elif kind == "other":
        weights["0.table"] = ArrayTensor((table * table).numpy())
    elif kind == "missing":
        del weights["0.table"]
    else:
        weights["0.table"] = ArrayTensor(table[0].numpy())
    kept, longer = tables_of(blocks_of(model), weights, 1000)
    if kind not in ("rounded", "shape only"):
        assert (kept, longer) == ([], {})
        return
    made = longer["0.table"]
    assert isinstance(made, LongerTensor) and torch.equal(torch.from_numpy(made.base.read()), table)


def test_lengths_of_blocks() -> None:
    assert Table("table", (1, 3)).longer((1, BLOCK, BLOCK, BLOCK), 50) == (1, 50, BLOCK, 50)
    module = Decayed()
    module.block_size = 2048
    assert not blocks_of(nn.ModuleList([module]))
