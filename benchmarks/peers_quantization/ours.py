"""Our own schemes, through the passes that `llmc compile` runs, scored by the interpreter.

open → trace → canonicalise → fuse → quantize → every quantized_linear(x, q, scale, zero_point)
                                               becomes linear(x, dequantized weight)
"""

from __future__ import annotations

import resource
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .models import CalibrationText, Shared
from .protocol import forget_peak, peak_bytes

if TYPE_CHECKING:
    from llmc.ir.core import Graph, Value


@dataclass
class Quantized:
    """`graph` with float linears; `bits` a weight of the linear layers, everything stored counted; `weights`
    by transformers' names where a layer was only rounded, not rescaled or permuted.
    """

    graph: Graph
    bits: float
    weights: dict[str, Any]


def quantized_graph(model: Shared, scheme: str, text: CalibrationText) -> Graph:
    """The fused graph, quantized by a scheme of `llmc compile --quant`."""
    from llmc.frontend.source import open_source
    from llmc.frontend.trace import trace_source
    from llmc.passes.base import PassContext
    from llmc.passes.calibration import Calibration
    from llmc.passes.manager import run_passes
    from llmc.passes.pipelines import canonicalize, fuse
    from llmc.passes.registry import quantization_passes
    from llmc.passes.stage import MarkStage

    passes = [*canonicalize(), MarkStage(stage="canonical"), *fuse(), *quantization_passes(scheme)]
    calibration = Calibration(tuple(text.ids), tuple(text.held), text.name, text.sha256)
    context = PassContext(context_length=None, calibration=calibration)
    return run_passes(trace_source(open_source(model.gguf)), passes, context)[0]


def with_float_linears(graph: Graph, exact: dict[str, Any]) -> Quantized:
    """Replace every quantized linear by a linear of its dequantized weight; embeddings and the head by the
    float ones in `exact` (torch tensors by transformers' names), which all tools keep.

    Layers that later passes merged (Q, K and V) are taken apart by their names.
    """
    from llmc.ir.core import Op
    from llmc.ir.ops.nn import Embedding, Linear
    from llmc.ir.ops.quant import QuantizedEmbedding, QuantizedLinear
    from llmc.ir.weights import ArrayTensor

    stored = count = 0.0
    weights: dict[str, Any] = {}
    made: dict[str, Value] = {}
    for op in list(graph):
        if not isinstance(op, (QuantizedLinear, QuantizedEmbedding)):
            continue
        name = op.q.name.removesuffix(".q")
        if name not in made:
            if _stands_alone(name):
                values = _exact(name, exact).numpy()
            else:
                values = _dequantized(op)
                stored, count = stored + _stored_bits(op), count + values.size
                weights |= dict(_parts(name, values, exact))
            made[name] = graph.add_weight(f"{name}.float", ArrayTensor(values))
        new: Op
        if isinstance(op, QuantizedLinear):
            new = Linear(op.x, made[name], op.bias)
        else:
            new = Embedding(op.ids, made[name])
        graph.insert(new, before=op)
        graph.replace(op, [new.results[0]])
    graph.drop_dead()
    if not count:
        raise ValueError("the scheme quantized no linear layer")
    return Quantized(graph, stored / count, weights)


def _stands_alone(name: str) -> bool:
    return "embed_tokens" in name or "lm_head" in name


def _exact(name: str, exact: dict[str, Any]) -> Any:
    """The float table; a tied head has the embedding's."""
    plain = name.removeprefix("model_.")
    return exact.get(plain, exact["model.embed_tokens.weight"])


def _dequantized(op: Any) -> np.ndarray[Any, Any]:
    from llmc.ir.interpreter import to_torch
    from llmc.ir.ops.quant import dequantized

    parts = [None if v is None else to_torch(v.weight.read()) for v in (op.q, op.scale, op.zero_point)]
    return dequantized(op.q.type.quant, *parts).numpy()


def _stored_bits(op: Any) -> float:
    """Bits that a layer's codes, scales and zero points take; an integer zero point takes a code's bits."""
    quant = op.q.type.quant
    n, k = op.q.type.shape
    groups = n * (-(-k // quant.group_size))
    scale = {"float16": 16, "float32": 32}[op.scale.type.dtype]
    zero = 0
    if op.zero_point is not None:
        zero = {"uint8": quant.bits, "float16": 16, "float32": 32}[op.zero_point.type.dtype]
    return n * k * quant.bits + groups * (scale + zero)


def _parts(name: str, values: np.ndarray[Any, Any], exact: dict[str, Any]) -> list[tuple[str, Any]]:
    """A merged weight "model.layers.0.self_attn.q_proj.weight+k_proj+v_proj" by the names of its parts."""
    import torch

    first, *others = name.removeprefix("model_.").split("+")
    stem = first.rsplit(".", 2)[0]
    names = [first, *(f"{stem}.{other}.weight" for other in others)]
    found: list[tuple[str, Any]] = []
    start = 0
    for one in names:
        if one not in exact:
            return []
        stop = start + exact[one].shape[0]
        found.append((one, torch.from_numpy(values[start:stop])))
        start = stop
    return found


def quantize(model: Shared, scheme: str, text: CalibrationText) -> tuple[Quantized, dict[str, Any]]:
    """Quantize, and what it took. Codes that are computed when they are read count: the weights are read."""
    from .models import parameters

    forget_peak()
    began, cpu = time.perf_counter(), _cpu_seconds()
    graph = quantized_graph(model, scheme, text)
    # Read once: lazily quantized codes cost nothing before.
    found = with_float_linears(graph, parameters(model))
    stats: dict[str, Any] = {
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(_cpu_seconds() - cpu, 1),
        "peak_bytes": peak_bytes(),
        "bits": found.bits,
        "note": "",
        "versions": _versions(),
    }
    return found, stats


def _cpu_seconds() -> float:
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    import llmc

    found = {"llmc": llmc.__version__, **{name: version(name) for name in ("torch", "transformers")}}
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        found["commit"] = done.stdout.strip()
    return found
