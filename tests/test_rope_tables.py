"""Tables of cosines and sines that a compiled step computes, beside transformers' for the whole sequence.

The oracle is transformers' own rotary module, called once with all positions of a sequence of the context's
length (so that its length-dependent kinds update themselves). The graph's tables must equal it bit for bit
by the interpreter; kernels of tvm-cpu within 3e-7 of the angle's cosine in float64.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from llmc.frontend.rope import RopeScaling  # noqa: E402
from llmc.frontend.source import open_source  # noqa: E402
from llmc.frontend.trace import trace_source  # noqa: E402
from llmc.ir.core import Graph  # noqa: E402
from llmc.ir.interpreter import run  # noqa: E402
from llmc.ir.ops.nn import Rope  # noqa: E402
from llmc.ir.types import DimExpr  # noqa: E402

from .graphs import lowered  # noqa: E402
from .models import CONTEXT, save_tiny, tiny_config, tiny_model  # noqa: E402
from .tvm_graphs import compile_graph, open_tvm  # noqa: E402

LISTS = {"short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [1.0 + 2.5 * i for i in range(8)]}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
ORIGINAL = {"original_max_position_embeddings": CONTEXT}

# The option, the context to compile for (None: what the option gives), and what a configuration of
# transformers says of the same.
SCALINGS: dict[str, tuple[str | None, int | None, dict[str, Any]]] = {
    "default": (None, None, {}),
    "linear": ("linear:4", None, {"factor": 4.0}),
    "dynamic": ("dynamic:4", None, {"factor": 4.0}),
    "dynamic, short": ("dynamic:4", 200, {"factor": 4.0}),
    "dynamic, between": ("dynamic:4", 700, {"factor": 4.0}),
    "yarn": ("yarn:4", None, {"factor": 4.0, **ORIGINAL}),
    "yarn, told": (
        "yarn:4,original=64,beta_fast=16,beta_slow=2,attention_factor=1.5,truncate=false",
        None,
        {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0, "beta_slow": 2.0,
         "attention_factor": 1.5, "truncate": False},
    ),
    "llama3": ("llama3:8", None, {"factor": 8.0, **LLAMA3, **ORIGINAL}),
    "longrope": ("longrope:4,factors=FILE", None, {"factor": 4.0, **LISTS, **ORIGINAL}),
    "longrope, short": ("longrope:4,factors=FILE", CONTEXT, {"factor": 4.0, **LISTS, **ORIGINAL}),
}  # fmt: skip


def scaled(family: str, name: str, folder: Path) -> tuple[Any, Any, int]:
    """Our source of an unscaled model with the option, transformers' model that says so, the context."""
    option, context, parameters = SCALINGS[name]
    source = open_source(save_tiny(family, folder))
    length = CONTEXT
    fields: dict[str, Any] = {}
    if option is not None:
        path = folder / "factors.json"
        path.write_text(json.dumps(LISTS))
        source.scale_rope(RopeScaling.parse(option.replace("FILE", str(path))))
        assert source.length is not None
        length = source.length = context or source.length
        # What is written by hand here is what a model's makers would publish.
        base = tiny_config(family).rope_parameters
        entry = {"rope_type": option.partition(":")[0], **parameters}
        nested = "full_attention" in base
        kept = base["full_attention"] if nested else base
        entry = {**kept, **entry}
        fields["rope_parameters"] = {**base, "full_attention": entry} if nested else entry
        if "dynamic" not in name:
            original = parameters.get("original_max_position_embeddings", CONTEXT)
            fields["max_position_embeddings"] = int(original * parameters["factor"])
        if "original_max_position_embeddings" in parameters and family == "phi3":
            fields["original_max_position_embeddings"] = parameters["original_max_position_embeddings"]
    return source, tiny_model(family, **fields), length


def tables(graph: Graph, positions: list[int]) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """(module, cos, sin) of every rope in a paged graph at some positions, by the interpreter."""
    ropes = [op for op in graph if isinstance(op, Rope)]
    where = [op.loc for op in ropes]
    graph.outputs = [value for op in ropes for value in (op.cos, op.sin)]
    graph.drop_dead()
    inputs: dict[str, Any] = {}

    def sized(d: DimExpr) -> Any:
        return d.substitute({name: len(positions) if name == "T" else 1 for name in d.symbols()})

    for value in graph.inputs:
        shape = [d if isinstance(d, int) else sized(d) for d in value.shape]
        inputs[value.name] = torch.zeros(shape, dtype=getattr(torch, value.dtype))
    inputs["positions"] = torch.tensor(positions, dtype=torch.int32)
    found = [value.numpy() for value in run(graph, inputs)]
    return [(loc, found[2 * i], found[2 * i + 1]) for i, loc in enumerate(where)]


def rotary_of(model: Any) -> Any:
    return next(m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding"))


def places(length: int) -> list[int]:
    """Positions to look at: the first ones, around what may be a bound, the last."""
    marks = [
        0,
        1,
        2,
        3,
        15,
        16,
        17,
        63,
        64,
        65,
        199,
        255,
        256,
        257,
        511,
        512,
        700,
        1023,
        length - 2,
        length - 1,
    ]
    rng = np.random.default_rng(0)
    return sorted({p for p in (*marks, *rng.integers(0, length, 40).tolist()) if p < length})


# transformers lets phi3 be published with LongRoPE only.
CASES = [("llama", name) for name in SCALINGS] + [
    ("phi3", name) for name in ("default", "longrope", "longrope, short")
]


def assert_same_tables(source: Any, theirs: Any, length: int) -> None:
    """The tables of the queries and keys of two layers are those of transformers, to the bit."""
    positions = places(length)
    graph, _ = lowered(trace_source(source), "paged")
    cos, sin = rotary_of(theirs)(torch.zeros(1, length, 1), torch.arange(length)[None])
    ours = tables(graph, positions)
    assert len(ours) == 4
    for _, found_cos, found_sin in ours:
        assert np.array_equal(found_cos.reshape(len(positions), -1), cos[0, positions].numpy())
        assert np.array_equal(found_sin.reshape(len(positions), -1), sin[0, positions].numpy())


@pytest.mark.parametrize(("family", "name"), CASES)
def test_tables_equal_transformers(family: str, name: str, tmp_path: Path) -> None:
    source, theirs, length = scaled(family, name, tmp_path)
    assert_same_tables(source, theirs, length)


@pytest.mark.parametrize("name", ["linear", "yarn", "dynamic", "llama3"])
def test_each_kind_of_layers_has_its_own_tables(name: str, tmp_path: Path) -> None:
    source, theirs, length = scaled("gemma3", name, tmp_path)
    positions = places(length)
    graph, _ = lowered(trace_source(source), "paged")
    ours = tables(graph, positions)
    for layer, kind in enumerate(theirs.config.layer_types):
        cos, sin = rotary_of(theirs)(torch.zeros(1, length, 1), torch.arange(length)[None], kind)
        mine = [(c, s) for loc, c, s in ours if f"layers.{layer}." in loc]
        assert len(mine) == 2, [loc for loc, _, _ in ours]
        for found_cos, found_sin in mine:
            assert np.array_equal(found_cos.reshape(len(positions), -1), cos[0, positions].numpy()), kind
            assert np.array_equal(found_sin.reshape(len(positions), -1), sin[0, positions].numpy()), kind


def test_partial_rotary_with_a_scaling(tmp_path: Path) -> None:
    """A quarter of each head is turned, by frequencies that are scaled for that width."""
    source, theirs, length = scaled("gpt_neox", "yarn", tmp_path)
    assert_same_tables(source, theirs, length)


@cache
def _published(kind: str, folder: Path) -> tuple[Any, Any]:
    extra = {"dynamic": {"factor": 2.0}, "longrope": {**LISTS, "original_max_position_embeddings": 64}}
    parameters = {"rope_type": kind, "rope_theta": 1e4, **extra.get(kind, {"partial_rotary_factor": 0.5})}
    changes: dict[str, Any] = {"rope_parameters": parameters}
    return open_source(save_tiny("llama", folder, **changes)), tiny_model("llama", **changes)


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "proportional"])
def test_models_published_with_a_scaling(kind: str, tmp_path: Path) -> None:
    """Without any option: the kinds that change with the length, and part of a head with its own waves."""
    source, theirs = _published(kind, tmp_path)
    length = source.length = 2 * CONTEXT if kind == "dynamic" else CONTEXT  # up to CONTEXT it does nothing
    assert_same_tables(source, theirs, length)


def test_kernels_compute_the_same_tables_up_to_131072_tokens(tmp_path: Path) -> None:
    source, _, _ = scaled("llama", "yarn", tmp_path)
    graph, _ = lowered(trace_source(source), "paged")
    rope = next(op for op in graph if isinstance(op, Rope))
    graph.outputs = [rope.cos, rope.sin]
    graph.output_names = ["cos", "sin"]
    graph.drop_dead()
    frequencies = next(v.weight.read() for v in graph.weights.values() if v.weight is not None)
    graph.inputs[:] = [v for v in graph.inputs if v.name == "positions"]
    graph.facts = {"kind": "function"}
    executor = open_tvm(compile_graph(graph, tmp_path / "tables.llmc"))
    factor = 0.1 * np.log(4.0) + 1.0
    for start in (0, 1, 255, 8191, 32767 - 64, 131072 - 64):
        positions = np.arange(start, start + 64, dtype=np.int32)
        found = executor.run({"positions": positions})
        # The angle is a float32 there and here; its cosine is not.
        angles = positions[:, None].astype(np.float32) * frequencies.reshape(1, -1)
        angles = np.concatenate([angles, angles], axis=1).astype(np.float64)
        for name, function in (("cos", np.cos), ("sin", np.sin)):
            got = found[name].reshape(64, -1)
            assert np.abs(got - factor * function(angles)).max() <= 3e-7 * factor, (name, start)
