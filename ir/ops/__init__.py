"""All operations. Importing this package registers them in `define.OPS`."""

from . import attention, cache, lora, math, moe, nn, quant, select, shape, state

__all__ = ["attention", "cache", "lora", "math", "moe", "nn", "quant", "select", "shape", "state"]
