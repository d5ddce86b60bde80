"""The runtime's half: a step over a ragged batch (docs/architecture.md, "The paged step"). Needs neither
torch nor anything else that compiles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from llmc.plugins import Artifact, Executor, Graph, InputError, StepInputs, Value, parse_graph

from .kernels import KERNELS, Run, dequantized

_STEP = (
    "token_ids", "positions", "slot_mapping", "query_start", "context_len", "block_table", "output_index",
    "token_type_ids",
)  # fmt: skip


class NumpyExecutor:
    """Runs the graph's ops in order; a value is dropped after its last use."""

    max_pages: int | None = None
    batch_invariant = False

    def __init__(self, graph: Graph, weights: Mapping[str, np.ndarray], rows: int) -> None:
        self._graph, self._rows = graph, rows
        self._step = graph.stage == "paged"
        self._pages = [v for v in graph.inputs if v.name.startswith("kv_pages.")]
        self._cache: list[np.ndarray] = []
        self._values: dict[Value, np.ndarray] = {
            v: _as_numpy(weights[name]) for name, v in graph.weights.items()
        }
        self._expand_codes()
        self._last = {
            v: op for op in graph for v in op.operands if not v.is_weight and v not in graph.outputs
        }
        width = graph.outputs[0].shape[-1] if graph.outputs[0].shape else 0
        self.vocab_size = width if self._step and isinstance(width, int) else 0
        self.page_size = int(graph.facts.get("page_size", 16))
        self.kv_bytes_per_page = sum(int(np.prod(self._page_shape(v, 1))) * _item(v) for v in self._pages)

    def _expand_codes(self) -> None:
        """A weight that is stored in codes becomes its values, once; a lookup of codes would have to be
        one more kernel.
        """
        for op in self._graph:
            if op.opname != "dequantize" or not all(v.is_weight for v in op.operands):
                continue
            parts = op.grouped([self._values[v] for v in op.operands])
            self._values[op.result] = dequantized(op.operands[0].type.quant, *parts)
        for v in self._graph.weights.values():  # codes that something else reads too stay: a tied embedding's
            if v.uses and all(op.opname == "dequantize" and op.result in self._values for op, _ in v.uses):
                self._values.pop(v, None)

    def _page_shape(self, pages: Value, count: int) -> list[int]:
        return [count if i == 1 else int(str(d)) for i, d in enumerate(pages.shape)]

    def allocate_kv(self, num_pages: int) -> None:
        """Pages 0 .. num_pages - 1 of every layer."""
        self._cache = [np.zeros(self._page_shape(v, num_pages), v.dtype) for v in self._pages]

    def copy_pages(self, src: Sequence[int], dst: Sequence[int]) -> None:
        """Copy page src[i] to dst[i] in all layers."""
        for pages in self._cache:
            pages[:, list(dst)] = pages[:, list(src)]  # the right side is copied before anything is written

    def step(self, inputs: StepInputs) -> np.ndarray:
        """Logits [R, vocab_size] float32."""
        if not self._step:
            raise InputError("this artifact is a function", remedy="call run(name=array, …)")
        given = {name: getattr(inputs, name) for name in _STEP if getattr(inputs, name) is not None}
        given |= {v.name: pages for v, pages in zip(self._pages, self._cache, strict=True)}
        # Layers that see a window may have pages of their own; here they have as many as the others, so the
        # same tables serve them.
        for v in self._graph.inputs:
            base, dot, window = v.name.partition(".")
            if dot and window.isdigit() and base in ("slot_mapping", "block_table"):
                given[v.name] = given[base]
        dims = {
            "T": len(inputs.token_ids),
            "B": len(inputs.context_len),
            "R": len(inputs.output_index),
            "P": inputs.block_table.shape[1],
            **{str(v.shape[1]): pages.shape[1] for v, pages in zip(self._pages, self._cache, strict=True)},
        }
        return np.ascontiguousarray(self._run(given, dims)[0], np.float32)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Named inputs → named outputs, for artifacts of kind "function"."""
        if self._step:
            raise InputError("this artifact is a language model", remedy="generate with it")
        dims: dict[str, int] = {}
        for v in self._graph.inputs:
            for dim, size in zip(v.shape, inputs[v.name].shape, strict=True):
                if not isinstance(dim, int):
                    dims.setdefault(str(dim), size)
        return dict(zip(self._graph.output_names, self._run(inputs, dims), strict=True))

    def _run(self, inputs: Mapping[str, np.ndarray], dims: Mapping[str, int]) -> list[np.ndarray]:
        run = Run(dims, self._rows)
        values = dict(self._values)
        values.update({v: inputs[v.name] for v in self._graph.inputs if v.name in inputs})
        with np.errstate(all="ignore"):  # -inf and NaN are values here, as they are to any kernel
            for op in self._graph:
                if op.result in values:
                    continue
                found = KERNELS[op.opname](run, op, op.grouped([values[v] for v in op.operands]))
                values[op.result] = np.asarray(found, op.result.dtype)
                for v in op.operands:
                    if self._last.get(v) is op:
                        values.pop(v, None)
        return [values[v] for v in self._graph.outputs]


def _as_numpy(array: np.ndarray) -> np.ndarray:
    """Floats as float32; integers as they are."""
    return array if array.dtype.kind in "iub" or array.dtype == np.float32 else array.astype(np.float32)


def _item(value: Value) -> int:
    return np.dtype(value.dtype).itemsize


def open_target(artifact: Artifact, *, isa: str | None, threads: int | None) -> Executor:
    """What the entry point of the group `llmc.executors` names. numpy's BLAS has its own number of
    threads.
    """
    entry = artifact.target("numpy-cpu")
    graph = parse_graph(artifact.read_text(entry["graph"]))
    return NumpyExecutor(graph, artifact.weights("numpy-cpu"), int(entry["options"]["rows"]))
