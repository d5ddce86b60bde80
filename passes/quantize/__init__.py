"""Quantizers: the maths takes and returns arrays and knows no graph (`rtn.py`), the walk over the graph is
apart (`walk.py`).
"""
