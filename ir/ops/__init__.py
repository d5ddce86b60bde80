"""All operations. Importing this package registers them in `define.OPS`."""

from . import attention, cache, lora, lora_experts, math, moe, nn, quant, select, shape, state

__all__ = [
    "attention",
    "cache",
    "lora",
    "lora_experts",
    "math",
    "moe",
    "nn",
    "quant",
    "select",
    "shape",
    "state",
]
