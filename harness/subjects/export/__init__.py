"""Exported students: files that other programs read, and what quantising costs."""
