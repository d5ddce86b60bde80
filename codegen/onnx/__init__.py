"""The `onnx-cpu` target: the final graph as one ONNX model with the paged step, run by onnxruntime."""
