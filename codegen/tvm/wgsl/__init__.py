"""Kernels in WGSL, the language of WebGPU: for GPUs of any maker, through Vulkan, Metal and Direct3D 12."""
