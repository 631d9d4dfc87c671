"""A training step taken apart, and beside TRL."""
