"""Kernels for NVIDIA's GPUs: CUDA C++ for the operations of language models (`*.cuh`), TVM's own code for all
other tensor operations, and the program that a step runs.
"""
