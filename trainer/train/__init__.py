"""Training: the loop, its steps, evaluation, checkpoints, and what ends a run early."""
