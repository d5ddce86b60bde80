"""llm-compressor's GPTQ and AWQ; see `protocol.py`."""

from __future__ import annotations

from typing import Any

from protocol import Done, Order, grid_bits, load_model, main


def quantize(order: Order) -> Done:
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot

    rows = order.sequences()
    data = Dataset.from_dict(
        {"input_ids": rows.tolist(), "attention_mask": [[1] * rows.shape[1]] * len(rows)}
    )
    weights = QuantizationArgs(
        num_bits=order.bits,
        type="int",
        symmetric=order.symmetric,
        strategy="group",
        group_size=order.group,
    )
    groups = {"linear": QuantizationScheme(targets=["Linear"], weights=weights)}
    model = load_model(order)
    if not torch.accelerator.is_available():
        _without_pinning()
    oneshot(
        model=model,
        dataset=data,
        recipe=_recipe(order.method, groups),
        max_seq_length=rows.shape[1],
        num_calibration_samples=len(rows),
    )
    return Done(_dequantized(model), grid_bits(order), "scales kept in float32, counted as float16")


def _recipe(method: str, groups: dict[str, Any]) -> Any:
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    if method == "gptq":
        return [GPTQModifier(config_groups=groups, ignore=["lm_head"])]
    quantize = QuantizationModifier(config_groups=groups, ignore=["lm_head"])
    return [AWQModifier(), quantize] if method == "awq" else [quantize]


def _without_pinning() -> None:
    """AWQ pins memory for copies to an accelerator, which torch refuses where there is none."""
    from llmcompressor.pipelines.cache import IntermediatesCache

    IntermediatesCache.pin_memory = lambda self, *arguments, **named: None


def _dequantized(model: Any) -> dict[str, Any]:
    import torch
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    state = dict(model.state_dict())
    with torch.no_grad():
        for name, module in model.named_modules():
            scheme = getattr(module, "quantization_scheme", None)
            if isinstance(module, torch.nn.Linear) and scheme is not None:
                state[f"{name}.weight"] = fake_quantize(
                    module.weight, module.weight_scale, module.weight_zero_point, scheme.weights
                )
    return {
        name: value for name, value in state.items() if not name.endswith(("_scale", "_zero_point", "_g_idx"))
    }


if __name__ == "__main__":
    main(quantize, ("llmcompressor", "compressed-tensors"))
