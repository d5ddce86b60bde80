"""HQQ (half-quadratic quantization), which needs no calibration; see `protocol.py`."""

from __future__ import annotations

from protocol import Done, Order, is_linear, load_model, main


def quantize(order: Order) -> Done:
    import torch
    from hqq.core.quantize import Quantizer

    model = load_model(order)
    state = dict(model.state_dict())
    for name, weight in state.items():
        if is_linear(name, weight):
            codes, meta = Quantizer.quantize(
                weight,
                nbits=order.bits,
                group_size=order.group,
                optimize=True,
                axis=1,
                device="cpu",
                compute_dtype=torch.float32,
            )
            state[name] = Quantizer.dequantize(codes, meta).reshape(weight.shape)
    bits = order.bits + 32 / order.group
    return Done(state, bits, "float zero points; no calibration")


if __name__ == "__main__":
    main(quantize, ("hqq",))
