"""The compiler from one end to the other: model → graph → passes → targets → artifact."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..frontend.chat_shapes import Renderer
from ..frontend.classifier import score_by_tokens
from ..frontend.dense import project
from ..frontend.memory import few_collections, release_freed_memory
from ..frontend.rope import RopeScaling, longest
from ..frontend.source import ModelSource, context_length, describe, open_source
from ..frontend.tokenizer import DetectTools, TokenizerFacts, export_tokenizer
from ..frontend.trace import trace_module
from ..ir.core import Graph, Value
from ..ir.dtypes import kv_bytes
from ..ir.errors import InputError
from ..ir.ops.attention import Attention
from ..ir.ops.moe import quantized_parts
from ..ir.printer import print_graph
from ..ir.weights import num_bytes, num_elements
from ..passes.base import PassContext, Progress, no_progress
from ..passes.calibration import LENGTH
from ..passes.manager import PassRecord, run_passes
from ..passes.pipelines import function, language_model
from ..passes.quantize.scheme import without_calibration
from .adapters import LoraOption, merge_gguf_adapters, write_module_names
from .artifact import Artifact, ArtifactWriter
from .calibrate import (
    CalibrationOptions,
    TextSource,
    begin_calibration,
    describe_calibration,
    finishing,
    say_nothing,
)
from .extensions import load_ops
from .manifest import PAGE_SIZE, begin_manifest, tokenizer_entry
from .memory import check_peak, processes_at_once, watched
from .model_facts import held_length, model_facts, rope_scaling_facts
from .peak import WORKER_BYTES, Peak, predict_peak
from .progress import Share
from .request import DEFAULT_CALIBRATION, DEFAULT_VERDICT, Plan, Request, with_scaling
from .target import ask_target, begin_target, emit_target, prepare_targets, with_adapters, with_tune
from .trace_cache import trace_once
from .verdict import VerdictOptions, prepare_held, without_verdict

if TYPE_CHECKING:
    import torch


_LATER = 0.1  # of the progress bar, for what is measured


@dataclass
class CompileReport:
    """What a compilation made.

    `weight_bytes` is the first target's weight file; `bits_per_weight` spreads it over the model's weights.
    """

    artifact: Artifact
    weight_bytes: int
    bits_per_weight: float
    passes: list[PassRecord] = field(default_factory=list[PassRecord])
    notes: list[str] = field(default_factory=list[str])
    """What passes and calibration had to say, each once."""
    quality: dict[str, Any] | None = None
    """The content of quality.json; None where nothing was lost, or nothing measured."""


def _context(source: ModelSource, asked: int | None) -> int | None:
    """The longest sequence that is compiled for; `source.length` says it to the tracing."""
    made_for = source.length or context_length(source.config) or source.use.get("max_seq_length")
    limit = longest(source.config, context_length(source.config))
    if asked is not None and asked < 1:
        raise InputError(f"--context {asked} is no length", remedy="ask for at least one token")
    if asked is None and made_for is None and source.task != "function":
        raise InputError(
            f"{source.name} does not say how many tokens it was made for", remedy="give it: --context 4096"
        )
    if asked is not None and limit is not None and asked > limit:
        raise InputError(
            f"--context {asked}: {source.name} was made for {limit} tokens",
            remedy=f"ask for at most {limit}; rotary embeddings reach further with --rope-scaling",
        )
    source.length = asked or made_for
    return source.length


def _open(
    model: str | os.PathLike[str] | torch.nn.Module, scaling: RopeScaling | None, *, config_only: bool = False
) -> ModelSource:
    source = open_source(model, config_only=config_only)
    if scaling is not None:
        source.scale_rope(scaling)
    return source


def _left_out(source: ModelSource) -> list[str]:
    """What a model takes besides text, in a sentence."""
    if source.whole is None:
        return []
    return [f"{source.name} ({source.whole}) takes more than text: its text model is what is compiled"]


def _fewer(source: ModelSource, graph: Graph, context: int | None) -> list[str]:
    """What a traced model that is another one beyond some number of tokens is compiled for, in a sentence."""
    held = graph.facts.get("positions")
    if held is None or context is None or held >= context:
        return []
    return [
        f"{source.name} is compiled for {held} of its {context} tokens: beyond them it computes something "
        "else (it picks some of its keys, say)"
    ]


def trace(source: ModelSource, example_inputs: Mapping[str, torch.Tensor] | None) -> Graph:
    """The traced graph of whatever was opened."""
    if source.task == "function" or example_inputs is not None:
        if source.module is None or example_inputs is None:
            raise InputError(
                f"{source.name} is no language model", remedy="give example_inputs (argument name → tensor)"
            )
        return trace_module(source.module, example_inputs, name=source.name)
    graph = trace_once(source)
    if source.scored:
        score_by_tokens(graph, source.scored)
    project(graph, source)
    return graph


def lower(
    graph: Graph, plan: Plan, context: PassContext, dump_ir: Path | None = None
) -> tuple[Graph, list[PassRecord]]:
    """Run the pipeline; the final graph, and a record of each pass."""
    if graph.facts["kind"] == "function":
        passes = function(list(plan.quantize), extra=list(plan.extra), adapt=list(plan.adapt))
    else:
        passes = language_model(
            list(plan.quantize),
            page_size=PAGE_SIZE,
            kv_dtype=plan.kv_dtype,
            extra=list(plan.extra),
            adapt=list(plan.adapt),
        )
    return run_passes(graph, passes, context, dump_ir)


def count_weights(graph: Graph) -> int:
    """Elements of all weights; what quantization adds beside its codes is none of the model's."""
    added = {part for op in graph for _, *parts in quantized_parts(op) for part in parts}
    return sum(num_elements(v.weight) for v in graph.weights.values() if v.weight and v not in added)


def _manifest(job: _Job, graph: Graph) -> dict[str, Any]:
    model = model_facts(job.source, graph, job.context.context_length)
    tokenizer = tokenizer_entry(job.tokenizer)
    return begin_manifest(graph, model, kv_dtype=job.plan.kv_dtype, tokenizer=tokenizer)


def compile_model(
    model: str | os.PathLike[str] | torch.nn.Module,
    output: str | os.PathLike[str],
    *,
    targets: Sequence[str] = ("tvm-cpu",),
    quant: str = "none",
    quant_head: str | None = None,
    bits_per_weight: float | None = None,
    context: int | None = None,
    kv_dtype: str | None = None,
    passes: Sequence[str] = (),
    lora: Sequence[str] = (),
    rope_scaling: str | None = None,
    dump_ir: str | os.PathLike[str] | None = None,
    example_inputs: Mapping[str, torch.Tensor] | None = None,
    render: Renderer | None = None,
    detect: DetectTools | None = None,
    calibration: CalibrationOptions = DEFAULT_CALIBRATION,
    max_ram: int | None = None,
    verdict: VerdictOptions = DEFAULT_VERDICT,
    tune: int = 0,
    adapters: bool = False,
    progress: Progress = no_progress,
    say: Callable[[str], None] = say_nothing,
) -> CompileReport:
    """Compile a model into the artifact folder `output`. Arguments as in `llmc.compile`; `passes` are further
    ones by name, run on the fused graph. `max_ram` caps the process tree, in bytes; `say` gets sentences that
    the user should see at once. What `verdict` asks for is measured where the scheme loses anything. `tune`:
    seconds to search for the sizes of kernels. `adapters`: places for adapters that requests choose among.

    Nothing stands under the name `output` before everything is written; an artifact that was there stays
    until then.
    """
    targets = _searching(targets, tune, max_ram) if tune else targets
    targets = with_adapters(targets) if adapters else targets
    merged = tuple(LoraOption.parse(text) for text in lora)
    options = (quant, quant_head, bits_per_weight, context, kv_dtype, tuple(passes), merged)
    scaling = None if rope_scaling is None else RopeScaling.parse(rope_scaling)
    asked = Request(tuple(targets), *options, calibration, verdict, scaling)
    plan = asked.plan()
    passing = PassContext(max_ram=max_ram)
    load_ops()
    # The writer first: a name that cannot be written costs no tracing.
    with ArtifactWriter(output) as writer, ExitStack() as stack, finishing(passing, say):
        prepare_targets(plan.targets if max_ram is None else (), stack)
        settled = stack.enter_context(few_collections())
        progress("open", 0.0)
        source = _open(model, scaling)
        passing.context_length = _context(source, context)
        passing.notes += _left_out(source) + merge_gguf_adapters(source, merged)
        progress("trace", 0.02)
        graph = trace(source, example_inputs)
        passing.notes += _fewer(source, graph, passing.context_length)
        settled()
        _check_before(asked, plan, source, graph, passing, say)
        stack.enter_context(watched(max_ram))
        job = _Job(asked, plan, source, passing, writer, render, detect)
        _read_text(job, graph, Path(output), progress, say)
        share = Share(progress, 0.80 if plan.calibrated else 0.50 if plan.measured else 0.20)
        graph, records = _lowered(job, graph, share, Path(dump_ir) if dump_ir is not None else None, stack)
        artifact, weight_bytes, bits = _write(job, graph, share)
    progress("done", 1.0)
    notes = list(dict.fromkeys(passing.notes))
    return CompileReport(artifact, weight_bytes, bits, records, notes, passing.quality)


def _searching(targets: Sequence[str], seconds: int, max_ram: int | None) -> tuple[str, ...]:
    """The targets, asked to search for the sizes of their kernels."""
    if max_ram is not None:
        raise InputError(
            "--tune with --max-ram: what a search takes is not predicted",
            remedy="leave one of them away",
        )
    return with_tune(targets, seconds)


@dataclass
class _Job:
    """A compilation on its way."""

    asked: Request
    plan: Plan
    source: ModelSource
    context: PassContext
    writer: ArtifactWriter
    render: Renderer | None
    detect: DetectTools | None
    tokenizer: TokenizerFacts | None = None


def _read_text(
    job: _Job,
    graph: Graph,
    output: Path,
    progress: Progress,
    say: Callable[[str], None],
) -> None:
    """The tokenizer, and what passes calibrate on or are measured on."""
    if graph.facts["kind"] != "function":
        progress("tokenizer", 0.08)
        folder = job.writer.path("tokenizer.json").parent
        job.tokenizer = export_tokenizer(job.source, folder, job.render, job.detect)
    text = TextSource(job.source, job.writer.partial, job.tokenizer, job.asked.calibration, job.render)
    if job.plan.calibrated:
        progress("calibration text", 0.10)
        key = job.asked.key(job.context.context_length)
        begin_calibration(job.context, text, output, key, job.plan.calibration_tokens, say)
    elif job.plan.measured:
        progress("held-out text", 0.10)
        prepare_held(job.context, text)


def _lowered(
    job: _Job, graph: Graph, share: Share, dump_ir: Path | None, stack: ExitStack
) -> tuple[Graph, list[PassRecord]]:
    """`lower`; what passes put off is done while a target begins its kernels, until `stack` is closed."""
    context, measured = job.context, job.plan.measured
    end = share.passes_end - (_LATER if measured else 0.0)
    context.later = [] if measured and context.max_ram is None else None
    context.progress = share.between(0.10, end)
    graph, records = lower(graph, job.plan, context, dump_ir)
    release_freed_memory()  # before a kernel compiler stands beside this process
    if context.later:
        begin_target(job.plan.targets[0], graph, job.writer, stack)
    for work in context.later or []:
        work(share.between(end, share.passes_end))
    return graph, records


def _write(job: _Job, graph: Graph, share: Share) -> tuple[Artifact, int, float]:
    """The artifact; bytes of its weights, and bits of each."""
    writer = job.writer
    manifest = _manifest(job, graph)
    writer.path("ir.txt").write_text(print_graph(graph), encoding="utf-8", newline="\n")
    if job.context.quality is not None:
        writer.write_quality(job.context.quality)
    write_module_names(job.source, writer)
    entries = _emit(job, graph, share)
    share.progress("write", 0.98)
    weight_bytes = written_bytes(writer, entries)
    bits = 8 * weight_bytes / max(1, count_weights(graph))
    quantization: dict[str, Any] = {
        "scheme": job.asked.quant,
        "bits_per_weight": round(bits, 4),
        "weight_bytes": weight_bytes,
        "source": job.source.quantization_of_source,
    }
    if job.plan.calibrated and job.context.calibration is not None:
        quantization["calibration"] = describe_calibration(job.context.calibration)
    manifest |= {
        "targets": entries,
        "quantization": quantization,
        "command": job.asked.command(job.source, calibrated=job.plan.calibrated),
    }
    return writer.finish(manifest), weight_bytes, bits


def _check_before(
    asked: Request,
    plan: Plan,
    source: ModelSource,
    graph: Graph,
    context: PassContext,
    say: Callable[[str], None],
) -> None:
    """Refuse before the long work what it would end in: memory that is not there, a target that will not take
    the model (not with further passes, which may make of it what a target takes).
    """
    capped = context.max_ram is not None
    if capped or plan.calibrated:
        peak = _peak(source, graph, plan, context.context_length, capped=capped)
        check_peak(peak, context.max_ram, say)
    if plan.calibrated and not asked.passes:
        _check_targets(source, graph.clone(), plan, context.context_length)


def _check_targets(
    source: ModelSource, graph: Graph, plan: Plan, context: int | None
) -> tuple[Graph, list[PassRecord]]:
    """Lower a graph as the plan does, but for calibration and measurements, and raise where a target will not
    take it; the lowered graph, and a record of each pass.
    """
    quick = replace(plan, quantize=tuple(without_calibration(without_verdict(plan.quantize))))
    graph, records = lower(graph, quick, PassContext(context_length=context))
    for target in plan.targets:
        ask_target(target, source, graph)
    return graph, records


def _peak(
    source: ModelSource, graph: Graph, plan: Plan, context: int | None, *, capped: bool = False
) -> Peak:
    """What compiling the traced graph will take."""
    vocabulary = describe(source)["vocab_size"] if source.config is not None else None
    workers = max((target.workers() for target in plan.targets), default=0)
    at_once = 1 if capped else processes_at_once(workers, WORKER_BYTES)
    kernels = at_once if workers else 0
    length = min(LENGTH, context or LENGTH)
    passes = (*plan.extra, *plan.quantize)
    vocabulary = int(vocabulary or 0)
    return predict_peak(graph, passes, vocabulary=vocabulary, length=length, kernels=kernels, capped=capped)


def _emit(job: _Job, graph: Graph, share: Share) -> dict[str, Any]:
    """Every target's files; their manifest entries by name."""
    entries: dict[str, Any] = {}
    begin = share.passes_end + 0.02
    step = (0.97 - begin) / len(job.plan.targets)
    for i, target in enumerate(job.plan.targets):
        part = share.between(begin + i * step, begin + (i + 1) * step)
        entries[target.name] = emit_target(target, job.source, graph, job.writer, progress=part)
    return entries


def written_bytes(writer: ArtifactWriter, entries: Mapping[str, Mapping[str, Any]]) -> int:
    """Bytes of the first target's weight file; 0 for a target without one."""
    first = next(iter(entries.values()))
    rel = first.get("weights", first.get("weight_file"))
    return writer.size_of(rel) if isinstance(rel, str) else 0


@dataclass(frozen=True)
class CheckReport:
    """What compiling would give, from headers and configuration alone; sizes in bytes, `notes` are the
    passes'.
    """

    facts: dict[str, Any]
    ops: int
    attention_layers: int
    kv_bytes_per_token: int
    weight_bytes: int
    peak_bytes: int
    notes: tuple[str, ...]


def _stored_bits(graph: Graph) -> dict[Value, float]:
    """Bits an element of what targets store narrower than its dtype: codes (those of a row's last group as
    many as a whole one has), zero points beside codes of at most 4 bits (two a byte), and scales and minima
    of two levels.
    """
    found: dict[Value, float] = {}
    for q, scale, zero in (parts for op in graph for parts in quantized_parts(op)):
        quant = q.type.quant
        assert quant is not None
        k = q.shape[-1]
        assert isinstance(k, int)
        group = min(quant.group_size, k)
        found[q] = quant.bits * (-(-k // group) * group) / k
        if zero is not None and zero.dtype == "uint8" and quant.bits <= 4:
            found[zero] = 4
        if quant.super_group:
            two_levels = 8 + 16 * quant.group_size / quant.super_group
            found |= {v: two_levels for v in (scale, zero) if v is not None and v.dtype == "float32"}
    return found


def check_model(
    model: str | os.PathLike[str],
    *,
    targets: Sequence[str] = ("tvm-cpu",),
    quant: str = "none",
    quant_head: str | None = None,
    bits_per_weight: float | None = None,
    context: int | None = None,
    kv_dtype: str | None = None,
    rope_scaling: str | None = None,
) -> CheckReport:
    """Trace and lower a model without its weights; predict sizes.

    Raises what `compile_model` would raise first.
    """
    scaling = None if rope_scaling is None else RopeScaling.parse(rope_scaling)
    asked = Plan.make(targets, quant, kv_dtype, (), quant_head, bits_per_weight)
    plan = with_scaling(asked, scaling)
    load_ops()
    # "keep" asks for the grids of the weights, which stand in the files.
    files = str(model).endswith(".gguf") or (quant == "keep" and Path(model).is_dir())
    source = _open(model, scaling, config_only=not files)
    length = _context(source, context)
    graph = trace(source, None)
    fewer = _fewer(source, graph, length)
    peak = _peak(source, graph, asked, length).bytes
    attentions = sum(isinstance(op, Attention) for op in graph)
    graph, records = _check_targets(source, graph, plan, length)
    total = 0
    narrow = _stored_bits(graph)
    for value in graph.weights.values():
        assert value.weight is not None
        if value in narrow:
            total += math.ceil(num_elements(value.weight) * narrow[value] / 8)
        else:
            total += num_bytes(value.weight)
    facts = describe(source)
    notes = tuple(dict.fromkeys([*_left_out(source), *fewer, *(n for r in records for n in r.notes)]))
    caches = graph.facts.get("kv", [])
    a_token = sum(2 * kv["heads"] * kv_bytes(plan.kv_dtype, kv["head_dim"]) for kv in caches)
    return CheckReport(
        {**facts, "context": held_length(graph, length), "rope_scaling": rope_scaling_facts(source)},
        len(graph.ops),
        attentions or len(caches),
        a_token,
        total,
        peak,
        notes,
    )
