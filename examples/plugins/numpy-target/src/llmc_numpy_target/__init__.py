"""Target `numpy-cpu`: the graph as text, run op by op with numpy. `target.py` writes, `executor.py` runs,
`kernels.py` is the table of ops.
"""
