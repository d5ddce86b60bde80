"""The runtime: loads an artifact and serves it.

Needs neither torch nor transformers nor TVM's Python package.
"""
