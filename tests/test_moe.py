"""Mixtures of experts as whole models: against transformers in float32, on each target, however steps are
cut; and what is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import llmc
import numpy as np
import pytest
import torch
from llmc.codegen.artifact import Artifact
from llmc.codegen.legalize import legalize
from llmc.codegen.onnx.cpu import OnnxCpu
from llmc.frontend.experts import check_choice, gate_of, installed
from llmc.frontend.trace import trace_source
from llmc.ir.core import Graph
from llmc.ir.errors import InputError, UnsupportedError, VerifyError
from llmc.ir.interpreter import run
from llmc.ir.ops.moe import Gate, Moe
from llmc.ir.types import TensorType, sym
from llmc.ir.weights import ArrayTensor
from llmc.passes.routers import is_router
from llmc.runtime.executor import StepInputs, open_executor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .graphs import ModelInMemory, PagedRun, logits_of, lowered, opnames, traced
from .models import ids_of, reference_logits
from .moe_models import MOE, save_moe, tiny_moe
from .test_tvm_model import step_inputs
from .tvm_graphs import ISA, open_tvm

TOLERANCE = 1e-4  # of logits of a few units; what was seen is below 1e-5
IDS, OTHER = ids_of(40), ids_of(5, seed=4)
EAGER = {"gpt_oss"}  # its attention has sinks, which torch's fused operator has no place for
SOME = [  # the others have no operation that these have not
    pytest.param(n, marks=pytest.mark.slow if n in ("qwen3_moe", "olmoe") else ()) for n in MOE
]
SLOW = [pytest.param(n, marks=() if n == "mixtral" else pytest.mark.slow) for n in MOE]


def artifact_logits(path: Path, ids: list[int], cut: int, *, threads: int = 1) -> np.ndarray:
    """Logits [T, vocab] of one sequence, its first `cut` tokens in a step, the others one by one."""
    executor = open_executor(Artifact.open(path), threads=threads)
    executor.allocate_kv(8)
    pages = [3, 7, 1]
    steps = [(ids[:cut], 0), *(([one], cut + i) for i, one in enumerate(ids[cut:]))]
    return np.concatenate([executor.step(step_inputs([(t, at, pages)])).copy() for t, at in steps])


def graph_of(name: str, model: Any) -> Graph:
    return traced(model, attention="eager" if name in EAGER else "sdpa")


@pytest.mark.parametrize("name", SOME)
def test_graphs_equal_transformers(name: str) -> None:
    model = tiny_moe(name)
    wanted = torch.from_numpy(reference_logits(model, IDS))
    graph = graph_of(name, model)
    fused, _ = lowered(graph, "fused")
    paged, _ = lowered(graph, "paged")
    assert "moe" in opnames(fused)
    paging = PagedRun(paged)
    rows = [paging.step([("a", IDS[:17])])[0], paging.step([("b", IDS[:3]), ("a", IDS[17:])])[1]]
    for got in (logits_of(graph, IDS), logits_of(fused, IDS), torch.cat(rows)):
        assert float((got - wanted).abs().max()) <= TOLERANCE


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """name, scheme → the artifact, made once."""
    made: dict[tuple[str, str, str], Path] = {}

    def compile_once(name: str, quant: str = "none", target: str = f"tvm-cpu:isa={ISA}") -> Path:
        key = (name, quant, target)
        if key not in made:
            folder = tmp_path_factory.mktemp("moe")
            save_moe(name, folder / "model")
            out = folder / "m.llmc"
            options: dict[str, Any] = {"targets": [target], "quant": quant, "verdict": False}
            llmc.compile(str(folder / "model"), out, kv_dtype="float32", **options)
            made[key] = out
        return made[key]

    return compile_once


@pytest.mark.parametrize("name", SLOW)
def test_artifacts_equal_transformers(name: str, compiled: Any) -> None:
    got = artifact_logits(compiled(name), IDS, 17, threads=2)
    assert np.abs(got - reference_logits(tiny_moe(name), IDS)).max() <= TOLERANCE


@pytest.mark.parametrize(
    ("quant", "bar"),
    [("none", 1e-5), pytest.param("int8", 0.1, marks=pytest.mark.slow)],
)
def test_experts_without_a_gate_behind_a_recurrence(quant: str, bar: float, compiled: Any) -> None:
    """In one pass and token by token, beside transformers: root mean squares of a row's difference over those
    of its values. Rounded weights turn some choices of a router, and what the recurrence makes of them: of
    eight models drawn, 0 to 6 of the 40 rows then differ by more than a fifth, in groups of 32 as where
    layers are rotated, and the median by 0.03 to 0.065.
    """
    wanted = reference_logits(tiny_moe("nemotron_h"), IDS)
    with llmc.load(compiled("nemotron_h", quant), kv_tokens=512) as llm:
        errors = np.linalg.norm(llm.logits(IDS) - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
        assert (np.max if quant == "none" else np.median)(errors) <= bar
        answer = llm.generate(IDS[:9], max_tokens=12, temperature=0.0, ignore_eos=True).token_ids
        rows = llm.logits([*IDS[:9], *answer])
        assert rows[8:-1].argmax(axis=1).tolist() == answer


@pytest.mark.slow
@pytest.mark.parametrize("name", MOE)
def test_answers_equal_transformers(name: str, compiled: Any) -> None:
    """The engine's greedy tokens, several prompts at once."""
    model = tiny_moe(name)
    prompts = [IDS[:9], IDS[9:30], OTHER]
    with llmc.load(compiled(name), kv_tokens=512) as llm:
        answers = llm.generate_batch(prompts, max_tokens=12, temperature=0.0, ignore_eos=True)
    for prompt, answer in zip(prompts, answers, strict=True):
        wanted = model.generate(
            torch.tensor([prompt]), max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0
        )
        assert list(answer.choices[0].token_ids) == wanted[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", ["mixtral", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_onnx_equals_transformers(name: str, compiled: Any) -> None:
    got = artifact_logits(compiled(name, target="onnx-cpu"), IDS, 37)
    assert np.abs(got - reference_logits(tiny_moe(name), IDS)).max() <= TOLERANCE


def test_a_row_does_not_depend_on_its_batch(compiled: Any) -> None:
    executor = open_tvm(Artifact.open(compiled("mixtral")))
    executor.allocate_kv(8)
    alone = executor.step(step_inputs([(IDS, 0, [3, 7, 1])])).copy()
    both = executor.step(step_inputs([(OTHER, 0, [0]), (IDS[:20], 0, [2, 4, 5])])).copy()
    rest: StepInputs = step_inputs([(IDS[20:], 20, [2, 4, 5]), ([9], 5, [0])])
    after = executor.step(rest).copy()
    assert np.array_equal(np.concatenate((both[5:], after[:20])), alone)


def test_decompositions_mean_the_same() -> None:
    """What targets without kernels for experts compute, through the interpreter."""
    for name in ("qwen2_moe", "gpt_oss"):
        paged, _ = lowered(graph_of(name, tiny_moe(name)), "paged")
        plain = legalize(paged, OnnxCpu.operations)
        assert "moe" not in opnames(plain)
        (wanted,), (got,) = (PagedRun(g).step([("a", IDS)]) for g in (paged, plain))
        assert float((got - wanted).abs().max()) <= 1e-4


def test_routers_are_neither_merged_nor_taken_for_other_layers() -> None:
    fused, _ = lowered(graph_of("qwen2_moe", tiny_moe("qwen2_moe")), "fused")
    routers = [op for op in fused if op.opname == "linear" and is_router(op)]
    assert [op.loc for op in routers] == [f"model.layers.{i}.mlp.gate" for i in (0, 1)]
    assert all(op.operands[1].name == f"{op.loc}.weight" for op in routers)


# -- what is refused


def test_more_experts_a_token_than_there_are() -> None:
    model = tiny_moe("mixtral")
    model.config.num_experts_per_tok = 9
    with pytest.raises(InputError, match=r"chooses 9 experts a token, and there are 8; correct config\.json"):
        traced(model)
    model.config.num_experts_per_tok = 2
    model.model.layers[1].mlp.gate.top_k = 11  # which its configuration does not say
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.gate chooses 11 experts"):
        trace_source(ModelInMemory(model))  # type: ignore[arg-type]


def test_more_groups_than_there_are() -> None:
    model = tiny_moe("deepseek_v3")
    model.model.layers[1].mlp.gate.topk_group = 5
    with pytest.raises(InputError, match="chooses 5 groups of experts a token, and there are 4"):
        check_choice(model)


def test_a_model_that_may_have_experts_and_has_none() -> None:
    model = tiny_moe("mixtral")
    model.config.num_local_experts = model.config.num_experts = 1  # all layers are dense then, and k stays
    check_choice(model)


def test_two_threads_trace_mixtures() -> None:
    """One is left while the other is still in it; each finds its own gates."""
    left, right = tiny_moe("mixtral"), tiny_moe("gpt_oss")
    first, second = installed(left), installed(right)
    with second:
        with first:
            names = {m.config._experts_implementation for m in (left, right)}
        assert len(names) == 2
        assert right.config._experts_implementation in ALL_EXPERTS_FUNCTIONS
        assert left.config._experts_implementation not in names


def mixture(experts: int, k: int) -> Moe:
    graph = Graph()
    x = graph.add_input("x", TensorType("float32", (sym("T"), 8)))
    indices = graph.add_input("i", TensorType("int64", (sym("T"), k)))
    weights = graph.add_input("w", TensorType("float32", (sym("T"), k)))
    up, down = (
        graph.add_weight(n, ArrayTensor(np.ones(s, np.float32)))
        for n, s in (("up", (experts, 8, 8)), ("down", (experts, 8, 4)))
    )
    return graph.append(Moe(x, indices, weights, up, down, None, None))  # type: ignore[return-value]


def test_an_op_that_chooses_more_than_there_are() -> None:
    mixture(3, 3).verify()
    with pytest.raises(VerifyError, match="4 experts a token of 3; k is at most their number"):
        mixture(3, 4).verify()


class _Module:
    """What `gate_of` asks a module of experts for."""

    has_gate, has_post_expert_norm = True, False

    def __init__(self, apply: Any) -> None:
        self._apply_gate = apply


def _halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    gate, up = x.chunk(2, dim=-1)
    return gate, up


def _clamped(x: torch.Tensor) -> torch.Tensor:
    gate, up = x[..., ::2].clamp(max=7.0), x[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(gate * 1.702)


GATES = [
    (lambda x: torch.nn.functional.silu(_halves(x)[0]) * _halves(x)[1], Gate("silu")),
    (
        lambda x: torch.nn.functional.gelu(_halves(x)[0], approximate="tanh") * _halves(x)[1],
        Gate("gelu_tanh"),
    ),
    (lambda x: torch.relu(x[..., ::2]) * x[..., 1::2], Gate("relu", interleaved=True)),
    (lambda x: torch.relu(_halves(x)[0]).square() * _halves(x)[1], Gate("relu2")),
    (_clamped, Gate("swish", 1.702, 7.0, 1.0, interleaved=True)),
    (
        lambda x: torch.nn.functional.silu(_halves(x)[0].clamp(max=2.5)) * _halves(x)[1].clamp(-2.5, 2.5),
        Gate("silu", limit=2.5),
    ),
    (
        lambda x: torch.nn.functional.silu(_halves(x)[0]).clamp(max=2.5) * _halves(x)[1].clamp(-2.5, 2.5),
        Gate("silu", limit=2.5, limits_active=True),
    ),
]


@pytest.mark.parametrize(("apply", "gate"), GATES, ids=lambda g: g.activation if isinstance(g, Gate) else "")
def test_gates_are_found_by_what_they_compute(apply: Any, gate: Gate) -> None:
    assert gate_of("experts", _Module(apply)) == gate


def _late(x: torch.Tensor) -> torch.Tensor:
    """A limit of ups alone, beyond the numbers that are usual."""
    gate, up = _halves(x)
    return torch.nn.functional.silu(gate) * up.clamp(-16.0, 16.0)


def _gated(activation: Any, ups: Any = lambda u: u) -> Any:
    return lambda x: activation(_halves(x)[0]) * ups(_halves(x)[1])


@pytest.mark.parametrize(
    "apply",
    [
        lambda x: x[..., ::2] ** 2,
        lambda x: torch.tanh(_halves(x)[0]),
        _late,
        # Limits of one side alone, and a threshold that is nearly zero.
        _gated(lambda g: torch.nn.functional.silu(g.clamp(max=16.0))),
        _gated(lambda g: torch.nn.functional.silu(g).clamp(max=448.0)),
        _gated(torch.nn.functional.silu, lambda u: u.clamp(min=-16.0)),
        _gated(lambda g: torch.nn.functional.threshold(g, 0.01, 0.0)),
    ],
)
def test_a_gate_that_is_not_known(apply: Any) -> None:
    with pytest.raises(UnsupportedError, match=r"the experts of layers\.0 have a gate of a kind that is not"):
        gate_of("layers.0", _Module(apply))


@pytest.mark.parametrize("name", ["relu2", "silu", "gelu", "gelu_pytorch_tanh"])
def test_experts_without_a_gate(name: str) -> None:
    from transformers.activations import ACT2FN

    module: Any = _Module(None)
    module.has_gate, module.act_fn = False, ACT2FN[name]
    known = {"gelu_pytorch_tanh": "gelu_tanh"}.get(name, name)
    assert gate_of("experts", module) == Gate(known, gated=False)
    module.act_fn = lambda x: ACT2FN[name](x).clamp(max=16.0)
    with pytest.raises(UnsupportedError, match=r"an activation of a kind"):
        gate_of("layers.0", module)
    module.act_fn = torch.tanh
    with pytest.raises(UnsupportedError, match=r"the experts of layers\.0 have an activation of a kind"):
        gate_of("layers.0", module)


def test_an_expert_that_nobody_chose_may_be_infinite() -> None:
    op = mixture(2, 1)
    graph = op.graph
    assert graph is not None
    graph.outputs.append(op.result)
    graph.output_names.append("y")
    broken = np.ones((2, 8, 8), np.float32)
    broken[1] = np.inf
    graph.set_weight(op.gate_up, ArrayTensor(broken))
    given = {"x": torch.ones(3, 8), "i": torch.zeros(3, 1, dtype=torch.int64), "w": torch.ones(3, 1)}
    for one in (graph, legalize(graph, OnnxCpu.operations)):
        assert bool(torch.isfinite(run(one, given)[0]).all())
