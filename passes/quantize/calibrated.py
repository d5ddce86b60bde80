"""Quantization layer by layer on what calibration sends through the model: the walk, for any method.

    x_f ── float model ──────────────► x_f'          per segment: Σ x_q x_qᵀ and Σ (x_f − x_q) x_qᵀ of its
    x_q ── quantized prefix ─► layer ─► x_q'          input → method → codes → the quantized prefix goes on

Every layer is quantized for the inputs that it will get, behind the quantized layers before it. Finished
blocks are pieces of the work folder: a compilation that was killed runs through them without quantizing them
again, which gives the same bits.

Both models' linear layers and the sums multiply `short_factors`. That moves the float model by a KL of
0.0001, a few thousandths of what 4 bits lose.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...ir.core import Graph, Value
from ...ir.errors import CompileError, InputError
from ...ir.ops.moe import Moe
from ...ir.types import Quantization
from ..base import PassContext
from ..calibration import Calibration, too_few_tokens
from ..work import PieceTensor, WorkFolder
from .attach import attach_quantized, is_head, is_quantizable
from .blocks import Activations, LinearOp, Segment, check_finite, read_weight, split_blocks, whole_weights
from .gptq import Coded
from .grid import Grid
from .moe_calibrated import (
    Coder,
    attach_coded,
    code_experts,
    dequantized,
    mixtures_of,
    read_of_mixtures,
)
from .products import short_factors

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, Any]

KEPT = 192 << 20
"""Bytes of each model's values that stay in memory where it has no cap."""


@dataclass(frozen=True)
class Inputs:
    """What the input of a layer W [N, K] was like, over so many tokens.

    weight = W float32; hessian = E[x_q x_qᵀ] float32 [K, K]; missing = E[W (x_f − x_q) x_qᵀ] float32 [N, K]:
    what its output lacks because of the layers before it.
    """

    weight: torch.Tensor
    hessian: torch.Tensor
    missing: torch.Tensor
    tokens: int


Method = Callable[[Inputs, Grid, str], tuple[Coded, list[str]]]
"""(a weight and its inputs, grid, name) → codes, and notes for the user."""

PARTS = ("q", "scale", "zero")


@dataclass
class Walked:
    """The codes of every weight, in order, and what there was to say.

    `exact` holds what the float model makes of the sequences, up to its head.
    """

    exact: Activations
    coded: dict[Value, dict[str, Array]] = field(default_factory=dict[Value, dict[str, Array]])
    grids: dict[Value, Grid] = field(default_factory=dict[Value, Grid])
    notes: list[str] = field(default_factory=list[str])


def need_calibration(context: PassContext, name: str) -> Calibration:
    """The context's calibration. InputError where there is none."""
    if context.calibration is None:
        raise InputError(
            f"pass {name} needs text to calibrate on", remedy="use it through llmc compile, or give a text"
        )
    return context.calibration


def open_work(context: PassContext, stack: ExitStack) -> WorkFolder:
    """The compilation's work folder, or one that goes with `stack`."""
    if context.work is not None:
        return context.work
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llmc-")))
    return WorkFolder.open(folder / "work", {}, resume=False)


def layers_of(graph: Graph, segment: Segment) -> list[Value]:
    """The weights [N, K] of a segment's layers that are to be quantized: no head, nothing shared with other
    kinds of ops.
    """
    found = dict.fromkeys(layer.operands[1] for layer in segment.layers)
    return [w for w in found if is_quantizable(w) and not is_head(graph, w)]


def walk(
    graph: Graph,
    context: PassContext,
    work: WorkFolder,
    grid_of: Callable[[Value], Grid],
    method: Method,
    *,
    sequences: Sequence[Array],
    others: Sequence[Array] = (),
    share: float = 1.0,
) -> Walked:
    """Codes for every linear layer but the head. The graph stays as it is (`attach_walked` changes it).

    Args:
        sequences: token ids int64 [L] each, to calibrate on.
        others: further ones that only the float model runs, for what comes after the walk.
        share: this walk's part of the pass's progress.
    """
    memory = KEPT if context.max_ram is None else 0
    exact = Activations(work.scratch("exact"), memory)
    quantized = Activations(work.scratch("quantized"), memory)
    exact.begin(graph, [*sequences, *others])
    started = False  # until the first quantized layer both models are one
    found = Walked(exact)
    blocks = split_blocks(graph)
    replaced: dict[Value, torch.Tensor] = {}
    for number, block in enumerate(blocks):
        context.progress(f"quantizing {block.name}", share * number / len(blocks))
        piece = f"codes-{number}"
        known = work.load(piece) if work.done(piece) else None
        fresh: dict[str, Array] = {}
        replaced.clear()
        for segment in block.segments:
            targets = [w for w in layers_of(graph, segment) if w not in found.coded]
            if any(is_head(graph, layer.operands[1]) for layer in segment.layers):
                break  # nothing after the head is asked for
            mixtures = [op for op in mixtures_of(graph, segment) if op.gate_up not in found.coded]
            if (targets or mixtures) and not started:
                quantized.adopt(exact, segment.inputs, len(sequences))
                started = True
            reads = read_of_exact(segment, targets) if known is None else ()
            reads += read_of_mixtures(mixtures) if known is None else ()
            exact.advance(segment, also=reads, short=True)
            if known is not None:
                codes = _read_codes(known, targets, mixtures)
            else:
                inputs = measure_inputs(segment, exact, quantized, targets)
                codes = _coded(inputs, grid_of, method, found.notes)
                for op in mixtures:
                    codes |= code_experts(op, exact, grid_of, _coder(method), found.notes)
            for weight, parts in codes.items():
                fresh |= {f"{weight.name}.{part}": array for part, array in parts.items()}
                found.coded[weight], found.grids[weight] = parts, grid_of(weight)
                replaced[weight] = dequantized(parts, grid_of(weight))
            if started:
                quantized.advance(segment, _fetch(replaced, segment), short=True)
            exact.drop(v for v in reads if v not in segment.outputs)
        if known is None and fresh:
            work.save(piece, fresh)
        if fresh:
            _keep_on_disk(work.load(piece, mapped=True), found)
    quantized.close()
    return found


def _read_codes(
    known: Mapping[str, Array], targets: Sequence[Value], mixtures: Sequence[Moe]
) -> dict[Value, dict[str, Array]]:
    """The codes of a segment, out of the piece that an interrupted run left."""
    stacked = [w for op in mixtures for w in (op.gate_up, op.down)]
    return {w: {part: known[f"{w.name}.{part}"] for part in PARTS} for w in [*targets, *stacked]}


def _keep_on_disk(mapped: Mapping[str, Array], found: Walked) -> None:
    """From here on a block's codes are read from its piece."""
    names = {name.rpartition(".")[0] for name in mapped}
    for weight in found.coded:
        if weight.name in names:
            found.coded[weight] = {part: mapped[f"{weight.name}.{part}"] for part in PARTS}


def _fetch(replaced: Mapping[Value, Any], segment: Segment) -> Any:
    if not any(v in replaced for op in segment.ops for v in op.operands):
        return read_weight
    kept = {v: read_weight(v) for v in whole_weights(segment.ops) if v not in replaced}
    return lambda v: replaced[v] if v in replaced else kept[v] if v in kept else read_weight(v)


def read_of_exact(segment: Segment, targets: Sequence[Value]) -> tuple[Value, ...]:
    """What `measure_inputs` needs of the float model after the segment: the layers' input x, or, where they
    are much wider than high (a down projection), their results W x, with which it has less to multiply.
    """
    layers = _first_layers(segment, targets)
    if not layers:
        return ()
    x = segment.layers[0].x
    n, k = sum(w.weight.shape[0] for w in layers if w.weight), x.shape[-1]
    assert isinstance(k, int)
    return tuple(layer.result for layer in layers.values()) if 2 * n < k else (x,)


def _first_layers(segment: Segment, targets: Sequence[Value]) -> dict[Value, LinearOp]:
    """A layer of the segment for each weight."""
    return {w: next(layer for layer in segment.layers if layer.operands[1] is w) for w in targets}


def measure_inputs(
    segment: Segment, exact: Activations, quantized: Activations, targets: Sequence[Value]
) -> dict[Value, Inputs]:
    """What a segment's input is like for those weights of its layers, over all sequences in order.

    Args:
        exact: of the float model, after the segment, with what `read_of_exact` names.
        quantized: of the other model, before the segment.
    """
    import torch

    if not targets:
        return {}
    weights = {v: _finite_weight(v) for v in targets}
    layers = _first_layers(segment, targets)
    x = segment.layers[0].x
    k = x.shape[-1]
    assert isinstance(k, int)
    wide = x not in read_of_exact(segment, targets)
    hessian, cross, tokens = torch.zeros(k, k), torch.zeros(0 if wide else k, k), 0
    missing = {v: torch.zeros(w.shape) for v, w in weights.items()} if wide else {}
    with short_factors():
        for i in range(len(quantized)):
            x_q = quantized.load(i, [x])[x].reshape(-1, k)
            _add_upper(hessian, x_q)
            tokens += len(x_q)
            if not wide:
                cross.addmm_(exact.load(i, [x])[x].reshape(-1, k).T, x_q)
            for v, sum_ in missing.items():
                sum_.addmm_(_products(layers[v], exact, i).T, x_q)
    upper = hessian.triu(1)
    hessian.triu_().add_(upper.T)
    for v, sum_ in missing.items():
        sum_.addmm_(weights[v], hessian, alpha=-1)
    if not wide:
        cross.sub_(hessian)
        missing = {v: w @ cross for v, w in weights.items()}
    count = max(1, tokens)
    hessian.div_(count)
    return {v: Inputs(w, hessian, missing[v].div_(count), tokens) for v, w in weights.items()}


def _products(layer: LinearOp, exact: Activations, sequence: int) -> torch.Tensor:
    """W x_f [T, N] by the layer's results."""
    made = exact.load(sequence, [layer.result])[layer.result]
    made = made.reshape(-1, made.shape[-1])
    return made if layer.bias is None else made - read_weight(layer.bias)


def _add_upper(hessian: torch.Tensor, x: torch.Tensor) -> None:
    """hessian [K, K] += xᵀ x for x [T, K], on and above the diagonal and somewhat below: torch has no product
    that knows of the symmetry, and four strips are two thirds of the work.
    """
    k = x.shape[1]
    step = -(-k // 4)
    for first in range(0, k, step):
        strip = slice(first, first + step)
        hessian[strip, first:].addmm_(x[:, strip].T, x[:, first:])


def _finite_weight(weight: Value) -> torch.Tensor:
    """float32 [N, K]; InputError where it holds NaN or infinite values."""
    w = read_weight(weight).float()
    check_finite(weight, w)
    return w


def _coded(
    inputs: dict[Value, Inputs], grid_of: Callable[[Value], Grid], method: Method, notes: list[str]
) -> dict[Value, dict[str, Array]]:
    """Codes of weights; the inputs of each are let go when they were used."""
    return {w: _quantize(w.name, inputs.pop(w), grid_of(w), method, notes) for w in list(inputs)}


def _quantize(name: str, inputs: Inputs, grid: Grid, method: Method, notes: list[str]) -> dict[str, Array]:
    import torch

    from .grid import encode, search_scales

    if not bool(torch.isfinite(inputs.hessian).all()):
        raise CompileError(
            f"the inputs of {name} overflow while calibrating", remedy="calibrate on another text"
        )
    w = inputs.weight
    k = w.shape[1]
    refusal = too_few_tokens(name, inputs.tokens, k)
    if refusal is not None:
        notes.append(refusal)
        scale, zero = search_scales(w, torch.ones(k), grid)
        return as_arrays(Coded(encode(w, grid.spread(scale, k), grid.spread(zero, k), grid.top), scale, zero))
    coded, said = method(inputs, grid, name)
    notes += said
    return as_arrays(coded)


def _coder(method: Method) -> Coder:
    """How the matrices of experts are quantized: as other weights, with the inputs of the float model."""

    def code(w: torch.Tensor, hessian: torch.Tensor, tokens: int, grid: Grid, name: str) -> dict[str, Array]:
        import torch

        said: list[str] = []  # of single experts there would be hundreds: `code_experts` says it in one line
        return _quantize(name, Inputs(w, hessian, torch.zeros_like(w), tokens), grid, method, said)

    return code


def as_arrays(coded: Coded) -> dict[str, Array]:
    """q uint8 [N, K], scale float16 [N, G], zero uint8 [N, G]."""
    return {
        "q": coded.codes.numpy().astype(np.uint8),
        "scale": coded.scale.numpy().astype(np.float16),
        "zero": coded.zero.numpy().astype(np.uint8),
    }


def as_coded(parts: Mapping[str, Array]) -> Coded:
    """The inverse of `as_arrays`."""
    import torch

    return Coded(*(torch.from_numpy(parts[name].astype(np.float32)) for name in PARTS))


def attach_walked(graph: Graph, found: Walked) -> None:
    """Let the graph's layers read the codes."""
    found.exact.close()
    stacked = attach_coded(graph, found.coded, found.grids, PieceTensor)
    for weight, parts in found.coded.items():
        if weight in stacked:
            continue
        grid = found.grids[weight]
        k = parts["q"].shape[1]
        quant = Quantization(grid.bits, min(grid.group, k), grid.symmetric)
        attach_quantized(
            graph,
            weight,
            quant,
            PieceTensor(parts["q"], f"q({weight.name})"),
            PieceTensor(parts["scale"], f"scale({weight.name})"),
            None if grid.symmetric else PieceTensor(parts["zero"], f"zero_point({weight.name})"),
        )
    graph.drop_dead()
