"""Graph → shared object of one ISA level. Runs in a process of its own (`worker.py`)."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from ...ir.core import Graph
from .backends import require
from .elf import link
from .kernels import make_sampling
from .kernels.intrinsics import library
from .kernels.isa import Isa, triple
from .kernels.layout import generates
from .kernels.schedule import Schedule
from .lower import lower
from .optimize import optimize
from .step import Step, add_entry, build_step
from .untyped import Module, tirx, tvm

_CPU = 1  # DLPack's kDLCPU


@dataclass(frozen=True)
class Built:
    """What the manifest says of a kernel library."""

    symbols: tuple[str, ...]
    arguments: tuple[str, ...]
    calls: tuple[tuple[str, str | None], ...]
    """Kernel and, where it reads one, weight of each call of the step, in order."""


def build(graph: Graph, isa: Isa, out: Path, schedules: Mapping[str, Schedule] | None = None) -> Built:
    """Compile a legalized graph for one ISA level into the shared object `out`; `schedules` as in `lower`."""
    require(isa)
    lowered = lower(graph, isa, schedules)
    step = build_step(optimize(lowered.module, isa), lowered.symbols)
    sampling = _sampling(step, isa) if generates(lowered.inputs) else ""
    with tempfile.TemporaryDirectory(prefix="llmc-") as folder:
        kernels = Path(folder, "kernels.o")
        compile_object(step.module, isa, kernels)
        texts = [_entry(step) + sampling, threads_text(isa.machine)]
        parts = [assemble(text, Path(folder), isa.machine) for text in texts]
        out.write_bytes(link([kernels.read_bytes(), *parts]))
    arguments = [*lowered.inputs, *(f"weight:{name}" for name in lowered.weights)]
    arguments += [*(f"output:{name}" for name in lowered.outputs), "workspace"]
    calls = [(kernel, _weight_of(places, arguments)) for kernel, places in step.calls]
    return Built(lowered.symbols, tuple(arguments), tuple(calls))


def _weight_of(places: Sequence[int], arguments: Sequence[str]) -> str | None:
    """The name of the first weight among a call's arguments."""
    names = [arguments[place] for place in places]
    return next((name.removeprefix("weight:") for name in names if name.startswith("weight:")), None)


def _tables(step: Step) -> str:
    """LLVM IR of the calls of a step: the function of each, and where its row begins among all rows."""
    functions = sorted({function for function, _ in step.rows})
    starts = [0, *accumulate(len(row) for _, row in step.rows)][:-1]
    rows = [f"i32 {place}" for _, row in step.rows for place in row]
    called = [f"ptr @__tvm_ffi_{function}" for function, _ in step.rows]
    count = len(step.rows)
    lines = [f"declare i32 @__tvm_ffi_{name}(ptr, ptr, i32, ptr)" for name in (*functions, "begin")]
    lines.append(f"@functions = internal constant [{count} x ptr] [{', '.join(called)}]")
    lines.append(f"@rows = internal constant [{len(rows)} x i32] [{', '.join(rows)}]")
    begin = ", ".join(f"i32 {start}" for start in starts)
    lines.append(f"@starts = internal constant [{count} x i32] [{begin}]")
    return "\n".join(lines)


def _entry(step: Step) -> str:
    """LLVM IR of `llmc_step`, which runs through the calls of the step (`step.py`)."""
    count, values, dims = len(step.rows), step.values, step.symbols
    return f"""
{_tables(step)}
declare i32 @call_packed(ptr, ptr, ptr)
declare i32 @llmc_mark(i32)
declare void @llvm.memcpy.inline.p0.p0.i64(ptr, ptr, i64, i1)

define i32 @llmc_step(ptr %dims, ptr %pointers) {{
entry:
  %values = alloca [{values} x i64], align 64
  store i64 0, ptr %values
  %first = getelementptr i64, ptr %values, i64 1
  call void @llvm.memcpy.inline.p0.p0.i64(ptr %first, ptr %dims, i64 {8 * dims}, i1 false)
  %second = getelementptr i64, ptr %values, i64 {1 + dims}
  br label %copy

copy:
  %c = phi i64 [ 0, %entry ], [ %c1, %copy ]
  %from = getelementptr i64, ptr %pointers, i64 %c
  %to = getelementptr i64, ptr %second, i64 %c
  %pointer = load i64, ptr %from
  store i64 %pointer, ptr %to
  %c1 = add i64 %c, 1
  %more = icmp ult i64 %c1, {step.arguments}
  br i1 %more, label %copy, label %begin

begin:
  %r = call i32 @call_packed(ptr @__tvm_ffi_begin, ptr %values, ptr null)
  %s = call i32 @llmc_mark(i32 -1)
  br label %next

next:
  %i = phi i64 [ 0, %begin ], [ %i1, %next ]
  %state = phi i32 [ %r, %begin ], [ %state1, %next ]
  %pf = getelementptr [{count} x ptr], ptr @functions, i64 0, i64 %i
  %f = load ptr, ptr %pf
  %pstart = getelementptr [{count} x i32], ptr @starts, i64 0, i64 %i
  %start = load i32, ptr %pstart
  %row = getelementptr i32, ptr @rows, i32 %start
  %r1 = call i32 @call_packed(ptr %f, ptr %values, ptr %row)
  %state1 = or i32 %state, %r1
  %number = trunc i64 %i to i32
  %s1 = call i32 @llmc_mark(i32 %number)
  %i1 = add i64 %i, 1
  %again = icmp ult i64 %i1, {count}
  br i1 %again, label %next, label %done

done:
  %failed = load i64, ptr %values
  %status = getelementptr i64, ptr %dims, i64 {dims}
  store i64 %failed, ptr %status
  ret i32 %state1
}}
"""


def _sampling(step: Step, isa: Isa) -> str:
    """LLVM IR of `llmc_sampling`, which calls the kernel of that name; its values as `add_entry` says."""
    count = add_entry(step.module, "sampling", make_sampling(isa=isa.name))
    row = ", ".join(f"i32 {1 + i}" for i in range(count))
    return f"""
@sampling_row = internal constant [{count} x i32] [{row}]
declare i32 @__tvm_ffi_run_sampling(ptr, ptr, i32, ptr)

define i32 @llmc_sampling(ptr %values) {{
  %r = call i32 @call_packed(ptr @__tvm_ffi_run_sampling, ptr %values, ptr @sampling_row)
  ret i32 %r
}}
"""


def threads_text(machine: str) -> str:
    """LLVM IR of threads, scratch memory and entry points: what is the machine's, and what is common."""
    here = Path(__file__)
    return "\n".join(here.with_name(f"{name}.ll").read_text() for name in (f"threads_{machine}", "threads"))


def assemble(text: str, folder: Path, machine: str) -> bytes:
    """LLVM IR text → a relocatable object for "x86_64" or "aarch64"; `folder` takes the files in between."""
    source, result = folder / "text.ll", folder / "text.o"
    text = f'target triple = "{triple(machine)}"\n{text}'
    source.write_text(text)
    tvm.get_global_func("ffi.Module.load_from_file.ll")(str(source), "ll").write_to_file(str(result), "o")
    return result.read_bytes()


def compile_object(module: Module, isa: Isa, path: Path) -> None:
    """TIR functions → a relocatable object by LLVM.

    Kernels that are private keep their bare-pointer signature.
    """
    _compile(module, isa).write_to_file(str(path), "o")


def compile_kernel(function: Any, isa: Isa) -> Any:
    """One TIR function → a module in this process, whose function "f" takes TVM's tensors: for searches,
    tests and benchmarks, by the passes that compile libraries.
    """
    return _compile(tvm.IRModule({"f": function.with_attr("global_symbol", "f")}), isa)


def _compile(module: Module, isa: Isa) -> Any:
    target = tvm.target.Target(isa.target)
    with tvm.transform.PassContext(opt_level=3):
        module = tirx.transform.BindTarget(target.with_host(target))(module)
        module = tvm.transform.Sequential(_lowering_passes())(module)
        # Scratch memory is asked of a device. The packed functions' prologue names it, private functions have
        # none.
        for gv, function in module.functions.items():
            if int(function.attrs.get("calling_conv", 0)) == 0:
                module.update_func(gv, function.with_body(_on_cpu(_freed_before_return(function.body))))
        _import_intrinsics(module, isa)
        finish = [tirx.transform.LowerTVMBuiltin(), tirx.transform.LowerIntrin()]
        module = tvm.transform.Sequential(finish)(module)
        return tvm.get_global_func("target.build.llvm")(module, target)


def _lowering_passes() -> list[Any]:
    """TVM's "s_tir" pipeline without what is for GPUs, and without what costs much and gives nothing.

    Our kernels allocate what they need; compacting their allocations (CompactBufferAllocation) changes
    nothing and took 40 of 49 seconds. RenormalizeSplitPattern finds next to nothing to do. Expressions that
    stand twice are found by LLVM as well: CommonSubexprElim took a tenth of the time, and gave a sixteenth
    more code. NarrowDataType, LoopPartition and SplitHostDevice changed no byte of the libraries that were
    compared (benchmarks/README.md). UnrollLoop must be followed by StmtSimplify: what is left unsimplified
    takes LLVM fifty times as long.
    """
    block, plain = tvm.s_tir.transform, tirx.transform
    return [
        block.CanonicalizeLoop(),
        block.LowerInitBlock(),
        block.PlanAndUpdateBufferAllocationLocation(),
        block.ConvertBlocksToOpaque(),
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
        plain.VerifyMemory(),
        plain.AnnotateEntryFunc(),
        plain.MakePackedAPI(),
        plain.BF16StorageLegalize(),
    ]


def _import_intrinsics(module: Module, isa: Isa) -> None:
    """Give what kernels call (`intrinsics.py`) to the first function: LLVM would read it anew for each that
    asks for it.
    """
    gv, function = next(iter(module.functions.items()))
    text = tvm.ir.StringImm(library(isa.name))
    body = tirx.AttrStmt(tirx.IntImm("int32", 0), "pragma_import_llvm", text, function.body)
    module.update_func(gv, function.with_body(body))


def _freed_before_return(body: Any) -> Any:
    """A kernel's body with a scope that ends before its return: scratch memory is freed where the scope ends
    that asks for it, which is the kernel's own where StorageRewrite has moved it there. After the return it
    would never be.
    """
    *before, last = body.seq
    assert isinstance(last, tirx.Return), "a kernel ends with its return"
    scope = tirx.SeqStmt(before) if len(before) > 1 else before[0]
    return tirx.SeqStmt(
        [tirx.AttrStmt(tvm.ir.StringImm("body"), "llmc.scope", tirx.IntImm("int32", 0), scope), last]
    )


def _on_cpu(body: Any) -> Any:
    for key, value in (("device_type", _CPU), ("device_id", 0)):
        body = tirx.AttrStmt(tvm.ir.StringImm("default"), key, tirx.IntImm("int32", value), body)
    return body
