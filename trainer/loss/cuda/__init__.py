"""The distillation loss on CUDA: cuBLAS for the products, one kernel for the rest."""
