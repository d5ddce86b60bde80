"""AWQ over the graph: scales of channels found by calibration and absorbed, then clipped round to nearest.

    x = rms_norm(h, w); y = linear(x, W)   →   x = rms_norm(h, w / s); y = quantized_linear(x, Q(W · diag(s)))

Block by block (`blocks.py`), with inputs that went through what was quantized before. Where nothing can take
in a scale (`absorb.py` says why), the layer is only clipped. The weights themselves stay where they are: kept
are s, the scales and the zero points, and codes are made when a target reads them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...ir.core import Graph, Value
from ...ir.errors import CompileError, InputError
from ...ir.ops.nn import Linear
from ...ir.types import Quantization
from ...ir.weights import ArrayTensor, LazyTensor
from ..base import Pass, PassContext, PassResult
from ..registry import Quantizer
from .absorb import Absorption, absorb, find_absorption, give_norms_weights
from .attach import attach_quantized, is_head, is_quantizable
from .awq import Choice, Layer, Rounded, clip, search_scale
from .blocks import Activations, Block, Segment, read_weight, run_ops, split_blocks, whole_weights
from .calibrated import need_calibration
from .grid import Grid
from .moe import fall_back
from .options import check_grid, parse_scheme

if TYPE_CHECKING:
    import torch

    from ..work import WorkFolder

Array = np.ndarray[Any, Any]
PROBES = 2  # sequences that tell how much a row matters to its block's output
CHUNK_BYTES = 2 << 20


class NearestCodes:
    """Codes uint8 [N, K] of a weight on a grid that is known, made when rows are read."""

    def __init__(self, base: LazyTensor, grid: Grid, rounded: Rounded) -> None:
        self.base, self.grid, self.rounded = base, grid, rounded
        self.shape: tuple[int, ...] = base.shape
        self.dtype = "uint8"
        self.source = f"codes({base.source})"

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        import torch

        end = self.shape[0] if stop is None else min(stop, self.shape[0])
        step = max(1, CHUNK_BYTES // (4 * self.shape[1]))
        pieces = [np.empty((0, self.shape[1]), np.uint8)]
        for a in range(start, end, step):
            b = min(a + step, end)
            rows = torch.from_numpy(self.base.read(a, b).astype(np.float32))
            part = Rounded(self.rounded.scale[a:b], self.rounded.zero[a:b])
            pieces.append(part.codes(rows, self.grid).to(torch.uint8).numpy())
        return np.concatenate(pieces)


@dataclass
class _Walk:
    """What one run of the pass knows so far."""

    graph: Graph
    bits: dict[Value, Grid]
    found: dict[Value, Rounded] = field(default_factory=dict[Value, Rounded])
    seen: set[Value] = field(default_factory=set[Value])  # values whose scale was decided
    refusals: dict[str, None] = field(default_factory=dict[str, None])

    def weight(self, value: Value) -> torch.Tensor:
        """A weight as the layers after it see it: rounded, where it is."""
        w = read_weight(value)
        rounded = self.found.get(value)
        return w if rounded is None else rounded.weight(w.float(), self.bits[value])


@dataclass(frozen=True)
class QuantizeAwq(Pass):
    """AWQ: activation-aware scales of input channels, absorbed by the op before, then clipped rounding.

    Options: `bits` of linear layers; `group` along K, 0 for whole rows; `symmetric`.
    """

    name = "quantize-awq"
    scales_channels = True
    requires = "fused"
    ensures = "quantized"
    needs_calibration = True
    bits: int = 4
    group: int = 32
    symmetric: bool = False

    def __post_init__(self) -> None:
        check_grid(self.name, self.bits, self.group)

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        walk = self._walk(graph, context)
        for weight, rounded in walk.found.items():
            _attach(walk, weight, rounded)
        said = fall_back(graph, "awq", self.bits, self.group, self.symmetric)
        graph.drop_dead()
        return PassResult(graph, bool(walk.found), [*walk.refusals, *said])

    def _walk(self, graph: Graph, context: PassContext) -> _Walk:
        """Scales found and absorbed, grids chosen, nothing attached yet."""
        calibration = need_calibration(context, self.name)
        give_norms_weights(graph)
        walk = _Walk(graph, self._grids(graph, context))
        if not walk.bits:
            walk.refusals["no linear layer was found to quantize"] = None
            return walk
        with tempfile.TemporaryDirectory() as spare:
            folder = Path(spare) if context.work is None else context.work.scratch("awq")
            activations = Activations(folder)
            activations.begin(graph, calibration.sequences)
            blocks = split_blocks(graph)
            for i, block in enumerate(blocks):
                context.progress(f"awq {block.name}", i / len(blocks))
                _block(walk, block, activations, context.work, f"awq.{i}")
            activations.close()
        return walk

    def _grids(self, graph: Graph, context: PassContext) -> dict[Value, Grid]:
        """The grid of each weight that is to be quantized: linear layers, not the head."""
        found: dict[Value, Grid] = {}
        for weight in graph.weights.values():
            linear = weight.users and all(isinstance(u, Linear) for u in weight.users)
            if linear and is_quantizable(weight) and not is_head(graph, weight):
                k = weight.shape[1]
                assert isinstance(k, int)
                bits = context.bits.get(weight.name, self.bits)
                found[weight] = Grid(bits, min(self.group or k, k), self.symmetric)
        return found


@dataclass(frozen=True)
class ScaleChannels(QuantizeAwq):
    """AWQ's scales of input channels alone, absorbed; weights stay floats for the quantizer that follows.

    Options: those of the grid that will follow.
    """

    name = "scale-channels"
    scales_channels = True
    ensures = None

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        walk = self._walk(graph, context)
        return PassResult(graph, bool(walk.found), list(walk.refusals))


def _attach(walk: _Walk, weight: Value, rounded: Rounded) -> None:
    grid = walk.bits[weight]
    assert weight.weight is not None
    quant = Quantization(grid.bits, grid.group, grid.symmetric)
    scale = ArrayTensor(rounded.scale.half().numpy(), f"scale({weight.name})")
    zero = rounded.zero.to(dtype=_uint8()).numpy()
    attach_quantized(
        walk.graph,
        weight,
        quant,
        NearestCodes(weight.weight, grid, rounded),
        scale,
        None if grid.symmetric else ArrayTensor(zero, f"zero_point({weight.name})"),
    )


def _uint8() -> torch.dtype:
    import torch

    return torch.uint8


def _block(walk: _Walk, block: Block, activations: Activations, work: WorkFolder | None, piece: str) -> None:
    """Decide a block's scales and grids, or take over those of an earlier run, and run it."""
    known = work.load(piece) if work is not None and work.done(piece) else None
    made: dict[str, Array] = {}
    importance = _importance(walk, block, activations) if known is None else {}
    for number, segment in enumerate(block.segments):
        if any(is_head(walk.graph, op.operands[1]) for op in segment.layers):
            break  # nothing after the head is asked for
        layers = [op for op in segment.layers if isinstance(op, Linear) and op.weight in walk.bits]
        fresh = [op for op in layers if op.weight not in walk.found]
        if fresh:
            _segment(walk, segment, fresh, activations, importance, (known, made, f"{number}"))
        rounded = any(op.operands[1] in walk.found for op in segment.layers)
        activations.advance(segment, _Fetch(walk, segment) if rounded else read_weight)
    if work is not None and known is None and made:
        work.save(piece, made)


class _Fetch:
    """A segment's weights, each made once."""

    def __init__(self, walk: _Walk, segment: Segment) -> None:
        self._walk = walk
        self._kept = {v: walk.weight(v) for v in whole_weights(segment.ops)}

    def __call__(self, value: Value) -> torch.Tensor:
        return self._kept[value] if value in self._kept else self._walk.weight(value)


Record = tuple[dict[str, Array] | None, dict[str, Array], str]
"""What an earlier run decided, what this one decides, and the segment's name in both."""


def _segment(
    walk: _Walk,
    segment: Segment,
    layers: Sequence[Linear],
    activations: Activations,
    importance: dict[Linear, torch.Tensor],
    record: Record,
) -> None:
    import torch

    known, made, name = record
    x = layers[0].x
    if known is None:
        for op in layers:
            _check_finite(op.weight)
    absorption = _absorption(walk, x, segment)
    if known is not None:
        scale = known.get(f"{name}.scale")
        if scale is not None and absorption is not None:
            _apply(walk, absorption, scale, segment, activations)
        for i, op in enumerate(layers):
            parts = (torch.from_numpy(known[f"{name}.{i}.{part}"]).float() for part in ("scale", "zero"))
            walk.found[op.weight] = Rounded(*parts)
        return
    hessian, mean_abs = _statistics(activations, x)
    if absorption is not None:
        choice = _choose(walk, absorption, hessian, mean_abs, importance)
        scale = absorption.tied(choice.scale.numpy())
        if choice.error < choice.error_nearest:
            made[f"{name}.scale"] = scale
            _apply(walk, absorption, scale, segment, activations)
            factors = torch.from_numpy(absorption.per_channel(scale)).float()
            hessian = hessian / (factors[:, None] * factors[None, :])
    for i, op in enumerate(layers):
        rounded = clip(read_weight(op.weight).float(), hessian, walk.bits[op.weight])
        walk.found[op.weight] = rounded
        made[f"{name}.{i}.scale"] = rounded.scale.half().numpy()
        made[f"{name}.{i}.zero"] = rounded.zero.to(torch.uint8).numpy()


def _check_finite(weight: Value) -> None:
    import torch

    assert weight.weight is not None
    if not bool(torch.isfinite(read_weight(weight)).all()):
        raise InputError(
            f"{weight.weight.source} holds NaN or infinite values",
            remedy="the checkpoint is damaged or must not be quantized (--quant none)",
        )


def _absorption(walk: _Walk, x: Value, segment: Segment) -> Absorption | None:
    """How x can be scaled here; None where it cannot (why is noted) or was decided before."""
    if x in walk.seen:
        return None
    walk.seen.add(x)
    found = find_absorption(walk.graph, x)
    where = segment.layers[0].loc or x.name
    if not found.possible:
        walk.refusals[f"{where} is not scaled: {found.reason}"] = None
        return None
    late = [op for op in found.linears if op.weight not in walk.bits or op.weight in walk.found]
    if late:
        walk.refusals[f"{where} is not scaled: {late[0].weight.name} reads the same values"] = None
        return None
    return found


def _choose(
    walk: _Walk,
    absorption: Absorption,
    hessian: torch.Tensor,
    mean_abs: torch.Tensor,
    importance: dict[Linear, torch.Tensor],
) -> Choice:
    """The scales for all layers that take them in."""
    import torch

    def constrain(scale: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(absorption.per_channel(absorption.tied(scale.numpy()))).float()

    layers = [
        Layer(read_weight(op.weight).float(), importance.get(op, torch.ones(int(op.weight.type.shape[0]))))  # type: ignore[arg-type]
        for op in absorption.linears
    ]
    return search_scale(layers, hessian, mean_abs, walk.bits[absorption.linears[0].weight], constrain)


def _apply(
    walk: _Walk, absorption: Absorption, scale: Array, segment: Segment, activations: Activations
) -> None:
    """Absorb, and bring along what was computed before: grids of scaled rows, values on disk."""
    import torch

    for edit in absorption.edits:
        if edit.weight in walk.found and edit.axis == 0:
            factors = torch.from_numpy(edit.factors(scale)).float()
            walk.found[edit.weight] = walk.found[edit.weight].rows_scaled(factors)
    absorb(walk.graph, absorption, scale)
    alive = {v: f for v in segment.inputs if (f := absorption.value_factors(v, scale)) is not None}
    for i in range(len(activations)):
        values = activations.load(i, alive)
        activations.save(i, {v: t * torch.from_numpy(alive[v]).to(t.dtype) for v, t in values.items()})


def _statistics(activations: Activations, x: Value) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ x xᵀ and mean |x| over all calibration tokens, float32 [K, K] and [K]."""
    import torch

    k = x.shape[-1]
    assert isinstance(k, int)
    hessian, total, count = torch.zeros(k, k), torch.zeros(k), 0
    for i in range(len(activations)):
        rows = activations.load(i, [x])[x].float().reshape(-1, k)
        hessian.addmm_(rows.T, rows)
        total += rows.abs().sum(0)
        count += len(rows)
    if not bool(torch.isfinite(hessian).all()):
        raise CompileError(
            f"the inputs of {x.users[0].loc or x.name} overflow while calibrating",
            remedy="calibrate on another text",
        )
    return hessian, total / max(1, count)


def _importance(walk: _Walk, block: Block, activations: Activations) -> dict[Linear, torch.Tensor]:
    """How much the block's output depends on each row of its linear layers: E[Σ (∂ out / ∂ y_n)²] over
    tokens, float32 [N], estimated with random directions of the output (Hutchinson's estimator).
    """
    import torch

    layers = [op for op in block.layers if isinstance(op, Linear) and op.weight in walk.bits]
    if any(is_head(walk.graph, op.operands[1]) for op in block.layers):
        return {}
    made = [v for v in block.outputs if v not in block.inputs and v.dtype.startswith("float")]
    if not layers or not made:
        return {}
    generator = torch.Generator().manual_seed(0)
    total: dict[Linear, torch.Tensor] = {}
    kept = {v: walk.weight(v) for v in whole_weights(block.ops)}
    for op in layers:  # of what embeddings alone are read from, results have a gradient too
        kept[op.weight] = kept[op.weight].detach().requires_grad_()
    for i in range(min(PROBES, len(activations))):
        inputs = activations.load(i, block.inputs)
        values = {v: t.requires_grad_() if t.is_floating_point() else t for v, t in inputs.items()}
        wanted = [*made, *(op.result for op in layers)]
        found = run_ops(block.ops, values, wanted, activations.dims[i], _Kept(kept))
        target = sum((found[v] * torch.randn(found[v].shape, generator=generator)).sum() for v in made)
        results = [found[op.result] for op in layers]
        assert isinstance(target, torch.Tensor)
        grads = torch.autograd.grad(target, results, allow_unused=True, materialize_grads=True)
        for op, grad in zip(layers, grads, strict=True):
            rows = grad.float().reshape(-1, grad.shape[-1]).square().mean(0)
            total[op] = total[op] + rows if op in total else rows
    return total


class _Kept:
    def __init__(self, kept: dict[Value, torch.Tensor]) -> None:
        self._kept = kept

    def __call__(self, value: Value) -> torch.Tensor:
        return self._kept[value] if value in self._kept else read_weight(value)


class ActivationAware(Quantizer):
    """`awq-int4-gN[-sym]`; `awq-int4` is `awq-int4-g32`."""

    forms = ("awq-int4-gN[-sym]",)

    def passes(self, scheme: str) -> list[Pass] | None:
        found = parse_scheme(scheme, "awq", "2345678")
        return None if found is None else [QuantizeAwq(*found)]
