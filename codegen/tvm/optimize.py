"""Relax module of one function over operators → the same over fused and scheduled TIR functions.

Kernels of our own pass through; what Relax's operators and tensor expressions became is fused (Relax's
FuseOps) and given a plain schedule: injective stages inlined, outer loops parallel where there is work for
more than one thread, and inner loops left in the order that LLVM vectorises. A reduction keeps its order
whatever the batch is.
"""

from __future__ import annotations

from typing import Any

from tvm.s_tir import Schedule, ScheduleError

from .kernels.isa import Isa
from .untyped import Module, relax, tirx, tvm

_PARALLEL_FROM = 1 << 15
"""Scalar operations from which a loop is worth a parallel region (some microseconds)."""
_SYMBOL_GUESS = 64
"""What a symbolic extent counts as in that estimate."""


def fuse(module: Module, target: Any) -> Module:
    """Legalize and fuse. Afterwards `main` holds only `call_tir`, `call_tir_inplace`, tuples and reshapes."""
    passes = [
        relax.transform.DeadCodeElimination(["main"]),
        # A reshape moves nothing: the step function aliases the memory.
        relax.transform.LegalizeOps(skip_ops=["relax.reshape"]),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        relax.transform.DeadCodeElimination(["main"]),
    ]
    with tvm.target.Target(target):
        return tvm.transform.Sequential(passes)(module)


def generic_functions(module: Module) -> dict[Any, Any]:
    """The TIR functions of a module that are no kernels of ours."""
    return {
        gv: function
        for gv, function in module.functions.items()
        if isinstance(function, tirx.PrimFunc) and not function.attrs.get("llmc.kernel", False)
    }


def optimize(module: Module, isa: Isa) -> Module:
    """`fuse`, and schedule for a CPU."""
    module = fuse(module, isa.target)
    for gv, function in generic_functions(module).items():
        module.update_func(gv, _schedule(function))
    return module


def _schedule(function: Any) -> Any:
    schedule = Schedule(function)
    for block in schedule.get_child_blocks(schedule.get_sblock("root"))[:-1]:
        if not _has_reduction(schedule, block):
            try:
                schedule.compute_inline(block)
            except ScheduleError:
                continue  # not injective (a scan, or read at several places): stays a stage of its own
    for block in schedule.get_child_blocks(schedule.get_sblock("root")):
        _schedule_block(schedule, block)
    return schedule.mod["main"]


def _has_reduction(schedule: Any, block: Any) -> bool:
    return any(v.iter_type == tirx.IterVar.CommReduce for v in schedule.get(block).iter_vars)


def _schedule_block(schedule: Any, block: Any) -> None:
    """Parallel outer spatial loops; for a product, the reduction outside of the last spatial loop."""
    loops = schedule.get_loops(block)
    kinds = [v.iter_type for v in schedule.get(block).iter_vars]
    if not loops or len(loops) != len(kinds):
        return
    spatial = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == tirx.IterVar.DataPar]
    reduction = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == tirx.IterVar.CommReduce]
    if len(spatial) + len(reduction) != len(loops) or not spatial:
        return
    work = 1
    for loop in loops:
        work *= _extent(schedule, loop)
    outer = spatial[:-1]
    if reduction:
        if len(spatial) > 1 and _reads_along(schedule, block):
            schedule.reorder(*outer, *reduction, spatial[-1])
        else:
            outer = spatial
            schedule.reorder(*outer, *reduction)
    elif len(spatial) == 1:
        outer = [schedule.split(spatial[0], [None, 256])[0]] if work >= _PARALLEL_FROM else []
    if outer and work >= _PARALLEL_FROM:
        schedule.parallel(schedule.fuse(*outer) if len(outer) > 1 else outer[0])
    if reduction:
        schedule.decompose_reduction(block, reduction[0])


def _reads_along(schedule: Any, block: Any) -> bool:
    """Whether an operand is contiguous along the result's last axis, as the right factor of a product is."""
    last = [v.var for v in schedule.get(block).iter_vars if v.iter_type == tirx.IterVar.DataPar][-1]
    reads = schedule.get(block).reads
    return any(len(read.region) and read.region[-1].min.same_as(last) for read in reads[1:])


def _extent(schedule: Any, loop: Any) -> int:
    extent = schedule.get(loop).extent
    return int(extent) if isinstance(extent, tirx.IntImm) else _SYMBOL_GUESS
