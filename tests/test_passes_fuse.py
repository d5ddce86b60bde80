"""fuse-norms, fuse-rope, fuse-gated-mlp, merge-projections: positive, refused, and the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from llmc.frontend.trace import trace_module
from llmc.ir.core import Graph
from llmc.ir.interpreter import run
from llmc.ir.ops import math as m
from llmc.ir.ops.nn import GatedMlp, LayerNorm, Linear, RmsNorm, Rope
from llmc.ir.ops.shape import Full
from llmc.ir.types import TensorType
from llmc.ir.weights import ArrayTensor
from llmc.passes.base import PassContext
from llmc.passes.derived import ConcatRows
from llmc.passes.fuse.norm import FuseNorms
from llmc.passes.fuse.projections import FuseGatedMlps, MergeProjections, merged_weight
from llmc.passes.manager import run_passes
from llmc.passes.pipelines import function
from torch import nn

from .graphs import notes, opnames

Forward = Callable[..., torch.Tensor]
WIDTH = 16


class Holder(nn.Module):
    """A module made of a function of (self, x), with a few parameters for it."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.function = forward
        self.scale, self.shift = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))
        self.column = nn.Parameter(torch.randn(5, 1))
        self.gate, self.up = nn.Linear(WIDTH, 24, bias=False), nn.Linear(WIDTH, 24, bias=False)
        self.both, self.down = nn.Linear(WIDTH, 48), nn.Linear(24, WIDTH)
        self.q, self.k, self.v = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


def checked(forward: Forward, *shape: int, tolerance: float = 2e-6) -> tuple[Graph, list[str]]:
    """The fused graph and its notes, after its outputs were compared with torch's."""
    module = Holder(forward)
    x = torch.randn(shape or (2, 5, WIDTH))
    graph = trace_module(module, {"x": x})
    wanted = module(x)
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    result, records = run_passes(graph, function([]), PassContext())
    for got, value in zip(run(result, {"x": x}), wanted, strict=True):
        torch.testing.assert_close(got, value.detach(), atol=tolerance, rtol=tolerance)
    return result, notes(records)


def only(graph: Graph, kind: type[Any]) -> Any:
    (op,) = [op for op in graph if isinstance(op, kind)]
    return op


# -- norms
def rms(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


RMS: dict[str, tuple[Forward, bool]] = {
    "rsqrt": (lambda s, x: rms(x), False),
    "divided by sqrt": (lambda s, x: x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6), False),
    "pow -0.5": (lambda s, x: x * (x.square().mean(-1, keepdim=True) + 1e-6) ** -0.5, False),
    "one over sqrt": (lambda s, x: x * (1 / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-6)), False),
    "torch": (lambda s, x: nn.functional.rms_norm(x, (WIDTH,), s.scale, 1e-6), True),
    "scaled": (lambda s, x: s.scale * rms(x), True),
    "scaled by 1 + w": (lambda s, x: rms(x) * (1.0 + s.scale), True),
}


@pytest.mark.parametrize("name", RMS)
def test_rms_norm(name: str) -> None:
    forward, scaled = RMS[name]
    graph, _ = checked(forward)
    op = only(graph, RmsNorm)
    assert op.eps == pytest.approx(1e-6) and (op.weight is not None) is scaled
    assert opnames(graph) == ["rms_norm"]


LAYER: dict[str, tuple[Forward, bool, bool]] = {
    "torch": (lambda s, x: nn.functional.layer_norm(x, (WIDTH,), s.scale, s.shift, 1e-5), True, True),
    "bare": (lambda s, x: rms(x - x.mean(-1, keepdim=True), 1e-5), False, False),
    "scaled": (lambda s, x: s.scale * rms(x - x.mean(-1, keepdim=True), 1e-5), True, False),
    "with bias": (lambda s, x: rms(x - x.mean(-1, keepdim=True), 1e-5) * s.scale + s.shift, True, True),
    "by variance": (
        lambda s, x: (
            (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5)
        ),
        False,
        False,
    ),
}


@pytest.mark.parametrize("name", LAYER)
def test_layer_norm_decomposed(name: str) -> None:
    forward, weight, bias = LAYER[name]
    graph, _ = checked(forward)
    op = only(graph, LayerNorm)
    assert ((op.weight is not None), (op.bias is not None)) == (weight, bias)
    assert opnames(graph) == ["layer_norm"] and op.eps == pytest.approx(1e-5)


NORM_REFUSED: dict[str, tuple[Forward, str]] = {
    "multiplied by the root": (
        lambda s, x: x * torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6),
        "FuseRmsNorm: the norm is multiplied where it should divide",
    ),
    "scaled by a column": (
        lambda s, x: rms(x) * s.column,
        "ScaleRmsNorm: column float32[5, 1] is no vector over the normalised axis",
    ),
}


@pytest.mark.parametrize("name", NORM_REFUSED)
def test_norms_refused(name: str) -> None:
    forward, sentence = NORM_REFUSED[name]
    _, said = checked(forward)
    assert sentence in said


def test_an_unscaled_norm_that_is_used_elsewhere_stays() -> None:
    def forward(s: Holder, x: torch.Tensor) -> Any:
        y = rms(x)
        return y * s.scale, y + 1.0

    graph, said = checked(forward)
    assert "ScaleRmsNorm: the unscaled norm is used elsewhere" in said
    assert only(graph, RmsNorm).weight is None


def test_a_mean_over_other_axes_is_no_norm() -> None:
    graph, _ = checked(lambda s, x: x * torch.rsqrt(x.pow(2).mean(-2, keepdim=True) + 1e-6))
    assert "rms_norm" not in opnames(graph)


def test_a_norm_in_half_precision_is_refused() -> None:
    g = Graph("half", "fused")
    x = g.add_input("x", TensorType("float16", (3, WIDTH)))
    eps = g.append(Full(value=1e-6, dtype="float16")).result
    mean = g.append(m.ReduceMean(g.append(m.Mul(x, x)).result, axes=(-1,), keepdim=True)).result
    root = g.append(m.Rsqrt(g.append(m.Add(mean, eps)).result)).result
    g.outputs, g.output_names = [g.append(m.Mul(x, root)).result], ["y"]
    result = FuseNorms().run(g, PassContext())
    assert not result.changed
    assert result.notes == ["FuseRmsNorm: the norm runs in float16, not float32"]


# -- gated MLPs
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "relu": nn.functional.relu,
    "sigmoid": torch.sigmoid,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("form", ["two layers", "one layer", "swapped"])
def test_gated_mlp(name: str, form: str) -> None:
    act = ACTIVATIONS[name]

    def forward(s: Holder, x: torch.Tensor) -> torch.Tensor:
        if form == "two layers":
            return s.down(act(s.gate(x)) * s.up(x))
        if form == "swapped":
            return s.down(s.up(x) * act(s.gate(x)))
        gate, up = s.both(x).chunk(2, dim=-1)
        return s.down(up * act(gate))

    graph, _ = checked(forward)
    assert only(graph, GatedMlp).activation == name
    assert opnames(graph) == ["linear", "gated_mlp", "linear"]


FORMULAS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "silu": (lambda x: x * torch.sigmoid(x), "silu"),
    "gelu by erf": (lambda x: 0.5 * x * (1.0 + torch.erf(x / 2**0.5)), "gelu"),
    "gelu by tanh": (
        lambda x: 0.5 * x * (1.0 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x.pow(3)))),
        "gelu",
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_activations_written_out(name: str) -> None:
    formula, opname = FORMULAS[name]
    graph, _ = checked(lambda s, x: formula(x))
    assert opnames(graph) == [opname]
    if opname == "gelu":
        assert only(graph, m.Gelu).tanh is ("tanh" in name)


def test_other_constants_are_no_gelu() -> None:
    near = lambda s, x: 0.5 * x * (1.0 + torch.tanh(0.8 * (x + 0.05 * x.pow(3))))  # noqa: E731
    graph, _ = checked(near)
    assert "gelu" not in opnames(graph)
    graph, _ = checked(lambda s, x: 0.5 * x * (1.0 + torch.erf(x / 2.0)))
    assert "gelu" not in opnames(graph)


GATES_REFUSED: dict[str, tuple[Forward, str]] = {
    "used elsewhere": (
        lambda s, x: (lambda up: s.down(nn.functional.silu(s.gate(x)) * up) + up[..., :WIDTH])(s.up(x)),
        "FuseGatedMlp: gate or up is used elsewhere",
    ),
    "other inputs": (
        lambda s, x: s.down(nn.functional.silu(s.gate(x)) * s.up(x + 1.0)),
        "FuseGatedMlp: the layers read different inputs",
    ),
    "halves swapped": (
        lambda s, x: (lambda y: s.down(nn.functional.silu(y[..., 24:]) * y[..., :24]))(s.both(x)),
        "",
    ),
    "no halves": (
        lambda s, x: (lambda y: nn.functional.silu(y[..., :16]) * y[..., 20:36])(s.both(x)),
        "FuseGatedSlices: the slices are not the two halves",
    ),
}


@pytest.mark.parametrize("name", GATES_REFUSED)
def test_gated_mlps_refused(name: str) -> None:
    forward, sentence = GATES_REFUSED[name]
    graph, said = checked(forward)
    assert "gated_mlp" not in opnames(graph)
    assert any(note.startswith(sentence) for note in said) or not sentence, said


# -- projections
def test_siblings_become_one_layer_with_slices() -> None:
    graph, _ = checked(lambda s, x: (s.q(x), s.k(x), s.v(x)))
    op = only(graph, Linear)
    assert op.weight.shape == (16, WIDTH) and op.bias is not None
    assert opnames(graph) == ["linear", "slice", "slice", "slice"]


def test_layers_with_and_without_bias_merge_apart() -> None:
    graph, _ = checked(lambda s, x: (s.q(x), s.gate(x), s.k(x), s.up(x)))
    layers = [op for op in graph if isinstance(op, Linear)]
    assert sorted((op.weight.shape[0], op.bias is not None) for op in layers) == [(12, True), (48, False)]


def test_a_layer_whose_weight_is_computed_is_not_merged() -> None:
    g = Graph("computed", "fused")
    x = g.add_input("x", TensorType("float32", (3, 4)))
    weights = [g.add_weight(n, ArrayTensor(np.ones((2, 4), np.float32))) for n in "ab"]
    g.append(Linear(x, weights[0], None))
    g.append(Linear(x, g.append(m.Mul(weights[1], weights[1])).result, None))
    g.outputs = [op.result for op in g if isinstance(op, Linear)]
    g.output_names = ["a", "b"]
    result = MergeProjections().run(g, PassContext())
    assert not result.changed and result.notes == ["a weight is computed in the graph ()"]
    assert not FuseGatedMlps().run(g, PassContext()).changed


def test_two_merges_under_one_derived_name_stay_two_weights() -> None:
    g = Graph("names", "fused")
    parts = {
        name: g.add_weight(name, ArrayTensor(np.full((2, 3), float(i), np.float32)))
        for i, name in enumerate(["l.q.weight", "a.k.weight", "b.k.weight"])
    }
    q, a, b = parts.values()
    one, other = merged_weight(g, [q, a]), merged_weight(g, [q, b])
    assert one is not other and merged_weight(g, [q, a]) is one
    assert isinstance(other.weight, ConcatRows) and other.weight.read()[2:].max() == 2.0


# -- rotary embedding
HEADS, HEAD = 2, 8


def angles(length: int, width: int, factor: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [T, width / 2] with a factor, as YaRN scales them."""
    inverse = 1.0 / 100.0 ** (torch.arange(0, width, 2, dtype=torch.int64).float() / width)
    each = torch.arange(length).float()[:, None] * inverse
    return each.cos() * factor, each.sin() * factor


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def rotate_pairs(x: torch.Tensor) -> torch.Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def split_heads(x: torch.Tensor) -> torch.Tensor:
    return x.view(1, x.shape[1], HEADS, HEAD).transpose(1, 2)


def merge_heads(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).reshape(1, x.shape[2], HEADS * HEAD)


def turn_halves(a: torch.Tensor, b: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def turn(x: torch.Tensor, style: str, width: int = HEAD, factor: float = 1.0) -> torch.Tensor:
    """[1, H, T, D], the first `width` elements turned."""
    cos, sin = angles(x.shape[2], width, factor)
    part, rest = x[..., :width], x[..., width:]
    if style == "half":
        cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
        part = part * cos[None, None] + rotate_half(part) * sin[None, None]
    elif style == "split":
        part = turn_halves(*part.chunk(2, dim=-1), cos[None], sin[None])
    else:
        cos, sin = cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, dim=-1)
        part = (part * cos) + (rotate_pairs(part) * sin)
    return part if width == HEAD else torch.cat((part, rest), dim=-1)


@pytest.mark.parametrize("style", ["half", "interleaved", "split"])
@pytest.mark.parametrize("width", [HEAD, 4])
@pytest.mark.parametrize("factor", [1.0, 1.3])
def test_rope(style: str, width: int, factor: float) -> None:
    forward = lambda s, x: merge_heads(turn(split_heads(x), style, width, factor))  # noqa: E731
    graph, _ = checked(forward, 1, 5, WIDTH)
    op = only(graph, Rope)
    assert op.interleaved is (style == "interleaved") and op.rotary_dim == width
    assert "neg" not in opnames(graph) and "transpose" not in opnames(graph)


@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_rope_of_token_major_heads(style: str) -> None:
    def forward(s: Holder, x: torch.Tensor) -> torch.Tensor:
        cos, sin = angles(x.shape[1], HEAD)
        heads = x.view(1, x.shape[1], HEADS, HEAD)
        if style == "half":
            cos, sin = (torch.cat((t, t), -1)[None, :, None] for t in (cos, sin))
            return (heads * cos + rotate_half(heads) * sin).flatten(2)
        cos, sin = (t.repeat_interleave(2, -1)[None, :, None] for t in (cos, sin))
        return (heads * cos + rotate_pairs(heads) * sin).flatten(2)

    graph, _ = checked(forward, 1, 5, WIDTH)
    assert only(graph, Rope).interleaved is (style == "interleaved")


def test_rope_that_leaves_pairs_as_halves() -> None:
    """Every other element against the next, the results behind each other; heads of one table, of one head
    too, where a table has the shape of what it turns.
    """

    def forward(s: Holder, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = (t[None, None] for t in angles(x.shape[1], HEAD))
        heads, one = split_heads(x), x[None, ..., :HEAD]
        return tuple(turn_halves(y[..., ::2], y[..., 1::2], cos, sin) for y in (heads, one))

    graph, _ = checked(forward, 1, 5, WIDTH)
    assert [op.interleaved for op in graph if isinstance(op, Rope)] == [False, False]
    assert "sub" not in opnames(graph)


@pytest.mark.parametrize("name", ["the other way", "one angle for all"])
def test_halves_that_do_not_turn_are_no_rope(name: str) -> None:
    def forward(s: Holder, x: torch.Tensor) -> torch.Tensor:
        cos, sin = (t[None, None] for t in angles(x.shape[1], HEAD))
        if name == "one angle for all":
            cos, sin = cos[..., :1], sin[..., :1]
        a, b = split_heads(x).chunk(2, dim=-1)
        turned = turn_halves(b, a, cos, sin) if name == "one angle for all" else turn_halves(a, b, sin, cos)
        return merge_heads(turned)

    graph, said = checked(forward, 1, 5, WIDTH)
    assert "rope" not in opnames(graph)
    if name == "one angle for all":
        assert any(note.startswith("FuseHalvesRope: the tables float32[1, 1, 5, 1]") for note in said), said


def wrong_sign(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.cat((x[..., half:], -x[..., :half]), dim=-1)


ROPES_REFUSED: dict[str, tuple[Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor], str]] = {
    "another tensor": (
        lambda x, cos, sin: x * cos + rotate_half(x + 1.0) * sin,
        "FuseRope: the second product does not turn the pairs of the same tensor",
    ),
    "the other way": (lambda x, cos, sin: x * cos + wrong_sign(x) * sin, ""),
    "one angle for all": (
        lambda x, cos, sin: x * cos[..., :1] + rotate_half(x) * sin[..., :1],
        "FuseRope: the tables float32[1, 1, 5, 1]",
    ),
    "one table for all tokens": (
        lambda x, cos, sin: x * cos[..., :1, :] + rotate_half(x) * sin[..., :1, :],
        "FuseRope: the tables float32[1, 1, 1, 8]",
    ),
}


@pytest.mark.parametrize("name", ROPES_REFUSED)
def test_ropes_refused(name: str) -> None:
    apply, sentence = ROPES_REFUSED[name]

    def forward(s: Holder, x: torch.Tensor) -> torch.Tensor:
        cos, sin = (torch.cat((t, t), -1)[None, None] for t in angles(x.shape[1], HEAD))
        return merge_heads(apply(split_heads(x), cos, sin))

    graph, said = checked(forward, 1, 5, WIDTH)
    assert "rope" not in opnames(graph)
    assert any(note.startswith(sentence) for note in said) or not sentence, said
