"""Checkpoints of models that are published quantized only, and of other programs' formats, packed by hand as
those of `quantized_files.py` are.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from .quantized_files import (
    E2M1,
    F8,
    Array,
    Values,
    integers,
    pack_rows,
    pairs_of,
    rewrite,
    scales,
    spread,
    table_of,
)


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
