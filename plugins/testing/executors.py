"""What every executor must do, tried on one that was compiled here: `check_target`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from ...codegen.artifact import Artifact, ArtifactWriter
from ...codegen.driver import count_weights, written_bytes
from ...codegen.manifest import begin_manifest
from ...codegen.target import Target, emit_target
from ...ir.core import Graph
from ...ir.printer import print_graph
from ...passes.base import PassContext
from ...passes.cache.rotary import rotary_facts
from ...passes.manager import run_passes
from ...passes.quantize.walk import QuantizeRtn
from ...runtime.executor.base import Executor, StepInputs
from .model import HIDDEN, PAGE_SIZE, VOCABULARY, logits_of, paged, tiny_model

OpenTarget = Callable[..., Executor]
"""open_target(artifact, *, isa, threads)."""


@dataclass
class TargetReport:
    """Largest error of each check against the ops' own meanings, relative to the largest logit."""

    errors: dict[str, float] = field(default_factory=dict[str, float])

    @property
    def worst(self) -> float:
        return max(self.errors.values(), default=0.0)


def check_target(target: Target, open_target: OpenTarget, *, tolerance: float = 1e-4) -> TargetReport:
    """Compile small models (floats, quantized weights, sliding windows) with a target, run them with its
    executor, and compare every logit with what the graph means.

    Args:
        open_target: what the entry point of the group `llmc.executors` names.
        tolerance: of a logit, relative to the largest one; a target that rounds needs more.
    Raises:
        AssertionError: naming the check that failed and the numbers. Whatever the target itself raises.
    """
    report = TargetReport()
    models: dict[str, Graph] = {
        "floats": tiny_model(layers=2),
        "windows": tiny_model(layers=2, window=7, seed=1),
        "int8": _quantized(8, True),
        "int4": _quantized(4, False),
    }
    for name, graph in models.items():
        with tempfile.TemporaryDirectory() as folder:
            artifact = compile_tiny(target, graph, Path(folder) / "tiny.llmc")
            checks = _Checks(open_target(artifact, isa=None, threads=1), graph, tolerance)
            for check in _CHECKS if name == "floats" else _CHECKS[:3]:
                what = f"{name}: {check.__name__.replace('_', ' ')}"
                checks.what, checks.error = what, 0.0
                check(checks)
                report.errors[what] = checks.error
    return report


def compile_tiny(target: Target, graph: Graph, out: Path) -> Artifact:
    """An artifact of a graph that is not paged yet, with all that `llmc compile` writes but a tokenizer."""
    final = paged(graph)
    with ArtifactWriter(out) as writer:
        writer.path("ir.txt").write_text(print_graph(final), encoding="utf-8", newline="\n")
        entry = emit_target(target, cast(Any, None), final, writer, progress=lambda what, share: None)
        assert isinstance(entry.get("batch_invariant"), bool), "the entry says whether it is batch_invariant"
        entries = {target.name: entry}
        size = written_bytes(writer, entries)
        quantization = {
            "scheme": "none" if graph.stage == "fused" else graph.stage,
            "bits_per_weight": round(8 * size / count_weights(final), 4),
            "weight_bytes": size,
            "source": None,
        }
        manifest = begin_manifest(final, _model(final), kv_dtype="float32", tokenizer=None)
        return writer.finish({**manifest, "targets": entries, "quantization": quantization})


def _model(final: Graph) -> dict[str, Any]:
    """The manifest's entry of a model without files of its own."""
    return {
        "name": "tiny",
        "architecture": "tiny",
        "num_layers": len(final.facts["kv"]),
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "context_length": 512,
        "eos_token_ids": [],
        "bos_token_id": None,
        "kv": final.facts["kv"],
        "rotary": rotary_facts(final),
        "generation": {},
    }


def _quantized(bits: int, symmetric: bool) -> Graph:
    passes = [QuantizeRtn(bits=bits, group=16, symmetric=symmetric)]
    return run_passes(tiny_model(layers=1, seed=bits), passes, PassContext())[0]


@dataclass
class _Sequence:
    """Tokens, and the pages that hold them."""

    tokens: list[int]
    pages: list[int] = field(default_factory=list[int])
    computed: int = 0


class _Checks:
    """One executor, and a graph that says what is right."""

    def __init__(self, executor: Executor, graph: Graph, tolerance: float) -> None:
        self.executor, self.graph, self.tolerance = executor, graph, tolerance
        self.rng = np.random.default_rng(5)
        self.what, self.error = "", 0.0
        assert executor.page_size == PAGE_SIZE and executor.vocab_size == VOCABULARY, (
            f"page_size {executor.page_size} and vocab_size {executor.vocab_size} are not the artifact's"
        )
        self.free: list[int] = []
        self.begin(32)

    def begin(self, pages: int) -> None:
        """A new cache; pages are given out in no order."""
        self.executor.allocate_kv(pages)
        self.free = list(self.rng.permutation(pages))

    def sequence(self, length: int) -> _Sequence:
        return _Sequence(self.rng.integers(0, VOCABULARY, length).tolist())

    def step(self, batch: Sequence[tuple[_Sequence, int]], rows: Sequence[int] | None = None) -> np.ndarray:
        """Compute the next `count` tokens of each sequence; logits of `rows`, all where None."""
        for one, count in batch:
            while len(one.pages) * PAGE_SIZE < one.computed + count:
                one.pages.append(int(self.free.pop()))
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        for one, count in batch:
            for place in range(one.computed, one.computed + count):
                tokens.append(one.tokens[place])
                positions.append(place)
                slots.append(one.pages[place // PAGE_SIZE] * PAGE_SIZE + place % PAGE_SIZE)
            one.computed += count
        table = np.zeros((len(batch), max(len(one.pages) for one, _ in batch)), np.int32)
        for row, (one, _) in zip(table, batch, strict=True):
            row[: len(one.pages)] = one.pages
        wanted = range(len(tokens)) if rows is None else rows
        starts = np.cumsum([0, *(count for _, count in batch)])
        inputs = StepInputs(
            *(np.array(part, np.int32) for part in (tokens, positions, slots, starts)),
            context_len=np.array([one.computed for one, _ in batch], np.int32),
            block_table=table,
            output_index=np.array(list(wanted), np.int32),
        )
        logits = self.executor.step(inputs)
        assert logits.shape == (len(wanted), VOCABULARY) and logits.dtype == np.float32, (
            f"{self.what}: step gave {logits.dtype}{list(logits.shape)}"
        )
        return logits.copy()  # the array is the caller's until the next step only

    def right(self, one: _Sequence, first: int, logits: np.ndarray) -> None:
        """Compare the logits of tokens `first` and following of a sequence."""
        wanted = logits_of(self.graph, one.tokens[: first + len(logits)])[first:]
        error = float(
            np.abs(logits - wanted).max(initial=0.0) / max(1.0, float(np.abs(wanted).max(initial=0.0)))
        )
        self.error = max(self.error, error)
        assert error <= self.tolerance, (
            f"{self.what}: tokens from {first} on are off by {error:.3g} of the largest logit, "
            f"{self.tolerance:g} is allowed"
        )


def a_prompt_in_one_step(c: _Checks) -> None:
    for length in (1, 15, 16, 17, 40):
        one = c.sequence(length)
        c.right(one, 0, c.step([(one, length)]))


def decoding(c: _Checks) -> None:
    c.begin(32)
    one = c.sequence(36)
    c.right(one, 0, c.step([(one, 14)]))
    for place in range(14, 36):
        c.right(one, place, c.step([(one, 1)]))


def a_ragged_batch(c: _Checks) -> None:
    """Sequences in all phases side by side, each as if it were alone."""
    c.begin(32)
    early, late, new = c.sequence(30), c.sequence(50), c.sequence(21)
    c.step([(early, 20)])
    c.step([(late, 33)])
    logits = c.step([(early, 1), (new, 21), (late, 17)])
    c.right(early, 20, logits[:1])
    c.right(new, 0, logits[1:22])
    c.right(late, 33, logits[22:])


def a_prompt_in_chunks(c: _Checks) -> None:
    c.begin(32)
    one = c.sequence(45)
    for first, count in ((0, 7), (7, 1), (8, 30), (38, 7)):
        c.right(one, first, c.step([(one, count)]))


def rows_that_are_not_wanted(c: _Checks) -> None:
    c.begin(32)
    one, other = c.sequence(24), c.sequence(20)
    assert c.step([(one, 10)], rows=[]).shape == (0, VOCABULARY)
    logits = c.step([(one, 14), (other, 20)], rows=[13, 33])
    c.right(one, 23, logits[:1])
    c.right(other, 19, logits[1:])


def copied_pages(c: _Checks) -> None:
    """Two choices of a request share its pages until one writes; then that one has a copy."""
    c.begin(32)
    one = c.sequence(30)
    c.step([(one, 20)])
    page = int(c.free.pop())
    c.executor.copy_pages([one.pages[1]], [page])
    fork = _Sequence([*one.tokens[:20], *c.sequence(6).tokens], [one.pages[0], page], 20)
    logits = c.step([(one, 6), (fork, 6)])
    c.right(one, 20, logits[:6])
    c.right(fork, 20, logits[6:])


def a_second_cache(c: _Checks) -> None:
    c.begin(4)
    one = c.sequence(60)
    c.right(one, 0, c.step([(one, 60)]))


_CHECKS: tuple[Callable[[_Checks], None], ...] = (
    a_prompt_in_one_step,
    decoding,
    a_ragged_batch,
    a_prompt_in_chunks,
    rows_that_are_not_wanted,
    copied_pages,
    a_second_cache,
)
