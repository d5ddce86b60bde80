"""What tests of passes share: sources made from transformers models, the pipeline up to a stage, and a paged
graph run by the interpreter over several sequences at once.
"""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from llmc.codegen.trace_cache import trace_once
from llmc.frontend.trace import trace_source
from llmc.ir.core import Graph, Op
from llmc.ir.interpreter import run
from llmc.ir.ops.cache import AppendKv
from llmc.ir.ops.state import Recurrence
from llmc.ir.weights import ArrayTensor, LazyTensor
from llmc.passes.base import Pass, PassContext
from llmc.passes.manager import PassRecord, run_passes
from llmc.passes.pipelines import language_model

PAGE_SIZE = 16


class ModelInMemory:
    """A transformers model as `trace_source` takes it: its modules, and its weights by name."""

    config_only = False
    kind = "hf"
    length: int | None = None
    gguf = rope_scaling = None

    def __init__(
        self, model: Any, *, attention: str = "sdpa", encoder: bool = False, name: str = "model"
    ) -> None:
        self.model = model
        self.config = model.config
        self.attention = attention
        self.task = "encoder" if encoder else "causal_lm"
        self.name = name
        self.weights: dict[str, LazyTensor] = {
            label: ArrayTensor(p.detach().numpy().copy(), f"memory:{label}")
            for label, p in model.named_parameters()
        }

    def build_model(self) -> Any:
        model = copy.deepcopy(self.model)
        model.set_attn_implementation(self.attention)
        return model


def traced(model: Any, *, attention: str = "sdpa", **options: Any) -> Graph:
    """The traced graph of a transformers model; options of `ModelInMemory`."""
    source: Any = ModelInMemory(model, attention=attention, **options)
    # What is kept was traced as the driver does, with the usual attention.
    return trace_once(source) if attention == "sdpa" else trace_source(source)


def passes_to(
    stage: str, quantize: Sequence[Pass] = (), *, page_size: int = PAGE_SIZE, kv_dtype: str = "float32"
) -> list[Pass]:
    """The passes of the language model pipeline up to a stage ("canonical", "fused", "paged")."""
    passes = language_model(list(quantize), page_size=page_size, kv_dtype=kv_dtype)
    if stage == "paged":
        return passes
    end = next(i for i, p in enumerate(passes) if p.ensures == "paged")
    if stage == "canonical":
        end = next(i for i, p in enumerate(passes) if getattr(p, "stage", "") == "fused")
    return passes[:end]


def lowered(graph: Graph, stage: str, quantize: Sequence[Pass] = ()) -> tuple[Graph, list[PassRecord]]:
    """The graph after the pipeline up to a stage; the graph that is given is left alone."""
    return run_passes(graph.clone(), passes_to(stage, quantize), PassContext())


_fused: dict[Any, Graph] = {}


def fused_once(key: Any, build: Callable[[], Any], **options: Any) -> Graph:
    """A copy of the fused graph of the model that `build` makes, which is traced once a process; `key` tells
    one from another, options are those of `ModelInMemory`.
    """
    full = (key, tuple(sorted(options.items())))
    if full not in _fused:
        _fused[full] = lowered(traced(build(), **options), "fused")[0]
    return _fused[full].clone()


def notes(records: Sequence[PassRecord]) -> list[str]:
    return [note for record in records for note in record.notes]


def logits_of(graph: Graph, ids: Sequence[int]) -> torch.Tensor:
    """Rows [T, …] of a traced or fused graph for one sequence."""
    return run(graph, {"input_ids": torch.tensor([list(ids)])})[0][0]


def opnames(graph: Graph) -> list[str]:
    return [op.opname for op in graph]


def ints(values: Sequence[int] | Sequence[Sequence[int]]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@dataclass
class PagedRun:
    """A paged graph with its cache: `step` feeds tokens of several sequences and returns the wanted rows.

    Pages are handed out in a shuffled order and start out full of a number that shows when it is read.
    """

    graph: Graph
    num_pages: int = 24
    num_states: int = 4
    seed: int = 0
    tables: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    lengths: dict[str, int] = field(default_factory=dict[str, int])

    def __post_init__(self) -> None:
        self.page_size = int(self.graph.facts["page_size"])
        self.free = list(range(self.num_pages))
        random.Random(self.seed).shuffle(self.free)
        self.pages: list[torch.Tensor] = []
        for layer in range(len(self.graph.facts["kv"])):
            held = self.graph.input(f"kv_pages.{layer}").type
            shape = (2, self.num_pages, *(d for d in held.shape[2:] if isinstance(d, int)))
            self.pages.append(torch.full(shape, 7, dtype=getattr(torch, held.dtype)))
        # A row of state for each sequence, likewise full of a number.
        self.state_slots = list(range(self.num_states))
        random.Random(self.seed + 1).shuffle(self.state_slots)
        self.slot_of: dict[str, int] = {}
        self.states = [
            torch.full((self.num_states, *shape), 7.0) for shape in self.graph.facts.get("state", [])
        ]

    def step(
        self, batch: Sequence[tuple[str, Sequence[int]]], *, last_only: bool = False
    ) -> list[torch.Tensor]:
        """Logits of each sequence's new tokens, or of the last one of each."""
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts = [0]
        for name, new in batch:
            table, seen = self.tables.setdefault(name, []), self.lengths.get(name, 0)
            while len(table) * self.page_size < seen + len(new):
                table.append(self.free.pop())
            where = range(seen, seen + len(new))
            ids += new
            positions += where
            slots += [table[p // self.page_size] * self.page_size + p % self.page_size for p in where]
            starts.append(len(ids))
            self.lengths[name] = seen + len(new)
        width = max(len(self.tables[name]) for name, _ in batch)
        rows = [e - 1 for e in starts[1:]] if last_only else list(range(len(ids)))
        inputs = {
            "token_ids": ints(ids),
            "positions": ints(positions),
            "slot_mapping": ints(slots),
            "query_start": ints(starts),
            "context_len": ints([self.lengths[name] for name, _ in batch]),
            "block_table": ints(
                [self.tables[name] + [0] * (width - len(self.tables[name])) for name, _ in batch]
            ),
            "output_index": ints(rows),
            **{f"kv_pages.{i}": pages for i, pages in enumerate(self.pages)},
        }
        # The layers of a window have as many pages here, and the same tables.
        for value in self.graph.inputs:
            base = value.name.rpartition(".")[0]
            if base in ("slot_mapping", "block_table"):
                inputs[value.name] = inputs[base]
        if self.states:
            for name, _ in batch:
                if name not in self.slot_of:
                    self.slot_of[name] = self.state_slots.pop()
            inputs["state_slot"] = ints([self.slot_of[name] for name, _ in batch])
            inputs |= {f"state.{i}": state for i, state in enumerate(self.states)}
        written: list[torch.Tensor] = []
        left: list[torch.Tensor] = []

        def observe(op: Op, operands: Sequence[Any], results: Any) -> None:
            if isinstance(op, AppendKv):
                written.append(results[0])
            if isinstance(op, Recurrence):
                left.append(results[1])

        out = run(self.graph, inputs, observe=observe)[0]
        self.pages, self.states = written, left
        if last_only:
            return [out[i : i + 1] for i in range(len(batch))]
        return [out[a:b] for a, b in itertools.pairwise(starts)]


def worst(got: Any, wanted: Any) -> float:
    """Largest absolute difference, in units of the largest wanted value."""
    reference = torch.as_tensor(wanted)
    return float((torch.as_tensor(got) - reference).abs().max() / reference.abs().max())
