"""Published quantized checkpoints, opened as the unquantized architecture.

    model.layers.0.mlp.up_proj.{qweight, qzeros, scales, g_idx}   →   model.layers.0.mlp.up_proj.weight

Each importer replaces the tensors of a quantized module by one lazy weight, whose `read` dequantizes and
whose `quantized` are the stored codes (`ir.weights.QuantizedTensors`; none for floats of 8 bits). Everything
in such a file is a stranger's claim: shapes, dtypes and ranges are checked against each other before anything
is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from ...ir.errors import InputError, UnsupportedError
from ...ir.weights import LazyTensor
from .autoround import open_autoround
from .awq import open_awq
from .bnb import open_bitsandbytes
from .checks import Config
from .compressed import open_compressed
from .fp4 import open_modelopt, open_mxfp4
from .fp8 import open_fp8
from .gptq import open_gptq
from .mlx import open_mlx
from .quark import open_quark
from .rows import Columns, open_rows
from .ternary import open_ternary
from .torchao import open_torchao

IMPORTERS: Final[dict[str, Callable[[Mapping[str, LazyTensor], Config], dict[str, LazyTensor]]]] = {
    "gptq": open_gptq,
    "awq": open_awq,
    "compressed-tensors": open_compressed,
    "auto-round": open_autoround,
    "bitsandbytes": open_bitsandbytes,
    "bitnet": open_ternary,
    "mlx": open_mlx,
    "metal": open_mlx,
    "quark": open_quark,
    "torchao": open_torchao,
    "fp8": open_fp8,
    "fbgemm_fp8": open_fp8,
    "modelopt": open_modelopt,
    "mxfp4": open_mxfp4,
}
SHAPED: Final[dict[str, Callable[[Mapping[str, LazyTensor], Config, Columns], dict[str, LazyTensor]]]] = {
    "gemma": open_rows,
}
"""Those whose tensors do not say how many columns they have, as the model does."""
_OF_OTHERS: Final = frozenset({"desc_act", "sym", "zero_point", "version", "checkpoint_format", "quant_type"})


def is_mlx(config: Any) -> bool:
    """Whether a configuration that names no method is MLX's, and none of the first ones of others."""
    if not isinstance(config, Mapping) or not _OF_OTHERS.isdisjoint(config):
        return False
    return all(type(config.get(name)) is int for name in ("group_size", "bits"))


def quantization_method(config: Any, origin: str) -> str:
    """The method that `quantization_config` names, one of `IMPORTERS` or `SHAPED`.

    Raises UnsupportedError for any other method, InputError for a configuration that names none.
    """
    method = config.get("quant_method") if isinstance(config, Mapping) else None
    if method is None and isinstance(config, Mapping) and {"load_in_4bit", "load_in_8bit"} & config.keys():
        method = "bitsandbytes"  # before transformers 4.33 nothing else was there
    if method is None and is_mlx(config):
        method = "mlx"
    if not isinstance(method, str):
        raise InputError(
            f"{origin}: quantization_config names no quant_method", remedy="download config.json again"
        )
    if method not in IMPORTERS and method not in SHAPED:
        raise UnsupportedError(
            f"{origin} is quantized with {method[:40]!r}, which llmc does not read",
            remedy=f"give the unquantized model, a GGUF file, or one of {', '.join((*IMPORTERS, *SHAPED))}",
        )
    return method


def open_quantized(
    tensors: Mapping[str, LazyTensor],
    config: Mapping[str, Any],
    origin: str,
    columns: Columns = lambda name: None,
) -> dict[str, LazyTensor]:
    """The checkpoint's tensors as those of the unquantized model.

    Args:
        columns: of the model's weights, by their names.

    Raises InputError naming the tensor that does not fit the configuration, or where none is quantized.
    """
    method = quantization_method(config, origin)
    shaped = SHAPED.get(method)
    found = IMPORTERS[method](tensors, config) if shaped is None else shaped(tensors, config, columns)
    if all(tensor is tensors.get(name) for name, tensor in found.items()):
        raise InputError(
            f"{origin}: quantization_config is there, but no tensor is quantized by it",
            remedy="remove quantization_config from config.json, or download the checkpoint again",
        )
    return found


def describe_quantization(config: Mapping[str, Any], origin: str) -> str:
    """The method and, where the configuration says them in one place, bits and group: "gptq 4-bit g128"."""
    bits, group = (
        config.get("bits", config.get("w_bit")),
        config.get("group_size", config.get("q_group_size")),
    )
    words = [quantization_method(config, origin)]
    words += [f"{bits}-bit"] if isinstance(bits, int) else []
    words += [f"g{group}"] if isinstance(group, int) and group > 0 else []
    return " ".join(words)
