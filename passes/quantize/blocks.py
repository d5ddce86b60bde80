"""A fused graph in pieces, run one piece at a time over many sequences.

Calibration needs every layer's inputs for thousands of tokens, of models that barely fit into memory once.
So a graph is cut where few values are alive:

    Block     what belongs to one layer of the model ("model.layers.3"), and what stands before and after them
    Segment   the part of a block that begins with the linear layers reading one value

and each piece is run over all sequences before the next one, with the live values at its boundary on disk
(`Activations`; the page cache keeps them fast). Memory is one piece's weights plus one sequence's values.
"""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...ir.core import Graph, Op, Value
from ...ir.errors import InputError
from ...ir.interpreter import bind, to_torch
from ...ir.ops.nn import Embedding, Linear
from ...ir.ops.quant import QuantizedEmbedding, QuantizedLinear
from .products import short_factors

if TYPE_CHECKING:
    import torch

LinearOp = Linear | QuantizedLinear
Fetch = Callable[[Value], Any]
"""A weight's tensor by its value."""


@dataclass(frozen=True)
class Segment:
    """Ops in order. `layers` are its linear layers, which all read `layers[0].x`; none in a block's first
    segment. `inputs` are alive before it (graph inputs included), `outputs` after it.
    """

    block: str
    ops: tuple[Op, ...]
    layers: tuple[LinearOp, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]


@dataclass(frozen=True)
class Block:
    """Segments in order; `name` is the module's ("model.layers.3", when it comes again "model.layers.3 (2)"),
    "prologue" or "head".
    """

    name: str
    segments: tuple[Segment, ...]

    @property
    def ops(self) -> tuple[Op, ...]:
        return tuple(op for s in self.segments for op in s.ops)

    @property
    def layers(self) -> tuple[LinearOp, ...]:
        return tuple(layer for s in self.segments for layer in s.layers)

    @property
    def inputs(self) -> tuple[Value, ...]:
        return self.segments[0].inputs

    @property
    def outputs(self) -> tuple[Value, ...]:
        return self.segments[-1].outputs


def layer_name(loc: str) -> str | None:
    """The repeated module that an op was traced from: up to the first number in its path."""
    found = re.match(r"(.*?\.\d+)(?=\.|$)", loc)
    return found.group(1) if found else None


def _block_names(ops: Sequence[Op]) -> list[str]:
    """Each op's block. What belongs to no layer stays with its neighbours, but before the first and after the
    last layer.
    """
    own = [layer_name(op.loc) for op in ops]
    known = [i for i, name in enumerate(own) if name is not None]
    if not known:
        return ["model"] * len(ops)
    names: list[str] = []
    for i, name in enumerate(own):
        if name is not None:
            names.append(name)
        elif i < known[0]:
            names.append("prologue")
        elif i > known[-1]:
            names.append("head")
        else:
            names.append(names[-1])
    return names


def _by_visit(names: Sequence[str]) -> list[str]:
    """The same, with a number where a block comes again after others (layers that are gone through twice)."""
    visits: dict[str, int] = {}
    found: list[str] = []
    for i, name in enumerate(names):
        if not i or name != names[i - 1]:
            visits[name] = visits.get(name, 0) + 1
        found.append(name if visits[name] == 1 else f"{name} ({visits[name]})")
    return found


def split_blocks(graph: Graph) -> list[Block]:
    """The blocks of a fused (or quantized) graph in order; together they are the whole graph."""
    ops = graph.ops
    names = _by_visit(_block_names(ops))
    starts = [0]
    reading: Value | None = None
    for i, op in enumerate(ops):
        if i and names[i] != names[i - 1]:
            starts.append(i)
            reading = None
        if isinstance(op, LinearOp) and op.x is not reading:
            if starts[-1] != i:
                starts.append(i)
            reading = op.x
    made = dict.fromkeys(graph.inputs, -1) | {r: i for i, op in enumerate(ops) for r in op.results}
    last = {v: i for i, op in enumerate(ops) for v in op.operands if v in made}
    last |= {v: len(ops) for v in graph.outputs if v in made}

    def alive(cut: int) -> tuple[Value, ...]:
        return tuple(v for v, at in made.items() if at < cut <= last.get(v, -2))

    segments = [
        Segment(
            names[a],
            tuple(ops[a:b]),
            tuple(op for op in ops[a:b] if isinstance(op, LinearOp)),
            alive(a),
            alive(b),
        )
        for a, b in pairwise([*starts, len(ops)])
    ]
    order = list(dict.fromkeys(s.block for s in segments))
    return [Block(name, tuple(s for s in segments if s.block == name)) for name in order]


def read_weight(value: Value) -> torch.Tensor:
    """The whole weight, read anew.

    Copied into torch's own memory: it is aligned, and sums by a matrix library may depend on alignment, so
    that a second run gives the same bits.
    """
    assert value.weight is not None
    return to_torch(value.weight.read()).clone()


def check_finite(weight: Value, read: torch.Tensor) -> None:
    """InputError where what was read of a weight holds NaN or infinite values."""
    import torch

    if not bool(torch.isfinite(read).all()):
        assert weight.weight is not None
        raise InputError(
            f"{weight.weight.source} holds NaN or infinite values",
            remedy="the checkpoint is damaged or must not be quantized (--quant none)",
        )


def run_ops(
    ops: Iterable[Op],
    values: Mapping[Value, Any],
    outputs: Sequence[Value],
    dims: Mapping[str, int],
    weight: Fetch = read_weight,
    *,
    short: bool = False,
) -> dict[Value, Any]:
    """The values `outputs` after running ops on `values`. Gradients flow where the caller asks torch for
    them.

    An embedding reads the rows that it needs and no others, whatever `weight` says. With `short`, linear
    layers multiply `short_factors`.
    """
    known = dict(values)
    for op in ops:
        operands = _rows(op, known) or [known[v] if v in known else weight(v) for v in op.operands]
        with short_factors() if short and isinstance(op, LinearOp) else nullcontext():
            result = op.reference(dims, *op.grouped(operands))
        results = list(result) if isinstance(result, (tuple, list)) else [result]
        known.update(zip(op.results, results, strict=True))
    return {v: known[v] for v in outputs}


def _rows(op: Op, known: Mapping[Value, Any]) -> list[Any] | None:
    """The operands of an embedding with its tables cut down to the rows asked for."""
    if not isinstance(op, (Embedding, QuantizedEmbedding)) or op.ids not in known:
        return None
    ids = known[op.ids]
    rows, places = ids.unique(return_inverse=True)
    wanted = rows.tolist()
    return [places, *(_read_rows(v, wanted) for v in op.operands[1:])]


def _read_rows(value: Value, rows: Sequence[int]) -> torch.Tensor:
    assert value.weight is not None
    pieces: list[np.ndarray[Any, Any]] = []
    start = 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i] != rows[i - 1] + 1:
            pieces.append(value.weight.read(rows[start], rows[i - 1] + 1))
            start = i
    return to_torch(np.concatenate(pieces))


def first_values(graph: Graph, sequence: np.ndarray[Any, Any]) -> tuple[dict[Value, Any], dict[str, int]]:
    """The graph's inputs for one sequence of token ids int64 [T], and what its symbols are then."""
    import torch

    dims: dict[str, int] = {}
    ids = torch.from_numpy(np.ascontiguousarray(sequence, np.int64)).reshape(1, -1)
    (tokens,) = graph.inputs
    bind(tokens.shape, ids.shape, dims, f"input {tokens.name}")
    return {tokens: ids}, dims


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor of any dtype; numpy has no bfloat16."""
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy().data


@dataclass(frozen=True)
class _Stored:
    """A tensor in a file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]


class Activations:
    """Values of many sequences at a cut: up to `memory` bytes of them as tensors, the others as files of a
    folder that is this object's alone.

    Files of dead values are written over: the system has their pages already. Threads may load and save
    values of different sequences at the same time.
    """

    def __init__(self, folder: Path, memory: int = 0) -> None:
        self.folder, self._room = folder, memory
        folder.mkdir(parents=True, exist_ok=True)
        self._stored: dict[tuple[Value, int], _Stored | torch.Tensor] = {}
        self._dead: dict[int, list[Path]] = {}  # by size in bytes
        self._count = 0
        self._lock = threading.Lock()  # of the room, and of which files are whose
        self.dims: list[dict[str, int]] = []

    def begin(self, graph: Graph, sequences: Sequence[np.ndarray[Any, Any]]) -> None:
        """Start with the graph's inputs."""
        for i, ids in enumerate(sequences):
            values, dims = first_values(graph, ids)
            self.dims.append(dims)
            self.save(i, values)

    def __len__(self) -> int:
        return len(self.dims)

    @property
    def alive(self) -> set[Value]:
        """The values that can be loaded."""
        return {value for value, _ in self._stored}

    def adopt(self, other: Activations, values: Iterable[Value], count: int) -> None:
        """Take over the first `count` sequences of `other` where no value was computed yet: the two have the
        same files until either writes others.
        """
        self.dims = other.dims[:count]
        for value in values:
            for i in range(count):
                have = other._stored[value, i]
                if not isinstance(have, _Stored):
                    self.save(i, {value: have})
                    continue
                path = self._new_path()
                try:
                    path.hardlink_to(have.path)
                except OSError:  # a file system without links
                    shutil.copyfile(have.path, path)
                self._stored[value, i] = replace(have, path=path)

    def _new_path(self) -> Path:
        self._count += 1
        return self.folder / str(self._count)

    def save(self, sequence: int, values: Mapping[Value, Any]) -> None:
        for value, given in values.items():
            tensor = given.detach().contiguous()
            with self._lock:
                self._drop(value, sequence)
                fits = tensor.nbytes <= self._room
                if fits:
                    self._room -= tensor.nbytes
            if fits:
                alone = tensor.untyped_storage().nbytes() == tensor.nbytes
                self._stored[value, sequence] = tensor if alone else tensor.clone()
                continue
            data = _bytes_of(tensor)
            with self._lock:
                dead = self._dead.get(data.nbytes)
                path, mode = (dead.pop(), "r+b") if dead else (self._new_path(), "wb")
            with open(path, mode) as file:
                file.write(data)
            self._stored[value, sequence] = _Stored(path, tensor.dtype, tuple(tensor.shape))

    def load(self, sequence: int, values: Iterable[Value]) -> dict[Value, Any]:
        """In memory that torch allocated, which is aligned (see `read_weight`); not to be written to."""
        import torch

        found: dict[Value, Any] = {}
        for value in values:
            have = self._stored[value, sequence]
            if not isinstance(have, _Stored):
                found[value] = have
                continue
            found[value] = torch.empty(have.shape, dtype=have.dtype)
            with open(have.path, "rb", buffering=0) as file:
                file.readinto(_bytes_of(found[value]))
        return found

    def advance(
        self,
        segment: Segment,
        weight: Fetch = read_weight,
        also: Sequence[Value] = (),
        *,
        short: bool = False,
    ) -> None:
        """Run a segment on every sequence (`run_ops`); what is dead after it is dropped, but for the values
        `also`.
        """
        import torch

        kept = {v: weight(v) for v in whole_weights(segment.ops)} if weight is read_weight else {}
        fetch = (lambda v: kept[v] if v in kept else read_weight(v)) if kept else weight
        made = [v for v in dict.fromkeys([*segment.outputs, *also]) if v not in segment.inputs]
        read = {v for op in segment.ops for v in op.operands}
        needed = [v for v in segment.inputs if v in read]
        with torch.no_grad():
            for i, dims in enumerate(self.dims):
                values = self.load(i, needed)
                self.save(i, run_ops(segment.ops, values, made, dims, fetch, short=short))
        self.drop(v for v in segment.inputs if v not in segment.outputs and v not in also)

    def drop(self, values: Iterable[Value]) -> None:
        for value in values:
            for i in range(len(self)):
                self._drop(value, i)

    def _drop(self, value: Value, sequence: int) -> None:
        have = self._stored.pop((value, sequence), None)
        if have is None:
            return
        if not isinstance(have, _Stored):
            self._room += have.nbytes
            return
        found = have.path.stat()
        if found.st_nlink > 1:  # another's too (`adopt`)
            have.path.unlink()
        else:
            self._dead.setdefault(found.st_size, []).append(have.path)

    def close(self) -> None:
        self._stored.clear()
        shutil.rmtree(self.folder, ignore_errors=True)


def whole_weights(ops: Iterable[Op]) -> list[Value]:
    """The weights that ops read whole (embedding tables are read by rows)."""
    found: dict[Value, None] = {}
    for op in ops:
        if not isinstance(op, (Embedding, QuantizedEmbedding)):
            found |= dict.fromkeys(v for v in op.operands if v.is_weight)
    return list(found)
