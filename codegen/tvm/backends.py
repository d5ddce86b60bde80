"""Whether the LLVM inside of this TVM can make code for a level, asked before it is tried: where an
instruction cannot be selected, LLVM ends the process.
"""

from __future__ import annotations

from ...ir.errors import CompileError
from .kernels.isa import Isa
from .untyped import tvm


def require(isa: Isa) -> None:
    """Raise CompileError where LLVM lacks the architecture of a level or one of its features."""
    version = int(tvm.get_global_func("target.llvm_version_major")())
    remedy = "leave that level out of --target tvm-cpu:isa=…, or install the TVM that pyproject.toml names"
    if isa.machine not in {str(name) for name in tvm.get_global_func("target.llvm_get_targets")()}:
        raise CompileError(
            f"the LLVM {version} of this TVM makes no code for {isa.machine}, which level {isa.name} is for",
            remedy=remedy,
        )
    has = tvm.get_global_func("target.llvm_cpu_has_feature")
    target = tvm.target.Target(isa.target)
    missing = [feature[1:] for feature in isa.mattr if not has(feature[1:], target)]
    if missing:
        raise CompileError(
            f"the LLVM {version} of this TVM does not know {', '.join(missing)}, "
            f"which level {isa.name} needs",
            remedy=remedy,
        )
