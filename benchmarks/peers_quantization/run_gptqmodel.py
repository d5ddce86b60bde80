"""GPTQModel's GPTQ, read back from the checkpoint that it writes; see `protocol.py`."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from protocol import Done, Order, grid_bits, main


def quantize(order: Order) -> Done:
    os.environ["GPTQMODEL_CPU_WORKERS"] = str(max(2, order.threads))  # one worker alone never finishes
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(
        bits=order.bits, group_size=order.group, sym=order.symmetric, desc_act=False, format="gptq_v2"
    )
    rows = order.sequences().tolist()
    data = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
    model = GPTQModel.load(order.model, config, device="cpu")
    model.quantize(data, batch_size=1)
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        weights = dequantized(Path(folder), order.bits)
    return Done(weights, grid_bits(order), "act_group_aware, its default")


def dequantized(folder: Path, bits: int) -> dict[str, Any]:
    """Linear weights of a checkpoint in GPTQ's second format: words of 32 bits hold codes along K (`qweight`
    [K / c, N]) and zero points along N (`qzeros` [G, N / c]); w = scale · (code - zero point).
    """
    from safetensors.torch import load_file

    state: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        state |= load_file(path)
    found: dict[str, Any] = {}
    for name in [n.removesuffix(".qweight") for n in state if n.endswith(".qweight")]:
        codes = unpacked(state[f"{name}.qweight"].T, bits).T
        zeros, scales = unpacked(state[f"{name}.qzeros"], bits), state[f"{name}.scales"].float()
        group = state[f"{name}.g_idx"].long()
        found[f"{name}.weight"] = (scales[group] * (codes - zeros[group])).T
    if not found:
        raise ValueError("GPTQModel saved no quantized layer")
    return found


def unpacked(words: Any, bits: int) -> Any:
    """int32 [R, C] → int64 [R, C · 32 / bits], lowest bits first."""
    import torch

    shifts = torch.arange(0, 32, bits)
    return ((words.long()[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2)


if __name__ == "__main__":
    main(quantize, ("gptqmodel",))
