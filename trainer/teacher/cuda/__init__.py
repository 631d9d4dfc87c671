"""The forward pass on CUDA: packed weights are decoded ahead of cuBLAS, short passes are graphs."""
