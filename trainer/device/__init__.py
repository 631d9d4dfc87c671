"""Devices: what they are, how memory is allocated there, what fits, what is held."""
