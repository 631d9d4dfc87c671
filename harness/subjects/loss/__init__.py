"""The distillation loss: its value, gradients and memory, fused and plain, on the CPU and on CUDA."""
