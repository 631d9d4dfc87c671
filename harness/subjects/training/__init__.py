"""Training: first step, control experiments, guards, the student and its optimiser."""
