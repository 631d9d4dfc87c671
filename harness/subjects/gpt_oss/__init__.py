"""gpt-oss: sinks beside the keys, experts with biases and a clamped SwiGLU, YaRN without rounding."""
