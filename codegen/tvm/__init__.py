"""Target tvm-cpu. A graph's way to a library:

    weights.py    how each weight is stored (no TVM needed, like cpu.py and worker.py)
    lower.py      IR graph → Relax `main` over TIR kernels (kernels/; emitters: emit_llm.py, emit_tensor.py)
    optimize.py   fuse and schedule what no kernel of ours covers
    step.py       Relax `main` → kernels and a table of their calls over one workspace (plan.py)
    build.py      TIR → object (LLVM) → shared object (elf.py), with threads.ll linked in
    tune.py       a search for the sizes of kernels (kernels/schedule.py)
    worker.py     build and tune in processes of their own, for cpu.py, the target

Nothing is imported here: the process that packs weights must not load TVM.
"""
