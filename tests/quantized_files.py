"""Quantized checkpoints packed by hand, value by value, from each format's definition.

    folder, values = save_gptq(save_tiny("llama", folder), bits=4, group=16)

writes the quantized tensors in place of the linear layers' weights and returns what each weight stands for,
computed from the integers in float64. Nothing here is shared with the importers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

Array = np.ndarray[Any, Any]
Values = dict[str, Array]
F8 = ml_dtypes.float8_e4m3fn
_MAGNITUDES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E2M1 = np.concatenate([_MAGNITUDES, -_MAGNITUDES])


def pack_stream(codes: Iterable[int], bits: int) -> list[int]:
    """Codes → signed 32-bit words: one long number, the first code in its lowest bits."""
    number, count = 0, 0
    for code in codes:
        assert 0 <= int(code) < 1 << bits
        number |= int(code) << (bits * count)
        count += 1
    words = -(-count * bits // 32)
    data = number.to_bytes(4 * words, "little")
    return [int.from_bytes(data[4 * i : 4 * i + 4], "little", signed=True) for i in range(words)]


def pack_rows(codes: Array, bits: int) -> Array:
    return np.array([pack_stream(row, bits) for row in codes.tolist()], np.int32)


def integers(shape: tuple[int, ...], bits: int, rng: np.random.Generator) -> Array:
    return rng.integers(0, 1 << bits, shape).astype(np.int64)


def scales(shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    return rng.uniform(0.004, 0.03, shape).astype(np.float16)


def spread(groups: Array, size: int, k: int) -> Array:
    return np.repeat(groups.astype(np.float64), size, axis=1)[:, :k]


def is_linear(name: str) -> bool:
    return name.endswith(("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight"))


def table_of(tensors: dict[str, Array]) -> str:
    """The module that embeds."""
    return next(name for name in tensors if name.endswith("embed_tokens.weight")).removesuffix(".weight")


def rewrite(
    folder: Path, config: dict[str, Any], quantize: Callable[[str, Array, dict[str, Array]], Array | None]
) -> Values:
    """Replace each weight for which `quantize(module, weight, out)` puts tensors into `out` and returns what
    they stand for; write config.json's `quantization_config`.
    """
    path = folder / "model.safetensors"
    out: dict[str, Array] = {}
    values: Values = {}
    for name, array in load_file(path).items():
        made = quantize(name.removesuffix(".weight"), array, out) if is_linear(name) else None
        if made is None:
            out[name] = array
        else:
            values[name] = made
    save_file(out, path)
    set_config(folder, config)
    return values


def set_config(folder: Path, config: dict[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": config}))


def change_tensors(folder: Path, change: Callable[[dict[str, Array]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def save_gptq(
    folder: Path, *, bits: int = 4, group: int = 16, sym: bool = False, desc_act: bool = False,
    version: str = "gptq", keep_order: bool = True, **config: Any,
) -> Values:  # fmt: skip
    """GPTQ in AutoGPTQ's layout. Zero points of "gptq" are stored less one; they start at 1 so that none
    leaves its field.
    """
    rng = np.random.default_rng(bits)

    def quantize(module: str, weight: Array, out: dict[str, Array]) -> Array:
        n, k = weight.shape
        size = k if group == -1 else group
        groups = -(-k // size)
        codes, scale = integers((n, k), bits, rng), scales((groups, n), rng)
        zero = np.full((groups, n), 1 << (bits - 1)) if sym else rng.integers(1, 1 << bits, (groups, n))
        g_idx = np.arange(k) // size
        if desc_act:
            # Layers of one input share the order, as their Hessians are one.
            g_idx = g_idx[
                np.random.default_rng(len(module.split(".")[-1]) if not keep_order else k).permutation(k)
            ]
        out[f"{module}.qweight"] = pack_rows(codes, bits).T.copy()
        out[f"{module}.qzeros"] = pack_rows(zero - (version == "gptq"), bits)
        out[f"{module}.scales"] = scale
        out[f"{module}.g_idx"] = g_idx.astype(np.int32)
        return (codes - zero.T[:, g_idx]) * scale.astype(np.float64).T[:, g_idx]

    settings = {
        "quant_method": "gptq", "bits": bits, "group_size": group, "sym": sym, "desc_act": desc_act,
        "checkpoint_format": version, **config,
    }  # fmt: skip
    return rewrite(folder, settings, quantize)


AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def _awq_words(codes: Array) -> Array:
    """[rows, N] → int32 [rows, N / 8]: nibble i of a word is column AWQ_ORDER[i] of eight."""
    rows, n = codes.shape
    mixed = codes.reshape(rows, n // 8, 8)[:, :, AWQ_ORDER].reshape(rows, n)
    return pack_rows(mixed, 4)


def save_awq(folder: Path, *, group: int = 16, version: str = "gemm", **config: Any) -> Values:
    rng = np.random.default_rng(7)

    def quantize(module: str, weight: Array, out: dict[str, Array]) -> Array:
        n, k = weight.shape
        size = k if group == -1 else group
        groups = -(-k // size)
        codes, zero, scale = integers((n, k), 4, rng), integers((n, groups), 4, rng), scales((n, groups), rng)
        if version == "gemm":
            out[f"{module}.qweight"] = _awq_words(codes.T)
            out[f"{module}.qzeros"] = _awq_words(zero.T)
            out[f"{module}.scales"] = scale.T.copy()
        else:
            multiple = {64: 16, 32: 32}.get(size, 8)
            width = -(-groups // multiple) * multiple
            filled = np.zeros((2, n, width))
            filled[0, :, :groups], filled[1, :, :groups] = zero, scale
            out[f"{module}.qweight"] = pack_rows(codes, 4)
            out[f"{module}.qzeros"] = pack_rows(filled[0].astype(np.int64), 4)
            out[f"{module}.scales"] = filled[1].astype(np.float16)
        return (codes - spread(zero, size, k)) * spread(scale, size, k)

    settings = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": version}
    return rewrite(folder, {**settings, **config}, quantize)


def save_compressed(
    folder: Path, *, bits: int = 4, group: int | None = 16, symmetric: bool = True, packed: bool = True,
    g_idx: bool = False, strategy: str = "group", **config: Any,
) -> Values:  # fmt: skip
    """compressed-tensors; `strategy` "group", "channel" or "tensor". The output projections stay floats."""
    rng = np.random.default_rng(bits + 20)
    half = 1 << (bits - 1)

    def quantize(module: str, weight: Array, out: dict[str, Array]) -> Array | None:
        if module.endswith("o_proj"):
            return None
        n, k = weight.shape
        size = group if strategy == "group" and group is not None else k
        rows, groups = (1, 1) if strategy == "tensor" else (n, -(-k // size))
        codes = integers((n, k), bits, rng) - half
        scale = scales((rows, groups), rng).astype(ml_dtypes.bfloat16)
        zero = np.zeros((rows, groups)) if symmetric else integers((rows, groups), bits, rng) - half
        order = np.arange(k) // size
        if g_idx:
            order = order[rng.permutation(k)]
            out[f"{module}.weight_g_idx"] = order.astype(np.int32)
        if packed:
            out[f"{module}.weight_packed"] = pack_rows(codes + half, bits)
            out[f"{module}.weight_shape"] = np.array([n, k], np.int64)
        else:
            out[f"{module}.weight"] = codes.astype(np.int8)
        out[f"{module}.weight_scale"] = scale.reshape(1) if strategy == "tensor" else scale
        if not symmetric:
            whole = strategy == "tensor" or not packed
            shifted = (zero + half).astype(np.int64)
            stored = zero.astype(np.int8) if whole else pack_rows(shifted.T, bits).T.copy()
            out[f"{module}.weight_zero_point"] = stored.reshape(1) if strategy == "tensor" else stored
        return (codes - zero[:, order]) * scale.astype(np.float64)[:, order]

    weights = {
        "num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "group_size": group,
        "actorder": "group" if g_idx else None,
    }  # fmt: skip
    layout = "pack-quantized" if packed else "int-quantized"
    settings = {
        "quant_method": "compressed-tensors", "format": layout, "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, **config,
    }  # fmt: skip
    return rewrite(folder, settings, quantize)


def save_bnb(folder: Path, *, nested: bool = True, int8: bool = False, storage: str = "uint8") -> Values:
    """bitsandbytes, packed by its own functions (`bitsandbytes.functional`) as transformers saves them."""
    import bitsandbytes.functional as bnb
    import torch

    def quantize(module: str, weight: Array, out: dict[str, Array]) -> Array:
        if int8:
            codes, rows, _ = bnb.int8_vectorwise_quant(torch.from_numpy(weight).half())
            out[f"{module}.weight"], out[f"{module}.SCB"] = codes.numpy(), rows.numpy()
            out[f"{module}.weight_format"] = np.zeros((), np.uint8)
            return codes.numpy().astype(np.float64) * rows.numpy().astype(np.float64)[:, None] / 127
        kind = getattr(torch, storage)
        codes, state = bnb.quantize_4bit(
            torch.from_numpy(weight), quant_type="nf4", compress_statistics=nested, quant_storage=kind
        )
        out[f"{module}.weight"] = codes.numpy()
        for part, tensor in state.as_dict(packed=True).items():
            out[f"{module}.weight.{part}"] = tensor.numpy()
        # From the definition: bitsandbytes' own CPU kernel mixes blocks up where K is an odd multiple of 32.
        absmax = state.absmax
        if nested:
            absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
        flat = codes.numpy().reshape(-1).view(np.uint8)
        table = state.code.numpy().astype(np.float64)[np.stack([flat >> 4, flat & 15], 1).reshape(-1)]
        return (table * np.repeat(absmax.numpy().astype(np.float64), 64)).reshape(weight.shape)

    kind = {"load_in_8bit": True} if int8 else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    return rewrite(folder, {"quant_method": "bitsandbytes", **kind}, quantize)


def pairs_of(codes: Array) -> Array:
    """E2M1 codes [.., K] in bytes, the even column in the low half."""
    return (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8)


def save_nvfp4(folder: Path) -> Values:
    """ModelOpt's: the weights by their definition."""
    rng = np.random.default_rng(3)

    def quantize(module: str, weight: Array, out: dict[str, Array]) -> Array:
        codes = rng.integers(0, 16, weight.shape)
        scale = rng.uniform(30, 400, (weight.shape[0], weight.shape[1] // 16)).astype(F8)
        factor = np.float32(rng.uniform(5e-5, 1e-4))
        out[f"{module}.weight"] = pairs_of(codes)
        out[f"{module}.weight_scale"] = scale
        out[f"{module}.weight_scale_2"] = np.array(factor)
        out[f"{module}.input_scale"] = np.array(np.float32(1))
        return E2M1[codes] * np.repeat(scale.astype(np.float64), 16, 1) * np.float64(factor)

    return rewrite(folder, {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}, quantize)


def save_mxfp4(folder: Path) -> None:
    """gpt-oss's experts, [E, K, N] in its model."""
    path, rng = folder / "model.safetensors", np.random.default_rng(2)
    tensors = load_file(path)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        codes = rng.integers(0, 16, (experts, rows, columns))
        tensors[f"{name}_blocks"] = pairs_of(codes).reshape(experts, rows, columns // 32, 16)
        scales = rng.integers(119, 123, (experts, rows, columns // 32))
        tensors[f"{name}_scales"] = scales.astype(np.uint8)
    save_file(tensors, path, metadata={"format": "pt"})
    set_config(folder, {"quant_method": "mxfp4"})


def save_fp8(folder: Path) -> Values:
    """Float8 in blocks of [128, 128], as DeepSeek-V3 is published."""

    def quantize(module: str, weight: Array, out: dict[str, Array]) -> Array:
        scale = np.abs(weight).max().reshape(1, 1) / np.float32(448)
        out[f"{module}.weight"] = (weight / scale).astype(F8)
        out[f"{module}.weight_scale_inv"] = scale
        return out[f"{module}.weight"].astype(np.float64) * scale.astype(np.float64)

    return rewrite(folder, {"quant_method": "fp8", "weight_block_size": [128, 128]}, quantize)
