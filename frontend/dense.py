"""Layers that sentence-transformers puts behind the pooling of an encoder (`Dense` in modules.json), as part
of its graph.

The graph gives a vector for each token, and the runtime pools them. A layer behind the pooling is applied to
every token's vector before it, which is the same where one token is picked ("cls", "last"), and for the mean
where the layer is affine. Affine layers in a row become one where that has fewer weights:
768 → 3072 → 768 are a matrix of 768 × 768.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ..ir.core import Graph, Op, Value
from ..ir.errors import InputError
from ..ir.ops import math as m
from ..ir.ops.nn import Linear
from ..ir.weights import ArrayTensor, LazyTensor, ShapeOnlyTensor
from . import hf
from .safetensors import open_safetensors
from .sentences import subfolder

if TYPE_CHECKING:
    from .source import ModelSource

_ACTIVATIONS: Final = {"Identity": None, "Tanh": m.Tanh, "ReLU": m.Relu, "GELU": m.Gelu, "SiLU": m.Silu}
_MOST: Final = 16  # layers: each is read from files that may be hostile


@dataclass(frozen=True)
class Dense:
    """activation(x · weightᵀ + bias): weight [N, K], bias [N], floats; `activation` None for the identity."""

    weight: LazyTensor
    bias: LazyTensor | None
    activation: type[m.Unary] | None


def dense_layers(folder: Path, places: list[str], *, config_only: bool = False) -> list[Dense]:
    """The layers in subfolders (config.json and model.safetensors, as sentence-transformers saves them).

    Raises InputError where one is damaged or has an activation that is not known.
    """
    if len(places) > _MOST:
        raise InputError(f"{folder} has {len(places)} layers behind the pooling", remedy=f"at most {_MOST}")
    return [_layer(folder, place, config_only=config_only) for place in places]


def _layer(folder: Path, place: str, *, config_only: bool) -> Dense:
    path = subfolder(folder, place) / "config.json"
    config = hf.read_json(path)
    given = str(config.get("activation_function", "torch.nn.Tanh"))
    name = given.rpartition(".")[2]
    if name not in _ACTIVATIONS or not given.startswith("torch."):
        raise InputError(
            f"{path} asks for the activation {given}", remedy=f"known: {', '.join(sorted(_ACTIVATIONS))}"
        )
    vector = "sentence_embedding"
    reads, gives = config.get("module_input_name", vector), config.get("module_output_name") or vector
    if config.get("use_residual") or reads != vector or gives != vector:
        raise InputError(
            f"{path} asks for a residual, or takes or gives something other than the vector of a text",
            remedy="report the model",
        )
    sizes = [config.get(key) for key in ("out_features", "in_features")]
    if not all(isinstance(n, int) and not isinstance(n, bool) and 0 < n <= 1 << 20 for n in sizes):
        raise InputError(f"{path} has no out_features and in_features", remedy="download the file again")
    shape: tuple[int, ...] = tuple(int(n) for n in sizes if n is not None)
    biased = config.get("bias", True) is not False
    if config_only:
        bias = ShapeOnlyTensor(shape[:1], "float32") if biased else None
        return Dense(ShapeOnlyTensor(shape, "float32"), bias, _ACTIVATIONS[name])
    weight, bias = _tensors(folder / place / "model.safetensors", shape, biased)
    return Dense(weight, bias, _ACTIVATIONS[name])


def _tensors(path: Path, shape: tuple[int, ...], biased: bool) -> tuple[LazyTensor, LazyTensor | None]:
    if not path.is_file():
        raise InputError(
            f"{path} is not there", remedy="download it; weights in a pickle file (*.bin) are never opened"
        )
    held = open_safetensors(path)
    wanted = {"linear.weight": shape, **({"linear.bias": shape[:1]} if biased else {})}
    for name, expected in wanted.items():
        floats = name in held and held[name].dtype.startswith(("float", "bfloat"))
        if not floats or tuple(held[name].shape) != expected:
            what = f"is {held[name].dtype}{list(held[name].shape)}" if name in held else "is missing"
            raise InputError(
                f"tensor {name} of {path} {what}, config.json beside it asks for floats {list(expected)}",
                remedy="download the folder again",
            )
    return held["linear.weight"], held["linear.bias"] if biased else None


def project(graph: Graph, source: ModelSource) -> None:
    """Put the layers behind an encoder's pooling at the end of its graph.

    Raises InputError where a layer cannot be applied before the pooling, or takes other vectors.
    """
    layers = source.dense
    if not layers:
        return
    pooled = graph.facts.get("pooling") or source.pooling or "mean"
    if pooled == "max" or (pooled == "mean" and any(one.activation is not None for one in layers)):
        raise InputError(
            f"{source.name} puts a layer behind its pooling ({pooled}) that cannot be applied before it",
            remedy="give an encoder whose vectors are its pooled hidden states, or affine functions of them",
        )
    (x,) = graph.outputs
    widths = [x.shape[-1], *(one.weight.shape[0] for one in layers)]
    for width, one in zip(widths, layers, strict=False):
        if one.weight.shape[1] != width:
            raise InputError(
                f"a layer behind the pooling of {source.name} takes vectors of {one.weight.shape[1]}, not of "
                f"{width} as there are",
                remedy="download the folder again",
            )
    for i, one in enumerate(_merged(layers)):
        weight = graph.add_weight(f"dense.{i}.weight", one.weight)
        bias = None if one.bias is None else graph.add_weight(f"dense.{i}.bias", one.bias)
        x = _appended(graph, Linear(x, weight, bias), i)
        if one.activation is not None:
            x = _appended(graph, one.activation(x), i)
    graph.outputs = [x]


def _appended(graph: Graph, op: Op, i: int) -> Value:
    op.loc = f"dense.{i}"
    return graph.append(op).result


def _merged(layers: list[Dense]) -> list[Dense]:
    """Affine layers in a row as one, where that one has fewer weights than they have."""
    found: list[Dense] = []
    for _, run in itertools.groupby(layers, key=lambda one: one.activation):
        same = list(run)
        affine = same[0].activation is None and len(same) > 1
        if affine and same[0].weight.shape[1] * same[-1].weight.shape[0] < sum(map(_elements, same)):
            found.append(_product(same))
        else:
            found += same
    return found


def _elements(one: Dense) -> int:
    return one.weight.shape[0] * one.weight.shape[1]


def _product(layers: list[Dense]) -> Dense:
    rows, columns = layers[-1].weight.shape[0], layers[0].weight.shape[1]
    biased = any(one.bias is not None for one in layers)
    if any(isinstance(one.weight, ShapeOnlyTensor) for one in layers):
        bias = ShapeOnlyTensor((rows,), "float32") if biased else None
        return Dense(ShapeOnlyTensor((rows, columns), "float32"), bias, None)
    weight: Any = np.eye(columns)
    total: Any = np.zeros(columns)
    for one in layers:
        matrix = np.asarray(one.weight.read(), np.float64)
        weight, total = matrix @ weight, matrix @ total
        total = total + (0 if one.bias is None else np.asarray(one.bias.read(), np.float64))
    made = [ArrayTensor(a.astype(np.float32), "layers behind the pooling") for a in (weight, total)]
    return Dense(made[0], made[1] if biased else None, None)
