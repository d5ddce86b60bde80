"""Which bits for which layer: what rounding each weight would cost the model, and the choice under a budget.

The cost is the KL divergence to the model itself, to second order. With g the gradient of the log-likelihood
of a token that the model itself draws (then E[g gᵀ] is the Fisher information), a linear layer y = W x whose
rows are off by e_n costs, in nats a token,

    ½ Σ_n E[g_n²] · e_n E[x xᵀ] e_nᵀ        and a table of embeddings    ½ Σ_k E[g_k²] · E[e_k(token)²]

One run forwards and one back, block by block: memory is one block plus one sequence's values; the rest, the
head's logits among it (`fisher.py`), lies on disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ...ir.core import Graph, Op, Value
from ...ir.errors import InputError
from ...ir.ops.nn import Embedding, Linear
from ...ir.weights import num_bytes, num_elements
from ..base import Pass, PassContext, PassResult, Progress, no_progress
from .attach import is_head, is_quantizable
from .awq import nearest
from .blocks import Activations, Block, read_weight, run_ops, split_blocks, whole_weights
from .calibrated import need_calibration, open_work
from .fisher import head_gradient
from .grid import Grid
from .head import LARGE, Cache, DiskCache, Head, find_head
from .mixed import HEADER, WIDTHS, Option, allocate, smallest, stored_bits
from .moe import experts_of

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, Any]
SEQUENCES = 8
ELEMENTS = 1 << 20  # of a weight that are rounded at a time


@dataclass
class _Reader:
    """What one op that reads a weight tells of it: E[g²] of its results, E[x xᵀ] of a linear layer's inputs,
    and how often an embedding's rows occurred.
    """

    gradient: torch.Tensor | None = None
    hessian: torch.Tensor | None = None
    counts: torch.Tensor | None = None
    tokens: int = 0


@dataclass
class _Sweep:
    """`grads` are, by sequence, those of values between blocks; `head` of a model that has logits, and its
    rows.
    """

    graph: Graph
    activations: Activations
    grids: Mapping[Value, Sequence[Grid]]
    head: Head | None
    cache: Cache = field(default_factory=dict[Any, Any])
    losses: dict[Value, list[float]] = field(default_factory=dict[Value, list[float]])
    grads: list[dict[Value, torch.Tensor]] = field(default_factory=list[dict[Value, Any]])


def measure(
    graph: Graph,
    sequences: Sequence[Array],
    activations: Activations,
    grids: Mapping[Value, Sequence[Grid]],
    progress: Progress = no_progress,
) -> dict[Value, list[float]]:
    """By weight, the loss in nats a token on each of its grids. Works in the folder of `activations`, too."""
    activations.begin(graph, sequences)
    blocks = split_blocks(graph)
    head = find_head(graph) if graph.facts.get("kind") == "causal_lm" else None
    sweep = _Sweep(graph, activations, grids, head, grads=[{} for _ in sequences])
    if head is not None and head.nbytes > LARGE:
        sweep.cache = DiskCache(activations.folder / "head")
    for number, block in enumerate(blocks[:-1]):
        progress("what rounding costs", 0.2 * number / len(blocks))
        _forward(sweep, block)
    for number, block in enumerate(reversed(blocks)):
        progress(f"what rounding costs: {block.name}", 0.2 + 0.8 * number / len(blocks))
        _backward(sweep, block)
        sweep.cache = {}  # the head was in the first one
    return sweep.losses


def _weights(ops: Sequence[Op]) -> dict[Value, Any]:
    """The weights that ops read as a whole."""
    return {v: read_weight(v) for v in whole_weights(ops)}


def _forward(sweep: _Sweep, block: Block) -> None:
    import torch

    kept = _weights(block.ops)
    made = [v for v in block.outputs if v not in block.inputs]
    with torch.no_grad():
        for i, dims in enumerate(sweep.activations.dims):
            inputs = sweep.activations.load(i, block.inputs)
            sweep.activations.save(i, run_ops(block.ops, inputs, made, dims, kept.__getitem__))


def _backward(sweep: _Sweep, block: Block) -> None:
    """A block again, with gradients: those of its inputs are kept, its weights' losses follow."""
    import torch

    head = sweep.head if sweep.head is not None and sweep.head.layer in block.ops else None
    ops = block.ops if head is None else block.ops[: block.ops.index(head.layer)]
    readers = {
        op: _Reader() for op in ops if isinstance(op, (Linear, Embedding)) and op.weight in sweep.grids
    }
    of_head = _Reader()
    kept = _weights(ops)
    generator = torch.Generator().manual_seed(0)
    made = [v for v in block.outputs if v not in block.inputs] if head is None else [head.x]
    for i, dims in enumerate(sweep.activations.dims):
        known = sweep.activations.load(i, block.inputs)
        known |= _embedded(ops, readers, known, dims)
        floats = [v for v, t in known.items() if t.is_floating_point()]
        for v in floats:
            known[v].requires_grad_()
        read = [v for op in readers for v in (op.result, op.operands[0])]
        rest = [op for op in ops if op.result not in known]
        found = run_ops(rest, known, [*made, *read], dims, kept.__getitem__)
        if head is not None:
            _through_head(sweep, head, i, found[head.x].detach(), generator, of_head)
        target = _target(sweep, found, made, i, generator)
        wanted = [*(known[v] for v in floats), *(found[op.result] for op in readers)]
        if target is None or not wanted:
            continue
        grads = torch.autograd.grad(target, wanted, allow_unused=True, materialize_grads=True)
        for v in made:
            sweep.grads[i].pop(v, None)
        for v, grad in zip(floats, grads, strict=False):
            before = sweep.grads[i].get(v)
            sweep.grads[i][v] = grad if before is None else before + grad
        for op, grad in zip(readers, grads[len(floats) :], strict=True):
            rows = grad.float().reshape(-1, grad.shape[-1])
            _take(readers[op], op, found[op.operands[0]].detach(), rows.square().sum(0), len(rows))
    if head is not None and head.layer.operands[1] in sweep.grids:
        _losses(sweep, head.layer, of_head)
    for op, reader in readers.items():
        _losses(sweep, op, reader)


def _embedded(
    ops: Sequence[Op], readers: Mapping[Any, _Reader], known: Mapping[Value, Any], dims: Mapping[str, int]
) -> dict[Value, Any]:
    """Results of a block's embeddings, and their ids: a gradient goes no further back."""
    import torch

    tables = [op for op in readers if isinstance(op, Embedding)]
    if not tables:
        return {}
    with torch.no_grad():
        wanted = [v for op in tables for v in (op.ids, op.result)]
        return run_ops(ops, known, wanted, dims)


def _through_head(
    sweep: _Sweep, head: Head, i: int, hidden: torch.Tensor, generator: torch.Generator, reader: _Reader
) -> None:
    """Gradients of the hidden states [1, T, D] before the head, and what the head's weight is read with."""
    rows = hidden.flatten(0, -2)
    folder = sweep.activations.folder / "logits"
    found = head_gradient(head, rows, sweep.activations.dims[i], generator, sweep.cache, folder)
    sweep.grads[i][head.x] = found.hidden.reshape(hidden.shape)
    _take(reader, head.layer, hidden, found.squares, len(rows))


def _target(
    sweep: _Sweep, found: Mapping[Value, Any], made: Sequence[Value], i: int, generator: torch.Generator
) -> torch.Tensor | None:
    """What a block's gradients are of: its outputs against the gradients of what follows, or, where a model
    ends without a head, the log-likelihood of places drawn from its own output.
    """
    import torch

    total: torch.Tensor | None = None
    for v in made:
        if sweep.graph.output_uses(v):
            logits = found[v].float().flatten(0, -2)
            with torch.no_grad():
                drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            part = -logits.log_softmax(-1).gather(1, drawn).sum()
        elif v in sweep.grads[i] and found[v].requires_grad:
            part = (found[v] * sweep.grads[i][v]).sum()
        else:
            continue
        total = part if total is None else total + part
    return total


def _take(reader: _Reader, op: Op, x: torch.Tensor, squares: torch.Tensor, tokens: int) -> None:
    """Add one sequence to a reader's sums: its op's inputs, and Σ g² of its results."""
    import torch

    reader.gradient = squares if reader.gradient is None else reader.gradient + squares
    reader.tokens += tokens
    if isinstance(op, Linear):
        inputs = x.float().reshape(-1, x.shape[-1])
        if reader.hessian is None:
            reader.hessian = torch.zeros(inputs.shape[1], inputs.shape[1])
        reader.hessian.addmm_(inputs.T, inputs)
    elif isinstance(op, Embedding):
        size = op.weight.shape[0]
        assert isinstance(size, int)
        counts = torch.bincount(x.flatten().long(), minlength=size).float()
        reader.counts = counts if reader.counts is None else reader.counts + counts


def _losses(sweep: _Sweep, op: Op, reader: _Reader) -> None:
    """Round the weight of a finished reader in every way, a few rows at a time."""
    import torch

    weight = op.operands[1]
    if reader.gradient is None or weight.weight is None:
        return
    if reader.hessian is not None:
        reader.hessian /= max(1, reader.tokens)
    losses = sweep.losses.setdefault(weight, [0.0] * len(sweep.grids[weight]))
    n, k = weight.weight.shape
    step = max(1, ELEMENTS // k)
    for a in range(0, n, step):
        w = torch.from_numpy(weight.weight.read(a, min(a + step, n)).astype(np.float32))
        for i, grid in enumerate(sweep.grids[weight]):
            losses[i] += _loss(reader, nearest(w, grid) - w, a)


def _loss(reader: _Reader, error: torch.Tensor, start: int) -> float:
    """½ of the sum in the docstring above, for errors of rows start … [rows, K]."""
    assert reader.gradient is not None
    count = max(1, reader.tokens)
    stop = start + len(error)
    if reader.hessian is not None:
        rows = ((error @ reader.hessian) * error).sum(1)
        return 0.5 * float((rows * reader.gradient[start:stop] / count).sum())
    assert reader.counts is not None
    columns = (reader.counts[start:stop, None] / count * error.square()).sum(0)
    return 0.5 * float((columns * reader.gradient / count).sum())


@dataclass(frozen=True)
class ChooseBits(Pass):
    """Bits for each linear layer, and for embeddings and head, so that the model has `target` bits a weight
    in all and loses least; quantizers that follow take them from the context.

    Options: `target`; `group` and `symmetric` of linear layers; `head`: whether heads are chosen too, else
    `head_bits` (0: they stay floats); `head_group` and `head_symmetric`.
    """

    name = "choose-bits"
    requires = "fused"
    needs_calibration = True
    target: float
    group: int = 32
    symmetric: bool = False
    head: bool = False
    head_bits: int = 8
    head_group: int = 64
    head_symmetric: bool = True

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        weights = [w for w in graph.weights.values() if is_quantizable(w)]
        if experts_of(graph):
            raise InputError(
                f"--bits-per-weight {self.target:g}: {graph.name} is a mixture of experts, which get the "
                "bits of the scheme",
                remedy="leave it out, and choose the scheme by its bits",
            )
        grids = {w: self._grids(w, is_head(graph, w)) for w in weights}
        grids = {w: g for w, g in grids.items() if g}
        fixed = sum(
            8 * (num_bytes(v.weight) + HEADER) for v in graph.weights.values() if v.weight and v not in grids
        )
        count = sum(num_elements(v.weight) for v in graph.weights.values() if v.weight)
        sizes = {w: [stored_bits(*_shape(w), g) for g in grids[w]] for w in grids}
        budget = int(self.target * count) - fixed
        least = (sum(min(s) for s in sizes.values()) + fixed) / max(1, count)
        if least > self.target or not grids:
            raise InputError(
                f"--bits-per-weight {self.target:g}: {graph.name} takes {least:.3f} bits a weight at least",
                remedy=f"ask for {np.ceil(least * 100) / 100:.2f} or more, or larger groups",
            )
        losses = self._measure(graph, context, grids)
        options = {
            w.name: [Option(g.bits, s, x) for g, s, x in zip(grids[w], sizes[w], losses[w], strict=True)]
            for w in grids
        }
        chosen = allocate(options, budget)
        assert chosen is not None and smallest(options) <= budget
        context.bits.update({name: option.bits for name, option in chosen.items()})
        total = (sum(o.size for o in chosen.values()) + fixed) / count
        return PassResult(graph, False, [_summary(total, chosen)])

    def _grids(self, weight: Value, head: bool) -> list[Grid]:
        _, k = _shape(weight)
        if not head:
            return [Grid(bits, min(self.group or k, k), self.symmetric) for bits in WIDTHS]
        group = min(self.head_group or k, k)
        if self.head:
            return [Grid(bits, group, self.head_symmetric) for bits in WIDTHS if bits >= 4]
        return [Grid(self.head_bits, group, self.head_symmetric)] if self.head_bits else []

    def _measure(
        self, graph: Graph, context: PassContext, grids: Mapping[Value, Sequence[Grid]]
    ) -> dict[Value, list[float]]:
        """Losses by weight; one that never got a gradient is as sensitive as nothing."""
        sequences = need_calibration(context, self.name).sequences[:SEQUENCES]
        with ExitStack() as stack:
            work = open_work(context, stack)
            names = {w.name: w for w in grids}
            if work.done("sensitivity"):
                return {names[n]: a.tolist() for n, a in work.load("sensitivity").items()}
            activations = Activations(work.scratch("sensitivity"))
            found = measure(graph, sequences, activations, grids, context.progress)
            activations.close()
            losses = {w: found.get(w, [0.0] * len(grids[w])) for w in grids}
            work.save("sensitivity", {w.name: np.asarray(x) for w, x in losses.items()})
        return losses


@dataclass(frozen=True)
class SupposeBits(ChooseBits):
    """Bits for the same size without measuring, for a prediction: all weights are equally sensitive."""

    name = "suppose-bits"
    needs_calibration = False

    def _measure(
        self, graph: Graph, context: PassContext, grids: Mapping[Value, Sequence[Grid]]
    ) -> dict[Value, list[float]]:
        return {w: [np.prod(_shape(w)) * 4.0**-g.bits for g in grids[w]] for w in grids}


def _shape(weight: Value) -> tuple[int, int]:
    n, k = weight.shape
    assert isinstance(n, int) and isinstance(k, int)
    return n, k


def _summary(total: float, chosen: Mapping[str, Option]) -> str:
    widths = [o.bits for o in chosen.values()]
    parts = ", ".join(f"{widths.count(b)} at {b} bits" for b in sorted(set(widths)))
    loss = sum(o.loss for o in chosen.values())
    return f"{total:.3f} bits a weight: {parts}; expected KL by rounding to nearest {loss:.3g} nats a token"
