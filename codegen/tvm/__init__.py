"""Target tvm-cpu. A graph's way to a library:

    weights.py    how each weight is stored (no TVM needed, like cpu.py and worker.py)
    lower.py      IR graph → Relax `main` over TIR kernels; emitters in emit_llm.py and emit_tensor.py,
    kernels/ optimize.py   fuse and schedule what no kernel of ours covers step.py       Relax `main` → TIR
    functions that run a step over one workspace (plan.py) build.py      TIR → object (LLVM) → shared object
    (elf.py), with threads.ll linked in worker.py     all of that in a process of its own, for cpu.py, the
    target

Nothing is imported here: the process that packs weights must not load TVM.
"""
