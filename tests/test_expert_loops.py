"""Experts that a module computes in a loop of its own over those that were chosen, and their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llmc.frontend.expert_loops import forms_of
from llmc.frontend.experts import installed
from llmc.frontend.trace import trace_module
from llmc.ir.core import Graph
from llmc.ir.errors import UnsupportedError
from llmc.ir.interpreter import run
from llmc.ir.ops.moe import Gate, Moe
from llmc.ir.ops.shape import Concat, Reshape, Slice, Transpose
from llmc.ir.types import TensorType, sym
from llmc.ir.weights import ArrayTensor
from llmc.passes.base import PassContext
from llmc.passes.canonicalize.moe import NormalizeExperts
from llmc.passes.manager import run_passes
from llmc.passes.pipelines import canonicalize
from torch import nn

from .families import attempt
from .graphs import opnames

EXPERTS, CHOSEN = 5, 2


class Loop(nn.Module):
    """A loop over the experts that were chosen. What one of them computes is said below."""

    beyond = "refuses"

    def __init__(self, width: int = 8, inner: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.width, self.inner, self.num_experts = width, inner, EXPERTS
        self.make()

    def make(self) -> None:
        self.gate_up = nn.Parameter(torch.randn(EXPERTS, 2 * self.inner, self.width))
        self.down = nn.Parameter(torch.randn(EXPERTS, self.width, self.inner))
        self.act_fn: Any = nn.SiLU()

    def one(self, e: Any, x: torch.Tensor) -> torch.Tensor:
        gate, up = (x @ self.gate_up[e].T).chunk(2, -1)
        return (self.act_fn(gate) * up) @ self.down[e].T

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        rows = hidden_states.reshape(-1, self.width)
        total = torch.zeros_like(rows)
        count = EXPERTS if self.beyond == "refuses" else EXPERTS + 9
        chosen = torch.nn.functional.one_hot(top_k_index, num_classes=count).permute(2, 1, 0)
        for hit in torch.greater(chosen.sum((-1, -2)), 0).nonzero():
            e = hit[0]
            place, token = torch.where(chosen[e])
            if e < EXPERTS:
                made = self.one(e, rows[token])
            elif self.beyond == "nothing":
                continue
            else:
                made = rows[token] * (2.0 if self.beyond == "doubles" else 1.0)
            total.index_add_(0, token, made * top_k_weights[token, place, None])
        return total.view(hidden_states.shape)


class Flat(Loop):
    """Three matrices, experts one below the other, the last of them turned."""

    def make(self) -> None:
        self.a, self.b, self.c = (
            nn.Parameter(torch.randn(EXPERTS * self.inner, self.width)) for _ in range(3)
        )
        self.activation = torch.nn.functional.gelu

    def one(self, e: Any, x: torch.Tensor) -> torch.Tensor:
        a, b, c = (p.view(EXPERTS, self.inner, self.width)[e] for p in (self.a, self.b, self.c))
        return (self.activation(x @ b.T) * (x @ a.T)) @ c


class Turned(Loop):
    """Both matrices turned, gates beside their ups."""

    def make(self) -> None:
        self.gate_up = nn.Parameter(torch.randn(EXPERTS, self.width, 2 * self.inner))
        self.down = nn.Parameter(torch.randn(EXPERTS, self.inner, self.width))
        self.act_fn = nn.ReLU()

    def one(self, e: Any, x: torch.Tensor) -> torch.Tensor:
        both = x @ self.gate_up[e]
        return (self.act_fn(both[..., ::2]) * both[..., 1::2]) @ self.down[e]


class Ungated(Loop):
    def make(self) -> None:
        self.up = nn.Parameter(torch.randn(EXPERTS, self.inner, self.width))
        self.down = nn.Parameter(torch.randn(EXPERTS, self.width, self.inner))
        self.act_fn = nn.GELU()

    def one(self, e: Any, x: torch.Tensor) -> torch.Tensor:
        return self.act_fn(x @ self.up[e].T) @ self.down[e].T


class Passing(Loop):
    """Experts beyond the last one pass the token; there are matrices for some of them, which nobody reads."""

    beyond = "passes"

    def make(self) -> None:
        super().make()
        self.gate_up = nn.Parameter(torch.randn(EXPERTS + 2, 2 * self.inner, self.width))


class Silent(Loop):
    beyond = "nothing"


class Doubling(Loop):
    beyond = "doubles"


class Biased(Loop):
    def make(self) -> None:
        super().make()
        self.bias = nn.Parameter(torch.randn(EXPERTS, self.width))

    def one(self, e: Any, x: torch.Tensor) -> torch.Tensor:
        return super().one(e, x) + self.bias[e]


class Other(Loop):
    """Half of an activation is of no kind that is known."""

    def one(self, e: Any, x: torch.Tensor) -> torch.Tensor:
        gate, up = (x @ self.gate_up[e].T).chunk(2, -1)
        return (self.act_fn(gate) * torch.tanh(up)) @ self.down[e].T


class Inline(Loop):
    """It holds no activation."""

    def make(self) -> None:
        super().make()
        del self.act_fn

    def one(self, e: Any, x: torch.Tensor) -> torch.Tensor:
        gate, up = torch.nn.functional.linear(x, self.gate_up[e]).chunk(2, -1)
        return (torch.nn.functional.gelu(gate, approximate="tanh") * up) @ self.down[e].T


class Clamped(Loop):
    """What only large numbers show."""

    limits = (7.0, 7.0)

    def one(self, e: Any, x: torch.Tensor) -> torch.Tensor:
        gate, up = (x @ self.gate_up[e].T).chunk(2, -1)
        first, second = self.limits
        return (self.act_fn(gate.clamp(max=first)) * up.clamp(-second, second)) @ self.down[e].T


class OneClamped(Clamped):
    """All experts but one have limits."""

    def one(self, e: Any, x: torch.Tensor) -> torch.Tensor:
        return Loop.one(self, e, x) if e == 1 else super().one(e, x)


class Uneven(Clamped):
    limits = (7.0, 5.0)


class ClampedLater(Loop):
    """The active gate is limited, by a method that experts of transformers' interface have as well."""

    def _apply_gate(self, both: torch.Tensor) -> torch.Tensor:
        gate, up = both.chunk(2, -1)
        return torch.nn.functional.silu(gate).clamp(max=16.0) * up.clamp(-16.0, 16.0)

    def one(self, e: Any, x: torch.Tensor) -> torch.Tensor:
        return self._apply_gate(x @ self.gate_up[e].T) @ self.down[e].T


class ClampedLow(ClampedLater):
    """A limit within which activations differ from their limits."""

    def _apply_gate(self, both: torch.Tensor) -> torch.Tensor:
        gate, up = both[..., ::2], both[..., 1::2]
        active = torch.nn.functional.gelu(gate).clamp(max=1.5)
        return active * (up.clamp(-1.5, 1.5) + 0.25)


class Columns(Loop):
    """Tokens are columns, and there are three matrices."""

    def make(self) -> None:
        self.a, self.b = (nn.Parameter(torch.randn(EXPERTS, self.inner, self.width)) for _ in range(2))
        self.c = nn.Parameter(torch.randn(EXPERTS, self.width, self.inner))

    def one(self, e: Any, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.a[e] @ x.T, self.b[e] @ x.T
        return (self.c[e] @ (gate * torch.sigmoid(1.702 * gate) * up)).T


class Full(Loop):
    """An expert takes a number of tokens at most, and nothing becomes of the others."""

    def one(self, e: Any, x: torch.Tensor) -> torch.Tensor:
        kept = torch.arange(len(x)) < 16
        return super().one(e, x) * kept[:, None]


class Layer(nn.Module):
    """A router and experts, over rows [T, D] or a batch of them."""

    def __init__(self, experts: Loop, batched: bool = False) -> None:
        super().__init__()
        more = 3 if experts.beyond != "refuses" else 0
        self.router, self.experts = nn.Linear(experts.width, EXPERTS + more, bias=False), experts
        self.batched = batched

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shares, places = self.router(x).softmax(-1).topk(CHOSEN, dim=-1)
        if self.batched:
            return self.experts(x[None], places, shares)[0]
        return self.experts(x, places, shares)


def traced(module: Layer) -> Graph:
    tokens = ({0: torch.export.Dim("T", min=2)},)
    return trace_module(module, (torch.zeros(3, module.experts.width),), dynamic_shapes=tokens)


_LOW = Gate("gelu", limit=1.5, offset=0.25, interleaved=True, limits_active=True)
KNOWN: dict[str, tuple[type[Loop], Gate, str]] = {
    "stacked": (Loop, Gate("silu"), ""),
    "flat": (Flat, Gate("gelu"), ""),
    "turned": (Turned, Gate("relu", interleaved=True), ""),
    "without a gate": (Ungated, Gate("gelu", gated=False), ""),
    "of functions": (Inline, Gate("gelu_tanh"), ""),
    "clamped": (Clamped, Gate("silu", limit=7.0), ""),
    "clamped later": (ClampedLater, Gate("silu", limit=16.0), ""),
    "clamped low": (ClampedLow, _LOW, ""),
    "columns": (Columns, Gate("swish", alpha=1.702), ""),
    "passing": (Passing, Gate("silu"), "passes"),
    "silent": (Silent, Gate("silu"), "nothing"),
}


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("sizes", [(8, 6), (8, 8), (4, 8), (8, 4)])
@pytest.mark.parametrize("name", KNOWN)
def test_loops_become_mixtures(name: str, sizes: tuple[int, int], batched: bool) -> None:
    """Within 1e-4: sums in another order. Sizes that are equal, or twice each other, fit in several ways."""
    kind, gate, beyond = KNOWN[name]
    layer = Layer(kind(*sizes), batched)
    (found,), unknown = forms_of(layer)
    assert not unknown and (found[1].gate, found[1].beyond, found[1].ranks) == (gate, beyond, (2, 3))
    graph = run_passes(traced(layer), canonicalize(), PassContext())[0]
    names = opnames(graph)
    assert names.count("moe") == 1
    assert "forward" not in vars(layer.experts)
    for rows in (1, 2, 9):
        x = torch.randn(rows, sizes[0])
        with torch.no_grad():
            torch.testing.assert_close(
                run(graph, {graph.inputs[0].name: x})[0], layer(x), atol=1e-4, rtol=1e-4
            )


@pytest.mark.parametrize("kind", [Biased, Other, Doubling, OneClamped, Uneven, Full])
def test_loops_of_another_kind_are_refused(kind: type[Loop]) -> None:
    with pytest.raises(UnsupportedError, match="the experts of experts are computed in a loop over those"):
        traced(Layer(kind()))


def test_a_forward_method_of_the_users_own_stays() -> None:
    layer = Layer(Loop())
    own = layer.experts.forward = lambda *given: Loop.forward(layer.experts, *given)
    traced(layer)
    assert vars(layer.experts)["forward"] is own


def test_what_depends_on_values_elsewhere_is_said_in_our_words() -> None:
    class Hit(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for place in (x > 0).nonzero():
                x = x + x[place[0]]
            return x

    with pytest.raises(UnsupportedError, match="what it does next, or a size, depends on the values"):
        trace_module(Hit(), (torch.ones(3, 2),))


def test_hidden_states_of_a_rank_that_was_not_tried_are_left_to_the_module() -> None:
    layer = Layer(Loop())
    with torch.no_grad(), installed(layer):
        x = torch.randn(1, 1, 3, 8)
        places, shares = torch.tensor([[0, 1], [2, 3], [4, 0]]), torch.rand(3, 2)
        got = layer.experts(x, places, shares)
    with torch.no_grad():
        assert torch.equal(got, layer.experts(x, places, shares))


@pytest.mark.parametrize("family", ["dbrx", "longcat_flash"])
def test_families_equal_transformers(family: str, tmp_path: Path) -> None:
    found = attempt(family, tmp_path / family)
    assert (found.status, found.reason) == ("equal", "")


@pytest.mark.parametrize("limit", [None, 1.5, 16.0])
def test_experts_of_transformers_that_have_half_of_its_interface(limit: float | None) -> None:
    """A gate of the interface's name in a loop. transformers has no text model of these alone: the layer is
    compared: within 1e-5 of the largest value.
    """
    from transformers.models.step3p7 import configuration_step3p7, modeling_step3p7

    config = configuration_step3p7.Step3p7TextConfig(
        hidden_size=64, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
        share_expert_dim=24, num_hidden_layers=1, swiglu_limits=[limit],
    )  # fmt: skip
    layer = modeling_step3p7.Step3p7SparseMoeBlock(config, 0).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
    tokens = ({1: torch.export.Dim("T", min=2)},)
    graph = trace_module(layer, (torch.zeros(1, 3, 64),), dynamic_shapes=tokens)
    assert opnames(graph).count("moe") == 1
    x = torch.randn(1, 17, 64)
    with torch.no_grad():
        wanted = layer(x)
    (got,) = run(graph, {graph.inputs[0].name: x})
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


# -- weights


def _weight(graph: Graph, name: str, *shape: int) -> Any:
    rng = np.random.default_rng(len(graph.weights))
    return graph.add_weight(name, ArrayTensor(rng.standard_normal(shape).astype(np.float32), name))


def _mixture(form: str) -> Graph:
    graph = Graph()
    x = graph.add_input("x", TensorType("float32", (sym("T"), 8)))
    indices = graph.add_input("i", TensorType("int64", (sym("T"), 2)))
    weights = graph.add_input("w", TensorType("float32", (sym("T"), 2)))

    def put(op: Any) -> Any:
        graph.append(op)
        return op.result

    if form == "flat":
        parts = [_weight(graph, n, 15, 8) for n in ("gate", "up", "down")]
        gate, up, down = (put(Reshape(p, shape=(5, 3, 8))) for p in parts)
        both = put(Concat([gate, up], axis=-2))
        down = put(Transpose(down, perm=(-1, -2)))
    else:
        both = put(Slice(_weight(graph, "both", 7, 6, 8), axis=-3, start=1, stop=6))
        down = _weight(graph, "down", 5, 8, 3)
    if form == "computed":
        both = put(Reshape(put(Reshape(both, shape=(5 * 6 * 8,))), shape=(5, 6, 8)))
    graph.outputs = [put(Moe(x, indices, weights, both, down, None, None))]
    graph.output_names = ["y"]
    return graph


@pytest.mark.parametrize("form", ["flat", "sliced", "computed"])
def test_weights_that_are_put_together_are_read_by_expert(form: str) -> None:
    """The very numbers; what is made in another way stays as it is."""
    given = {
        "x": torch.randn(4, 8),
        "i": torch.tensor([[0, 4], [1, 2], [3, 0], [4, 1]]),
        "w": torch.rand(4, 2),
    }
    (wanted,) = run(_mixture(form), given)
    graph, _ = run_passes(_mixture(form), [NormalizeExperts()], PassContext())
    assert torch.equal(run(graph, given)[0], wanted)
    if form == "computed":
        assert "reshape" in opnames(graph)
        return
    assert opnames(graph) == ["moe"]
    op = graph.ops[0]
    assert isinstance(op, Moe)
    for value in (op.gate_up, op.down):
        assert value.weight is not None and value.weight.shape == value.shape
        whole = value.weight.read()
        assert whole.shape == value.shape and value.weight.read(5).shape[0] == 0
        for start, stop in ((0, 1), (2, 5), (4, None)):
            assert np.array_equal(value.weight.read(start, stop), whole[start:stop])
    assert not NormalizeExperts().run(graph, PassContext()).changed
