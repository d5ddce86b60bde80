"""Checks for the tests of plugins: each runs what an author wrote on small models, holds it to what llmc
relies on, and raises AssertionError, saying what is wrong, where it falls short.

    def test_my_pass():
        result = check_pass(MyPass(), tiny_model(), tolerance=1e-5)
        assert result.changed

They need the extra `llmc[compile]` (torch, for the meanings of ops).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...ir.core import Graph
from ...ir.ops.quant import QuantizedLinear
from ...ir.printer import print_graph
from ...ir.weights import LazyTensor, QuantizedTensors, dequantize_rows
from ...passes.base import Pass, PassContext, PassResult
from ...passes.calibration import Calibration
from ...passes.manager import run_one, run_passes
from ...passes.registry import Quantizer
from ...runtime.custom_sampler import Sampler, SamplerContext
from ...runtime.tool_calls.base import Tool, ToolCall, ToolFormat, collect
from .executors import TargetReport, check_target, compile_tiny
from .model import PAGE_SIZE, VOCABULARY, logits_of, paged, tiny_model

__all__ = [
    "PAGE_SIZE",
    "VOCABULARY",
    "TargetReport",
    "check_pass",
    "check_quantizer",
    "check_sampler",
    "check_target",
    "check_tool_format",
    "compile_tiny",
    "context_of",
    "logits_of",
    "paged",
    "tiny_model",
]

_TOKENS = tuple(int(token) for token in np.random.default_rng(3).integers(0, VOCABULARY, 40))


def context_of(*, sequences: int = 4, length: int = 32) -> PassContext:
    """A context as a compilation gives it to a pass that needs calibration, with random tokens."""
    rng = np.random.default_rng(11)
    made = [rng.integers(0, VOCABULARY, length, dtype=np.int64) for _ in range(2 * sequences)]
    calibration = Calibration(tuple(made[:sequences]), tuple(made[sequences:]), "random", "0" * 64)
    return PassContext(context_length=512, calibration=calibration)


def check_pass(
    pass_: Pass, graph: Graph, *, tolerance: float | None = None, context: PassContext | None = None
) -> PassResult:
    """Run a pass on a copy of `graph` as a compilation does, the graph verified after it.

    It must do the same twice, and say truly whether it changed anything. `tolerance`: the logits before and
    after may differ by so much of the largest one; None where the pass is meant to change them (they must
    still be finite).
    """
    before = print_graph(graph)
    result = run_one(pass_, graph.clone(), context or context_of())
    again = run_one(pass_, graph.clone(), context or context_of())
    text = print_graph(result.graph)
    assert text == print_graph(again.graph), f"{pass_.name} gives two different graphs of the same one"
    same = text == before.replace(f'stage = "{graph.stage}"', f'stage = "{result.graph.stage}"')
    assert result.changed or same, f"{pass_.name} says that it changed nothing, and did"
    assert all(isinstance(note, str) for note in result.notes), f"{pass_.name}: notes are sentences"
    after = logits_of(result.graph, _TOKENS)
    assert np.isfinite(after).all(), f"after {pass_.name} the logits are not finite"
    if tolerance is not None:
        wanted = logits_of(graph, _TOKENS)
        error = float(np.abs(after - wanted).max() / np.abs(wanted).max())
        assert error <= tolerance, f"{pass_.name} changes logits by {error:.3g} of the largest one"
    return result


def check_quantizer(quantizer: Quantizer, scheme: str, *, graph: Graph | None = None) -> float:
    """Quantize a small model by a scheme; the error of its linear layers' weights, |w - w'| / |w|.

    Every linear layer but the head must be quantized, weights must read the same in pieces and at once, and
    what is no scheme of the quantizer's must be left to others (None).
    """
    graph = tiny_model() if graph is None else graph
    assert quantizer.passes("no-such-scheme-of-anyone") is None, "schemes of others are answered with None"
    passes = quantizer.passes(scheme)
    assert passes, f"{scheme} is not taken"
    assert all(isinstance(one, Pass) for one in passes), f"{scheme}: no list of passes"
    final = run_passes(graph.clone(), passes, context_of())[0]
    json.dumps([str(one) for one in passes])
    linears = [op for op in final if isinstance(op, QuantizedLinear)]
    wanted = {name for name, v in graph.weights.items() if len(v.shape) == 2 and name.startswith("layers.")}
    found = {op.q.name.removesuffix(".q") for op in linears}
    assert wanted <= found, f"{scheme} leaves {sorted(wanted - found)[0]} as it was"
    difference = total = 0.0
    for op in linears:
        parts = _parts(op)
        _reads_alike([parts.codes, parts.scale, *([parts.zero_point] if parts.zero_point else [])])
        source = graph.weights.get(op.q.name.removesuffix(".q"))
        if source is not None and source.weight is not None:
            w = source.weight.read().astype(np.float64)
            difference += float(((dequantize_rows(parts) - w) ** 2).sum())
            total += float((w**2).sum())
    assert np.isfinite(logits_of(final, _TOKENS)).all(), f"{scheme}: the logits are not finite"
    return float(np.sqrt(difference / total))


def _parts(op: QuantizedLinear) -> QuantizedTensors:
    quant, codes, scale = op.q.type.quant, op.q.weight, op.scale.weight
    assert quant is not None and codes is not None and scale is not None, f"{op!r} reads no weights"
    return QuantizedTensors(quant, codes, scale, None if op.zero_point is None else op.zero_point.weight)


def _reads_alike(tensors: Sequence[LazyTensor]) -> None:
    for tensor in tensors:
        rows = tensor.shape[0]
        cut = max(1, rows // 3)
        whole = tensor.read()
        pieces = np.concatenate([tensor.read(0, cut), tensor.read(cut, rows)])
        assert whole.shape == tensor.shape, f"{tensor.source} reads as {whole.shape}, not {tensor.shape}"
        assert np.array_equal(whole, pieces), f"{tensor.source} reads otherwise in pieces than at once"


def check_sampler(sampler: Sampler, *, vocabulary: int = VOCABULARY) -> None:
    """Ask a sampler for logits in many situations: right form, something left to choose, and a function of
    its arguments alone.
    """
    rng = np.random.default_rng(4)
    for length, prompt in ((1, 1), (5, 5), (9, 4), (200, 100)):
        tokens = rng.integers(0, vocabulary, length).astype(np.int32)
        logits = rng.standard_normal(vocabulary).astype(np.float32)
        context = SamplerContext(tokens, prompt)
        found = sampler.adjust(logits.copy(), context)
        assert isinstance(found, np.ndarray), f"{sampler.name} gave a {type(found).__name__}"
        assert found.dtype == np.float32 and found.shape == logits.shape, (
            f"{sampler.name} gave {found.dtype}{list(found.shape)}, not float32{list(logits.shape)}"
        )
        assert np.isfinite(found.max()) and not np.isnan(found).any(), (
            f"{sampler.name} leaves nothing to choose"
        )
        sampler.adjust(rng.standard_normal(vocabulary).astype(np.float32), SamplerContext(tokens[:1], 1))
        again = sampler.adjust(logits.copy(), context)
        assert np.array_equal(found, again), f"{sampler.name} gives something else when asked again"


def check_tool_format(format: ToolFormat) -> None:
    """Write calls as a model would and read them back, cut anywhere; make the grammar of two tools."""
    where: dict[str, Any] = {
        "type": "object",
        "properties": {"place": {"type": "string"}},
        "required": ["place"],
    }
    tools = [Tool("find_weather", "What the sky does.", where), Tool("now", "The time.")]
    calls = [ToolCall("call_1", "find_weather", json.dumps({"place": 'Graz, the "old" town'}))]
    text = format.write(calls)
    for size in (len(text), 7, 3, 1):
        parser = format.parser(tools)
        events = [e for at in range(0, len(text), size) for e in parser.push(text[at : at + size])]
        _, found = collect([*events, *parser.finish()])
        assert [(c.name, json.loads(c.arguments)) for c in found] == [
            (c.name, json.loads(c.arguments)) for c in calls
        ], f"{format.name} reads {text!r}, in pieces of {size}, as {found}"
    parser = format.parser(tools)
    content, found = collect([*parser.push("It is sunny."), *parser.finish()])
    assert (content, found) == ("It is sunny.", []), f"{format.name} reads {content!r}, {found} in plain text"
    assert format.grammar(tools, required=True, parallel=False), f"{format.name} has no grammar"
