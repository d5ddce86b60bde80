"""TIR kernels of the `tvm-cpu` target.

A kernel is made by a function `make_NAME(*, static parameters, isa)` and is a `PrimFunc` in
destination-passing style: inputs in the order below, then the outputs (call it by `relax.call_tir(gv, inputs,
out_type)`). T, R, B, P and N (tokens, wanted rows, sequences, block-table width, pages) are symbolic.
Activations are float32; `isa` is the name of a level. Every row of a result is computed in an order that
depends on nothing but the row's own operands: not on T, not on the row's place in the batch, not on how a
prompt is cut into chunks.

Shapes of weights come from `layout`: `packed_shape(n, k)` and `QuantLayout(n, k, bits, group_size, codebook,
scale_dtype, zero_point, super_group)`, here L; FORM stands for the last six parameters.

    make_linear(n, k, bias, residual, weight_dtype)
        x [T, K], weight packed_shape(n, k), (bias [N]), (residual [T, N]) → out [T, N]
    make_quantize_activation(k, group_size, align, apart)
        x [T, K] → a int8 [T, L.k_padded], sums and a_scale [T, L.groups + apart] (`activation.Quantized`)
    make_quantized_linear(n, k, FORM, bias, residual, apart, schedule)
        a, sums, a_scale, weight uint8 L.weight_shape, scale L.scale_storage L.scale_shape,
        (zero_point L.zero_storage L.zero_shape), (bias [N]), (residual [T, N]) → out [T, N]
    make_lora(parts, k, dtype)
        y [T, N], which is written in place, x [T, K], adapter int32 [T], rank int32 [A, P], scale
        [A, P, L, 16], a dtype [A, P, L, K, 16], b dtype [A, C, 16 · L, 16]: factors (`ir/ops/lora.py`)
    make_lora_embedding(rows, width, dtype)
        y [T, width], which is written in place, ids int32 [T], and the rest as of lora, of one part
    make_moe_lora(rows, parts, k, experts, top_k, by_token, dtype)
        the same of rows by expert: see `lora`
    make_codebook_linear(n, k, FORM, bias, residual)
        x [T, K], weight, scale as of quantized_linear, (bias [N]), (residual [T, N]) → out [T, N]
    make_embedding(rows, width, packed, weight_dtype)
        ids int32 [T], table [rows, width] or packed_shape(rows, width) → out [T, width]
    make_quantized_embedding(rows, width, FORM)
        ids int32 [T], weight, scale, (zero_point) as of quantized_linear → out [T, width]
    make_rms_norm(width, eps, weight, heads, source, quantize, apart)
        x, (weight [width]) → out; or a, sums, a_scale of quantize_activation
    make_layer_norm(width, eps, weight, bias)
        x [T, width], (weight [width]), (bias [width]) → out [T, width]
    make_rope(heads, head_dim, rotary_dim, interleaved, source)
        x, cos [T, rotary_dim], sin [T, rotary_dim] → out [T, heads, head_dim]
    make_gated_mlp(width, activation, quantize)
        gate_up [T, 2 · width] → out [T, width]; or a, sums, a_scale of quantize_activation
    make_quantized_gated_mlp(width, k, FORM, bias, apart, activation, quantize, schedule)
        operands as of quantized_linear for N = 2 · width → a, sums, a_scale of quantize_activation
    make_activation(width, activation)
        x [T, width] → out [T, width]
    make_append_kv(kv_heads, head_dim, kv_dtype, k_source, k_rotary, v_source)
        k, (cos, sin [T, k_rotary]), v, slot_mapping int32 [T], pages [2, N, kv_heads, 16, head_dim],
        which are written in place
    make_paged_attention(heads, kv_heads, head_dim, kv_dtype, scale, causal, window, softcap, sinks, slopes,
        distances, q_source, q_rotary)
        q [T, heads, head_dim], (cos, sin [T, q_rotary]), pages, query_start int32 [B+1], context_len int32
        [B], block_table int32 [B, P], (sinks [heads]), (slopes [heads]), (distances
        [heads, W]) → out [T, heads, head_dim]
    make_causal_conv1d, make_linear_recurrence, make_selective_scan, make_ssd_scan, make_gated_delta_rule
        see `state` and `state_delta`: a state [S, …] is written in place
    make_gather_last(width)
        x [T, width], index int32 [R] → out [R, width]
    make_top_k(width, k)
        x [T, width] → places int64 [T, k]
    make_sampling()
        scale [R] → best int32 [R], sums, tops [R, V // 256], and logits [R, V] in place; no op of a graph:
        it is called behind a step (`build.py`)
    make_moe_rows, make_moe_linear, make_moe_gather, make_moe_quantized_linear, make_moe_gate,
    make_moe_combine: a mixture of experts in steps, with rows by expert (see `moe`)

`source` (also `q_source`, `k_source`, `v_source`) is None for an operand of its own, [T, heads, head_dim], or
`(row_width, offset)` for one that stands in columns [offset, offset + heads · head_dim) of a wider result
[T, row_width], as q, k and v do in the merged projection: no slice is copied. In `make_rms_norm`, heads = 0
means x [T, width] → out [T, width]; heads > 0 normalises each head: x [T, heads, width] or a source → [T,
heads, width]. `q_rotary` and `k_rotary` are the columns of a head that are turned as it is read
(`heads.Heads`), or 0.

The physical order inside a page is pages[0, page, head] = keys as [head_dim, 16 tokens] and pages[1, page,
head] = values as [16 tokens, head_dim]; `kv_layout` names it for the manifest. Where `kv_dtype` is int8,
these are codes, the last axis is head_dim + 4, and 16 float32 scales follow; where it is bfloat16, words of
two neighbours stand together (see `cache`). To copy a page is pages[:, dst] = pages[:, src].
"""

from __future__ import annotations

from typing import Any

from ....ir.dtypes import FLOAT8

PAGE_SIZE = 16

# Maker → module. Resolved on first use: `isa` and `layout` are needed where TVM must not be imported (in the
# process that packs weights, whose memory is counted).
_MAKERS = {
    "make_activation": "elementwise",
    "make_append_kv": "cache",
    "make_causal_conv1d": "state",
    "make_codebook_linear": "codebook",
    "make_embedding": "gather",
    "make_gated_delta_rule": "state_delta",
    "make_gated_mlp": "elementwise",
    "make_gather_last": "gather",
    "make_hadamard": "rotation",
    "make_layer_norm": "norms",
    "make_linear": "linear",
    "make_linear_recurrence": "state",
    "make_lora": "lora",
    "make_lora_embedding": "lora",
    "make_moe_combine": "moe",
    "make_moe_gate": "moe",
    "make_moe_gather": "moe",
    "make_moe_linear": "moe",
    "make_moe_lora": "lora",
    "make_moe_quantized_linear": "moe",
    "make_moe_rows": "moe",
    "make_paged_attention": "attention",
    "make_quantize_activation": "activation",
    "make_quantized_embedding": "gather",
    "make_quantized_gated_mlp": "gated",
    "make_quantized_linear": "quantized",
    "make_rms_norm": "norms",
    "make_rope": "elementwise",
    "make_sampling": "sampling",
    "make_selective_scan": "state",
    "make_ssd_scan": "state",
    "make_top_k": "select",
    "make_wkv": "state",
}


def stored_dtype(dtype: str) -> str:
    """The element type by which kernels address a tensor: of float8 the bytes, since TVM would rewrite what
    computes with it.
    """
    return "uint8" if dtype == FLOAT8 else dtype


def kv_layout(kv_dtype: str) -> str:
    """The order of a page, for the manifest."""
    if kv_dtype == "bfloat16":
        return "2,pages,heads,k:dim/2.token.2,v:token/2.dim.2"
    return "2,pages,heads,k:dim.token,v:token.dim"


def __getattr__(name: str) -> Any:
    if name not in _MAKERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_MAKERS[name]}", __name__), name)
