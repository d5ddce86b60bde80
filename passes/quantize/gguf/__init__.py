"""Quantization into GGML's block types: `fit.py` and `encode.py` take and return arrays, `mixture.py` says
which weight gets which type, `importance.py` measures what weights are worth, `walk.py` is the pass.
"""
