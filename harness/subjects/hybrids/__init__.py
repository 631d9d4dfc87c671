"""Hybrid decoders: states that follow their recurrence token by token, and documents that see nothing of each other."""
