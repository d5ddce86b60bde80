"""What a module of emitters for tvm-cpu builds on. It imports TVM, so only such modules import this one:
llmc does, in the process of the kernel compiler, when a graph holds an op whose `emitters` names them.

    @emits("softcap")
    def softcap(low, op):
        return low.emit(relax.op.tanh(low.get(op.x)))
"""

from __future__ import annotations

from ..codegen.tvm.lower import Lowering, emits
from ..codegen.tvm.untyped import relax, te, tirx, tvm

__all__ = ["Lowering", "emits", "relax", "te", "tirx", "tvm"]
