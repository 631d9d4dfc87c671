"""The distillation loss: one written equation, fused with both heads and chunked over tokens."""
