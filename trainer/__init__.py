"""The trainer: a GGUF teacher kept in its K-quant bytes, a fused distillation loss, an exactly resumable student."""
