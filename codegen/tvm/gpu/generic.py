"""Tensor operations without a kernel of ours: TIR functions → CUDA C++ by TVM, a thread an element.

D[i, j] = A[i, j] / C[i],  C[i] = Σ_k B[i, k]    →    a launch over i, then one over (i, j); C in scratch
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from tvm.s_tir import ScheduleError

from ....ir.dtypes import itemsize
from ..step import Callee
from ..untyped import tirx, tvm
from .sizes import text_of
from .source import Argument, Code, Launch

THREADS = 256
_DEVICE_KERNEL = 2
"""`tvm::CallingConv::kDeviceKernelLaunch`."""


def generic_code(
    function: Any,
    target: Any,
    source: Callable[[Any, Any], str] | None = None,
    width: Callable[[str], int] = itemsize,
) -> Code:
    """The launches of a TIR function over whole arrays, one a stage that cannot be inlined. `source`: what
    writes the text of a stage (`Callee`) for the target, its name as `@`; None for CUDA C++. `width`: bytes
    of an element of a dtype.
    """
    function = _bound(function)
    root = function.body.block
    stages = list(root.body.seq) if isinstance(root.body, tirx.SeqStmt) else [root.body]
    between = list(root.alloc_buffers)
    parameters = [*function.params, *between]
    sources: list[Launch] = []
    callee: Any = None
    for i, stage in enumerate(stages):
        body = tvm.s_tir.SBlockRealize(
            [], tirx.const(True, "bool"), tvm.s_tir.SBlock([], [], [], "root", stage)
        )
        alone = tirx.PrimFunc(parameters, body).with_attrs({"s_tir": True, "tirx.noalias": True})
        callee = Callee(alone, f"stage{i}")
        names = {v: f"s{n}" for n, v in enumerate(callee.symbols)}
        extent = tvm.sym.Analyzer().simplify(_blocks(stage))
        sources.append(
            Launch(
                f"stage{i}",
                "",
                (*(p.name for p in callee.buffers), *(f"{names[v]}:{v.ty.dtype}" for v in callee.symbols)),
                (text_of(extent, names), 1, 1),
                THREADS,
                source=(source or _source)(callee, target),
            )
        )
    symbols = {v: f"s{n}" for n, v in enumerate(callee.symbols)}
    arguments = tuple(
        Argument(p.name, tuple(_size(d, symbols) for d in p.ty.shape), str(p.ty.dtype), True)
        for p in callee.buffers[: len(function.params)]
    )
    scratch = {p.name: ("void*", _bytes(p, symbols, width)) for p in callee.buffers[len(function.params) :]}
    return Code(arguments, tuple(sources), {}, scratch, symbols=tuple(symbols.values()))


def _bytes(buffer: Any, names: dict[Any, str], width: Callable[[str], int]) -> str:
    total: Any = tirx.IntImm("int64", width(str(buffer.ty.dtype)))
    for d in buffer.ty.shape:
        total = total * d
    return text_of(tvm.sym.Analyzer().simplify(total), names)


def _size(d: Any, names: dict[Any, str]) -> int | str:
    return int(d) if isinstance(d, int | tirx.IntImm) else text_of(d, names)


def _bound(function: Any) -> Any:
    """Injective stages inlined, and the others' spatial loops over blocks and threads."""
    schedule = tvm.s_tir.Schedule(function)
    root = schedule.get_sblock("root")
    for block in schedule.get_child_blocks(root)[:-1]:
        if all(v.iter_type != tirx.IterVar.CommReduce for v in schedule.get(block).iter_vars):
            try:
                schedule.compute_inline(block)
            except ScheduleError:
                continue  # read at several places: a stage of its own
    for block in schedule.get_child_blocks(root):
        loops, kinds = schedule.get_loops(block), [v.iter_type for v in schedule.get(block).iter_vars]
        alike = len(loops) == len(kinds)  # a scalar has an axis and no loop
        over = [kind == tirx.IterVar.DataPar for kind in kinds] if alike else [False] * len(loops)
        spatial = [loop for loop, own in zip(loops, over, strict=True) if own]
        others = [loop for loop, own in zip(loops, over, strict=True) if not own]
        if not spatial:
            spatial = [schedule.add_unit_loop(loops[0] if loops else block)]
        if others and loops:
            schedule.reorder(*spatial, *others)
        whole = schedule.fuse(*spatial) if len(spatial) > 1 else spatial[0]
        outer, inner = schedule.split(whole, [None, THREADS])
        schedule.bind(outer, "blockIdx.x")
        schedule.bind(inner, "threadIdx.x")
    return schedule.mod["main"]


def _blocks(stage: Any) -> Any:
    """How many blocks a stage's outermost loop, bound to them, has."""
    assert isinstance(stage, tirx.For), stage
    return stage.extent


def _source(callee: Any, target: Any) -> str:
    """CUDA C++ of one stage; its name stands as `@`."""
    text = device_text(callee, target)
    start = [m.start() for m in re.finditer(r'extern "C" __global__', text)][-1]  # after the declaration
    return re.sub(r"\bstage\(", "@(", text[start:], count=1)


def device_text(callee: Any, target: Any) -> str:
    """What TVM's code generator of the target's kind writes for one stage, under the name `stage`."""
    function = callee.function
    *body, _ = function.body.seq  # without the status that functions for CPUs return
    kernel = tirx.PrimFunc(function.params, tirx.SeqStmt(body)).with_attrs(
        {"s_tir": True, "tirx.noalias": True, "global_symbol": "stage"}
    )
    module = tirx.transform.BindTarget(target)(tvm.IRModule({"stage": kernel}))
    with target:
        module = tvm.transform.Sequential(_passes())(module)
        for gv, f in list(module.functions.items()):
            device = {
                "calling_conv": _DEVICE_KERNEL,
                "tirx.kernel_launch_params": ["blockIdx.x", "threadIdx.x"],
                "target": target,
            }
            module.update_func(gv, f.with_attrs(device))
        last = [tirx.transform.LowerIntrin(), tirx.transform.BF16StorageLegalize()]
        module = tvm.transform.Sequential(last)(module)
        build = tvm.get_global_func(f"target.build.{target.kind}")
        return str(build(module, target).inspect_source())


def _passes() -> list[Any]:
    block, plain = tvm.s_tir.transform, tirx.transform
    return [
        block.CanonicalizeLoop(),
        block.LowerInitBlock(),
        block.PlanAndUpdateBufferAllocationLocation(),
        block.ConvertBlocksToOpaque(),
        block.LiftThreadBinding(),
        block.UnifyThreadBinding(),
        block.LowerMatchBuffer(),
        block.StmtSimplify(),
        block.LowerOpaqueBlock(),
        plain.FlattenBuffer(),
        plain.BF16ComputeLegalize(),
        plain.VectorizeLoop(True),
        plain.StorageRewrite(),
        plain.UnrollLoop(),
        plain.StmtSimplify(),
        block.RewriteUnsafeSelect(),
    ]
