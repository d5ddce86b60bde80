"""What a module of emitters for onnx-cpu builds on; it imports the package onnx.

@emits("softcap")
def softcap(context, op):
    return context.scope.op("Tanh", context.name(op.x))
"""

from __future__ import annotations

from ..codegen.onnx.context import Context, emits

__all__ = ["Context", "emits"]
