"""How each weight of a graph is stored for this target, and its bytes, a chunk of rows at a time.

A weight that only the linear kernels (and embeddings) read is stored in their blocked layout; all other
weights are stored as they are. One weight has one layout: a tied embedding and head share it. No TVM is
needed here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ...ir.core import Graph, Op, Value
from ...ir.dtypes import itemsize, to_numpy
from ...ir.errors import CompileError
from ...ir.ops.cache import AppendKv, PagedAttention
from ...ir.ops.moe import Moe, QuantizedMoe
from ...ir.ops.nn import Embedding, Linear
from ...ir.ops.quant import QuantizedEmbedding, QuantizedLinear
from ...ir.types import Dim, TensorType
from ...ir.weights import LazyTensor, read_chunks
from ..weight_file import TensorSpec
from .kernels.layout import ROWS, QuantLayout, pack_rows, packed_shape

CHUNK_BYTES = 8 << 20


@dataclass(frozen=True)
class Role:
    """How a weight is stored: "plain", "linear" (blocks of 16 rows), "codes" (packed q), "scale" or
    "zero_point". Of stacked weights [E, N, K] those of all `experts`, one below the other; 0: [N, K].
    """

    kind: str
    layout: QuantLayout | None = None
    experts: int = 0


PLAIN = Role("plain")


def weight_roles(graph: Graph) -> dict[Value, Role]:
    """The role of every weight. Raises CompileError where two ops need quantized parts in two ways."""
    roles: dict[Value, Role] = {}
    for value in graph.weights.values():
        wanted = {_role_of_use(op, index) for op, index in value.uses}
        if graph.output_uses(value):
            wanted.add(PLAIN)
        either = Role("either")
        wanted.discard(either)
        if len(wanted) > 1:
            if any(role.layout is not None for role in wanted):
                raise CompileError(
                    f"weight {value.name} is used both by a quantized kernel and otherwise",
                    remedy="give each use a weight of its own",
                )
            wanted = {PLAIN}  # the linear op that reads it falls back to a generic product
        roles[value] = wanted.pop() if wanted else PLAIN
    return roles


def _role_of_use(op: Op, index: int) -> Role:
    value = op.operands[index]
    if isinstance(op, Linear) and index == 1:
        return (
            Role("linear") if value.dtype in ("float32", "float16", "bfloat16") and _has_kernel(op) else PLAIN
        )
    if isinstance(op, Embedding) and index == 1:
        return Role("either")
    if isinstance(op, QuantizedLinear | QuantizedEmbedding) and index >= 1:
        layout = quant_layout(op)
        parts = {op.q: Role("codes", layout), op.scale: Role("scale", layout)}
        if op.zero_point is not None:
            parts[op.zero_point] = Role("zero_point", layout)
        return parts.get(value, PLAIN)
    if isinstance(op, Moe) and op.operands[index] in (op.gate_up, op.down):
        return Role("linear", experts=length(value.shape[0]))
    if isinstance(op, QuantizedMoe):
        return _role_of_expert(op, value)
    return PLAIN


def _role_of_expert(op: QuantizedMoe, value: Value) -> Role:
    up, down = expert_layouts(op)
    experts = length(op.up_q.shape[0])
    for layout, (q, scale, zero) in (
        (up, (op.up_q, op.up_scale, op.up_zero_point)),
        (down, (op.down_q, op.down_scale, op.down_zero_point)),
    ):
        for part, kind in ((q, "codes"), (scale, "scale"), (zero, "zero_point")):
            if part is value:
                return Role(kind, layout, experts)
    return PLAIN


def length(d: Dim) -> int:
    """A dimension that is known."""
    assert isinstance(d, int)
    return d


def _has_kernel(op: Linear) -> bool:
    return op.x.dtype == "float32"


def quant_layout(op: QuantizedLinear | QuantizedEmbedding) -> QuantLayout:
    """The packed layout of the weight [N, K] that an op reads."""
    return _layout(op.q, op.zero_point)


def expert_layouts(op: QuantizedMoe) -> tuple[QuantLayout, QuantLayout]:
    """The packed layouts of one expert's gate_up [2I, D] and down [D, I]."""
    return _layout(op.up_q, op.up_zero_point), _layout(op.down_q, op.down_zero_point)


def _layout(q: Value, zero_point: Value | None) -> QuantLayout:
    quant = q.type.quant
    n, k = q.shape[-2:]
    assert quant is not None and isinstance(n, int) and isinstance(k, int)
    zero = None if zero_point is None else zero_point.dtype
    return QuantLayout(
        n, k, quant.bits, quant.group_size, quant.codebook, quant.scale_dtype, zero, quant.super_group
    )


def stored_shape(value: Value, role: Role) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of a weight as it is stored."""
    shape = tuple(d for d in value.shape if isinstance(d, int))
    if role.experts:
        (blocks, *rest), dtype = _stored_matrix(shape[1:], value.dtype, role)
        return (role.experts * blocks, *rest), dtype
    return _stored_matrix(shape, value.dtype, role)


def _stored_matrix(shape: tuple[int, ...], dtype: str, role: Role) -> tuple[tuple[int, ...], str]:
    if role.kind == "linear":
        return packed_shape(shape[0], shape[1]), dtype
    if role.layout is not None:
        lay = role.layout
        shapes = {"codes": lay.weight_shape, "scale": lay.scale_shape, "zero_point": lay.zero_shape}
        dtypes = {"codes": "uint8", "scale": lay.scale_storage, "zero_point": lay.zero_storage or "uint8"}
        return shapes[role.kind], dtypes[role.kind]
    return shape, dtype


def page_values(graph: Graph) -> set[Value]:
    """The KV cache's arrays: what `append_kv` writes and `paged_attention` reads."""
    found: set[Value] = set()
    for op in graph:
        if isinstance(op, AppendKv | PagedAttention):
            found.add(op.pages)
        if isinstance(op, AppendKv):
            found.add(op.result)
    return found


def stored_type(value: Value, is_pages: bool) -> TensorType:
    """The type of an array in memory. A page holds its heads apart: [2, N, kv_heads, page_size, head_dim]."""
    shape = list(value.shape)
    if is_pages:
        shape[-3], shape[-2] = shape[-2], shape[-3]
    return value.type.with_shape(shape)


def weight_specs(graph: Graph, report: Callable[[float], None] = lambda share: None) -> list[TensorSpec]:
    """Every weight as `ArtifactWriter.write_weights` takes it; nothing is read before the chunks are asked
    for.

    `report` is told the share of the bytes that were packed.
    """
    return specs_of(weight_roles(graph), stored_shape, _chunks, report)


def specs_of(
    roles: Mapping[Value, Role],
    stored_shape: Callable[[Value, Role], tuple[tuple[int, ...], str]],
    chunks_of: Callable[[Value, Role], Iterator[np.ndarray]],
    report: Callable[[float], None],
) -> list[TensorSpec]:
    """`weight_specs` for any layout: shape and dtype of a weight of some role, and its packed chunks."""
    stored = {value: stored_shape(value, role) for value, role in roles.items()}
    total = sum(math.prod(shape) * itemsize(dtype) for shape, dtype in stored.values())
    done = 0

    def counted(chunks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        nonlocal done
        for chunk in chunks:
            yield chunk
            done += chunk.nbytes
            report(done / max(1, total))

    return [(v.name, *stored[v], counted(chunks_of(v, roles[v]))) for v in stored]


def _chunks(value: Value, role: Role) -> Iterator[np.ndarray]:
    assert value.weight is not None
    pack: Callable[[np.ndarray], np.ndarray]
    if role.kind == "linear":
        pack = pack_rows
    elif role.layout is not None:
        lay = role.layout
        packers = {"codes": lay.pack, "scale": lay.pack_scales, "zero_point": lay.pack_zero_points}
        pack = packers[role.kind]
    else:
        pack = np.ascontiguousarray
    wanted = to_numpy(value.dtype)
    matrices = experts_of(value.weight) if role.experts else aligned_rows(value.weight)
    for rows in matrices:
        yield pack(rows.astype(wanted, copy=False)).reshape(-1, *stored_shape(value, role)[0][1:])


def experts_of(tensor: LazyTensor) -> Iterator[np.ndarray]:
    """The matrix of each expert: each is packed for itself, so that none shares a block with another."""
    for e in range(tensor.shape[0]):
        yield tensor.read(e, e + 1)[0]


def aligned_rows(tensor: LazyTensor) -> Iterator[np.ndarray]:
    """Chunks of whole blocks: a multiple of 16 rows each but the last."""
    if len(tensor.shape) < 2:
        yield from read_chunks(tensor, CHUNK_BYTES)
        return
    rows = tensor.shape[0]
    row_bytes = max(1, int(np.prod(tensor.shape[1:])) * to_numpy(tensor.dtype).itemsize)
    step = max(ROWS, CHUNK_BYTES // row_bytes // ROWS * ROWS)
    for start in range(0, rows, step):
        yield tensor.read(start, min(rows, start + step))
