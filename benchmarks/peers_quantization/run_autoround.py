"""AutoRound (SignRound) at `options["iters"]` steps a block; see `protocol.py`."""

from __future__ import annotations

from typing import Any

from protocol import Done, Order, grid_bits, load_model, load_tokenizer, main


def quantize(order: Order) -> Done:
    import torch
    from auto_round import AutoRound

    rows = torch.from_numpy(order.sequences())
    size = int(order.options.get("batch_size", 8))
    iters = int(order.options.get("iters", 200))
    data = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in rows.split(size)]
    model = load_model(order)
    tuner = AutoRound(
        model,
        load_tokenizer(order),
        scheme="W4A16",
        bits=order.bits,
        group_size=order.group,
        sym=order.symmetric,
        dataset=data,
        seqlen=rows.shape[1],
        nsamples=len(rows),
        batch_size=size,
        iters=iters,
        device_map="cpu",
        enable_torch_compile=False,
    )
    tuned, _ = tuner.quantize()
    return Done(_dequantized(tuned, order), grid_bits(order), f"{iters} iterations, {size} sequences each")


def _dequantized(model: Any, order: Order) -> dict[str, Any]:
    """Linear weights from the scales and zero points that it left on the layers.

    It may round the weights to bfloat16: the codes are exact, the values are not, so they are made again.
    """
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        scale = getattr(module, "scale", None)
        if scale is None or not hasattr(module, "weight"):
            continue
        n, k = module.weight.shape
        groups = module.weight.detach().float().reshape(n, k // order.group, order.group)
        scale = scale.float().reshape(n, -1, 1)
        # Symmetric: codes are counted from zero, which is what the zero point would take off again.
        zero = 0 if order.symmetric else module.zp.float().reshape(n, -1, 1)
        steps = (groups / scale + zero).round() - zero
        found[f"{name}.weight"] = (steps * scale).reshape(n, k)
    if not found:
        raise ValueError("AutoRound left no scales on the layers")
    return found


if __name__ == "__main__":
    main(quantize, ("auto-round",))
