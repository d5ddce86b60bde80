"""Models with recurrent layers against transformers in float32: traced, fused, and paged over a ragged batch
by the interpreter. Bar: largest absolute difference of any logit ≤ 1e-4.
"""

from __future__ import annotations

import sys
from collections import Counter
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from llmc.frontend import recurrence
from llmc.ir.core import Graph, Value
from llmc.ir.errors import CompileError, UnsupportedError, VerifyError
from llmc.ir.ops import state as ops
from llmc.ir.parser import parse
from llmc.ir.printer import equal, print_graph
from llmc.ir.types import TensorType
from llmc.passes.cache.state import keep_states
from llmc.passes.quantize.scheme import weight_passes

from .graphs import PagedRun, logits_of, lowered, opnames, traced
from .models import ids_of
from .state_models import MODELS, RECURRENCES, state_logits, state_model

TOLERANCE = 1e-4
LONG, SHORT = ids_of(40), ids_of(21, seed=3)


@cache
def graph_of(name: str) -> Graph:
    return traced(state_model(name), attention="eager", name=name)


@cache
def staged(name: str, stage: str) -> Graph:
    return lowered(graph_of(name), stage)[0]


def off(got: Any, wanted: np.ndarray) -> float:
    return float((torch.as_tensor(got) - torch.as_tensor(wanted)).abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_traced_and_fused_graphs_equal_transformers(name: str) -> None:
    assert off(logits_of(graph_of(name), LONG), state_logits(name, LONG)) <= TOLERANCE
    fused = staged(name, "fused")
    assert off(logits_of(fused, LONG), state_logits(name, LONG)) <= TOLERANCE
    assert off(logits_of(fused, LONG[:1]), state_logits(name, LONG)[:1]) <= TOLERANCE
    found = Counter(opnames(fused))
    assert {op: found[op] for op in RECURRENCES[name]} == RECURRENCES[name]
    # Gates that are products of blocks, by the tokens of all heads; keys that are repeated, added to queries.
    if name not in ("gated linear", "convolved attention"):
        assert not found["transpose"] and not found["matmul"]


@pytest.mark.parametrize("name", MODELS)
def test_paged_graph_over_a_ragged_batch_equals_transformers(name: str) -> None:
    graph = staged(name, "paged")
    assert len(graph.facts["state"]) == sum(RECURRENCES[name].values())
    paged = PagedRun(graph)
    head = paged.step([("a", LONG[:17])])[0]
    middle, whole = paged.step([("a", LONG[17:39]), ("b", SHORT[:-1])])
    end_b, end_a = paged.step([("b", SHORT[-1:]), ("a", LONG[39:])])
    assert off(torch.cat([head, middle, end_a]), state_logits(name, LONG)) <= TOLERANCE
    assert off(torch.cat([whole, end_b]), state_logits(name, SHORT)) <= TOLERANCE
    rows = PagedRun(graph).step([("a", LONG), ("b", SHORT)], last_only=True)
    assert off(rows[0], state_logits(name, LONG)[-1:]) <= TOLERANCE


@pytest.mark.parametrize("name", ["selective", "delta"])
def test_text_of_a_paged_graph_round_trips(name: str) -> None:
    graph = staged(name, "paged")
    assert equal(parse(print_graph(graph)), graph)


def test_linear_layers_around_a_recurrence_are_quantized() -> None:
    graph, _ = lowered(graph_of("ssd"), "paged", weight_passes("int8"))
    names = Counter(opnames(graph))
    assert names["quantized_linear"] == 5 and not names["linear"]
    got = PagedRun(graph).step([("a", LONG)])[0]
    wanted = torch.from_numpy(state_logits("ssd", LONG))
    assert float((got - wanted).norm() / wanted.norm()) <= 0.1  # random weights, and a tied head


# What stands for a function


def _module(**functions: Any) -> torch.nn.Module:
    """A module of a Python module of its own, which holds the functions."""
    home = ModuleType("llmc_test_recurrence")
    vars(home).update(functions)
    sys.modules[home.__name__] = home
    kind = type("Layer", (torch.nn.Module,), {"__module__": home.__name__})
    return kind()


def test_function_is_replaced_while_tracing_and_put_back() -> None:
    def filtered(hidden_states: Any, weight: Any, bias: Any = None, activation: Any = None) -> Any:
        count, width = hidden_states.shape[-1], weight.shape[-1]
        y = torch.nn.functional.conv1d(
            hidden_states, weight[:, None], bias, padding=width - 1, groups=len(weight)
        )[..., :count]
        return y if activation is None else torch.nn.functional.silu(y)

    module = _module(filtered=filtered)
    home = sys.modules["llmc_test_recurrence"]
    with recurrence.installed(module):
        assert home.filtered is not filtered
        x, w = torch.randn(1, 3, 6), torch.randn(3, 4)
        torch.testing.assert_close(home.filtered(x, w), filtered(x, w))
    assert home.filtered is filtered


def test_function_that_computes_something_else_is_left_alone() -> None:
    def mean(hidden_states: Any, weight: Any, bias: Any = None, activation: Any = None) -> Any:
        return hidden_states.mean(-1, keepdim=True).expand(hidden_states.shape)

    module = _module(mean=mean)
    with recurrence.installed(module):
        assert sys.modules["llmc_test_recurrence"].mean is mean


def test_variant_that_is_not_proven_is_refused_by_name() -> None:
    def twice(hidden_states: Any, weight: Any, bias: Any = None, activation: Any = None) -> Any:
        count, width = hidden_states.shape[-1], weight.shape[-1]
        y = torch.nn.functional.conv1d(
            hidden_states, weight[:, None], bias, padding=width - 1, groups=len(weight)
        )[..., :count]
        return y if activation is None else 2 * y

    module = _module(twice=twice)
    with recurrence.installed(module):
        held = sys.modules["llmc_test_recurrence"].twice
        held(torch.randn(1, 3, 6), torch.randn(3, 4))
        with pytest.raises(
            UnsupportedError, match=r"twice in .*\(silu\) does not compute what its parameters"
        ):
            held(torch.randn(1, 3, 6), torch.randn(3, 4), activation="silu")


def test_arguments_that_nothing_here_knows_are_refused_where_they_ask_for_something() -> None:
    def filtered(
        hidden_states: Any,
        weight: Any,
        bias: Any = None,
        activation: Any = None,
        whole: Any = True,
        **more: Any,
    ) -> Any:
        assert not any(more.values())
        count, width = hidden_states.shape[-1], weight.shape[-1]
        return torch.nn.functional.conv1d(
            hidden_states, weight[:, None], bias, padding=width - 1, groups=len(weight)
        )[..., :count]

    module = _module(filtered=filtered)
    given = torch.randn(1, 3, 6), torch.randn(3, 4)
    nothing: list[dict[str, Any]] = [{"whole": True}, {"whole": None}, {"seq_idx": None}, {"final": False}]
    with recurrence.installed(module):
        held = sys.modules["llmc_test_recurrence"].filtered
        assert held is not filtered
        for asked in nothing:
            torch.testing.assert_close(held(*given, **asked), filtered(*given))
        for name, x in (("whole", False), ("seq_idx", torch.ones(1)), ("final", True)):
            with pytest.raises(UnsupportedError, match=f"is given {name}, which is not supported"):
                held(*given, **{name: x})


def test_arguments_that_a_function_never_reads_change_nothing() -> None:
    """As models hand theirs on by `**kwargs`."""

    def filtered(
        hidden_states: Any, weight: Any, bias: Any = None, activation: Any = None, **unread: Any
    ) -> Any:
        count, width = hidden_states.shape[-1], weight.shape[-1]
        return torch.nn.functional.conv1d(
            hidden_states, weight[:, None], bias, padding=width - 1, groups=len(weight)
        )[..., :count]

    given = torch.randn(1, 3, 6), torch.randn(3, 4)
    with recurrence.installed(_module(filtered=filtered)):
        held = sys.modules["llmc_test_recurrence"].filtered
        assert held is not filtered
        torch.testing.assert_close(held(*given, position_embeddings=(torch.ones(1),)), filtered(*given))


def test_peak_of_memory_is_predicted_where_a_weight_stands_before_the_tokens() -> None:
    """One recurrence's step is weight · x with tokens last."""
    from llmc.codegen.peak import predict_peak

    graph = graph_of("selective")
    assert any(op.opname == "matmul" and op.operands[0].is_weight for op in graph)
    assert predict_peak(graph, [], vocabulary=384, length=64, kernels=0).bytes > 0


# Refusals


def test_encoder_with_a_recurrence_is_refused() -> None:
    graph = graph_of("selective").clone()
    graph.facts["kind"] = "encoder"
    inputs = [graph.add_input(n, TensorType("int32", (1,))) for n in ("query_start", "context_len")]
    with pytest.raises(UnsupportedError, match=r"is no language model, and .* keeps a state"):
        keep_states(graph, *inputs)


def test_target_without_the_kernels_says_so() -> None:
    from llmc.codegen.legalize import legalize
    from llmc.codegen.onnx.cpu import OnnxCpu

    with pytest.raises(UnsupportedError, match="cannot emit causal_conv1d"):
        legalize(staged("selective", "paged"), OnnxCpu.operations)


def test_kernels_of_a_step_take_no_recurrence_over_a_whole_sequence() -> None:
    from llmc.codegen.legalize import legalize
    from llmc.codegen.tvm.cpu import OPERATIONS, TvmCpu

    with pytest.raises(
        UnsupportedError, match=r"cannot emit causal_conv1d \(from .*layers.*no decomposition"
    ):
        legalize(graph_of("selective"), OPERATIONS, TvmCpu().supports)
    legalize(staged("selective", "paged"), OPERATIONS, TvmCpu().supports)


def _value(*shape: int) -> Value:
    return Value(TensorType("float32", shape))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ops.CausalConv1d(_value(1, 5, 8), _value(4, 7), None, []), r"weight is \[W, C\]"),
        (lambda: ops.CausalConv1d(_value(1, 5, 8), _value(4, 8), _value(7), []), r"bias is \[C\]"),
        (lambda: ops.LinearRecurrence(_value(5, 8), _value(5, 7), []), "one shape"),
        (
            lambda: ops.SsdScan(
                _value(5, 4, 8), _value(5, 4), _value(5, 3, 2), _value(5, 3, 2), _value(4), None, []
            ),
            "G divides H",
        ),
        (
            lambda: ops.GatedDeltaRule(
                _value(5, 2, 4), _value(5, 2, 4), _value(5, 4, 8), _value(5, 3), _value(5, 4), []
            ),
            r"g is \[\.\.\., T, H\]",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused(make: Any, message: str) -> None:
    with pytest.raises(CompileError, match=message):
        make()


def test_cache_of_another_shape_is_refused() -> None:
    ints = [Value(TensorType("int32", (2,))) for _ in range(3)]
    op = ops.LinearRecurrence(_value(5, 8), _value(5, 8), [_value(3, 1, 7), *ints])
    with pytest.raises(VerifyError, match=r"linear_recurrence in .*: cache of"):
        op.verify()
