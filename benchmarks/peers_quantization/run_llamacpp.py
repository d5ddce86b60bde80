"""llama.cpp's quantizer with an importance matrix, by `ggml_quantize_chunk` of the xllamacpp wheel.

That function is what llama-quantize calls for each tensor. The importance matrix is made as llama-imatrix
makes it: the mean square of each input column of a linear layer, over the calibration tokens. Every linear
layer gets the type that is asked for; a row length that a type does not divide falls back as in
llama-quantize. See `protocol.py`.
"""

from __future__ import annotations

import ctypes
from typing import Any

from protocol import Done, Order, is_linear, load_model, main

FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL", "Q3_K": "IQ4_NL"}


def quantize(order: Order) -> Done:
    import torch
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    wanted, _, plain = order.method.partition("-")
    model = load_model(order)
    importance = {} if plain else importance_matrix(model, torch.from_numpy(order.sequences()))
    library = _library()
    state, stored, count = dict(model.state_dict()), 0, 0
    types = dict[str, int]()
    for name, weight in state.items():
        if is_linear(name, weight):
            kind = GGMLQuantizationType[wanted.upper()]
            if weight.shape[1] % GGML_QUANT_SIZES[kind][0]:
                kind = GGMLQuantizationType[FALLBACK[kind.name]]
            block, size = GGML_QUANT_SIZES[kind]
            state[name] = quantized(library, weight, kind, importance.get(name.removesuffix(".weight")))
            stored, count = stored + weight.numel() // block * size, count + weight.numel()
            types[kind.name] = types.get(kind.name, 0) + weight.numel()
    shares = ", ".join(f"{share / count:.0%} {name}" for name, share in types.items())
    return Done(state, 8 * stored / count, f"{shares}; {'no ' if plain else ''}importance matrix")


def importance_matrix(model: Any, rows: Any) -> dict[str, Any]:
    """Mean square of each input column by the layer's name, float32 [K], over all tokens."""
    import torch

    sums = dict[str, Any]()

    def watch(name: str) -> Any:
        def hook(module: Any, arguments: Any) -> None:
            x = arguments[0].reshape(-1, arguments[0].shape[-1])
            sums[name] = sums.get(name, 0) + x.double().square().sum(0)

        return hook

    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in layers]
    with torch.inference_mode():
        for row in rows:
            model(input_ids=row[None], use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return {name: (total / rows.numel()).float() for name, total in sums.items()}


def quantized(library: Any, weight: Any, kind: Any, importance: Any) -> Any:
    """The values that llama.cpp's blocks of a matrix [N, K] stand for."""
    import numpy as np
    import torch
    from gguf import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    n, k = weight.shape
    block, size = GGML_QUANT_SIZES[kind]
    source = np.ascontiguousarray(weight.numpy(), np.float32)
    blocks = np.zeros((n, k // block * size), np.uint8)
    column_weights = None if importance is None else np.ascontiguousarray(importance.numpy(), np.float32)
    pointer = ctypes.c_void_p(None if column_weights is None else column_weights.ctypes.data)
    written = library.ggml_quantize_chunk(
        int(kind), ctypes.c_void_p(source.ctypes.data), ctypes.c_void_p(blocks.ctypes.data), 0, n, k, pointer
    )
    if written != blocks.nbytes:
        raise RuntimeError(
            f"ggml_quantize_chunk wrote {written} bytes of {kind.name}, expected {blocks.nbytes}"
        )
    return torch.from_numpy(dequantize(blocks, kind).reshape(n, k).astype(np.float32))


def _library() -> Any:
    """ggml inside the wheel's extension module.

    int64 counts, and size_t back: without argument types ctypes would pass 32 bits.
    """
    import xllamacpp.xllamacpp as extension

    library = ctypes.CDLL(extension.__file__)
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


if __name__ == "__main__":
    main(quantize, ("xllamacpp", "gguf"))
