"""Quantised blocks: their layouts, decoders, scales, and the quantiser."""
