"""Relative position biases: read from a model's buckets, and computed by every target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import llmc
import numpy as np
import pytest
import torch
import transformers
from llmc.frontend.source import open_source
from llmc.frontend.trace import trace_module, trace_source
from llmc.ir.core import Graph, Value
from llmc.ir.errors import VerifyError
from llmc.ir.interpreter import run
from llmc.ir.ops.attention import VECTOR, Attention
from llmc.ir.types import TensorType
from llmc.ir.weights import ArrayTensor
from llmc.passes.base import PassContext
from llmc.passes.manager import run_passes
from llmc.passes.pipelines import function

from .graphs import lowered
from .models import ids_of, save_tokenizer
from .tvm_graphs import ISA

HEADS, WIDTH = 4, 64


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A small model with 32 buckets, whose biases are as large as its scores."""
    config = transformers.MPNetConfig(
        vocab_size=384, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=HEADS,
        intermediate_size=96, max_position_embeddings=514, relative_attention_num_buckets=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MPNetModel(config, add_pooling_layer=False).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=2.0 if "relative" in name else 1.4 * parameter.shape[-1] ** -0.5)
            else:
                parameter.normal_(mean=float("Norm.weight" in name), std=0.2)
    folder = tmp_path_factory.mktemp("mpnet")
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model, folder


def hidden(model: Any, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).last_hidden_state[0].numpy()


@pytest.mark.parametrize("target", [f"tvm-cpu:isa={ISA}", "onnx-cpu"])
def test_artifacts_equal_transformers(target: str, encoder: tuple[Any, Path], tmp_path: Path) -> None:
    """Also where keys stand further away than the last bucket begins (128 tokens). Bar: 1e-4 of the largest
    value.
    """
    model, folder = encoder
    llmc.compile(folder, tmp_path / "m.llmc", targets=[target])
    texts = [[t for t in ids_of(n, seed=n) if t != model.config.pad_token_id] for n in (1, 17, 90, 400)]
    with llmc.load(tmp_path / "m.llmc") as llm:
        for ids in texts:
            wanted = hidden(model, ids)
            assert np.abs(llm.logits(ids) - wanted).max() <= 1e-4 * np.abs(wanted).max()
    weight = model.encoder.relative_attention_bias.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
        other = hidden(model, texts[2])
        weight.copy_(before)
    assert np.abs(other - hidden(model, texts[2])).max() > 0.1, "the biases do nothing here"


def test_rows_hold_what_the_buckets_give(encoder: tuple[Any, Path]) -> None:
    model, folder = encoder
    fused, _ = lowered(trace_source(open_source(folder)), "fused")
    found = [op for op in fused if isinstance(op, Attention)]
    assert len(found) == 2 and found[0].distances is found[1].distances is not None
    table = found[0].distances.weight.read()
    bias = model.encoder.compute_position_bias(torch.zeros(1, 600, 1)).detach()[0].numpy()
    width = table.shape[1]
    for query in (0, 5, 300, 599):
        index = np.clip(np.arange(600) - query + width // 2, 0, width - 1)
        assert np.array_equal(table[:, index], bias[:, query])
    for end in (table[:, :VECTOR], table[:, -VECTOR:]):
        assert (end == end[:, :1]).all()


class Biased(torch.nn.Module):
    """Attention with a bias of buckets that `bucket` computes from queries' and keys' positions."""

    def __init__(self, bucket: Any) -> None:
        super().__init__()
        self.bucket, self.table = bucket, torch.nn.Embedding(40, 2)

    def forward(self, q: Any, k: Any, v: Any) -> Any:
        steps = torch.arange(q.shape[-2])
        bias = self.table(self.bucket(steps[:, None], steps[None, :])).permute(2, 0, 1)[None]
        return torch.softmax(q @ k.transpose(-1, -2) + bias, -1) @ v


def fused(bucket: Any) -> Graph:
    shapes = {name: {2: torch.export.Dim("T", min=2, max=2000)} for name in "qkv"}
    given = {name: torch.zeros(1, 2, 7, 8) for name in "qkv"}
    graph = trace_module(Biased(bucket), given, dynamic_shapes=shapes)
    return run_passes(graph, function([]), PassContext())[0]


def near(i: Any, j: Any) -> Any:
    return (j - i).clamp(-19, 19) + 19


@pytest.mark.parametrize(
    "bucket",
    [
        lambda i, j: near(i, j) + (i == 0) * 1,  # the first query is something else
        lambda i, j: (j - i).abs() % 40,  # goes on changing
        lambda i, j: (i + j).clamp(max=39),  # no distance
    ],
)
def test_what_is_no_function_of_distance_is_not_taken_for_one(bucket: Any) -> None:
    assert any(isinstance(op, Attention) and op.distances is not None for op in fused(near))
    assert not any(isinstance(op, Attention) for op in fused(bucket))


def test_one_table_by_two_kinds_of_buckets() -> None:
    class Two(Biased):
        def forward(self, q: Any, k: Any, v: Any) -> Any:
            first = super().forward(q, k, v)
            self.bucket = lambda i, j: near(j, i)
            return first + super().forward(k, q, v)

    shapes = {name: {2: torch.export.Dim("T", min=2, max=2000)} for name in "qkv"}
    given = {name: torch.randn(1, 2, 7, 8) for name in "qkv"}
    model = Two(near)
    graph = trace_module(model, given, dynamic_shapes=shapes)
    result, _ = run_passes(graph, function([]), PassContext())
    tables = [op.distances for op in result if isinstance(op, Attention)]
    assert len(tables) == 2 and tables[0] is not tables[1]
    model.bucket = near
    torch.testing.assert_close(run(result, given)[0], model(**given), atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("shape", "sinks", "said"),
    [
        ((3, 32), False, r"a multiple of 32\]"),
        ((2, 40), False, r"a multiple of 32\]"),
        ((2, 32), True, "sinks and distances at once"),
    ],
)
def test_a_table_that_fits_no_heads_is_no_graph(shape: tuple[int, int], sinks: bool, said: str) -> None:
    g = Graph("g", "fused")
    q, k, v = (g.add_input(n, TensorType("float32", (1, 7, 2, 4))) for n in "qkv")
    table = g.add_weight("table", ArrayTensor(np.zeros(shape, np.float32)))
    column: Value | None = g.add_weight("sinks", ArrayTensor(np.zeros(2, np.float32))) if sinks else None
    op = g.append(Attention(q, k, v, column, None, table, scale=1.0))
    with pytest.raises(VerifyError, match=said):
        op.verify()
