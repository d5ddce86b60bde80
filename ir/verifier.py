"""Rules that every graph obeys, and one table a stage of what may stand in it.

The pass manager runs this after every pass.
"""

from __future__ import annotations

from . import ops as _ops  # noqa: F401  # pyright: ignore[reportUnusedImport]  (registers the operations)
from .core import Graph, Op, Value
from .define import OPS
from .errors import VerifyError

# Ops that a stage forbids. Everything else that is defined may stand in it: a fusion that does not apply is
# not an error.
_PAGED_ONLY = frozenset({"append_kv", "paged_attention", "gather_last"})
_QUANT = frozenset({"dequantize", "quantized_linear", "quantized_embedding", "quantized_moe"})
_FUSED = frozenset({"rms_norm", "rope", "attention", "gated_mlp"})
# Ops that mix tokens; in a ragged batch they would mix sequences.
_TOKEN_MIXING = frozenset({"sdpa", "attention", "cumsum", "diff"})

STAGES: dict[str, frozenset[str]] = {
    "traced": _PAGED_ONLY | _QUANT | _FUSED,
    "canonical": _PAGED_ONLY | _QUANT | _FUSED,
    "fused": _PAGED_ONLY | _QUANT,
    "quantized": _PAGED_ONLY,
    "paged": _TOKEN_MIXING,
}


def _check_op(graph: Graph, op: Op, seen: set[Value]) -> None:
    for i, v in enumerate(op.operands):
        if v.is_weight:
            if graph.weights.get(v.name) is not v:
                raise VerifyError(
                    f"{op!r} reads weight {v.name}, which the graph does not hold",
                    remedy="add it with add_weight",
                )
        elif v not in seen:
            raise VerifyError(
                f"{op!r}: operand {i} ({v!r}) is not defined before it", remedy="insert its producer earlier"
            )
        if (op, i) not in v.uses:
            raise VerifyError(
                f"{op!r}: operand {i} does not know this use",
                remedy="change graphs through Graph's methods only",
            )
    for r, t in zip(op.results, op.infer(), strict=True):
        if r.type != t:
            raise VerifyError(
                f"{op!r}: result is typed {r.type}, operands give {t} ({op.loc})",
                remedy="call retype_all after changing types",
            )
    op.verify()


def verify(graph: Graph, stage: str | None = None) -> None:
    """Raise `VerifyError` for the first broken rule.

    Args:
        stage: checked instead of `graph.stage` where given.
    """
    name = stage or graph.stage
    if name not in STAGES:
        raise VerifyError(f"no stage is named {name}", remedy=f"one of {', '.join(STAGES)}")
    seen: set[Value] = set(graph.inputs)
    for op in graph:
        if op.opname not in OPS:
            raise VerifyError(f"{op.opname} is not a registered op", remedy="define it with @op")
        if op.opname in STAGES[name]:
            raise VerifyError(
                f"{op.opname} may not stand in a graph of stage {name} ({op.loc})",
                remedy="a pass did not do its work",
            )
        _check_op(graph, op, seen)
        seen.update(op.results)
    for v in graph.outputs:
        if v not in seen and not v.is_weight:
            raise VerifyError(
                f"output {v!r} is not defined in the graph", remedy="set it to a result of an op"
            )
    if len(graph.output_names) != len(graph.outputs):
        raise VerifyError("output names and outputs differ in number", remedy="name every output")
    _check_uses(graph)


def _check_uses(graph: Graph) -> None:
    inside = set(graph.ops)
    for v in (*graph.inputs, *graph.weights.values(), *(r for op in graph for r in op.results)):
        for user, i in v.uses:
            if user not in inside or user.operands[i] is not v:
                raise VerifyError(
                    f"{v!r} lists a use by {user!r} that is not there", remedy="erase ops through Graph.erase"
                )
