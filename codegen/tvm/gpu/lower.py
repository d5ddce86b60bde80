"""IR graph → Relax module for a GPU: tvm-cpu's emitters over the kernels of `kernels.py`, and others where
the two differ (products take floats here; the cache's pages are of a known size).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ....ir.core import Graph, Op, Value
from .. import emit_llm, emit_moe, emit_state, emit_tensor
from ..emit_activations import form_of
from ..emit_llm import source_of
from ..kernels.isa import get_isa
from ..lower import EMITTERS, Emitter, Lowering
from ..weights import expert_layouts, length, quant_layout
from .kernels import make as make_code
from .source import Code
from .weights import stored_shape

assert all((emit_state, emit_tensor))  # imported for the emitters that they register

_OWN: dict[str, Emitter] = {}


def _emits(*names: str) -> Callable[[Emitter], Emitter]:
    def register(emitter: Emitter) -> Emitter:
        _OWN.update(dict.fromkeys(names, emitter))
        return emitter

    return register


class CudaLowering(Lowering):
    """One pass over a graph. `codes`: what each kernel of the module is, by its name there."""

    target = "tvm-cuda"

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph, get_isa("avx2"))  # what emitters ask of a level holds for none
        self.codes: dict[str, Code] = {}
        self.turned = {}  # `rope` is a kernel of its own here

    def emitter(self, op: Op) -> Emitter | None:
        """Ours, else tvm-cpu's; of another package's op the one that it names for this target."""
        return _OWN.get(op.opname) or super().emitter(op)

    def stored(self, weight: Value) -> tuple[tuple[int, ...], str]:
        """Shape and dtype of a weight in memory."""
        return stored_shape(weight, self.roles[weight])

    def make(self, name: str, static: Mapping[str, Any]) -> Code:
        """The code of a kernel. Raises CompileError for one that there is not."""
        return make_code(name, static)

    # Kernels are made by their names: what tvm-cpu's emitters name besides is for CPUs.
    def _kernel(self, name: str, make: Callable[..., Any], static: dict[str, Any]) -> Any:
        key = (name, tuple(sorted((k, repr(v)) for k, v in static.items())))
        if key not in self._kernels:
            code = self.make(name, static)
            # Named, since the builder takes two functions that look alike for one.
            stub = code.stub().with_attr("llmc.code", repr(key))
            self._kernels[key] = self.add(stub, name)
            self.codes[self._kernels[key].name_hint] = code
        return self._kernels[key]


def _unused(**static: Any) -> Any:
    raise AssertionError("tvm-cuda makes kernels by their names")


def _given(low: Lowering, *values: Value | None) -> list[Any]:
    return [low.get(v) for v in values if v is not None]


def _product(low: Lowering, op: Any, residual: Value | None) -> Any:
    """`linear` or `quantized_linear`, and the addition after it."""
    if op.opname == "linear":
        role = low.roles.get(op.weight)
        if role is None or role.kind != "linear" or op.x.dtype != "float32":
            return emit_llm.generic_linear(low, op, residual)
        n, k = op.weight.shape
        static: dict[str, Any] = {"n": n, "k": k, "weight_dtype": op.weight.dtype}
        weights = _given(low, op.weight, op.bias)
    else:
        layout = quant_layout(op)
        n, k = layout.n, layout.k
        static = {"n": n, "k": k, **form_of(layout)}
        weights = _given(low, op.q, op.scale, op.zero_point, op.bias)
    static |= {"bias": op.bias is not None, "residual": residual is not None}
    args = [low.rows(op.x, k), *weights]
    if residual is not None:
        args.append(low.rows(residual, n))
    return emit_llm.product(low, op, op.opname, _unused, static, args)


@_emits("linear", "quantized_linear")
def _linear(low: Lowering, op: Any) -> Any:
    return _product(low, op, None)


@_emits("add")
def _add(low: Lowering, op: Any) -> Any:
    absorbed: Any = low.absorbed.get(op)
    if absorbed is None:
        return EMITTERS["add"](low, op)
    return _product(low, absorbed, op.b if op.a is absorbed.result else op.a)


@_emits("append_kv")
def _append_kv(low: Lowering, op: Any) -> Any:
    k, k_source = source_of(low, op.k)
    v, v_source = source_of(low, op.v)
    static = {
        **emit_llm.cache_form(op.k, op.pages),
        "page_size": op.pages.shape[2],
        "k_source": k_source,
        "v_source": v_source,
    }
    args = [k, v, low.get(op.slot_mapping), low.get(op.pages)]
    return low.kernel_inplace("append_kv", _unused, static, args, 3, low.type_of(op.pages))


@_emits("paged_attention")
def _paged_attention(low: Lowering, op: Any) -> Any:
    static = {**emit_llm.attention_form(op), "page_size": op.pages.shape[2]}
    args = [low.get(op.q), *emit_llm.attention_operands(low, op)]
    return low.kernel("paged_attention", _unused, static, args, low.type_of(op.result))


@_emits("moe", "quantized_moe")
def _moe(low: Lowering, op: Any) -> Any:
    """Pairs sorted by expert, two products over them with the gate between, and their sum."""
    if op.opname == "moe":
        forms: list[dict[str, Any]] = [{}, {}]
        weights = [[op.gate_up], [op.down]]
        widths = [(length(w.shape[1]), length(w.shape[2])) for w in (op.gate_up, op.down)]
    else:
        layouts = expert_layouts(op)
        forms = [form_of(layout) for layout in layouts]
        weights = [
            [op.up_q, op.up_scale, op.up_zero_point],
            [op.down_q, op.down_scale, op.down_zero_point],
        ]
        widths = [(layout.n, layout.k) for layout in layouts]
    experts = length(op.operands[3].shape[0])
    pairs = emit_moe.Pairs(low, op, experts)

    def product(x: Any, which: int, per_row: int) -> Any:
        n, k = widths[which]
        static = {"n": n, "k": k, "experts": experts, "top_k": pairs.k, "per_row": per_row, **forms[which]}
        args = [x, pairs.source, pairs.offsets, *_given(low, *weights[which])]
        return low.kernel("moe_product", _unused, static, args, pairs.rows(n))

    products = product(low.rows(op.x, length(op.x.shape[-1])), 0, pairs.k)
    held = pairs.gate(op, products, widths[0][0] // op.gate.products)
    return pairs.finish(op, product(held, 1, 0))
