"""Kernels: compiled, planned and launched on CUDA; products and attention on the CPU."""
