"""What products by quantized weights read: activations of 8 bits, made by the kernel that makes the
activations where that is possible.
"""

from __future__ import annotations

from typing import Any

from ...ir.core import Graph, Value
from ...ir.types import Dim, sym
from . import kernels
from .kernels.layout import QuantLayout, fits_rotation, has_bytes
from .lower import Lowering, emits
from .untyped import relax
from .weights import quant_layout

LOGITS_APART = 4
"""Activations kept apart of each row that logits are wanted of: of a small model's head they take 3/4 of what
int8 loses there, and of a step with few rows little time.
"""
_WANTED = sym("R")


def form_of(layout: QuantLayout) -> dict[str, Any]:
    """The static parameters of a kernel that reads a quantized weight."""
    return {
        "bits": layout.bits,
        "group_size": layout.group_size,
        "zero_point": layout.zero_point,
        "codebook": layout.codebook,
        "scale_dtype": layout.scale_dtype,
        "super_group": layout.super_group,
    }


def present(low: Lowering, *values: Value | None) -> list[Any]:
    return [low.get(v) for v in values if v is not None]


def kept_apart(x: Value, layout: QuantLayout) -> int:
    """How many of each row's largest activations are kept apart where x is quantized for weights of that
    layout: of norms, through which the few large columns of the residual stream go; more of the rows that the
    head reads, which are few and decide alone. Attention has no such columns, and rows of gated
    MLPs are made in parts, by several threads; of what is rotated nothing stands out.
    """
    from .kernels.activation import whole_groups

    op: Any = x.producer
    if op is None or not whole_groups(layout) or op.opname == "hadamard":
        return 0
    made = op.x.producer if op.opname == "gather_last" else op
    if made is None or made.opname == "gated_mlp":
        return 0
    if x.shape[0] == _WANTED and _makes_logits(x, op.graph):
        return LOGITS_APART
    return 1 if made.opname in ("rms_norm", "layer_norm") else 0


def _makes_logits(x: Value, graph: Graph) -> bool:
    """Whether x, of the rows that logits are wanted of, is what the head reads."""
    rows = graph.outputs
    while len(rows) == 1 and (op := rows[0].producer) is not None:
        if x in op.operands:
            return True
        rows = [v for v in op.operands if not v.is_weight and v.shape[:1] == (_WANTED,)]
    return False


def quantized_activation(low: Lowering, x: Value, layout: QuantLayout) -> list[Any]:
    """x quantized per token and group to int8; ops that read the same x by the same groups share it."""
    key = ("quantized", x, layout.k, layout.group_size, layout.group)
    if key not in low.shared:
        rows: Dim = 1
        for d in x.shape[:-1]:
            rows = d * rows
        t, apart = low.dim(rows), kept_apart(x, layout)
        plain, rotate = _unrotated(x, layout)
        out = [
            low.tensor([t, layout.k_padded], "int8"),
            low.tensor([t, layout.groups + apart], "float32"),
            low.tensor([t, layout.groups + apart], "float32"),
        ]
        name, make, static, args = _made_quantized(low, x, layout) or (
            "quantize_activation",
            kernels.make_quantize_activation,
            # All widths that pad groups alike share one kernel.
            {"k": layout.k, "group_size": layout.group_size, "align": layout.align, "apart": apart, **rotate},
            [low.rows(plain, layout.k)],
        )
        parts = low.kernel(name, make, static, args, out)
        low.shared[key] = [low.emit(relax.TupleGetItem(parts, i)) for i in range(3)]
    return low.shared[key]


def _unrotated(x: Value, layout: QuantLayout) -> tuple[Value, dict[str, int]]:
    """What is rotated to x, with the parameters of the kernel that does it as it quantizes; x and none where
    nothing is, or groups are not made of such runs.
    """
    from .kernels.activation import whole_groups

    op: Any = x.producer
    if op is None or op.opname != "hadamard" or not fits_rotation(op.size):
        return x, {}
    if not whole_groups(layout) or layout.group % op.size:
        return x, {}
    return op.x, {"rotate": op.size}


def _made_quantized(low: Lowering, x: Value, layout: QuantLayout) -> tuple[Any, ...] | None:
    """The kernel that makes x and quantizes it at once, where quantized weights alone read x, all by the
    same groups: name, maker, static parameters and arguments. The kernel that makes x as floats is emitted
    too, and has no use then.
    """
    from .kernels.activation import fits_producer

    plain, rotate = _unrotated(x, layout)
    op: Any = plain.producer
    if op is None or op.opname not in ("rms_norm", "gated_mlp") or not fits_producer(layout):
        return None
    if plain is not x and (low.graph.output_uses(plain) or len(plain.users) > 1):
        return None
    if low.graph.output_uses(x) or not all(_reads_alike(user, layout) for user in x.users):
        return None
    quantize = (layout.group_size, layout.align)
    if op.opname == "gated_mlp":
        whole = _whole_gated_mlp(low, op, layout, rotate)
        if whole is not None:
            return whole
        static = {"width": layout.k, "activation": op.activation, "quantize": quantize, **rotate}
        return "gated_mlp", kernels.make_gated_mlp, static, [low.rows(op.gate_up, 2 * layout.k)]
    if op.x.type.rank == 3 and isinstance(op.x.shape[1], int):
        return None  # norms of heads
    static = {"width": layout.k, "eps": op.eps, "weight": op.weight is not None, "quantize": quantize}
    static |= {"apart": kept_apart(x, layout), **rotate}
    args = [low.rows(op.x, layout.k), *present(low, op.weight)]
    return "rms_norm", kernels.make_rms_norm, static, args


def _whole_gated_mlp(
    low: Lowering, op: Any, layout: QuantLayout, rotate: dict[str, int]
) -> tuple[Any, ...] | None:
    """The kernel that makes a quantized gated MLP's result from its operand, where nobody else reads what is
    in between.
    """
    from .kernels.gated import fits_gated

    product: Any = op.gate_up.producer
    alone = len(op.gate_up.users) == 1 and not low.graph.output_uses(op.gate_up)
    if product is None or product.opname != "quantized_linear" or not alone:
        return None
    weight = quant_layout(product)
    if weight.codebook is not None and not has_bytes(weight.codebook):
        return None
    if not fits_gated(layout.k, layout):
        return None
    static = {
        "width": layout.k,
        "k": weight.k,
        **form_of(weight),
        "bias": product.bias is not None,
        "apart": kept_apart(product.x, weight),
        "activation": op.activation,
        "quantize": (layout.group_size, layout.align),
        **rotate,
    }
    args = [*quantized_activation(low, product.x, weight)]
    args += present(low, product.q, product.scale, product.zero_point, product.bias)
    return "quantized_gated_mlp", kernels.make_quantized_gated_mlp, static, args


def _reads_alike(op: Any, layout: QuantLayout) -> bool:
    """Whether an op takes its x quantized as weights of `layout` do."""
    if op.opname != "quantized_linear":
        return False
    other = quant_layout(op)
    floats = other.codebook is not None and not has_bytes(other.codebook)
    return not floats and (other.k, other.group_size, other.align) == (
        layout.k,
        layout.group_size,
        layout.align,
    )


@emits("hadamard")
def hadamard(low: Lowering, op: Any) -> Any:
    rows: Dim = 1
    for d in op.x.shape[:-1]:
        rows = d * rows
    static = {"width": op.x.shape[-1], "size": op.size}
    out = low.tensor([low.dim(rows), static["width"]], "float32")
    out = low.kernel("hadamard", kernels.make_hadamard, static, [low.rows(op.x, static["width"])], out)
    return out if op.x.type.rank == 2 else low.reshape(out, low.shape(op.x.shape))
