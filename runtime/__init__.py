"""Runs artifacts. Nothing in here imports torch, transformers or TVM's Python package."""
