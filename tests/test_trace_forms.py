"""Forms in which models write what tracing without values makes hard: tensors made of numbers, lists of
places, complex numbers, tables cut to the number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from llmc.frontend.export import export, narrower
from llmc.frontend.importer import Importer
from llmc.frontend.trace import trace_module
from llmc.ir.core import Graph
from llmc.ir.errors import UnsupportedError
from llmc.ir.interpreter import run
from llmc.ir.ops.nn import Rope
from llmc.ir.types import sym
from llmc.passes.base import PassContext
from llmc.passes.manager import run_passes
from llmc.passes.pipelines import function
from torch import nn

from .graphs import opnames


class Made(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


def on_meta(made: Callable[[torch.Tensor], Any], x: torch.Tensor) -> torch.Tensor:
    """What a function traced on the meta device gives for x."""
    program = export(Made(made), (x.to("meta"),), None, "made")
    graph = Graph("made")
    importer = Importer(graph)
    for node in program.graph.nodes:
        importer.node = node
        if node.op == "placeholder":
            importer.values[node] = graph.add_input("x", importer_type(importer))
        elif node.op == "call_function":
            importer.run_node(node)
        elif node.op == "output":
            graph.outputs, graph.output_names = [importer.values[n] for n in node.args[0]], ["y"]
    return run(graph, {"x": x})[0]


def importer_type(importer: Importer) -> Any:
    from llmc.ir.types import TensorType

    return TensorType(importer.result_dtype(), importer.result_shape())


NUMBERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "a number": lambda x: x + torch.tensor(0.5, device=x.device),
    "an integer": lambda x: x * torch.tensor(3, device=x.device),
    "of a type": lambda x: x + torch.tensor(2, dtype=torch.float32, device=x.device),
    "a list": lambda x: x * torch.tensor([1.0, 2.0, 2.0, -0.5], device=x.device),
    "a table": lambda x: x @ torch.tensor([[1.0, 0.0]] * 3 + [[0.5, 0.25]], device=x.device),
    "as_tensor": lambda x: x - torch.as_tensor([1, 2, 3, 4], device=x.device),
    "new_tensor": lambda x: x * x.new_tensor([1.5, 2.0, 3.0, 1.0]),
    "an empty list": lambda x: torch.cat([x, x.new_tensor([]).reshape(0, 4)]),
    "places": lambda x: x[:, [2, 0]],
    "places from the end": lambda x: x[..., [-1]] + x[:, [-3]],
    "places of the first axis": lambda x: x[[1, 1, 0]],
    "places before whole axes": lambda x: x[..., [-2], :],
}


@pytest.mark.parametrize("name", NUMBERS)
def test_tensors_of_numbers_have_their_values_on_the_meta_device(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    torch.testing.assert_close(on_meta(NUMBERS[name], x), NUMBERS[name](x), atol=0, rtol=0)


def test_an_integer_that_scalar_tensor_takes_is_a_float() -> None:
    x = torch.full((1,), 5, dtype=torch.int64)

    def divided(x: torch.Tensor) -> torch.Tensor:
        return torch.scalar_tensor(1 << 25, device=x.device) + 1 + x  # 2^25 + 1 is no float32

    torch.testing.assert_close(on_meta(divided, x), divided(x), atol=0, rtol=0)


def test_places_from_the_end_of_the_tokens() -> None:
    """Their number stays any."""
    tokens = torch.export.Dim("T", min=2, max=63)
    given = torch.zeros(1, 6, 4, device="meta")
    program = export(Made(lambda x: x[:, [-1, 0]]), (given,), {"x": {1: tokens}}, "made")
    assert [one.upper for one in program.range_constraints.values()] == [63]


INDEXED: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "behind an axis": lambda x, i: x[:, i],
    "the last axis": lambda x, i: x[..., i],
    "by a matrix": lambda x, i: x[:, i.reshape(2, 2)],
    "selected": lambda x, i: torch.index_select(x, 2, i),
}


@pytest.mark.parametrize("name", INDEXED)
def test_places_are_picked_along_any_axis(name: str) -> None:
    class Pick(nn.Module):
        def forward(self, x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
            return INDEXED[name](x, i)

    given = {"x": torch.randn(2, 5, 5), "i": torch.tensor([4, 0, 0, 3])}
    graph = trace_module(Pick(), given)
    torch.testing.assert_close(run(graph, given)[0], INDEXED[name](**given), atol=0, rtol=0)


def test_several_places_behind_an_axis_are_refused_by_what_they_are() -> None:
    with pytest.raises(UnsupportedError, match="indexing by several tensors behind a full axis"):
        trace_module(Made(lambda x: x[:, torch.tensor([0, 1]), torch.tensor([1, 1])]), [torch.randn(2, 3, 4)])


def rotated(x: torch.Tensor, angles: torch.Tensor, axis: int) -> torch.Tensor:
    table = torch.polar(torch.ones_like(angles), angles).unsqueeze(axis)
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * table).flatten(3).type_as(x)


@pytest.mark.parametrize("axis", [1, 2], ids=["heads before tokens", "tokens before heads"])
def test_a_product_of_complex_numbers_becomes_a_rotary_embedding(axis: int) -> None:
    """To 2e-6, as traced and fused."""

    class Turn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("frequencies", 1 / 10 ** (torch.arange(4) / 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            tokens = x.shape[2] if axis == 1 else x.shape[1]
            return rotated(x, torch.outer(torch.arange(tokens), self.frequencies)[None], axis)

    torch.manual_seed(0)
    x = torch.randn(1, 3, 5, 8)
    module = Turn()
    graph = trace_module(module, [x])
    fused, _ = run_passes(graph.clone(), function([]), PassContext())
    assert [op.interleaved for op in fused if isinstance(op, Rope)] == [True]
    for one in (graph, fused):
        torch.testing.assert_close(run(one, {"x": x})[0], module(x), atol=2e-6, rtol=2e-6)


COMPLEX: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "parts": lambda x: torch.view_as_complex(x).real + torch.view_as_complex(x).imag,
    "conjugate": lambda x: torch.view_as_real(torch.view_as_complex(x) * torch.view_as_complex(x).conj()),
    "times a number": lambda x: torch.view_as_real(torch.view_as_complex(x) * 2.5),
    "moved": lambda x: torch.view_as_real(torch.view_as_complex(x).transpose(0, 1).unsqueeze(0)[:, 1:]),
}


@pytest.mark.parametrize("name", COMPLEX)
def test_complex_numbers_are_pairs(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 2)
    graph = trace_module(Made(COMPLEX[name]), [x])
    torch.testing.assert_close(run(graph, {"x": x})[0], COMPLEX[name](x), atol=1e-6, rtol=2e-6)


def test_other_functions_of_complex_numbers_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"aten\.exp\.default on complex numbers"):
        trace_module(Made(lambda x: torch.view_as_complex(x).exp().abs()), [torch.randn(3, 2)])


def test_a_list_of_complex_numbers_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"aten\.cat\.default on complex numbers"):
        trace_module(
            Made(lambda x: torch.view_as_real(torch.cat([torch.view_as_complex(x)] * 2))), [torch.randn(3, 2)]
        )


def written_in_a_half(x: torch.Tensor) -> torch.Tensor:
    left, _ = x.clone().chunk(2, dim=-1)
    left.mul_(2)
    return left


def read_through_a_view_of_a_view(x: torch.Tensor) -> torch.Tensor:
    whole = x.clone()
    view = whole.unsqueeze(0)[0]
    whole.mul_(2)
    return view


def part_written_under_a_half(x: torch.Tensor) -> torch.Tensor:
    whole = x.clone()
    left, _ = whole.chunk(2, dim=-1)
    whole[:, :1] = 7.0
    return left + whole[:, 2:]


def part_written_under_what_was_written(x: torch.Tensor) -> torch.Tensor:
    whole = x.clone()
    view = whole.add_(1)[:, 1:]
    whole[:, :3] = 7.0
    return view


def test_a_half_that_alone_is_read_may_be_written_in() -> None:
    x = torch.randn(3, 4)
    assert torch.equal(run(trace_module(Made(written_in_a_half), [x]), {"x": x})[0], written_in_a_half(x))


@pytest.mark.parametrize(
    "function",
    [
        read_through_a_view_of_a_view,
        part_written_under_a_half,
        part_written_under_what_was_written,
    ],
)
def test_what_is_written_and_read_under_another_name_is_refused(
    function: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    x = torch.randn(3, 4)
    with pytest.raises(UnsupportedError, match="on a part of"):
        trace_module(Made(function), [x])


class Cut(nn.Module):
    """Adds the end of a table of 64 rows that is as long as the input, as models cut tables of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(64, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.table[max(0, self.table.shape[0] - x.shape[1]) :]


class Begin(nn.Module):
    """Hides what a table of 64 by 64 says, cut to the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.ones(64, 64).tril())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        return torch.where(self.table[:length, :length] > 0, x @ x.mT, 0.0)


def bounded(module: nn.Module, bound: int) -> Any:
    tokens = torch.export.Dim("T", min=2, max=bound)
    return export(module, (torch.zeros(1, 6, 4),), {"x": {1: tokens}}, "cut")


def test_a_table_cut_to_the_tokens_is_traced_below_its_length() -> None:
    with pytest.raises(UnsupportedError) as refused:
        bounded(Begin(), 64)
    assert narrower(refused.value, 64) == (63, False)
    assert narrower(refused.value, 63) is None  # it would not end
    bounded(Begin(), 63)


def test_a_size_that_is_one_of_two_for_every_number_of_tokens_is_that_one() -> None:
    shapes = {"x": {1: torch.export.Dim("T", min=2, max=63)}}
    torch.manual_seed(0)
    module = Cut()
    graph = trace_module(module, {"x": torch.zeros(1, 6, 4)}, dynamic_shapes=shapes)
    assert graph.outputs[0].shape == (1, sym("T"), 4) and "slice" in opnames(graph)
    for length in (2, 30, 63):
        x = torch.randn(1, length, 4)
        torch.testing.assert_close(run(graph, {"x": x})[0], module(x), atol=0, rtol=0)


def test_another_reason_is_no_bound() -> None:
    with pytest.raises(UnsupportedError) as refused:
        export(Made(lambda x: x + float(x.sum())), (torch.zeros(2, device="meta"),), None, "made")
    assert narrower(refused.value, 64) is None


FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "at most": lambda x: torch.clamp_max(x, 0.25),
    "at least": lambda x: torch.clamp_min(x, 0.25),
    "relu6": lambda x: nn.functional.relu6(x * 9),
    "hardtanh": lambda x: nn.functional.hardtanh(x, -0.5, 0.75),
    "leaky relu": lambda x: nn.functional.leaky_relu(x, 0.1),
    "mish": nn.functional.mish,
    "hard sigmoid": lambda x: nn.functional.hardsigmoid(x * 3),
    "hard swish": lambda x: nn.functional.hardswish(x * 3),
    "elu": lambda x: nn.functional.elu(x * 200, 0.7),
    "selu": nn.functional.selu,
    "celu": lambda x: nn.functional.celu(x, 1.5),
    "softsign": nn.functional.softsign,
    "tanhshrink": nn.functional.tanhshrink,
    "glu": lambda x: nn.functional.glu(x, 1),
    "powers": lambda x: torch.exp2(x) + torch.log2(x.abs()) + torch.expm1(x),
    "hyperbolic": lambda x: torch.sinh(x) + torch.cosh(x),
    "rounded": lambda x: torch.ceil(x) + 10 * torch.trunc(x * 3) + 100 * torch.sign(x - x[0]),
    "joined with a factor": lambda x: torch.addcmul(x, x, x, value=3) + torch.addcdiv(x, x, x.abs() + 1),
    "between": lambda x: torch.lerp(x, x * x, 0.25) + torch.lerp(x, x * x, x),
    "between values": lambda x: torch.clamp(x, x[:1] - 0.5, x[:1] + 0.5),
    "under other names": lambda x: torch.multiply(torch.subtract(x, 0.5), torch.absolute(x)).swapaxes(0, 1),
    "where the largest stands": lambda x: x.argmax(-1, keepdim=True) + x.max(-1)[1].unsqueeze(-1) + x,
    "spread": lambda x: x.std(-1, keepdim=True) + x.var(0) + x.std(1, correction=0, keepdim=True),
    "log sigmoid": nn.functional.logsigmoid,
    "log1p": lambda x: torch.log1p(x.abs()),
    "outer": lambda x: torch.outer(x[0], x[:, 1]),
    "norm": lambda x: x / torch.linalg.vector_norm(x, dim=-1, keepdim=True),
    "norms of other orders": lambda x: (
        x.norm(p=1, dim=-1, keepdim=True)
        + torch.linalg.vector_norm(x, ord=3.5, dim=0)
        + torch.linalg.vector_norm(x, ord=float("inf"), dim=1, keepdim=True)
    ),
    "as another": lambda x: x.reshape(-1).view_as(x) + x.t().contiguous().reshape_as(x),
    "scattered": lambda x: torch.full_like(x, -9.0).scatter(-1, *reversed(x.topk(2, dim=-1))),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_mean_what_they_mean_in_torch(name: str) -> None:
    """To 2e-6."""
    torch.manual_seed(0)
    x = torch.randn(5, 4)
    graph = trace_module(Made(FUNCTIONS[name]), [x])
    torch.testing.assert_close(run(graph, {"x": x})[0], FUNCTIONS[name](x), atol=2e-6, rtol=2e-6)


class Repeated(nn.Module):
    """Asks torch for a relation that holds for every length, but that it does not see through."""

    def __init__(self, holds: bool) -> None:
        super().__init__()
        self.holds = holds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        torch._check(min(64, length) <= length if self.holds else length * length > 9)
        return x * 2


def relations(holds: bool) -> list[bool | None]:
    from llmc.frontend.export import relation_holds

    tokens = torch.export.Dim("T", min=2, max=63)
    program = export(Repeated(holds), (torch.zeros(1, 6, 4),), {"x": {1: tokens}}, "made", asserting=True)
    found: list[bool | None] = []
    for node in program.graph.nodes:
        if "_assert_scalar" in str(node.target):
            relation = node.args[0].meta["val"].node
            found.append(relation_holds(relation.expr, relation.shape_env.var_to_range))
    return found


def test_relations_of_sizes_are_proven_by_trying() -> None:
    found = relations(holds=True)
    assert found and set(found) == {True}
    assert False in relations(holds=False)
