"""The `tvm-cpu` target: Relax for the graph, TIR kernels, one shared library a machine level."""
