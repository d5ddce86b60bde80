"""Every tiny family against transformers in float32: the traced, fused and paged graph by the interpreter,
and the compiled artifact on each target. Bar: largest difference ≤ 1e-4 of the largest value.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import llmc
import numpy as np
import pytest
from llmc.ir.core import Graph
from llmc.ir.parser import parse
from llmc.ir.printer import equal, print_graph
from llmc.passes.base import PassContext
from llmc.passes.manager import run_passes

from .conftest import LONG as LONG_TESTS
from .conftest import Golden
from .graphs import PagedRun, logits_of, lowered, notes, opnames, passes_to, traced, worst
from .models import TINY, ids_of, reference_logits, tiny_model
from .tvm_graphs import ISA

TOLERANCE = 1e-4
LONG, SHORT = ids_of(40), ids_of(21, seed=3)  # longer than two pages, and than the windows of 12
NO_SDPA = {"gemma2"}  # soft-capped scores have no place in torch's fused operator
# What eager attention is traced to differs by its mask, its scale and its scores; others are like these.
EAGER = set(TINY) if LONG_TESTS else {"llama", "gemma2", "gpt2", "bert"}
CASES = [(f, "sdpa") for f in TINY if f not in NO_SDPA] + [(f, "eager") for f in TINY if f in EAGER]
TARGETS = ("tvm-cpu", "onnx-cpu")


@cache
def model_of(family: str) -> Any:
    return tiny_model(family)


@cache
def wanted(family: str, *, short: bool = False) -> np.ndarray:
    return reference_logits(model_of(family), SHORT if short else LONG)


@cache
def graph_of(family: str, attention: str) -> Graph:
    return traced(model_of(family), attention=attention, encoder=not TINY[family].causal, name=family)


@cache
def staged(family: str, attention: str, stage: str) -> tuple[Graph, list[str]]:
    graph, records = lowered(graph_of(family, attention), stage)
    return graph, notes(records)


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_traced_and_fused_graphs_equal_transformers(family: str, attention: str) -> None:
    assert worst(logits_of(graph_of(family, attention), LONG), wanted(family)) <= TOLERANCE
    fused, _ = staged(family, attention, "fused")
    assert worst(logits_of(fused, LONG), wanted(family)) <= TOLERANCE
    assert worst(logits_of(fused, LONG[:1]), wanted(family)[:1]) <= TOLERANCE if TINY[family].causal else True


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_every_attention_norm_and_projection_is_fused(family: str, attention: str) -> None:
    graph, refused = staged(family, attention, "paged")
    names = opnames(graph)
    layers = 2
    assert names.count("paged_attention") == names.count("append_kv") == layers
    assert not {"matmul", "softmax", "sdpa", "attention", "rsqrt", "reduce_mean", "where"} & set(names)
    assert names.count("rope") == (0 if family in ("gpt2", "bert") else 2 * layers)
    assert names.count("gated_mlp") == (0 if family in ("gpt2", "bert", "gpt_neox") else layers)
    head = 0 if family == "bert" else 1
    assert names.count("linear") == 4 * layers + head
    assert not refused


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_both_attentions_give_one_paged_graph(family: str, attention: str) -> None:
    """How transformers was asked to attend leaves no trace, locations aside."""
    if family in NO_SDPA:
        pytest.skip("traced with eager attention only")
    assert opnames(staged(family, attention, "paged")[0]) == opnames(staged(family, "sdpa", "paged")[0])


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_paged_graph_over_a_ragged_batch_equals_transformers(family: str, attention: str) -> None:
    graph, _ = staged(family, attention, "paged")
    paged = PagedRun(graph, seed=len(family))
    if not TINY[family].causal:
        short, long = paged.step([("b", SHORT), ("a", LONG)])
        assert worst(short, wanted(family, short=True)) <= TOLERANCE
        assert worst(long, wanted(family)) <= TOLERANCE
        return
    head = paged.step([("a", LONG[:17])])[0]
    middle, whole = paged.step([("a", LONG[17:39]), ("b", SHORT[:-1])])
    end_b, end_a = paged.step([("b", SHORT[-1:]), ("a", LONG[39:])])
    rows = np.concatenate([head.numpy(), middle.numpy(), end_a.numpy()])
    assert worst(paged_rows := np.asarray(rows), wanted(family)) <= TOLERANCE, paged_rows.shape
    assert worst(whole, wanted(family, short=True)[:-1]) <= TOLERANCE
    assert worst(end_b, wanted(family, short=True)[-1:]) <= TOLERANCE


@pytest.mark.parametrize("family", [f for f in TINY if TINY[f].causal])
def test_only_wanted_rows_go_through_the_head(family: str) -> None:
    graph, _ = staged(family, "eager" if family in NO_SDPA else "sdpa", "paged")
    of_wanted = [op for op in graph if op.results[0].shape[:1] == graph.input("output_index").type.shape]
    assert any(op.results[0] is graph.outputs[0] for op in of_wanted)
    # The head and its norm; of the last layer, no keys and values, whose rows others see.
    kept = [op for op in graph if op.opname in ("append_kv", "paged_attention")]
    assert not [op for op in kept if any(v.producer in of_wanted for v in op.operands)]
    assert {op.opname for op in of_wanted} & {"rms_norm", "layer_norm"}
    assert graph.outputs[0].type.shape[0] == graph.input("output_index").type.shape[0]
    rows = PagedRun(graph).step([("a", LONG), ("b", SHORT)], last_only=True)
    assert worst(rows[0], wanted(family)[-1:]) <= TOLERANCE
    assert worst(rows[1], wanted(family, short=True)[-1:]) <= TOLERANCE


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_text_of_every_stage_round_trips(family: str, attention: str) -> None:
    graph = graph_of(family, attention).clone()
    assert equal(parse(print_graph(graph)), graph)
    for step in passes_to("paged"):
        graph, records = run_passes(graph, [step], PassContext())
        if records[0].changed:
            assert equal(parse(print_graph(graph)), graph), f"after {step}"


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("stage", ["fused", "paged"])
def test_golden_text(family: str, stage: str, golden: Golden) -> None:
    golden.check(f"{family}-{stage}.txt", print_graph(staged(family, "eager", stage)[0]))


def test_tied_embedding_and_head_are_one_weight() -> None:
    graph = graph_of("llama", "sdpa")
    (tied,) = [v for v in graph.weights.values() if v.shape[0] == 384]
    assert sorted(op.opname for op in tied.users) == ["embedding", "linear"]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Any) -> Any:
    """family → artifact for all targets, made once."""
    folder = tmp_path_factory.mktemp("artifacts")

    @cache
    def artifact(family: str) -> Path:
        path = folder / f"{family}.llmc"
        llmc.compile(tiny_folder(family), path, targets=[f"tvm-cpu:isa={ISA}", "onnx-cpu"])
        return path

    return artifact


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=pytest.mark.slow if i % 2 else ()) for i, f in enumerate(TINY)]
)
@pytest.mark.parametrize("target", TARGETS)
def test_compiled_artifact_equals_transformers(family: str, target: str, artifacts: Any) -> None:
    llm = llmc.load(artifacts(family), target=target)
    assert worst(llm.logits(LONG), wanted(family)) <= TOLERANCE
    assert worst(llm.logits(SHORT), wanted(family, short=True)) <= TOLERANCE
