"""Tracing: modules become graphs of the same meaning, weights stay where they are, and what cannot be traced
is refused in one line that names the operator and the module.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from llmc.frontend.trace import trace_module, trace_source
from llmc.ir.core import Graph
from llmc.ir.errors import InputError, LlmcError, UnsupportedError
from llmc.ir.interpreter import run
from llmc.ir.parser import parse
from llmc.ir.printer import equal, print_graph
from llmc.ir.verifier import verify
from llmc.ir.weights import ShapeOnlyTensor
from llmc.passes.base import PassContext
from llmc.passes.manager import run_passes
from llmc.passes.pipelines import function
from torch import nn

from examples.attention_module import example

from .graphs import ModelInMemory, lowered, opnames
from .models import TINY, tiny_model


class Made(nn.Module):
    """A module made of a function of (self, *inputs)."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.layer = nn.Linear(6, 6)
        self.register_buffer("count", torch.arange(6))

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


def same(function_: Any, x: torch.Tensor, tolerance: float = 2e-6) -> Graph:
    """Trace, compare with torch as traced and after the pipeline, and return the traced graph."""
    module = Made(function_).eval()
    graph = trace_module(module, [x])
    verify(graph)
    assert equal(parse(print_graph(graph)), graph)
    with torch.no_grad():
        wanted = module(x.clone())
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    for g in (graph, run_passes(graph.clone(), function([]), PassContext())[0]):
        for got, value in zip(run(g, {"x": x.clone()}), wanted, strict=True):
            assert got.dtype == value.dtype
            torch.testing.assert_close(got, value, atol=tolerance, rtol=tolerance)
    return graph


def in_place_on_a_view(s: Made, x: torch.Tensor) -> torch.Tensor:
    y = x + 1
    y[:, :2].mul_(3)
    return y


OPERATORS: dict[str, Any] = {
    "arithmetic": lambda s, x: (x + 2) * 3 - x / 4 + (1 - x) ** 2 + torch.rsub(x, 1.5),
    "alpha": lambda s, x: torch.add(x, x, alpha=2) - torch.sub(x, 1.0, alpha=3),
    "functions": lambda s, x: (
        x.exp()
        + x.abs().sqrt()
        + x.sin() * x.cos()
        + x.tanh()
        + torch.erf(x)
        + x.sigmoid()
    ),
    "activations": lambda s, x: (
        nn.functional.softplus(x)
        + torch.expm1(x)
        + nn.functional.relu(x)
        + nn.functional.silu(x)
    ),
    "softplus far out": lambda s, x: nn.functional.softplus(x * 200),
    "integers in functions": lambda s, x: torch.sqrt(s.count) + torch.sin(s.count) + s.count / 2,
    "rounded bfloat16": lambda s, x: (
        torch.ceil(x.to(torch.bfloat16)).float()
        + torch.trunc(x.to(torch.bfloat16)).float()
    ),
    "integer division": lambda s, x: (
        s.count // 2,
        s.count % 4,
        torch.div(s.count, 3, rounding_mode="floor"),
    ),
    "comparisons": lambda s, x: ((x > 0) & ~(x > 1), (x < 0) | (x >= 1), (x == x) ^ (x != 0)),
    "logic of numbers": lambda s, x: torch.logical_and(s.count, s.count - 1),
    "where": lambda s, x: torch.where(x > 0, x, -1.0) + x.masked_fill(x < 0, 2.0),
    "clamp": lambda s, x: x.clamp(-0.5, 0.5) + x.clamp(min=0) + torch.maximum(x, -x) + torch.max(x, x * 2),
    "reductions": lambda s, x: (
        x.mean(-1),
        x.sum((0, 1)),
        x.amax(-1, keepdim=True),
        x.max(-1).values,
        x.mean(),
        x.max(),
        s.count.max(),
    ),
    "logarithms of sums": lambda s, x: (
        torch.logsumexp(50 * x, -1),
        torch.logsumexp(x, (0, 1), keepdim=True),
        torch.logsumexp(x.masked_fill(x < 0, float("-inf")), 0),
    ),
    "variance": lambda s, x: (
        x.var(-1, unbiased=False),
        torch.var(x, dim=(0, 1), correction=0, keepdim=True),
        x.var(-1),
        x.std(0),
    ),
    "sums of integers": lambda s, x: (
        s.count.sum(),
        (x > 0).sum(-1),
        s.count.cumsum(0),
        x.cumsum(0, dtype=torch.float32),
    ),
    "products": lambda s, x: (
        x @ x.transpose(0, 1),
        torch.addmm(s.layer.bias, x, s.layer.weight),
        s.layer(x),
    ),
    "batched product": lambda s, x: torch.baddbmm(x[None], x[None, :, :4], x[None, :4], beta=0.5, alpha=2),
    "softmax": lambda s, x: torch.softmax(x, 0) + torch.softmax(x, -1, dtype=torch.float32),
    "norms": lambda s, x: nn.functional.layer_norm(x, (6,), s.layer.bias) + nn.functional.rms_norm(x, (6,)),
    "views": lambda s, x: (
        x.view(2, 2, 6).flatten(0, 1),
        x.reshape(-1, 3),
        x.unsqueeze(1).squeeze(1),
        x.T,
        x.mT,
    ),
    "permute": lambda s, x: x.view(2, 2, 3, 2).permute(0, 2, 1, 3).contiguous().view(6, 4),
    "slices": lambda s, x: (x[1:, ::2], x[-9:, -2:], x[:, 3], x[..., 1:99], x[2]),
    "cutting and joining": lambda s, x: (
        torch.cat((*x.chunk(2, -1), *x.split([1, 5], -1), x.unbind(0)[0][None].expand(4, 6)), -1)
    ),
    "stack": lambda s, x: torch.stack((x, -x), dim=1).sum(1),
    "repeats": lambda s, x: (x.repeat(2, 1, 3), x.repeat_interleave(2, dim=-1), x[:1].expand(3, -1)),
    "making tensors": lambda s, x: (
        x
        + torch.arange(6)
        + torch.zeros_like(x)
        + torch.full((6,), 2.0)
        + torch.ones(4, 1)
    ),
    "literals": lambda s, x: x + torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) * torch.tensor(2.0),
    "numbers from numbers": lambda s, x: (
        x * torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(0.95))
        + torch.lgamma(torch.full((), 2.5))
        + sum(torch.broadcast_tensors(torch.tensor(2.0), torch.tensor(3.0)))
    ),
    "what nobody reads": lambda s, x: (torch.lgamma(x), torch.linalg.det(x[:, :4]) + 1, x * 2)[2],
    "triangles": lambda s, x: (torch.tril(x), torch.triu(x, diagonal=1), torch.tril(x, diagonal=-1)),
    "indexing": lambda s, x: (
        x[s.count[:3]],
        x[s.count[:2], s.count[1:3]],
        x.gather(-1, s.count[None, :2].expand(4, 2)),
    ),
    "embedding": lambda s, x: nn.functional.embedding(s.count[:3], s.layer.weight),
    "casts": lambda s, x: (x.to(torch.float16).float(), x.long(), (x > 0).float(), s.count.bool(), x.int()),
    "in place": lambda s, x: torch.relu_((x + 1).mul_(2).clamp_(-1, 3)),
    "a part in place": in_place_on_a_view,
    "places of the largest": lambda s, x: (*x.max(-1), *x.max(-1, keepdim=True), x.argmax(-1)),
    "gelu": lambda s, x: nn.functional.gelu(x) + nn.functional.gelu(x, approximate="tanh"),
    "dropout": lambda s, x: nn.functional.dropout(x, 0.5, training=s.training),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_mean_what_torch_means(name: str) -> None:
    same(OPERATORS[name], torch.randn(4, 6, generator=torch.Generator().manual_seed(5)))


def in_place_after_a_view(s: Made, x: torch.Tensor) -> torch.Tensor:
    y = x + 1
    part = y[:, :2]
    y.mul_(3)
    return part


def changes_a_buffer(s: Made, x: torch.Tensor) -> torch.Tensor:
    s.count.add_(1)
    return x + s.count


def number_of_what_was_written(s: Made, x: torch.Tensor) -> torch.Tensor:
    y = torch.ones(3)
    y[:1] = 2.0
    return x * y.prod()


UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "numbers that were written": (
        number_of_what_was_written,
        "operator aten.prod.default in the model is not supported",
    ),
    "sort": (
        lambda s, x: x.sort(-1).values,
        "operator aten.sort.default in the model is not supported; add it",
    ),
    "bits": (lambda s, x: s.count & 3, "operator aten.__and__ on integers in the model is not supported"),
    "argmax": (
        lambda s, x: x.max(0).indices,
        "result 1 of operator aten.max.dim in the model is not supported",
    ),
    "in place under a view": (in_place_after_a_view, "operator aten.mul_.Tensor on a part of another tensor"),
    "state": (changes_a_buffer, "module changes count while it runs; a compiled function keeps no state"),
    "values in shapes": (lambda s, x: x[x > 0], "indexing by a mask in the model is not supported"),
    "bessel": (
        lambda s, x: x[:, :1].var(-1),
        "variance with Bessel's correction over tokens, or over a single number in the model is not",
    ),
    "no tensor": (lambda s, x: (x, 3), "module returns something that is no tensor; return tensors only"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_the_refusal_names_operator_and_module(name: str) -> None:
    function_, sentence = UNSUPPORTED[name]
    with pytest.raises(UnsupportedError) as caught:
        trace_module(Made(function_), [torch.randn(4, 6)])
    assert str(caught.value).startswith(sentence), str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_module_path_is_named() -> None:
    class Inner(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sort(-1).values

    outer = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Tanh(), Inner()))
    with pytest.raises(UnsupportedError, match=r"operator aten\.sort\.default in 1\.1 is not supported"):
        trace_module(outer, [torch.randn(2, 4)])
    graph = trace_module(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), [torch.randn(2, 4)])
    assert [op.loc for op in graph] == ["0", "1"]


def test_control_flow_on_values_is_refused_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    def branch(s: Made, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x - 1

    with pytest.raises(UnsupportedError) as caught:
        trace_module(Made(branch), [torch.randn(4, 6)], name="brancher")
    text = str(caught.value)
    assert text.startswith("brancher cannot be traced: ") and "must not depend on tensor values" in text
    assert "\n" not in text and len(text) < 500
    assert capfd.readouterr() == ("", ""), "torch prints the graph so far: that is for its developers"


def test_a_length_that_must_be_one_number_is_refused() -> None:
    shapes = {"x": {0: torch.export.Dim("T", min=2, max=64)}}
    with pytest.raises(UnsupportedError, match="cannot be traced: "):
        trace_module(Made(lambda s, x: x.view(2, 3, 6)), {"x": torch.randn(6, 6)}, dynamic_shapes=shapes)


class Several(nn.Module):
    def forward(self, first: torch.Tensor, second: torch.Tensor, third: torch.Tensor) -> Any:
        return first - second, {"quotient": first / third}


def test_inputs_are_named_and_ordered_by_the_forward_method() -> None:
    example_inputs = {name: torch.rand(3) + 1 for name in ("third", "first", "second")}
    for given in (example_inputs, [example_inputs[n] for n in ("first", "second", "third")]):
        graph = trace_module(Several(), given)
        assert [v.name for v in graph.inputs] == ["first", "second", "third"]
        assert graph.output_names == ["output0", "output1"] and graph.facts["kind"] == "function"
        difference, quotient = run(graph, example_inputs)
        assert torch.equal(difference, example_inputs["first"] - example_inputs["second"])
        assert torch.equal(quotient, example_inputs["first"] / example_inputs["third"])


def test_a_wrong_input_name_is_an_error() -> None:
    with pytest.raises(InputError, match="Several takes no input fourth; inputs: first, second, third"):
        trace_module(Several(), {"fourth": torch.rand(3)})


def test_inputs_that_are_no_tensors_are_refused() -> None:
    with pytest.raises(LlmcError) as caught:
        trace_module(
            Several(),
            {"first": [torch.rand(3), torch.rand(3)], "second": torch.rand(3), "third": torch.rand(3)},
        )  # type: ignore[dict-item]
    assert "\n" not in str(caught.value)


def test_half_precision_modules_are_refused_by_the_parameters_name() -> None:
    with pytest.raises(InputError, match=r"module: layer\.weight is bfloat16; compile the module in float32"):
        trace_module(Made(lambda s, x: x).bfloat16(), [torch.randn(4, 6)])


def test_training_mode_is_what_it_was() -> None:
    module = Made(lambda s, x: s.layer(x))
    module.layer.eval()
    trace_module(module, [torch.randn(4, 6)])
    assert module.training and not module.layer.training
    with pytest.raises(UnsupportedError):
        trace_module(Made(lambda s, x: x.sort().values), [torch.randn(4, 6)])


def test_shared_parameters_are_one_weight() -> None:
    module = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh(), nn.Linear(6, 6, bias=False))
    module[2].weight = module[0].weight
    graph = trace_module(module, [torch.randn(2, 6)])
    (weight,) = graph.weights.values()
    assert len(weight.users) == 2


def test_symbolic_lengths() -> None:
    shapes = {"x": {0: torch.export.Dim("T", min=2, max=64)}}
    module = Made(lambda s, x: s.layer(x) + x.shape[0])
    graph = trace_module(module, {"x": torch.randn(5, 6)}, dynamic_shapes=shapes)
    assert str(graph.inputs[0].type) == "float32[T, 6]"
    for length in (1, 2, 17):
        x = torch.randn(length, 6)
        # Products may be summed in another order than the module's: an ulp.
        torch.testing.assert_close(run(graph, {"x": x})[0], module(x).detach(), atol=1e-6, rtol=2e-7)


def test_the_attention_module_of_the_example() -> None:
    module, hidden = example()
    graph = trace_module(module, {"hidden": hidden})
    result, _ = run_passes(graph, function([]), PassContext())
    output, weights = run(result, {"hidden": hidden})
    assert output.shape == (2, 5, 64) and weights.shape == (2, 8, 5, 5)
    with torch.no_grad():
        wanted = module(hidden)
    torch.testing.assert_close(output, wanted[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(weights, wanted[1], atol=1e-5, rtol=0)
    assert "attention" not in opnames(result), "the weights are an output: they are computed once, not twice"


# -- models
class Untouchable(ShapeOnlyTensor):
    """A weight that fails the test when it is read."""

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray[Any, Any]:
        raise AssertionError(f"{self.source} was read")


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bert"])
def test_weights_are_not_read_until_they_are_written(family: str) -> None:
    source = ModelInMemory(tiny_model(family), attention="eager", encoder=not TINY[family].causal)
    source.weights = {n: Untouchable(tuple(w.shape), w.dtype, n) for n, w in source.weights.items()}
    graph = trace_source(source)  # type: ignore[arg-type]
    paged, _ = lowered(graph, "paged")
    assert "paged_attention" in opnames(paged)


def test_a_missing_and_a_wrong_tensor_are_named() -> None:
    source = ModelInMemory(tiny_model("llama"))
    name = "model.layers.1.mlp.up_proj.weight"
    held = source.weights.pop(name)
    with pytest.raises(InputError, match=f"the model has no tensor {name}; the checkpoint is incomplete"):
        trace_source(source)  # type: ignore[arg-type]
    source.weights[name] = ShapeOnlyTensor((3, *held.shape[1:]), held.dtype, f"file.safetensors:{name}")
    with pytest.raises(
        InputError,
        match=r"\(file\.safetensors:.*\) has shape \[3, 64\], the configuration asks for \[96, 64\]",
    ):
        trace_source(source)  # type: ignore[arg-type]
