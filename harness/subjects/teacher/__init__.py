"""The frozen teacher: residency, parity, block decoding, refused gradients."""
