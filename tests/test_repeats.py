"""Layers that are alike are traced once (`frontend/repeats.py`): the graph is the one of a whole trace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from llmc.frontend.repeats import CannotRepeat, Repeats, alike
from llmc.frontend.trace import (
    _trace_source,  # pyright: ignore[reportPrivateUsage]
    trace_source,
)
from llmc.ir.printer import print_graph

from .conftest import LONG
from .graphs import ModelInMemory
from .models import TINY

LAYERS = {"gpt2": "n_layer"}


def deep(family: str, layers: int = 4) -> Any:
    """A tiny model of more layers; a pattern of layer types goes on."""
    options: dict[str, Any] = {LAYERS.get(family, "num_hidden_layers"): layers}
    types = TINY[family].options.get("layer_types")
    if types is not None:
        options["layer_types"] = (types * layers)[:layers]
    import transformers

    tiny = TINY[family]
    config = getattr(transformers, tiny.config)(**{**tiny.options, **options})
    torch.manual_seed(0)
    return getattr(transformers, tiny.model)(config).to(torch.float32).eval()


def texts(source: Any, *, repeated: bool) -> tuple[str, list[str], list[str]]:
    graph = _trace_source(source, repeated=repeated)
    return print_graph(graph), [op.loc for op in graph], list(graph.weights)


# Two kinds of layers, positions that are learned, an encoder, and the usual.
@pytest.mark.parametrize("family", sorted(TINY) if LONG else ["bert", "gemma3", "gpt2", "llama"])
def test_the_graph_is_that_of_a_whole_trace(family: str) -> None:
    model = deep(family)
    source = ModelInMemory(model, attention="eager", encoder=not TINY[family].causal)
    assert texts(source, repeated=True) == texts(source, repeated=False)


@pytest.mark.parametrize(("family", "kinds"), [("llama", 1), ("gemma3", 2), ("gpt2", 1)])
def test_one_layer_of_each_kind_is_traced(family: str, kinds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Repeats] = []
    monkeypatch.setattr("llmc.frontend.trace.Repeats", lambda model: made.append(Repeats(model)) or made[-1])
    trace_source(ModelInMemory(deep(family), attention="eager"))  # type: ignore[arg-type]
    (repeats,) = made  # no second attempt
    assert len(repeats.copies) == 4 - kinds
    assert len(set(repeats.begun.values())) == kinds


def scaled_by_number(attention: Any) -> None:
    """Its class's forward, and then a factor that is the layer's number."""
    kind = type(attention)

    class Scaled(kind):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            hidden, weights = super().forward(*args, **kwargs)
            return hidden * (1 + self.layer_idx), weights

    attention.__class__ = Scaled


def test_a_layer_that_reads_its_number_is_traced_each_time() -> None:
    model = deep("llama", 3)

    class Source(ModelInMemory):
        def build_model(self) -> Any:
            built = copy.deepcopy(self.model)
            for layer in built.model.layers:
                scaled_by_number(layer.self_attn)
            return built

    source = Source(model)
    with pytest.raises(CannotRepeat):
        _trace_source(source, repeated=True)  # type: ignore[arg-type]
    whole = print_graph(_trace_source(source, repeated=False))  # type: ignore[arg-type]
    assert print_graph(trace_source(source)) == whole  # type: ignore[arg-type]


def test_what_makes_layers_unlike() -> None:
    layers = deep("llama", 2).model.layers
    for part in layers.modules():  # numbers are hidden while a model is traced
        vars(part).pop("layer_idx", None)
    one, two = layers
    assert alike(one, two)
    two.input_layernorm.variance_epsilon *= 2
    assert not alike(one, two)
    two.input_layernorm.variance_epsilon /= 2
    assert alike(one, two)
    for layer, value in ((one, 1.0), (two, 2.0)):
        layer.register_buffer("scale", torch.tensor([value]))
    assert not alike(one, two)
    two.scale.fill_(1.0)
    assert alike(one, two)
    handle = two.mlp.register_forward_hook(lambda *_: None)
    assert not alike(one, two)
    handle.remove()
    original = two.mlp.forward
    two.mlp.forward = lambda x: 2 * original(x)
    assert not alike(one, two)
    del two.mlp.forward
    assert alike(one, two)
    two.mlp.act_fn = torch.nn.GELU()
    assert not alike(one, two)


def test_a_layer_that_changes_what_it_is_given_is_traced_each_time() -> None:
    class Source(ModelInMemory):
        def build_model(self) -> Any:
            built = copy.deepcopy(self.model)
            for layer in built.model.layers:
                original = layer.forward

                def forward(hidden: Any, *args: Any, _original: Any = original, **kwargs: Any) -> Any:
                    return _original(hidden.add_(1.0), *args, **kwargs)

                layer.forward = forward
            return built

    source = Source(deep("llama", 3))
    with pytest.raises(CannotRepeat):
        _trace_source(source, repeated=True)  # type: ignore[arg-type]


def test_the_model_is_as_before_afterwards() -> None:
    model = deep("llama", 3)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        before = model(ids).logits
        with Repeats(model).installed():
            pass
        assert torch.equal(before, model(ids).logits)
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]
    assert not any("forward" in vars(layer) for layer in model.model.layers)
