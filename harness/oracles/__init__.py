"""References that share no code with the trainer: a float64 forward pass and scalar block decoders."""
