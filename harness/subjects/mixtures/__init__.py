"""Mixtures of experts: every token reaches its own experts, at any load."""
