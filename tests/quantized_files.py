"""Quantized checkpoints packed by hand, value by value, from each format's definition.

    folder, values = save_gptq(save_tiny("llama", folder), bits=4, group=16)

writes the quantized tensors in place of the linear layers' weights and returns what each weight stands for,
computed from the integers in float64. Nothing here is shared with the importers.
"""

from __future__ import annotations

import json
import re
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


def save_bitnet(folder: Path, *, packed: bool = True, kind: str = "bitlinear") -> Values:
    """BitNet's ternary weights, by whose scale "bitlinear" divides and "autobitlinear" multiplies."""
    rng = np.random.default_rng(6)

    def quantize(module: str, weight: Array, out: dict[str, Array]) -> Array:
        n, _ = weight.shape
        ternary = rng.integers(-1, 2, weight.shape)
        number = rng.uniform(5, 30)
        number = number if kind == "bitlinear" else 1 / number
        scale = np.array([number], np.float32).astype(ml_dtypes.bfloat16)
        out[f"{module}.weight_scale"] = scale
        if packed:
            quarters = (ternary + 1).reshape(4, n // 4, -1)
            out[f"{module}.weight"] = sum(quarters[i] << 2 * i for i in range(4)).astype(np.uint8)
        else:
            out[f"{module}.weight"] = ternary.astype(ml_dtypes.bfloat16)
        factor = scale.astype(np.float64)
        return ternary / factor if kind == "bitlinear" else ternary * factor

    config = {"quant_method": "bitnet", "linear_class": kind, "quantization_mode": "offline"}
    return rewrite(folder, config, quantize)


def save_rows(folder: Path, *, embeddings: int = 0) -> Values:
    """Integers with a scale a row: 4 bits, down projections 2 and value projections 8; so many scales a row
    of the table.
    """
    rng, path = np.random.default_rng(7), folder / "model.safetensors"
    bits_of = {"down_proj": 2, "v_proj": 8}

    def packed(shape: tuple[int, ...], bits: int) -> tuple[Array, Array]:
        """What is stored, and the integers."""
        codes = rng.integers(0, 1 << bits, shape)
        values = codes - (1 << (bits - 1))
        if bits == 8:
            return values.astype(np.int8), values
        many = 8 // bits
        codes = np.pad(codes, ((0, 0), (0, -shape[1] % many))).reshape(shape[0], -1, many)
        return sum(codes[:, :, i] << bits * i for i in range(many)).astype(np.uint8), values

    def quantize(module: str, weight: Array, out: dict[str, Array]) -> Array:
        stored, values = packed(weight.shape, bits_of.get(module.rpartition(".")[2], 4))
        scale = scales((weight.shape[0], 1), rng).astype(np.float32)
        out |= {f"{module}.weight": stored, f"{module}.weight_scale": scale}
        for side in ("input", "output"):
            out[f"{module}.{side}_activation_scale"] = np.zeros((), np.float32)  # which rounds nothing
        return values * scale.astype(np.float64)

    patterns = {rf"{name}$": {"num_bits": bits} for name, bits in bits_of.items()}
    config = {
        "quant_method": "gemma", "num_bits": 4, "quantize_embeddings": embeddings > 0,
        "module_quant_configs": {**patterns, "embed": {"num_bits": 4}}, "modules_to_not_convert": ["lm_head"],
    }  # fmt: skip
    found = rewrite(folder, config, quantize)
    if embeddings:
        tensors = load_file(path)
        label = table_of(tensors)
        stored, values = packed(tensors.pop(f"{label}.weight").shape, 4)
        scale = scales((len(stored), embeddings), rng).astype(np.float32)
        save_file(
            {**tensors, f"{label}.embedding_quantized": stored, f"{label}.embedding_scale": scale}, path
        )
        found[f"{label}.weight"] = values * np.repeat(
            scale.astype(np.float64), values.shape[1] // embeddings, 1
        )
    return found


MLX_MODES = {"mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}


def mlx_parts(
    prefix: str, shape: tuple[int, ...], mode: str, group: int, bits: int, rng: np.random.Generator
) -> tuple[dict[str, Array], Array]:
    """What MLX stores of a weight [(E,) N, K], and the weight."""
    groups = (*shape[:-1], shape[-1] // group)
    codes = integers(shape, bits, rng)
    words = pack_rows(codes.reshape(-1, shape[-1]), bits).view(np.uint32)
    out = {f"{prefix}.weight": words.reshape(*shape[:-1], -1)}
    if mode == "affine":
        scale, bias = scales(groups, rng), rng.normal(0, 0.1, groups).astype(np.float16)
        out |= {f"{prefix}.scales": scale, f"{prefix}.biases": bias}
        return out, codes * np.repeat(scale.astype(np.float64), group, -1) + np.repeat(bias, group, -1)
    if mode == "nvfp4":
        scale = rng.uniform(0.01, 0.1, groups).astype(F8)
        stored, factor = scale.view(np.uint8), scale.astype(np.float64)
    else:
        stored = rng.integers(118, 124, groups).astype(np.uint8)
        factor = 2.0 ** (stored.astype(int) - 127)
    values = E2M1[codes] if bits == 4 else codes.astype(np.uint8).view(F8).astype(np.float64)
    out[f"{prefix}.scales"] = stored
    return out, values * np.repeat(factor, group, -1)


def save_mlx(
    folder: Path, *, mode: str = "affine", group: int = 32, bits: int = 4, key: str = "quantization_config"
) -> Values:
    """MLX's: codes of all layers and of the table; affine ones of down projections have 8 bits."""
    rng, special = np.random.default_rng(8), {}
    group, bits = MLX_MODES.get(mode, (group, bits))
    path = folder / "model.safetensors"

    def quantize(module: str, weight: Array, out: dict[str, Array]) -> Array | None:
        own = (group, bits)
        if mode == "affine" and module.endswith("down_proj"):
            own = (16, 8)
            special[module] = {"group_size": 16, "bits": 8}
        if weight.shape[1] % own[0]:
            return None
        made, values = mlx_parts(module, weight.shape, mode, *own, rng)
        if mode == "mxfp8":  # a random byte may be no number
            made, values = mlx_floats(module, weight, group, rng)
        out |= made
        return values

    found = rewrite(folder, {}, quantize)
    tensors = load_file(path)
    if mode != "mxfp8":
        table = table_of(tensors)
        made, found[f"{table}.weight"] = mlx_parts(
            table, tensors[f"{table}.weight"].shape, mode, group, bits, rng
        )
        save_file({**tensors, **made}, path)
    config = {"group_size": group, "bits": bits, "mode": mode, **special}
    written = json.loads((folder / "config.json").read_text())
    del written["quantization_config"]
    (folder / "config.json").write_text(json.dumps({**written, key: config}))
    return found


def save_mlx_experts(folder: Path) -> Values:
    """The same of a mixture, whose experts MLX stacks."""
    values, path = save_mlx(folder, group=16), folder / "model.safetensors"
    tensors, stacks = load_file(path), dict[str, list[Array]]()
    for name in sorted(tensors, key=lambda name: [int(p) if p.isdigit() else 0 for p in name.split(".")]):
        before, experts, behind = name.partition(".experts.")
        if experts:
            _, _, part = behind.partition(".")
            stacks.setdefault(f"{before}.switch_mlp.{part}", []).append(tensors.pop(name))
    save_file({**tensors, **{name: np.stack(parts) for name, parts in stacks.items()}}, path)
    config = folder / "config.json"
    config.write_text(re.sub(r"\.experts\.\d+\.", ".switch_mlp.", config.read_text()))
    return values


def mlx_floats(
    prefix: str, weight: Array, group: int, rng: np.random.Generator
) -> tuple[dict[str, Array], Array]:
    """The same of "mxfp8"."""
    stored = rng.integers(118, 124, (weight.shape[0], weight.shape[1] // group)).astype(np.uint8)
    factor = np.repeat(2.0 ** (stored.astype(int) - 127), group, 1)
    floats = (weight / factor).astype(F8)
    out = {f"{prefix}.weight": floats.view(np.uint32), f"{prefix}.scales": stored}
    return out, floats.astype(np.float64) * factor


def save_quark(folder: Path, kind: str, *, pack: str = "reorder", symmetric: bool = False) -> Values:
    """AMD's Quark's, by the type of weights; among uint4 one layer is int4."""
    rng = np.random.default_rng(9)
    places = [0, 4, 1, 5, 2, 6, 3, 7] if pack == "reorder" else list(range(8))

    def nibbles(codes: Array) -> Array:
        """[rows, N] in words [rows, N / 8]: column i of eight stands in nibble places[i]."""
        eights = codes.reshape(len(codes), -1, 8)
        words = sum(eights[:, :, i].astype(np.int64) << 4 * place for i, place in enumerate(places))
        return np.ascontiguousarray(words.astype(np.uint32)).view(np.int32)

    def quantize(module: str, weight: Array, out: dict[str, Array]) -> Array:
        n, k = weight.shape
        name, label = f"{module}.weight", f"{module}.weight_scale"
        out[f"{module}.input_scale"] = np.ones((), np.float32)
        if kind == "int8":
            out[name], out[label] = rng.integers(-128, 128, (n, k)).astype(np.int8), scales((n,), rng)
            return out[name] * out[label].astype(np.float64)[:, None]
        if kind in ("int4", "uint4"):
            scale, codes = scales((k // 16, n), rng), integers((n, k), 4, rng)
            zero = np.full((k // 16, n), 8) if symmetric else integers((k // 16, n), 4, rng)
            signed = kind == "int4" or module.endswith("up_proj")  # by its own configuration
            less = 8 if signed else 0
            out |= {name: nibbles((codes - less).T & 15), label: scale}
            out[f"{module}.weight_zero_point"] = nibbles((zero - less) & 15)
            return (codes - spread(zero.T, 16, k)) * spread(scale.T, 16, k)
        codes = integers((n, k), 4, rng)
        factor, group = 1.0, 32
        if kind in ("mxfp4", "mxfp8"):
            out[label] = rng.integers(118, 124, (n, k // 32)).astype(np.uint8)
            scale = 2.0 ** (out[label].astype(int) - 127)
        elif kind == "nvfp4":
            group, factor = 16, 0.25
            out[label] = rng.uniform(0.02, 0.1, (n, k // 16)).astype(F8)
            out[f"{module}.weight_scale_2"] = np.array([factor], np.float32)
            scale = out[label].astype(np.float64)
        else:
            group, scale = k, (np.abs(weight).max(1, keepdims=True) / 448).astype(np.float32)
            out[label] = scale[:, 0]
        scale = factor * spread(scale, group, k)
        out[name] = pairs_of(codes) if "4" in kind else (weight / scale).astype(F8)
        return (E2M1[codes] if "4" in kind else out[name].astype(np.float64)) * scale

    weights = {"dtype": kind, "symmetric": symmetric}
    own = {"*up_proj": {"weight": {**weights, "dtype": "int4"}}} if kind == "uint4" else {}
    config = {
        "quant_method": "quark", "global_quant_config": {"weight": weights}, "layer_quant_config": own,
        "export": {"pack_method": pack},
    }  # fmt: skip
    return rewrite(folder, config, quantize)


def save_torchao(
    folder: Path, kind: str, *, group: int = 32, zeros: bool = False, said: bool = True
) -> Values:
    """torchao's tensor subclasses with a byte for each weight."""
    rng = np.random.default_rng(10)
    bits = 0 if kind == "fp8" else int(kind.removeprefix("int"))

    def quantize(module: str, weight: Array, out: dict[str, Array]) -> Array:
        n, k = weight.shape
        size = k if group == -1 else group
        label = f"{module}._weight"
        if kind == "fp8":
            scale = (np.abs(weight).max(1, keepdims=True) / 448).astype(np.float32)
            out |= {f"{label}_qdata": (weight / scale).astype(F8), f"{label}_scale": scale}
            return out[f"{label}_qdata"].astype(np.float64) * scale
        middle = 1 << (bits - 1)
        codes, scale = integers((n, k), bits, rng) - middle, scales((n, k // size), rng)
        zero = integers((n, k // size), bits, rng) - middle if zeros else np.zeros((n, k // size), np.int64)
        out |= {f"{label}_qdata": codes.astype(np.int8), f"{label}_scale": scale.astype(ml_dtypes.bfloat16)}
        out[f"{label}_zero_point"] = zero.astype(np.int8)
        factor = out[f"{label}_scale"].astype(np.float64)
        return (codes - spread(zero, size, k)) * spread(factor, size, k)

    settings = {"weight_dtype": {"_data": kind, "_type": "torch.dtype"}} if said else {}
    quant_type = {"default": {"_data": settings, "_type": "IntxWeightOnlyConfig", "_version": 2}}
    return rewrite(folder, {"quant_method": "torchao", "quant_type": quant_type}, quantize)


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
