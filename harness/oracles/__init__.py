"""References that share no code with the trainer: float64 forward passes and training, windows, scalar decoders."""
