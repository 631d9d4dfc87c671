"""A tiny program with experiments, a check and faults, so that the harness can be tested without the trainer."""
