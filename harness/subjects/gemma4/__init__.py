"""Gemma 4: heads of two sizes, values without a matrix, scaled layers, experts beside a dense feed-forward."""
