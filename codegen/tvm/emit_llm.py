"""Emitters of the operations of language models: calls of the kernels in `kernels/`."""

from __future__ import annotations

from typing import Any

from ...ir.core import Value
from ...ir.types import Dim
from . import kernels
from .emit_activations import form_of, kept_apart, present, quantized_activation
from .kernels.layout import has_bytes
from .lower import Lowering, emits
from .untyped import relax, te
from .weights import quant_layout

Source = tuple[int, int]
"""(row width, first column): an operand that stands in columns of a wider matrix."""


def source_of(low: Lowering, value: Value) -> tuple[Any, Source | None]:
    """A value [T, heads, head_dim], or the wider matrix [T, width] that it is a column slice of, with the
    place.

    The kernels read q, k and v in the merged projection, so that no slice is copied.
    """
    reshaped = value.producer
    if reshaped is None or reshaped.opname != "reshape" or value.type.rank != 3:
        return low.get(value), None
    part = reshaped.operands[0]
    sliced = part.producer
    width = value.shape[1] * value.shape[2]
    if part.type.rank != 2 or part.shape != (value.shape[0], width):
        return low.get(value), None
    if sliced is None or sliced.opname != "slice":
        return low.get(value), None
    axis, step, start = sliced.axis, sliced.step, sliced.start  # type: ignore[attr-defined]
    whole = sliced.operands[0]
    row = whole.shape[-1]
    if axis != -1 or step != 1 or not isinstance(start, int) or not isinstance(row, int):
        return low.get(value), None
    return low.get(whole), (row, start)


def _int(d: Dim) -> int:
    assert isinstance(d, int)
    return d


@emits("embedding")
def embedding(low: Lowering, op: Any) -> Any:
    role = low.roles.get(op.weight)
    rows, width = op.weight.shape
    if role is None or op.weight.dtype not in ("float32", "float16", "bfloat16"):
        return _take(low, op)
    static = {
        "rows": rows,
        "width": width,
        "packed": role.kind == "linear",
        "weight_dtype": op.weight.dtype,
    }
    ids = _ids(low, op.ids)
    out = low.kernel(
        "embedding",
        kernels.make_embedding,
        static,
        [ids, low.get(op.weight)],
        low.tensor([_count(low, op.ids), width], "float32"),
    )
    if op.result.dtype != "float32":  # as the table has it, which float32 holds exactly
        out = low.emit(relax.op.astype(out, op.result.dtype))
    return out if op.ids.type.rank == 1 else low.reshape(out, low.shape(op.result.shape))


def _count(low: Lowering, value: Value) -> Any:
    total: Dim = 1
    for d in value.shape:
        total = d * total
    return low.dim(total)


def _ids(low: Lowering, value: Value) -> Any:
    """Integer indices as int32 [count]."""
    ids = low.get(value)
    if value.dtype != "int32":
        ids = low.emit(relax.op.astype(ids, "int32"))
    return ids if value.type.rank == 1 else low.reshape(ids, [_count(low, value)])


def _take(low: Lowering, op: Any) -> Any:
    def pick(shape: list[Any], ids: Any, table: Any) -> Any:
        rank = len(ids.shape)
        return te.compute(shape, lambda *i: table(ids(*i[:rank]).astype("int64"), i[rank]), name="take")

    return low.te("take", pick, low.get(op.ids), low.get(op.weight), dims=op.result.shape)


def _linear(low: Lowering, op: Any, residual: Value | None) -> Any:
    role = low.roles.get(op.weight)
    if role is None or role.kind != "linear" or op.x.dtype != "float32":
        return generic_linear(low, op, residual)
    n, k = op.weight.shape
    static = {
        "n": n,
        "k": k,
        "bias": op.bias is not None,
        "residual": residual is not None,
        "weight_dtype": op.weight.dtype,
    }
    args = [low.rows(op.x, k), low.get(op.weight), *present(low, op.bias)]
    if residual is not None:
        args.append(low.rows(residual, n))
    return product(low, op, "linear", kernels.make_linear, static, args)


def product(low: Lowering, op: Any, name: str, make: Any, static: dict[str, Any], args: list[Any]) -> Any:
    """The rows [T, n] that a kernel makes of op.x, in the shape of the op's result."""
    rows: Dim = 1
    for d in op.x.shape[:-1]:
        rows = d * rows
    out = low.kernel(name, make, static, args, low.tensor([low.dim(rows), static["n"]], "float32"))
    return out if op.x.type.rank == 2 else low.reshape(out, low.shape(op.result.shape))


def generic_linear(low: Lowering, op: Any, residual: Value | None) -> Any:
    """A product by a weight that no kernel's layout holds (another op reads it too, or it is no weight at
    all).
    """
    weight = low.get(op.weight)
    if op.weight.dtype != op.x.dtype:
        weight = low.emit(relax.op.astype(weight, op.x.dtype))
    out = low.emit(relax.op.matmul(low.get(op.x), low.emit(relax.op.permute_dims(weight))))
    for extra in present(low, op.bias, residual):
        out = low.emit(relax.op.add(out, extra))
    return out


def _quantized_linear(low: Lowering, op: Any, residual: Value | None) -> Any:
    layout = quant_layout(op)
    static = {
        "n": layout.n,
        "k": layout.k,
        **form_of(layout),
        "bias": op.bias is not None,
        "residual": residual is not None,
    }
    weights = present(low, op.q, op.scale, op.zero_point, op.bias)
    if residual is not None:
        weights.append(low.rows(residual, layout.n))
    if layout.codebook is not None and not has_bytes(layout.codebook):
        args = [low.rows(op.x, layout.k), *weights]
        return product(low, op, "codebook_linear", kernels.make_codebook_linear, static, args)
    static["apart"] = kept_apart(op.x, layout)
    args = [*quantized_activation(low, op.x, layout), *weights]
    return product(low, op, "quantized_linear", kernels.make_quantized_linear, static, args)


@emits("linear")
def linear(low: Lowering, op: Any) -> Any:
    return _linear(low, op, None)


@emits("quantized_linear")
def quantized_linear(low: Lowering, op: Any) -> Any:
    return _quantized_linear(low, op, None)


@emits("add")
def add(low: Lowering, op: Any) -> Any:
    """An addition, or the linear op before it with the other operand as residual."""
    absorbed: Any = low.absorbed.get(op)
    if absorbed is None:
        return low.emit(relax.op.add(*low.operands(op.a, op.b)))
    other = op.b if op.a is absorbed.result else op.a
    return (_linear if absorbed.opname == "linear" else _quantized_linear)(low, absorbed, other)


@emits("quantized_embedding")
def quantized_embedding(low: Lowering, op: Any) -> Any:
    layout = quant_layout(op)
    static = {"rows": layout.n, "width": layout.k, **form_of(layout)}
    args = [_ids(low, op.ids), *present(low, op.q, op.scale, op.zero_point)]
    out = low.kernel(
        "quantized_embedding",
        kernels.make_quantized_embedding,
        static,
        args,
        low.tensor([_count(low, op.ids), layout.k], "float32"),
    )
    return out if op.ids.type.rank == 1 else low.reshape(out, low.shape(op.result.shape))


@emits("rms_norm")
def rms_norm(low: Lowering, op: Any) -> Any:
    width = _int(op.x.shape[-1])
    heads, source = 0, None
    if op.x.type.rank == 3 and isinstance(op.x.shape[1], int):
        heads = op.x.shape[1]
        x, source = source_of(low, op.x)
        shape = low.shape(op.x.shape)
    else:
        x, shape = low.rows(op.x, width), [_rows(low, op.x), width]
    static = {
        "width": width,
        "eps": op.eps,
        "weight": op.weight is not None,
        "heads": heads,
        "source": source,
    }
    args = [x, *present(low, op.weight)]
    out = low.kernel("rms_norm", kernels.make_rms_norm, static, args, low.tensor(shape, "float32"))
    return out if len(shape) == op.x.type.rank else low.reshape(out, low.shape(op.x.shape))


def _rows(low: Lowering, value: Value) -> Any:
    rows: Dim = 1
    for d in value.shape[:-1]:
        rows = d * rows
    return low.dim(rows)


@emits("layer_norm")
def layer_norm(low: Lowering, op: Any) -> Any:
    width = _int(op.x.shape[-1])
    static = {"width": width, "eps": op.eps, "weight": op.weight is not None, "bias": op.bias is not None}
    args = [low.rows(op.x, width), *present(low, op.weight, op.bias)]
    out = low.kernel(
        "layer_norm",
        kernels.make_layer_norm,
        static,
        args,
        low.tensor([_rows(low, op.x), width], "float32"),
    )
    return out if op.x.type.rank == 2 else low.reshape(out, low.shape(op.x.shape))


@emits("rope")
def rope(low: Lowering, op: Any) -> Any:
    _, heads, head_dim = op.x.shape
    x, source = source_of(low, op.x)
    static = {
        "heads": heads,
        "head_dim": head_dim,
        "rotary_dim": op.rotary_dim,
        "interleaved": op.interleaved,
        "source": source,
    }
    args = [x, low.get(op.cos), low.get(op.sin)]
    return low.kernel("rope", kernels.make_rope, static, args, low.type_of(op.result))


@emits("gated_mlp")
def gated_mlp(low: Lowering, op: Any) -> Any:
    width = _int(op.result.shape[-1])
    static = {"width": width, "activation": op.activation}
    args = [low.rows(op.gate_up, 2 * width)]
    out = low.kernel(
        "gated_mlp",
        kernels.make_gated_mlp,
        static,
        args,
        low.tensor([_rows(low, op.gate_up), width], "float32"),
    )
    return out if op.gate_up.type.rank == 2 else low.reshape(out, low.shape(op.result.shape))


def _turned(low: Lowering, value: Value, name: str) -> tuple[list[Any], dict[str, Any]]:
    """Operands and static parameters of `Heads` for a value [T, heads, head_dim]."""
    rope: Any = low.turned.get(value)
    x, source = source_of(low, value if rope is None else rope.x)
    if rope is None:
        return [x], {f"{name}_source": source}
    angles = [low.get(rope.cos), low.get(rope.sin)]
    return [x, *angles], {f"{name}_source": source, f"{name}_rotary": rope.rotary_dim}


def cache_form(heads: Value, pages: Value) -> dict[str, Any]:
    """What a kernel knows of the heads [T, kv_heads, head_dim] that it puts into pages."""
    return {"kv_heads": heads.shape[1], "head_dim": heads.shape[2], "kv_dtype": pages.dtype}


def attention_form(op: Any) -> dict[str, Any]:
    """The static parameters of attention over pages."""
    return {
        "heads": op.q.shape[1],
        "kv_heads": op.pages.shape[-2],
        "head_dim": op.q.shape[2],
        "kv_dtype": op.pages.dtype,
        "scale": op.scale,
        "causal": op.causal,
        "window": op.window,
        "softcap": op.softcap,
        "sinks": op.sinks is not None,
        "slopes": op.slopes is not None,
        "distances": 0 if op.distances is None else op.distances.shape[1],
    }


def attention_operands(low: Lowering, op: Any) -> list[Any]:
    """Its operands behind the queries, those that it has."""
    operands = (op.pages, op.query_start, op.context_len, op.block_table)
    return present(low, *operands, op.sinks, op.slopes, op.distances)


@emits("append_kv")
def append_kv(low: Lowering, op: Any) -> Any:
    """Writes in place: the cache is never copied."""
    keys, turned = _turned(low, op.k, "k")
    v, v_source = source_of(low, op.v)
    static = {**cache_form(op.k, op.pages), **turned, "v_source": v_source}
    args = [*keys, v, low.get(op.slot_mapping), low.get(op.pages)]
    place = len(args) - 1
    return low.kernel_inplace("append_kv", kernels.make_append_kv, static, args, place, low.type_of(op.pages))


@emits("paged_attention")
def paged_attention(low: Lowering, op: Any) -> Any:
    queries, turned = _turned(low, op.q, "q")
    static, args = {**attention_form(op), **turned}, [*queries, *attention_operands(low, op)]
    return low.kernel("paged_attention", kernels.make_paged_attention, static, args, low.type_of(op.result))


@emits("lora")
def lora(low: Lowering, op: Any) -> Any:
    """Writes in place what the linear layer, or its sum with the residual, has written."""
    static: dict[str, Any] = {"parts": tuple(op.parts), "k": op.x.shape[-1], "dtype": op.a.dtype}
    if op.gain is not None:
        static |= {"gains": True, "residual": op.residual is not None}
    factors = (op.rank, op.scale, op.a, op.b, op.gained, op.gain, op.residual)
    args = present(low, op.y, op.x, op.adapter, *factors)
    return low.kernel_inplace("lora", kernels.make_lora, static, args, 0, low.type_of(op.result))


@emits("lora_embedding")
def lora_embedding(low: Lowering, op: Any) -> Any:
    """Writes in place the rows that the embedding has written."""
    static = {"rows": op.a.shape[3], "width": op.y.shape[-1], "dtype": op.a.dtype}
    factors = (op.adapter, op.rank, op.scale, op.a, op.b)
    args = [low.get(op.y), _ids(low, op.ids), *present(low, *factors)]
    return low.kernel_inplace(
        "lora_embedding", kernels.make_lora_embedding, static, args, 0, low.type_of(op.result)
    )


@emits("gather_last")
def gather_last(low: Lowering, op: Any) -> Any:
    if op.x.type.rank == 2 and op.x.dtype == "float32":
        args = [low.get(op.x), _ids(low, op.index)]
        static = {"width": op.x.shape[-1]}
        return low.kernel("gather_last", kernels.make_gather_last, static, args, low.type_of(op.result))

    def pick(shape: list[Any], x: Any, index: Any) -> Any:
        return te.compute(shape, lambda r, *i: x(index(r).astype("int64"), *i), name="gather")

    return low.te("gather_last", pick, low.get(op.x), low.get(op.index), dims=op.result.shape)


_ACTIVATIONS = ("silu", "gelu", "relu", "sigmoid")


@emits(*_ACTIVATIONS)
def activation(low: Lowering, op: Any) -> Any:
    """An activation of [..., width]; of anything else Relax's own."""
    width = op.x.shape[-1] if op.x.type.rank else None
    if not isinstance(width, int) or op.x.dtype != "float32":
        return _relax_activation(low, op)
    name = "gelu_tanh" if op.opname == "gelu" and op.tanh else op.opname
    out = low.kernel(
        "activation",
        kernels.make_activation,
        {"width": width, "activation": name},
        [low.rows(op.x, width)],
        low.tensor([_rows(low, op.x), width], "float32"),
    )
    return out if op.x.type.rank == 2 else low.reshape(out, low.shape(op.x.shape))


def _relax_activation(low: Lowering, op: Any) -> Any:
    if op.opname == "gelu":
        return low.emit((relax.op.nn.gelu_tanh if op.tanh else relax.op.nn.gelu)(low.get(op.x)))
    plain = {"silu": relax.op.nn.silu, "relu": relax.op.nn.relu, "sigmoid": relax.op.sigmoid}
    return low.emit(plain[op.opname](low.get(op.x)))
