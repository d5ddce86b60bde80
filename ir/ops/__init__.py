"""All operations. Importing this package registers them in `define.OPS`."""

from . import attention, cache, math, nn, quant, shape

__all__ = ["attention", "cache", "math", "nn", "quant", "shape"]
